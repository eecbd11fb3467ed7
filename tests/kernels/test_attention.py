import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from drivetrain.kernels.attention import attention, make_documents


@dataclass(frozen=True)
class Case:
    rows: list[list[int]]  # document lengths of each row
    kv_heads: int
    groups: int
    head_dim: int
    sliding_window: int | None
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    row_len = draw(st.integers(1, 24))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        cuts = draw(st.sets(st.integers(1, row_len - 1), max_size=6)) if row_len > 1 else set()
        edges = [0, *sorted(cuts), row_len]
        rows.append([end - start for start, end in itertools.pairwise(edges)])
    return Case(
        rows,
        kv_heads=draw(st.integers(1, 3)),
        groups=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([2, 8, 10])),
        sliding_window=draw(st.none() | st.integers(1, 30)),
        seed=draw(st.integers(0, 1000)),
    )


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(case.seed)
    T = sum(map(sum, case.rows))
    q_heads = case.kv_heads * case.groups
    heads = (q_heads, case.kv_heads, case.kv_heads)
    # Cut from one buffer as the model does, so that the parts are not contiguous.
    fused = torch.randn(T, sum(heads), case.head_dim, generator=generator)
    q, k, v = fused.split(heads, dim=1)
    return q, k, v


def attend(case: Case, backend: str, qkv: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    lengths = [length for row in case.rows for length in row]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    documents = make_documents(cu_seqlens, max(lengths), sum(lengths), sum(case.rows[0]), case.sliding_window)
    return attention(*qkv, documents, sliding_window=case.sliding_window, backend=backend)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_sdpa_is_the_reference_forward_and_backward(case: Case) -> None:
    found = []
    for backend in ("reference", "sdpa"):
        qkv = tuple(part.clone().requires_grad_() for part in inputs(case))
        out = attend(case, backend, qkv)  # type: ignore[arg-type]
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        found.append((out.detach(), *torch.autograd.grad(out, qkv, cotangent)))
    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(cases())
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_each_token_is_a_softmax_over_what_it_may_see(backend: str, case: Case) -> None:
    """The definition once more, a query at a time, in float64 and without a mask."""
    q, k, v = (part.double() for part in inputs(case))
    out = attend(case, backend, (q, k, v))
    begin = 0
    for length in (length for row in case.rows for length in row):
        for token in range(begin, begin + length):
            first = begin if case.sliding_window is None else max(begin, token - case.sliding_window + 1)
            for head in range(q.shape[1]):
                keys = k[first : token + 1, head // case.groups]
                weights = (keys @ q[token, head] / case.head_dim**0.5).softmax(0)
                expected = weights @ v[first : token + 1, head // case.groups]
                torch.testing.assert_close(out[token, head], expected)
        begin += length


def test_rows_that_are_whole_documents_need_no_mask() -> None:
    whole = torch.tensor([0, 4, 8], dtype=torch.int32)
    assert make_documents(whole, 4, 8, 4).mask_R1SS is None
    assert make_documents(whole, 4, 8, 4, sliding_window=4).mask_R1SS is None
    assert make_documents(whole, 4, 8, 4, sliding_window=3).mask_R1SS is not None
    assert make_documents(torch.tensor([0, 3, 4, 8], dtype=torch.int32), 4, 8, 4).mask_R1SS is not None
