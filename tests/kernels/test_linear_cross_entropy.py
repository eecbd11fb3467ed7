"""The loss over a vocabulary: the same sums and gradients at every chunk length, and never a T x V tensor."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from drivetrain.kernels import linear_cross_entropy as module
from drivetrain.kernels import softmax_chunk
from drivetrain.kernels.chunks import chunk_tokens
from drivetrain.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_ref
from drivetrain.kernels.op import INTERPRETED

# Padding beyond the vocabulary holds whatever was in memory, and takes part in the interpreter's arithmetic.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
T, D, V = 37, 12, 300
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
FAST = [
    "sdpa",
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(
            DEVICE == "cpu" and not INTERPRETED, reason="needs a CUDA device or TRITON_INTERPRET=1"
        ),
    ),
]
EVERYTHING = {"z_loss": 1e-2, "label_smoothing": 0.2, "softcap": 5.0}


def draw(tokens: int = T, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden_TD = torch.randn(tokens, D, generator=generator)
    weight_VD = torch.randn(V, D, generator=generator)
    targets_T = torch.randint(0, V, (tokens,), generator=generator)
    targets_T[:2] = torch.tensor([0, V - 1])
    weights_T = torch.rand(tokens, generator=generator)
    return hidden_TD.to(DEVICE), weight_VD.to(DEVICE), targets_T.to(DEVICE), weights_T.to(DEVICE)


@contextmanager
def chunks_of(tokens: int, block: int = softmax_chunk.BLOCK) -> Iterator[None]:
    with (
        mock.patch.object(module, "CHUNK_TOKENS", tokens),
        mock.patch.object(module, "chunk_tokens", lambda *_: tokens),
        mock.patch.object(module, "BLOCK", block),
        # Two rows of the vocabulary at a time, so that there are several tiles in a chunk.
        mock.patch.object(softmax_chunk, "TILE_ELEMENTS", 2 * V),
    ):
        yield


def gradients(
    hidden_TD: Tensor, weight_VD: Tensor, *rest: Tensor, upstream: float = 1.0, **options: Any
) -> list[Tensor]:
    """Loss, nll and the gradients of hidden states and weights."""
    leaves = [hidden_TD.clone().requires_grad_(), weight_VD.clone().requires_grad_()]
    loss, nll = linear_cross_entropy(*leaves, *rest, **options)
    assert not nll.requires_grad
    return [loss.detach(), nll, *torch.autograd.grad(loss * upstream, leaves)]


def exact(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    weights_T: Tensor,
    *,
    upstream: float = 1.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
) -> list[Tensor]:
    """The same from torch's cross_entropy in float64."""
    leaves = [hidden_TD.double().requires_grad_(), weight_VD.double().requires_grad_()]
    logits_TV = leaves[0] @ leaves[1].T
    if softcap:
        logits_TV = softcap * (logits_TV / softcap).tanh()
    kept_T = targets_T != ignore_index
    logits_TV, targets_T, weights_T = logits_TV[kept_T], targets_T[kept_T], weights_T[kept_T].double()
    plain_T, smooth_T = (
        torch.nn.functional.cross_entropy(logits_TV, targets_T, reduction="none", label_smoothing=s)
        for s in (0.0, label_smoothing)
    )
    loss = (weights_T * (smooth_T + z_loss * logits_TV.logsumexp(-1) ** 2)).sum()
    nll = (weights_T * plain_T).sum()
    return [loss.detach(), nll.detach(), *torch.autograd.grad(loss * upstream, leaves)]


# --- values and gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"z_loss": 1e-2}, EVERYTHING], ids=["plain", "z_loss", "everything"])
@pytest.mark.parametrize("chunk", [1, 5, 36, 37, 38])
@pytest.mark.parametrize("backend", FAST)
def test_any_chunk_gives_float64s_sums_and_gradients(
    backend: str, chunk: int, options: dict[str, float]
) -> None:
    inputs = draw()
    with chunks_of(chunk, block=128):
        found = gradients(*inputs, upstream=-2.5, backend=backend, **options)
    for ours, truth in zip(found, exact(*inputs, upstream=-2.5, **options), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-4)


