import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from drivetrain.data.batch import Batch, batch_from_windows

EOS = 0


def made(rows: list[list[int]], dtype: str = "uint16") -> Batch:
    return batch_from_windows(np.array(rows, dtype=dtype), EOS)


@pytest.mark.parametrize(
    ("window", "positions", "ends", "weights"),
    [
        ([5, 6, 7, 8, 9], [0, 1, 2, 3], [4], [1, 1, 1, 1]),  # no end
        ([0, 6, 7, 8, 9], [0, 0, 1, 2], [1, 4], [0, 1, 1, 1]),  # at the first token
        ([5, 6, 0, 8, 9], [0, 1, 2, 0], [3, 4], [1, 1, 0, 1]),  # in the middle
        ([5, 6, 7, 0, 9], [0, 1, 2, 3], [4], [1, 1, 1, 0]),  # at the last input
        ([5, 6, 7, 8, 0], [0, 1, 2, 3], [4], [1, 1, 1, 1]),  # in the last column, which is only a target
        ([5, 0, 0, 8, 9], [0, 1, 0, 0], [2, 3, 4], [1, 0, 0, 1]),  # one after another
        ([0, 0, 0, 0, 0], [0, 0, 0, 0], [1, 2, 3, 4], [0, 0, 0, 0]),
    ],
)
def test_documents_end_at_each_eos(
    window: list[int], positions: list[int], ends: list[int], weights: list[int]
) -> None:
    batch = made([window, [1, 2, 3, 4, 5]])
    assert batch.tokens_T.tolist() == [*window[:-1], 1, 2, 3, 4]
    assert batch.targets_T.tolist() == [*window[1:], 2, 3, 4, 5]
    assert batch.positions_T.tolist() == [*positions, 0, 1, 2, 3]
    assert batch.cu_seqlens.tolist() == [0, *ends, 8]
    assert batch.loss_weights_T.tolist() == [*weights, 1, 1, 1, 1]
    assert (batch.tokens, batch.row_len, batch.max_seqlen) == (8, 4, 4)


@settings(max_examples=150, deadline=None)
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 12)).flatmap(
        lambda shape: st.lists(
            st.lists(st.integers(0, 3), min_size=shape[1] + 1, max_size=shape[1] + 1),
            min_size=shape[0],
            max_size=shape[0],
        )
    ),
    st.sampled_from(["uint16", "int32"]),
)
def test_packing_is_what_a_loop_over_tokens_says(rows: list[list[int]], dtype: str) -> None:
    batch = made(rows, dtype)
    positions, starts, weights = [], [], []
    for row in rows:
        position = 0
        for place, token in enumerate(row[:-1]):
            if place and row[place - 1] == EOS:
                position = 0
            if position == 0:
                starts.append(len(positions))
            positions.append(position)
            weights.append(float(token != EOS))
            position += 1
    edges = [*starts, len(positions)]
    assert batch.positions_T.tolist() == positions
    assert batch.cu_seqlens.tolist() == edges
    assert batch.max_seqlen == max(np.diff(edges))
    assert batch.loss_weights_T.tolist() == weights
    dtypes = [tensor.dtype for tensor in (batch.tokens_T, batch.targets_T, batch.positions_T)]
    assert dtypes == [torch.int32, torch.int64, torch.int32]
    assert batch.cu_seqlens.dtype == torch.int32 and batch.loss_weights_T.dtype == torch.float32


def test_tokens_above_two_to_the_fifteen_survive() -> None:
    batch = made([[65535, 40000, 3]])
    assert batch.tokens_T.tolist() == [65535, 40000] and batch.targets_T.tolist() == [40000, 3]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 99), min_size=4, max_size=4), min_size=2, max_size=8), st.randoms())
def test_the_digest_does_not_depend_on_order_or_on_how_a_step_is_cut(
    rows: list[list[int]], random: object
) -> None:
    whole = made(rows).digest
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert made(shuffled).digest == whole
    parts = [made(shuffled[:1]).digest, made(shuffled[1:]).digest]
    assert sum(parts) % (1 << 64) == whole
    hashes = [xxhash.xxh3_64_intdigest(np.array(row, dtype="uint16").tobytes()) for row in rows]
    assert whole == sum(hashes) % (1 << 64)
    changed = [[*rows[0][:-1], rows[0][-1] + 1], *rows[1:]]
    assert made(changed).digest != whole  # the last target counts too


def test_moving_a_batch_keeps_everything() -> None:
    batch = made([[5, 0, 7, 8]])
    moved = batch.to(torch.device("cpu"))
    assert moved.digest == batch.digest and moved.max_seqlen == batch.max_seqlen
    assert torch.equal(moved.cu_seqlens, batch.cu_seqlens)
    assert batch.to(torch.device("meta")).tokens_T.device.type == "meta"
