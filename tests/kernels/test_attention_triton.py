"""Attention's Triton kernels: any documents and any layout, against the definition and float64; what they read."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from drivetrain.kernels.attention import Documents, attention, attention_with_lse, make_documents
from drivetrain.kernels.attention_triton import MAX_HEAD_DIM, Tile, choose_tiles, padded
from drivetrain.kernels.op import INTERPRETED

# Weights of masked keys overflow before they are dropped, and rows of poison have no largest value.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),
]
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Packed:
    lengths: list[int]
    kv_heads: int
    groups: int
    head_dim: int
    window: int | None
    causal: bool
    scale: float | None
    seed: int

    def draw(self, dtype: torch.dtype, loudness: float = 1.0, seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed + seed)
        heads = (self.kv_heads * self.groups, self.kv_heads, self.kv_heads)
        shapes = [(sum(self.lengths), n, self.head_dim) for n in heads]
        q, k, v = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
        return [q * loudness, k, v]

    def documents(self) -> Documents:
        T = sum(self.lengths)
        cu_seqlens = torch.tensor([0, *self.lengths]).cumsum(0).to(DEVICE, torch.int32)
        return make_documents(cu_seqlens, max(self.lengths), T, T, self.window, causal=self.causal)

    def run(self, backend: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        options = {"sliding_window": self.window, "causal": self.causal, "scale": self.scale}
        return attention_with_lse(q, k, v, self.documents(), **options, backend=backend)


@st.composite
def packed(draw: st.DrawFn, longest: int = 75, most_groups: int = 4) -> Packed:
    length = st.sampled_from([0, 1, 1]) | st.integers(2, 20) | st.integers(longest // 2, longest)
    lengths = draw(st.lists(length, min_size=1, max_size=4).filter(any))
    kv_heads = draw(st.integers(1, 2))
    return Packed(
        lengths,
        kv_heads,
        groups=draw(st.integers(1, max(1, most_groups // kv_heads))),
        head_dim=draw(st.sampled_from([8, 16, 24, 64, 80, 128, 256])),
        window=draw(st.none() | st.integers(1, 20) | st.integers(20, longest)),
        causal=draw(st.booleans()),
        scale=draw(st.none() | st.floats(0.02, 1.0)),
        seed=draw(st.integers(0, 2**32)),
    )


ARRANGEMENTS: dict[str, Callable[..., Any]] = {
    "contiguous": lambda *qkv: qkv,
    "parts of one buffer": lambda *qkv: torch.cat(qkv, dim=1).split([x.shape[1] for x in qkv], dim=1),
    "heads first": lambda *qkv: [x.transpose(0, 1).contiguous().transpose(0, 1) for x in qkv],
    "channels apart": lambda *qkv: [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv],
    "rows off 16 bytes": lambda *qkv: [F.pad(x, (1, 2))[..., 1:-2] for x in qkv],
}


def units(case: Packed, dtype: torch.dtype, loudness: float) -> list[float]:
    """Of output, log-sum-exp and gradients of normal inputs. Slopes may cancel to nothing, as in a document of one
    token; in fp32 a weight exp(score) is as many ulps off as the largest score is big."""
    score = case.head_dim**0.5 * (case.head_dim**-0.5 if case.scale is None else case.scale)
    sizes = [4.0, max(1.0, score * loudness), 3 * score, 3 * score * loudness, 10.0]
    if dtype == torch.float32:
        weight = max(1.0, 4 * score * loudness)
        return [size if place == 1 else size * weight for place, size in enumerate(sizes)]
    return [0.0, *sizes[1:4], 0.0]


@settings(max_examples=14)
@given(case=packed(), arrange=st.sampled_from(list(ARRANGEMENTS)), loudness=st.sampled_from([1.0, 1.0, 30.0]))
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernels_err_no_more_than_the_definition(
    assert_no_worse: Callable[..., None], dtype: torch.dtype, case: Packed, arrange: str, loudness: float
) -> None:
    """Outputs, log-sum-exp and gradients, against float64 too."""
    case = replace(case, head_dim=min(case.head_dim, MAX_HEAD_DIM[dtype]))
    assert_no_worse(
        lambda *qkv: case.run("triton", *ARRANGEMENTS[arrange](*qkv)),
        lambda *qkv: case.run("reference", *qkv),
        case.draw(dtype, loudness),
        units(case, dtype, loudness),
    )


@settings(max_examples=6)
@given(case=packed(longest=40, most_groups=2), data=st.data())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_document_changes_no_bit(
    values_and_gradients: Callable[..., list[Tensor]], dtype: torch.dtype, case: Packed, data: st.DataObject
) -> None:
    case = replace(case, head_dim=min(case.head_dim, 32))
    kept = data.draw(st.sampled_from([place for place, length in enumerate(case.lengths) if length]))
    begin = sum(case.lengths[:kept])
    mine = slice(begin, begin + case.lengths[kept])
    plain, changed = case.draw(dtype), case.draw(dtype, loudness=50.0, seed=1)
    for before, after in zip(plain, changed, strict=True):
        after[mine] = before[mine]
    found = [values_and_gradients(lambda *qkv: case.run("triton", *qkv), qkv) for qkv in (plain, changed)]
    for place, (before, after) in enumerate(zip(*found, strict=True)):
        before, after = (x.mT if place == 1 else x for x in (before, after))  # the log-sum-exp is [N, T]
        assert torch.equal(before[mine], after[mine])


def touched(case: Packed, token: int, tile: Tile, transposed: bool) -> Iterator[int]:
    """The tokens in the same tile, and those of the tiles that it walks over: of keys, or of queries."""
    seen_4T = case.documents().seen_4T
    assert seen_4T is not None
    rows, step = (tile.keys, tile.queries) if transposed else (tile.queries, tile.keys)
    begin = token // rows * rows
    last = min(begin + rows, sum(case.lengths)) - 1
    low, high = int(seen_4T[2 * transposed, begin]), int(seen_4T[2 * transposed + 1, last])
    yield from range(begin, last + 1)
    yield from range(low, low + -(-(high - low) // step) * step)


@settings(max_examples=6)
@given(case=packed(longest=160, most_groups=1), data=st.data())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tile_is_read_that_a_token_cannot_see(
    dtype: torch.dtype, case: Packed, data: st.DataObject
) -> None:
    """NaN times a weight of zero is NaN: it would show."""
    case = replace(case, head_dim=16, kv_heads=1)
    T = sum(case.lengths)
    token = data.draw(st.integers(0, T - 1))
    tiles = choose_tiles(padded(16), dtype.itemsize)
    walks = (tiles.forward, False), (tiles.queries, False), (tiles.keys, True)
    near = {place for tile, transposed in walks for place in touched(case, token, tile, transposed)}
    far = torch.tensor(sorted(set(range(T)) - near), dtype=torch.long, device=DEVICE)
    assume(len(far))
    q, k, v = case.draw(dtype)
    seen_4T, grad = case.documents().seen_4T, torch.randn_like(q)
    operators = torch.ops.drivetrain
    out, lse_NT = operators.attention(q, k, v, seen_4T, 0.25)
    grads = operators.attention_backward(q, k, v, seen_4T, out, lse_NT, grad, 0.25)
    poisoned = [x.index_fill(0, far, float("nan")) for x in (q, k, v, out, grad)]
    q, k, v, poisoned_out, grad = poisoned
    out_again, lse_again_NT = operators.attention(q, k, v, seen_4T, 0.25)
    lse_poisoned_NT = lse_NT.index_fill(1, far, float("nan"))
    again = operators.attention_backward(q, k, v, seen_4T, poisoned_out, lse_poisoned_NT, grad, 0.25)
    assert torch.equal(lse_NT[:, token], lse_again_NT[:, token])
    for before, after in zip((out, *grads), (out_again, *again), strict=True):
        assert torch.equal(before[token], after[token])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_that_sees_itself_alone_takes_its_value(
    values_and_gradients: Callable[..., list[Tensor]], dtype: torch.dtype
) -> None:
    alone = Packed([1] * 70, 2, 3, 24, window=None, causal=True, scale=0.5, seed=0)
    near = replace(alone, lengths=[70], window=1)
    for case in (alone, near, replace(near, causal=False)):
        q, k, v = case.draw(dtype)
        out, lse_NT, dq, dk, _ = values_and_gradients(lambda *qkv, c=case: c.run("triton", *qkv), [q, k, v])
        assert torch.equal(out, v.repeat_interleave(3, dim=1))
        score_TN = 0.5 * (q.double() * k.repeat_interleave(3, dim=1).double()).sum(-1)
        torch.testing.assert_close(lse_NT.mT.double(), score_TN, rtol=1e-6, atol=1e-5)
        assert dq.abs().max() < 1e-4 and dk.abs().max() < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_call_gives_the_same_bits(
    values_and_gradients: Callable[..., list[Tensor]], dtype: torch.dtype
) -> None:
    case = Packed([70, 1, 69], 1, 4, 64, window=None, causal=True, scale=None, seed=0)
    first, again = (
        values_and_gradients(lambda *qkv: case.run("triton", *qkv), case.draw(dtype)) for _ in range(2)
    )
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


QKV = [torch.zeros(6, heads, 16) for heads in (4, 2, 2)]
WHOLE = torch.tensor([0, 6], dtype=torch.int32)


def sized(
    *, tokens: int = 6, heads: int = 4, head_dim: int = 16, dtype: torch.dtype = torch.float32
) -> Tensor:
    return torch.zeros(tokens, heads, head_dim, dtype=dtype)


@pytest.mark.parametrize(
    ("qkv", "options", "message"),
    [
        ([sized(head_dim=12)] * 3, {}, "multiples of 8 up to 128 for torch.float32, this is 12"),
        ([sized(head_dim=136)] * 3, {}, "up to 128 for torch.float32, this is 136"),
        ([sized(head_dim=264, dtype=torch.bfloat16)] * 3, {}, "up to 256 for torch.bfloat16, this is 264"),
        ([sized(dtype=torch.float64)] * 3, {}, "fp32, bf16 and fp16, this is torch.float64"),
        ([*QKV[:2], QKV[2].half()], {}, "one dtype, these are torch.float32, torch.float32, torch.float16"),
        ([*QKV[:2], sized(heads=1)], {}, r"k and v \[T, K, H\]"),
        ([QKV[0][0], *QKV[1:]], {}, r"q \[T, N, H\]"),
        ([sized(heads=3), *QKV[1:]], {}, "query heads that key heads divide"),
        ([sized(tokens=7), *QKV[1:]], {}, "as many tokens and the same head dim"),
        ([sized(head_dim=24), *QKV[1:]], {}, "as many tokens and the same head dim"),
        ([sized(tokens=7)] * 3, {}, "documents of 7 tokens from make_documents, these have 6 tokens"),
        (QKV, {"scale": 0.0}, "positive softmax scale, this is 0.0"),
        (
            QKV,
            {"sliding_window": 3},
            "sliding_window=None and causal=True, attention was called with 3 and True",
        ),
        (QKV, {"causal": False}, "causal=True, attention was called with None and False"),
    ],
)
def test_what_does_not_fit_is_named(qkv: list[Tensor], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(*qkv, make_documents(WHOLE, 6, 6, 6), **options, backend="triton")


@pytest.mark.parametrize(("made", "called"), [("sdpa", "triton"), ("triton", "sdpa")])
def test_documents_made_for_another_backend_are_an_error(made: str, called: str) -> None:
    documents = make_documents(WHOLE, 6, 6, 6, backend=made)
    with pytest.raises(ValueError, match=f"made for attention={made}, not {called}"):
        attention(*QKV, documents, backend=called)