@settings(max_examples=30)
@given(data=st.data())
@pytest.mark.parametrize("backend", FAST)
def test_errors_are_at_most_twice_the_references(backend: str, data: st.DataObject) -> None:
    """Any sizes, options, ignored targets and weights; the reference runs at the same dtype."""
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    tokens, width, words = (data.draw(st.integers(1, most)) for most in (24, 20, 200))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    scale = data.draw(st.sampled_from([0.1, 1.0, 3.0])) / width**0.5
    hidden_TD = torch.randn(tokens, width, generator=generator).to(DEVICE, dtype)
    weight_VD = (scale * torch.randn(words, width, generator=generator)).to(DEVICE, dtype)
    ignore_index = data.draw(st.sampled_from([-100, 0]))
    targets_T = torch.randint(0, words, (tokens,), generator=generator).to(DEVICE)
    weights_T = torch.randn(tokens, generator=generator).to(DEVICE)
    weights_T[torch.rand(tokens, generator=generator) < 0.3] = 0
    targets_T[torch.rand(tokens, generator=generator) < 0.3] = ignore_index
    weights_T[targets_T == ignore_index] *= 1e6
    options = {
        "z_loss": data.draw(st.sampled_from([0.0, 1e-3, 1e-1])),
        "label_smoothing": data.draw(st.sampled_from([0.0, 0.1, 1.0])),
        "softcap": data.draw(st.sampled_from([0.0, 1.0, 30.0])),
        "ignore_index": ignore_index,
    }
    inputs = hidden_TD, weight_VD, targets_T, weights_T
    truths = exact(*inputs, **options)
    plain = gradients(*inputs, backend="reference", **options)
    with chunks_of(data.draw(st.integers(1, tokens + 1)), block=data.draw(st.sampled_from([32, 256]))):
        found = gradients(*inputs, backend=backend, **options)

    heaviest = weights_T[targets_T != ignore_index].abs().max() if (targets_T != ignore_index).any() else 0
    largest = (hidden_TD.double() @ weight_VD.double().T).abs().max() + 1
    # A sum may cancel to nothing: what its terms may come to bounds what rounding them may cost.
    terms = [tokens * largest**2, tokens * largest, weight_VD.abs().max(), hidden_TD.abs().max()]
    for mine, reference, truth, term in zip(found, plain, truths, terms, strict=True):
        assert mine.shape == reference.shape and mine.dtype == reference.dtype
        ulp = torch.finfo(mine.dtype).eps * max(float(truth.abs().max()), float(heaviest * term))
        if INTERPRETED and dtype == torch.bfloat16:
            ulp *= 2  # the interpreter's fp32 -> bf16 truncates
        error, bar = (mine.double() - truth).abs().max(), (reference.double() - truth).abs().max()
        assert error <= 2 * bar + ulp


