"""Rows of whole conversations, and the steps made of them."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drivetrain.conf.errors import CheckpointError, DataError
from drivetrain.conf.schema import DataConfig, SourceConfig, TooLong
from drivetrain.data import packing
from drivetrain.data.batch import Batch
from drivetrain.data.loader import share_of
from drivetrain.data.packing import Conversations, Rows, best_fit
from drivetrain.data.sft import HeldOutConversations, SftSource, batch_from_rows
from drivetrain.data.shard_writer import ShardWriter
from drivetrain.data.shards import Manifest

EOS, PER_STEP, ROW = 1, 12, 64


def write(directory: Path, lengths: list[int], first: int = 1000, shards: int = 2) -> str:
    """Conversation i is `first + i` over and over, which tells it; its second half is learned."""
    directory.mkdir(parents=True)
    infos, each = [], -(-len(lengths) // shards)
    for split in ("train", "held_out"):
        for shard in range(shards):
            with ShardWriter(directory, f"{split}_{shard}", split, "uint16", weighted=True) as writer:
                for i in range(shard * each, min((shard + 1) * each, len(lengths))):
                    weights = (np.arange(lengths[i]) >= lengths[i] // 2).astype(np.uint8)
                    writer.add(np.full(lengths[i], first + i), weights)
            infos.append(writer.info)
    Manifest(dtype="uint16", vocab_size=60_000, eos_id=EOS, tokenizer_hash="ab", shards=infos).write(
        directory
    )
    return str(directory)


@settings(max_examples=100)
@given(row_len=st.integers(1, 50), data=st.data())
def test_best_fit_puts_every_conversation_whole_into_one_row(row_len: int, data: st.DataObject) -> None:
    lengths = np.array(data.draw(st.lists(st.integers(1, row_len), max_size=60)), dtype=np.int64)
    rows = best_fit(lengths, row_len)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    filled = [int(lengths[row].sum()) for row in rows]
    assert all(row and full <= row_len for row, full in zip(rows, filled, strict=True))
    # No two rows would fit into one: what first- and best-fit have in common.
    assert len(filled) < 2 or sum(sorted(filled)[:2]) > row_len


def test_mixed_lengths_fill_more_than_95_percent(tmp_path: Path) -> None:
    draws = np.random.default_rng(0).lognormal(5.0, 1.0, 6000)
    lengths = np.clip(draws, 8, 4096).astype(int).tolist()
    conversations = Conversations(Path(write(tmp_path / "a", lengths)), "train")
    rows = Rows(conversations, 2048, TooLong.truncate, 0, "a")
    taken: list[np.ndarray] = []
    while not rows.place.epoch:
        taken += rows.take(1)
    real = sum(min(length, 2048) for length in lengths)
    assert real / (2048 * len(taken)) > 0.95 and rows.utilisation() > 0.95


def epoch_of(rows: Rows) -> list[np.ndarray]:
    """The rows of the next epoch; the stream stands at its end, which is the next one's beginning."""
    epoch, taken = rows.place.epoch, []
    while True:
        row = rows.take(1)[0]
        if rows.place.epoch > epoch:
            rows.place.row -= 1
            rows.place.conversations -= len(row)
            return taken
        taken.append(row)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[list[int], Conversations]]:
    """Data sets of very different sizes and lengths."""
    draw, made = np.random.default_rng(0), []
    for count, low, high in ((1, 2, 9), (150, 2, ROW + 80), (40, ROW - 9, ROW + 9), (700, 2, 9)):
        lengths = [ROW, *draw.integers(low, high, count).tolist()]
        directory = write(tmp_path_factory.mktemp("uneven") / "a", lengths)
        made.append((lengths, Conversations(Path(directory), "train")))
    return made


