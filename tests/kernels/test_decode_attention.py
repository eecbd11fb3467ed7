"""Decoding over a paged cache, in Triton's interpreter: against the definition, float64 and a dense attention."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from drivetrain.kernels.decode_attention import decode_attention, decode_attention_ref
from drivetrain.kernels.decode_attention_triton import choose_splits, decode_attention_triton
from drivetrain.kernels.op import INTERPRETED

TRITON = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a CUDA device or TRITON_INTERPRET=1"
)
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"


class Inputs(NamedTuple):
    q_BQNH: Tensor
    k_cache_PLKH: Tensor
    v_cache_PLKH: Tensor
    page_table_BM: Tensor
    lengths_B: Tensor

    def widened(self) -> "Inputs":
        return Inputs(*(x.double() if x.is_floating_point() else x for x in self))


def draw(
    lengths: list[int],
    *,
    Q: int = 1,
    K: int = 1,
    G: int = 1,
    H: int = 64,
    L: int = 16,
    M: int,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """Random tokens on pages in random order; NaN where no sequence has a token, nonsense past a table's end."""
    B, P = len(lengths), len(lengths) * M + 1
    q_BQNH = torch.randn(B, Q, K * G, H).to(dtype)
    k_PLKH, v_PLKH = (torch.randn(P, L, K, H).to(dtype) for _ in range(2))
    page_table_BM = torch.randperm(P)[: B * M].view(B, M).int()
    used_PL = torch.zeros(P, L, dtype=torch.bool)
    for b, length in enumerate(lengths):
        for t in range(length):
            used_PL[page_table_BM[b, t // L], t % L] = True
        page_table_BM[b, -(-length // L) :] = 2**30
    k_PLKH[~used_PL] = float("nan")
    v_PLKH[~used_PL] = float("nan")
    lengths_B = torch.tensor(lengths, dtype=torch.int32)
    return Inputs(*(x.to(DEVICE) for x in (q_BQNH, k_PLKH, v_PLKH, page_table_BM, lengths_B)))


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-9))


def assert_as_good_as_the_definition(found: Tensor, inputs: Inputs, **options: Any) -> None:
    """At most twice the definition's own error against float64, and one unit in the last place."""
    exact = decode_attention_ref(*inputs.widened(), **options)
    plain = decode_attention_ref(*inputs, **options)
    assert found.dtype == inputs.q_BQNH.dtype and found.shape == inputs.q_BQNH.shape
    assert error(found, exact) <= 2 * error(plain, exact) + torch.finfo(found.dtype).eps


@st.composite
def cases(draw_: st.DrawFn) -> tuple[dict[str, Any], int | None, float | None, int]:
    L = draw_(st.sampled_from([16, 32, 48, 100]))
    Q = draw_(st.integers(1, 3))
    longest = draw_(st.sampled_from([Q, 15, 130, 200]))
    lengths = draw_(st.lists(st.integers(Q, max(Q, longest)), min_size=1, max_size=3))
    shape = {
        "lengths": lengths,
        "Q": Q,
        "K": draw_(st.integers(1, 2)),
        "G": draw_(st.integers(1, 4)),
        "H": draw_(st.sampled_from([16, 64, 80, 96, 128, 256])),
        "L": L,
        "M": -(-max(lengths) // L) + draw_(st.integers(0, 2)),
        "dtype": draw_(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
    }
    window = draw_(st.none() | st.integers(1, 150))
    scale = draw_(st.none() | st.floats(0.05, 0.5))
    return shape, window, scale, draw_(st.integers(1, 4))


@TRITON
@given(case=cases(), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_any_shape_and_any_split_is_as_good_as_the_definition(
    case: tuple[dict[str, Any], int | None, float | None, int], seed: int
) -> None:
    shape, window, scale, splits = case
    torch.manual_seed(seed)
    inputs = draw(**shape)
    found = decode_attention_triton(*inputs, scale, window, splits)
    assert_as_good_as_the_definition(found, inputs, scale=scale, sliding_window=window)


@given(case=cases(), seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_torchs_own_attention_over_gathered_pages_is_as_good(
    case: tuple[dict[str, Any], int | None, float | None, int], seed: int
) -> None:
    shape, window, scale, _ = case
    torch.manual_seed(seed)
    inputs = draw(**shape)
    found = decode_attention(*inputs, scale=scale, sliding_window=window, backend="sdpa")
    assert_as_good_as_the_definition(found, inputs, scale=scale, sliding_window=window)


BACKENDS = ["reference", "sdpa", pytest.param("triton", marks=TRITON)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_the_end_of_a_causal_attention(backend: str) -> None:
    """The newest tokens' rows of torch's attention over the whole sequence; the cache is a page a sequence."""
    torch.manual_seed(0)
    B, C, Q, K, G, H = 2, 70, 3, 2, 3, 32
    q_BCNH = torch.randn(B, C, K * G, H, device=DEVICE)
    k_BCKH, v_BCKH = torch.randn(2, B, C, K, H, device=DEVICE)
    heads_first = (x.transpose(1, 2) for x in (q_BCNH, k_BCKH, v_BCKH))
    whole_BNCH = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
    table_B1 = torch.arange(B, dtype=torch.int32, device=DEVICE)[:, None]
    lengths_B = torch.full((B,), C, dtype=torch.int32, device=DEVICE)
    found = decode_attention(q_BCNH[:, -Q:], k_BCKH, v_BCKH, table_B1, lengths_B, backend=backend)
    torch.testing.assert_close(found, whole_BNCH.transpose(1, 2)[:, -Q:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("splits", [1, 3])
def test_a_query_that_sees_nothing_gives_zeros(backend: str, splits: int) -> None:
    torch.manual_seed(0)
    inputs = draw([0, 1, 140], Q=2, M=9)
    options = {"splits": splits} if backend == "triton" else {}
    run = decode_attention_triton if backend == "triton" else decode_attention
    found = run(*inputs, **options) if options else run(*inputs, backend=backend)
    assert (found[0] == 0).all() and (found[1, 0] == 0).all()
    assert (found[1, 1] != 0).all() and (found[2] != 0).all()
    torch.testing.assert_close(found, decode_attention_ref(*inputs), rtol=1e-5, atol=1e-6)


@TRITON
def test_more_rows_than_a_tile_holds_take_several(Q: int = 5, G: int = 7) -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = draw([33, 90], Q=2 * Q, G=G, M=6, dtype=dtype)
        for splits in (1, 2):
            assert_as_good_as_the_definition(decode_attention_triton(*inputs, splits=splits), inputs)


@TRITON
def test_a_cache_may_be_a_strided_half_of_one_buffer() -> None:
    torch.manual_seed(0)
    inputs = draw([50, 17], K=2, G=2, H=32, M=4)
    both_P2LKH = torch.stack([inputs.k_cache_PLKH, inputs.v_cache_PLKH], dim=1)
    strided = inputs._replace(k_cache_PLKH=both_P2LKH[:, 0], v_cache_PLKH=both_P2LKH[:, 1])
    assert torch.equal(
        decode_attention_triton(*strided, splits=2), decode_attention_triton(*inputs, splits=2)
    )


@given(st.integers(1, 4096), st.integers(1, 1 << 20), st.sampled_from([1, 78, 132, 148]))
def test_splits_are_worth_a_program_each(programs: int, tokens: int, multiprocessors: int) -> None:
    splits = choose_splits(programs, tokens, multiprocessors)
    assert 1 <= splits <= 64
    assert splits == 1 or tokens // splits >= 128


@pytest.mark.parametrize(
    ("programs", "tokens", "splits"),
    [(1, 100, 1), (1, 8192, 64), (8, 8192, 50), (64, 8192, 8), (64 * 8, 8192, 5), (4096, 8192, 1)],
)
def test_splits_on_a_hopper(programs: int, tokens: int, splits: int) -> None:
    assert choose_splits(programs, tokens, 132) == splits


def wrong(**changes: Tensor) -> Inputs:
    return draw([20, 5], K=2, G=2, H=32, M=2)._replace(**changes)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (wrong(q_BQNH=torch.randn(2, 1, 3, 32)), "3 query heads of 32 cannot read 2"),
        (wrong(q_BQNH=torch.randn(2, 1, 4, 16)), "4 query heads of 16 cannot read 2 key/value heads of 32"),
        (wrong(q_BQNH=torch.randn(2, 4, 32)), r"must be \[B, Q, N, H\]"),
        (wrong(q_BQNH=torch.randn(2, 1, 4, 32).bfloat16()), "differ: torch.bfloat16, torch.float32"),
        (wrong(page_table_BM=torch.zeros(2, 2, dtype=torch.int64)), "page table must be int32"),
        (wrong(page_table_BM=torch.zeros(3, 2, dtype=torch.int32)), r"\[2, M\], is torch.int32 \[3, 2\]"),
        (wrong(lengths_B=torch.ones(2)), r"lengths must be int32 \[2\]"),
        (wrong(q_BQNH=torch.randn(2, 1, 4, 32, requires_grad=True)), "no backward pass"),
    ],
)
@pytest.mark.skipif(DEVICE != "cpu", reason="the wrong inputs lie on the CPU")
def test_what_does_not_fit_is_named(inputs: Inputs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_attention(*inputs)


def test_a_window_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="sliding window of 0"):
        decode_attention(*draw([20], M=2), sliding_window=0)


def test_an_input_that_requires_grad_is_taken_without_grad_mode() -> None:
    inputs = draw([20], M=2)
    with torch.no_grad():
        decode_attention(inputs.q_BQNH.requires_grad_(), *inputs[1:])


@TRITON
def test_the_kernel_refuses_a_head_dim_that_it_cannot_tile() -> None:
    with pytest.raises(ValueError, match=r"head dims 16, 32, ... 256, this is 72"):
        decode_attention(*draw([20], H=72, M=2), backend="triton")