@pytest.mark.parametrize("words", [50257, 8192])
@pytest.mark.parametrize("backend", FAST)
def test_vocabularies_of_several_blocks(backend: str, words: int) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden_TD = torch.randn(3, 4, generator=generator).to(DEVICE)
    weight_VD = torch.randn(words, 4, generator=generator).to(DEVICE)
    targets_T, weights_T = torch.tensor([0, words - 1, 8191], device=DEVICE), torch.ones(3, device=DEVICE)
    inputs = hidden_TD, weight_VD, targets_T, weights_T
    for ours, truth in zip(
        gradients(*inputs, backend=backend, **EVERYTHING), exact(*inputs, **EVERYTHING), strict=True
    ):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_gradients_are_the_slopes_of_the_loss(backend: str) -> None:
    """Finite differences along random directions: independent of anybody's derivative."""
    hidden_TD, weight_VD, *rest = draw(seed=3)
    _, _, *grads = gradients(hidden_TD, weight_VD, *rest, backend=backend, **EVERYTHING)
    for grad, place in zip(grads, (0, 1), strict=True):
        inputs = [hidden_TD.double(), weight_VD.double()]
        generator = torch.Generator().manual_seed(4)
        direction = torch.randn(grad.shape, generator=generator, dtype=torch.float64).to(DEVICE)
        sides = []
        for sign in (1, -1):
            moved = list(inputs)
            moved[place] = inputs[place] + sign * 1e-5 * direction
            sides.append(linear_cross_entropy_ref(moved[0], moved[1], *rest, **EVERYTHING)[0])
        slope = (sides[0] - sides[1]) / 2e-5
        torch.testing.assert_close((grad.double() * direction).sum(), slope, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_plain_derivatives_pass_gradcheck(backend: str) -> None:
    hidden_TD, weight_VD, targets_T, weights_T = draw(5)
    targets_T = targets_T % 20
    targets_T[3] = -100
    leaves = [hidden_TD.double().requires_grad_(), weight_VD[:20].double().requires_grad_()]
    with chunks_of(2):
        assert torch.autograd.gradcheck(
            lambda h, w: linear_cross_entropy(
                h, w, targets_T, weights_T.double(), backend=backend, **EVERYTHING
            )[0],
            leaves,
        )


# --- what it means ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ignored_weight", [1.0, float("nan")])
@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_tokens_of_weight_zero_and_ignored_ones_add_nothing(backend: str, ignored_weight: float) -> None:
    hidden_TD, weight_VD, targets_T, weights_T = draw()
    weights_T[::3] = 0
    targets_T[::4] = -100
    weights_T[::4] = ignored_weight
    kept_T = (weights_T != 0) & (targets_T != -100)
    options = {"backend": backend, **EVERYTHING}
    loss, nll, grad_hidden, grad_weight = gradients(hidden_TD, weight_VD, targets_T, weights_T, **options)
    rest = gradients(hidden_TD[kept_T], weight_VD, targets_T[kept_T], weights_T[kept_T], **options)
    torch.testing.assert_close([loss, nll, grad_hidden[kept_T], grad_weight], rest)
    assert not grad_hidden[~kept_T].any()
    silent = gradients(hidden_TD, weight_VD, torch.full_like(targets_T, -100), weights_T, **options)
    assert not any(part.any() for part in silent)
    nothing = gradients(hidden_TD[:0], weight_VD, targets_T[:0], weights_T[:0], **options)
    assert not any(part.any() for part in nothing)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_both_are_sums_over_tokens(backend: str) -> None:
    inputs = draw()
    options = {"backend": backend, **EVERYTHING}
    whole = gradients(*inputs, **options)
    first, last = (
        gradients(hidden, inputs[1], targets, weights, **options)
        for hidden, targets, weights in zip(*(inputs[i].split([10, T - 10]) for i in (0, 2, 3)), strict=True)
    )
    together = [first[0] + last[0], first[1] + last[1], torch.cat([first[2], last[2]]), first[3] + last[3]]
    torch.testing.assert_close(whole, together)
    doubled = gradients(*inputs[:3], 2 * inputs[3], **options)
    torch.testing.assert_close(doubled, [2 * part for part in whole])


def test_a_target_outside_the_vocabulary_is_no_quiet_number() -> None:
    hidden_TD, weight_VD, targets_T, weights_T = draw()
    for wrong in (V, -1):
        targets_T[5] = wrong
        if DEVICE == "cpu":
            with pytest.raises((RuntimeError, IndexError)):
                linear_cross_entropy(hidden_TD, weight_VD, targets_T, weights_T)
        if INTERPRETED or DEVICE == "cuda":
            loss, nll = linear_cross_entropy(hidden_TD, weight_VD, targets_T, weights_T, backend="triton")
            assert loss.isnan() and nll.isnan()


def test_wrong_arguments_are_named() -> None:
    hidden_TD, weight_VD, targets_T, weights_T = draw()
    for arguments, message in (
        ((hidden_TD, weight_VD[:, 1:], targets_T, weights_T), r"\[37, 12\], \[300, 11\], \[37\], \[37\]"),
        ((hidden_TD, weight_VD, targets_T[1:], weights_T), r"\[36\], \[37\]"),
        ((hidden_TD, weight_VD, targets_T, weights_T[:, None]), r"\[37, 1\]"),
        ((hidden_TD, weight_VD.half(), targets_T, weights_T), "one dtype and int64 targets"),
        ((hidden_TD, weight_VD, targets_T.int(), weights_T), "torch.int32"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(*arguments)
    for options in ({"label_smoothing": 1.5}, {"softcap": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            linear_cross_entropy(hidden_TD, weight_VD, targets_T, weights_T, **options)
    with pytest.raises(KeyError, match="no_such"):
        linear_cross_entropy(hidden_TD, weight_VD, targets_T, weights_T, backend="no_such")


# --- memory -------------------------------------------------------------------------------------------------


class Sizes(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation allocates."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not any(returned.alias_info for returned in func._schema.returns):  # a view holds nothing
            sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
            self.largest = max(self.largest, *sizes, 0)
        return out


@contextmanager
def operators_opened() -> Iterator[None]:
    """The operator's own body instead of the operator, which hides what it allocates from dispatch modes."""
    with mock.patch.object(module, "_loss", torch.no_grad()(module._loss._init_fn)):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", FAST)
def test_no_tensor_is_larger_than_a_chunk_of_logits(backend: str, dtype: torch.dtype) -> None:
    hidden_TD, weight_VD, targets_T, weights_T = draw(100)
    leaves = [hidden_TD.to(dtype).requires_grad_(), weight_VD.to(dtype).requires_grad_()]
    with chunks_of(16), operators_opened(), Sizes() as sizes:
        loss, _ = linear_cross_entropy(*leaves, targets_T, weights_T, backend=backend)
        if backend == "sdpa":
            loss.backward()
    assert sizes.largest == 16 * (V if backend == "sdpa" else 320)  # rows begin 64 numbers apart
    with Sizes() as sizes:
        linear_cross_entropy(*leaves, targets_T, weights_T, backend="reference")[0].backward()
    assert sizes.largest == 100 * V  # the probe sees what it is meant to see


@pytest.mark.parametrize("backend", FAST)
def test_evaluation_computes_no_gradients(backend: str) -> None:
    hidden_TD, weight_VD, targets_T, weights_T = draw()
    leaves = [hidden_TD.requires_grad_(), weight_VD.requires_grad_()]
    with chunks_of(2):
        trained, _ = linear_cross_entropy(*leaves, targets_T, weights_T, backend=backend)
        with torch.no_grad(), operators_opened(), Sizes() as sizes:
            loss, _ = linear_cross_entropy(*leaves, targets_T, weights_T, backend=backend)
    assert sizes.largest <= 2 * 320 < weight_VD.numel()  # one chunk of logits, and no gradient of V x D
    assert not loss.requires_grad and loss == trained.detach()


@given(
    T=st.integers(1, 1 << 20),
    V=st.integers(1, 1 << 18),
    D=st.integers(1, 1 << 14),
    element_bytes=st.sampled_from([2, 4]),
)
def test_a_chunk_is_bounded(T: int, V: int, D: int, element_bytes: int) -> None:
    chunk = chunk_tokens(T, V, D, element_bytes)
    assert chunk.bit_count() == 1 and (1024 <= chunk <= 8192 or T <= chunk < 2 * T)
    assert chunk * V * element_bytes <= max(1 << 28, D * V * element_bytes, 1024 * V * element_bytes)


def test_chunks_of_known_models() -> None:
    assert chunk_tokens(8192, 128256, 4096, 2) == 4096  # llama3_8b: 1.05 GB, as large as the gradient
    assert chunk_tokens(8192, 50257, 1600, 2) == 2048  # gpt2_xl
    assert chunk_tokens(8192, 8192, 256, 2) == 8192


@pytest.mark.parametrize(
    "backend",
    [
        "sdpa",
        pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")),
    ],
)
def test_a_frozen_matrix_has_no_gradient_and_changes_no_other(backend: str) -> None:
    hidden_TD, weight_VD, targets_T, weights_T = draw(7)
    hidden_TD, weight_VD = hidden_TD.requires_grad_(), weight_VD.requires_grad_()
    with chunks_of(5):
        loss, _ = linear_cross_entropy(hidden_TD, weight_VD, targets_T, weights_T, backend=backend)
        expected, _ = torch.autograd.grad(loss, (hidden_TD, weight_VD))
        loss, _ = linear_cross_entropy(hidden_TD, weight_VD.detach(), targets_T, weights_T, backend=backend)
        kept = [tensor.shape for tensor in getattr(loss.grad_fn, "saved_tensors", ())]
        (found,) = torch.autograd.grad(loss, (hidden_TD,))
    assert torch.equal(found, expected)
    assert weight_VD.shape not in kept


# --- the operator -------------------------------------------------------------------------------------------

INTERPRETED_ONLY = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")


@INTERPRETED_ONLY
def test_without_gradients_the_operator_keeps_torchs_rules() -> None:
    arguments = (*draw(5), 1e-3, 0.1, 0.0, -100)
    torch.library.opcheck(torch.ops.drivetrain.linear_cross_entropy.default, (*arguments, False, True))
    *_, grad_hidden, grad_weight = torch.ops.drivetrain.linear_cross_entropy(*arguments, False, True)
    assert grad_hidden.numel() == grad_weight.numel() == 0


@INTERPRETED_ONLY
def test_rows_may_lie_further_apart_than_int32_reaches() -> None:
    rows, stride, words = 130, 1 << 24, 20
    torch.utils.deterministic.fill_uninitialized_memory = False  # 4 GiB of address space, few pages of memory
    try:
        logits_CV = torch.empty(rows, stride, dtype=torch.float16)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    logits_CV[-1, :words] = torch.arange(words)
    weights_C = torch.zeros(rows)
    weights_C[-1] = 1
    losses_C, nll_C = torch.empty(2, rows)
    assert (rows - 1) * stride > 2**31
    module._loss_of_rows[(rows,)](
        logits_CV,
        torch.full((rows,), 3),
        weights_C,
        losses_C,
        nll_C,
        words,
        stride,
        -100,
        0.0,
        0.0,
        0.0,
        GRAD=False,
        SMOOTH=False,
        CAP=False,
        BLOCK=1 << 20,
        num_warps=4,
    )
    torch.testing.assert_close(nll_C[-1], torch.arange(words).float().logsumexp(0) - 3)
    assert not nll_C[:-1].any()