@settings(max_examples=60)
@given(
    seed=st.integers(0, 100),
    which=st.integers(0, 3),
    blocks=st.sampled_from([1, 3, 256]),
    too_long=st.sampled_from(TooLong),
)
def test_an_epoch_has_every_conversation_once_and_none_cut(
    uneven: list[tuple[list[int], Conversations]], seed: int, which: int, blocks: int, too_long: TooLong
) -> None:
    lengths, conversations = uneven[which]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BLOCK_ROWS", blocks)
        rows = Rows(conversations, ROW, too_long, seed, "a")
        epochs = [epoch_of(rows) for _ in range(3)]
    # Truncated, a conversation whose second half lies beyond the row has nothing to learn.
    fits = [i for i, n in enumerate(lengths) if n <= ROW or (too_long is TooLong.truncate and n // 2 < ROW)]
    for epoch in epochs:
        assert sorted(np.concatenate(epoch).tolist()) == fits
        assert all(sum(min(lengths[i], ROW) for i in row) <= ROW for row in epoch)
    assert rows.longer == sum(n > ROW for n in lengths)
    assert rows.place.conversations == 3 * len(fits)
    orders = [np.concatenate(epoch).tolist() for epoch in epochs]
    assert len(fits) < 9 or orders[0] != orders[1] != orders[2]


def test_the_longest_do_not_come_first(tmp_path: Path) -> None:
    lengths = list(range(2, 62)) * 10
    rows = Rows(Conversations(Path(write(tmp_path / "a", lengths)), "train"), 64, TooLong.drop, 0, "a")
    longest = [max(lengths[i] for i in row) for row in rows.take(200)]
    assert abs(np.mean(longest[:100]) - np.mean(longest[100:])) < 5


def test_rows_are_documents_with_positions_and_weights() -> None:
    parts = [
        [
            (np.array([5, 6, 7]), np.array([1, 0, 1], np.uint8)),
            (np.array([8, 9]), np.array([0, 1], np.uint8)),
        ],
        [(np.array([2, 3, 4, 5, 6, 7]), np.array([0, 0, 0, 0, 0, 1], np.uint8))],
    ]
    batch = batch_from_rows(parts, 6, EOS)
    assert batch.tokens_T.tolist() == [5, 6, 7, 8, 9, EOS, 2, 3, 4, 5, 6, 7]
    assert batch.targets_T.tolist() == [6, 7, 8, 9, EOS, 2, 3, 4, 5, 6, 7, EOS]
    assert batch.positions_T.tolist() == [0, 1, 2, 0, 1, 0, 0, 1, 2, 3, 4, 5]
    # The weight of a token is that of its prediction: a conversation's first token has none.
    assert batch.loss_weights_T.tolist() == [0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 6, 12]
    assert (batch.max_seqlen, batch.row_len) == (6, 6)
    flipped = batch_from_rows(parts[::-1], 6, EOS)
    assert flipped.digest == batch.digest != batch_from_rows(parts[:1], 6, EOS).digest


# --- steps --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder, draw = tmp_path_factory.mktemp("mixed"), np.random.default_rng(1)
    paths = {
        "a": write(folder / "a", draw.integers(2, 60, 300).tolist(), 1000),
        "b": write(folder / "b", draw.integers(2, 80, 90).tolist(), 20_000, shards=1),
        "c": write(folder / "c", draw.integers(2, 30, 8).tolist(), 40_000),
    }
    return DataConfig(mixture={name: SourceConfig(path=path) for name, path in paths.items()})


def source_of(
    data: DataConfig,
    *,
    micro_batch: int = PER_STEP,
    rank: int = 0,
    world: int = 1,
    seed: int = 0,
    too_long: TooLong = TooLong.drop,
    state: dict[str, Any] | None = None,
) -> SftSource:
    return SftSource(data, ROW, too_long, share_of(PER_STEP, micro_batch, rank, world), seed, state)


def row_lists(batches: list[Batch]) -> list[tuple[list[int], list[float]]]:
    return [
        (tokens.tolist(), weights.tolist())
        for batch in batches
        for tokens, weights in zip(
            batch.tokens_T.view(-1, ROW), batch.loss_weights_T.view(-1, ROW), strict=True
        )
    ]


def digest(batches: list[Batch]) -> int:
    return sum(batch.digest for batch in batches) % (1 << 64)


def stored(source: SftSource) -> dict[str, Any]:
    return json.loads(json.dumps(source.state()))  # type: ignore[no-any-return]


@settings(max_examples=20)
@given(world=st.sampled_from([1, 2, 3, 4, 12]), micro_batch=st.integers(1, 12), seed=st.integers(0, 20))
@pytest.mark.parametrize("single", [False, True])
def test_a_steps_rows_depend_on_seed_and_step_alone(
    mixed: DataConfig, single: bool, world: int, micro_batch: int, seed: int
) -> None:
    data = DataConfig(path=mixed.mixture["b"].path) if single else mixed
    one = source_of(data, seed=seed)
    ranks = [source_of(data, micro_batch=micro_batch, rank=r, world=world, seed=seed) for r in range(world)]
    for _ in range(8):  # past the end of epochs
        whole, parts = one.next_step(), [rank.next_step() for rank in ranks]
        assert [row for part in parts for row in row_lists(part)] == row_lists(whole)
        assert sum(map(digest, parts)) % (1 << 64) == digest(whole)
        assert all(batch.tokens <= micro_batch * ROW for part in parts for batch in part)
        # Every row has something to learn: no step is without a loss.
        assert all(any(weights) for _, weights in row_lists(whole))
    assert all(rank.state() == one.state() for rank in ranks)


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("stop", [0, 1, 17])
def test_a_stored_state_goes_on_alike_on_any_ranks(mixed: DataConfig, stop: int, world: int) -> None:
    straight = source_of(mixed)
    for _ in range(stop):
        straight.next_step()
    state = stored(straight)
    ranks = [source_of(mixed, micro_batch=2, rank=r, world=world, state=state) for r in range(world)]
    for _ in range(12):
        expected = row_lists(straight.next_step())
        assert [row for rank in ranks for row in row_lists(rank.next_step())] == expected
    assert stored(ranks[0]) == stored(straight)


def test_the_state_counts_tokens_and_conversations(mixed: DataConfig) -> None:
    source = source_of(DataConfig(path=mixed.mixture["a"].path))
    real = seen = 0
    for _ in range(9):
        rows = [np.array(tokens) for tokens, _ in row_lists(source.next_step())]
        real += sum(int((tokens != EOS).sum()) for tokens in rows)
        seen += sum(len(set(tokens.tolist()) - {EOS}) for tokens in rows)
    state = stored(source)
    assert state["tokens"] == real and state["sample"] == 9 * PER_STEP
    assert state["streams"]["data"]["conversations"] == seen


def test_weights_are_shares_of_rows_and_may_change_at_a_resume(mixed: DataConfig) -> None:
    def shares(source: SftSource, steps: int) -> Counter[int]:
        rows = [tokens for _ in range(steps) for tokens, _ in row_lists(source.next_step())]
        return Counter(tokens[0] // 20_000 for tokens in rows)

    uneven = {
        n: SourceConfig(path=part.path, weight=6 if n == "a" else 1) for n, part in mixed.mixture.items()
    }
    source = source_of(DataConfig(mixture=uneven))
    found = shares(source, 100)
    assert found[0] == pytest.approx(1200 * 6 / 8, abs=15)
    other = {name: SourceConfig(path=part.path, weight=1) for name, part in mixed.mixture.items()}
    later = source_of(DataConfig(mixture=other), state=stored(source))
    assert stored(later)["streams"] == stored(source)["streams"]
    assert shares(later, 100)[2] == pytest.approx(400, abs=15)
    with pytest.raises(CheckpointError, match="this run names"):
        source_of(DataConfig(path=other["a"].path), state=stored(source))


def test_conversations_that_are_too_long_are_left_out_or_cut(tmp_path: Path) -> None:
    data = DataConfig(path=write(tmp_path / "a", [10, 100, 20, 400], shards=1))
    dropped, cut = source_of(data), source_of(data, too_long=TooLong.truncate)
    assert {t for row, _ in row_lists(dropped.next_step()) for t in row} == {1000, 1002, EOS}
    rows = row_lists(cut.next_step())
    assert {t for row, _ in rows for t in row} == {1000, 1001, 1002, EOS}  # of 400, nothing learned is in 64
    long = next(weights for row, weights in rows if row[0] == 1001)
    assert long == [0.0] * 49 + [1.0] * 14 + [0.0]


def test_nothing_that_fits_is_an_error(tmp_path: Path) -> None:
    data = DataConfig(path=write(tmp_path / "a", [100, 400]))
    with pytest.raises(DataError, match=r"all 2 train conversations .* more than stage.seq_len=64"):
        source_of(data)
    data = DataConfig(path=write(tmp_path / "b", [300, 400]))
    with pytest.raises(DataError, match=r"no conversation of .* has a learned token among its first"):
        source_of(data, too_long=TooLong.truncate).next_step()


def test_documents_are_no_conversations(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "train_0", "train", "uint16") as writer:
        writer.add(np.arange(50))
    Manifest(dtype="uint16", vocab_size=99, eos_id=0, tokenizer_hash="a", shards=[writer.info]).write(
        tmp_path
    )
    with pytest.raises(DataError, match="holds documents and no conversations"):
        Conversations(tmp_path, "train")


def test_held_out_rows_are_fixed_and_at_most_an_epoch(mixed: DataConfig) -> None:
    conversations = Conversations(Path(mixed.mixture["a"].path), "held_out")
    few, all_ = (HeldOutConversations(conversations, ROW, TooLong.drop, 0, "a", n) for n in (5, 10**6))
    assert len(few) == 5
    rows = row_lists([all_.batch(np.arange(len(all_)))])
    assert rows[:5] == row_lists([few.batch(np.arange(5))])
    assert {t for row, _ in rows for t in row} == {*range(1000, 1300), EOS}
