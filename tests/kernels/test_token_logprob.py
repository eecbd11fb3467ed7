"""Log-probabilities and entropies: right at every chunk length and temperature, and never a T x V tensor."""

import math
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

from drivetrain.kernels import softmax_chunk
from drivetrain.kernels import token_logprob as module
from drivetrain.kernels.linear_cross_entropy import linear_cross_entropy
from drivetrain.kernels.op import INTERPRETED
from drivetrain.kernels.token_logprob import token_logprob

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
BACKENDS = ["reference", *FAST]


def draw(tokens: int = T, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden_TD = torch.randn(tokens, D, generator=generator)
    weight_VD = torch.randn(V, D, generator=generator)
    targets_T = torch.randint(0, V, (tokens,), generator=generator)
    targets_T[:2] = torch.tensor([0, V - 1])
    return hidden_TD.to(DEVICE), weight_VD.to(DEVICE), targets_T.to(DEVICE)


def cotangents(tokens: int, seed: int = 7) -> Tensor:
    """Gradients of log-probabilities and entropies, [2, T], some zero: both, the one, the other."""
    generator = torch.Generator().manual_seed(seed)
    grads_2T = torch.randn(2, tokens, generator=generator)
    grads_2T[torch.rand(2, tokens, generator=generator) < 0.3] = 0
    grads_2T[:, ::5] = 0
    return grads_2T.to(DEVICE)


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
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, grads_2T: Tensor, **options: Any
) -> list[Tensor]:
    """Log-probabilities, entropies, and the gradients of hidden states and weights."""
    leaves = [hidden_TD.clone().requires_grad_(), weight_VD.clone().requires_grad_()]
    outputs = token_logprob(*leaves, targets_T, **options)
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, [*grads_2T])]


def exact(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    grads_2T: Tensor,
    temperature: float = 1.0,
    softcap: float = 0.0,
) -> list[Tensor]:
    """The same from torch.distributions in float64."""
    leaves = [hidden_TD.double().requires_grad_(), weight_VD.double().requires_grad_()]
    logits_TV = leaves[0] @ leaves[1].T
    if softcap:
        logits_TV = softcap * (logits_TV / softcap).tanh()
    found = torch.distributions.Categorical(logits=logits_TV / temperature)
    outputs = [found.log_prob(targets_T), found.entropy()]
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, [*grads_2T.double()])]


# --- values and gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6}, {"temperature": 1.7, "softcap": 5.0}], ids=str)
@pytest.mark.parametrize("chunk", [1, 5, 36, 37, 38])
@pytest.mark.parametrize("backend", FAST)
def test_any_chunk_gives_float64s_values_and_gradients(
    backend: str, chunk: int, options: dict[str, float]
) -> None:
    inputs = *draw(), cotangents(T)
    with chunks_of(chunk, block=128):
        found = gradients(*inputs, backend=backend, **options)
    for ours, truth in zip(found, exact(*inputs, **options), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-4)


@settings(max_examples=30)
@given(data=st.data())
@pytest.mark.parametrize("backend", FAST)
def test_errors_are_at_most_twice_the_references(backend: str, data: st.DataObject) -> None:
    """Any sizes, temperatures and caps; the reference runs at the same dtype."""
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    tokens, width, words = (data.draw(st.integers(1, most)) for most in (24, 20, 200))
    seed = data.draw(st.integers(0, 2**32))
    generator = torch.Generator().manual_seed(seed)
    scale = data.draw(st.sampled_from([0.1, 1.0, 3.0])) / width**0.5
    hidden_TD = torch.randn(tokens, width, generator=generator).to(DEVICE, dtype)
    weight_VD = (scale * torch.randn(words, width, generator=generator)).to(DEVICE, dtype)
    targets_T = torch.randint(0, words, (tokens,), generator=generator).to(DEVICE)
    grads_2T = cotangents(tokens, seed)
    temperature = data.draw(st.sampled_from([0.3, 1.0, 2.0]))
    options = {"temperature": temperature, "softcap": data.draw(st.sampled_from([0.0, 1.0, 30.0]))}
    inputs = hidden_TD, weight_VD, targets_T, grads_2T
    truths = exact(*inputs, **options)
    plain = gradients(*inputs, backend="reference", **options)
    with chunks_of(data.draw(st.integers(1, tokens + 1)), block=data.draw(st.sampled_from([32, 256]))):
        found = gradients(*inputs, backend=backend, **options)

    largest = float((hidden_TD.double() @ weight_VD.double().T).abs().max()) / temperature + math.log(words)
    steepest = float(grads_2T.abs().max()) * (1 + largest) / temperature
    # A sum may cancel to nothing: what its terms may come to bounds what rounding them may cost.
    terms = [
        largest,
        largest,
        steepest * float(weight_VD.abs().max()),
        steepest * float(hidden_TD.abs().max()),
    ]
    for mine, reference, truth, term in zip(found, plain, truths, terms, strict=True):
        assert mine.shape == reference.shape and mine.dtype == reference.dtype
        ulp = torch.finfo(mine.dtype).eps * max(float(truth.abs().max()), term)
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
    inputs = (
        hidden_TD,
        weight_VD,
        torch.tensor([0, words - 1, 8191], device=DEVICE),
        torch.ones(2, 3).to(DEVICE),
    )
    options = {"temperature": 0.9, "softcap": 3.0}
    for ours, truth in zip(
        gradients(*inputs, backend=backend, **options), exact(*inputs, **options), strict=True
    ):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_plain_derivatives_pass_gradcheck(backend: str) -> None:
    hidden_TD, weight_VD, targets_T = draw(5)
    leaves = [hidden_TD.double().requires_grad_(), weight_VD[:20].double().requires_grad_()]
    with chunks_of(2):
        assert torch.autograd.gradcheck(
            lambda h, w: token_logprob(h, w, targets_T % 20, temperature=0.7, softcap=5.0, backend=backend),
            leaves,
        )


@pytest.mark.parametrize("used", [0, 1], ids=["logprob", "entropy"])
@pytest.mark.parametrize("backend", FAST)
def test_each_output_may_be_used_alone(backend: str, used: int) -> None:
    hidden_TD, weight_VD, targets_T = draw()
    grads_2T = cotangents(T)
    grads_2T[1 - used] = 0
    leaves = [hidden_TD.clone().requires_grad_(), weight_VD.clone().requires_grad_()]
    alone = torch.autograd.grad(
        token_logprob(*leaves, targets_T, backend=backend)[used], leaves, grads_2T[used]
    )
    truths = exact(hidden_TD, weight_VD, targets_T, grads_2T)[2:]
    for ours, truth in zip(alone, truths, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-4)


# --- what it means ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_probabilities_of_all_tokens_sum_to_one_and_give_the_entropy(backend: str) -> None:
    hidden_TD, weight_VD, _ = draw()
    everything_T = torch.arange(V, device=DEVICE)
    same_TD = hidden_TD[:1].expand(V, D)
    logprob_T, entropy_T = token_logprob(same_TD, weight_VD, everything_T, temperature=1.3, backend=backend)
    torch.testing.assert_close(logprob_T.exp().sum(), torch.ones((), device=DEVICE))
    torch.testing.assert_close(entropy_T, -(logprob_T.exp() * logprob_T).sum().expand(V))


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_distributions(backend: str) -> None:
    """Equal logits: entropy log V. One far above the rest: entropy 0."""
    hidden_TD = torch.tensor([[0.0], [400.0]], device=DEVICE)
    weight_VD = torch.zeros(V, 1, device=DEVICE)
    weight_VD[7] = 1
    targets_T = torch.tensor([5, 7], device=DEVICE)
    logprob_T, entropy_T = token_logprob(hidden_TD, weight_VD, targets_T, backend=backend)
    torch.testing.assert_close(logprob_T.cpu(), torch.tensor([-math.log(V), 0.0]))
    torch.testing.assert_close(entropy_T.cpu(), torch.tensor([math.log(V), 0.0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_agrees_with_cross_entropy_and_with_weights_divided_by_the_temperature(backend: str) -> None:
    hidden_TD, weight_VD, targets_T = draw()
    logprob_T, _ = token_logprob(hidden_TD, weight_VD, targets_T, softcap=4.0, backend=backend)
    _, nll = linear_cross_entropy(
        hidden_TD, weight_VD, targets_T, torch.ones(T, device=DEVICE), softcap=4.0, backend=backend
    )
    torch.testing.assert_close(-logprob_T.sum(), nll)
    torch.testing.assert_close(
        token_logprob(hidden_TD, weight_VD, targets_T, temperature=2.0, backend=backend),
        token_logprob(hidden_TD, weight_VD / 2, targets_T, backend=backend),
    )


@pytest.mark.parametrize("backend", FAST)
def test_tokens_without_a_gradient_are_silent(backend: str) -> None:
    hidden_TD, weight_VD, targets_T = draw()
    grads_2T = cotangents(T)
    kept_T = grads_2T.any(dim=0)
    *_, grad_hidden, grad_weight = gradients(hidden_TD, weight_VD, targets_T, grads_2T, backend=backend)
    assert not grad_hidden[~kept_T].any() and grad_hidden[kept_T].any(dim=1).all()
    *_, kept_hidden, kept_weight = gradients(
        hidden_TD[kept_T], weight_VD, targets_T[kept_T], grads_2T[:, kept_T], backend=backend
    )
    torch.testing.assert_close([grad_hidden[kept_T], grad_weight], [kept_hidden, kept_weight])
    nothing = gradients(hidden_TD[:0], weight_VD, targets_T[:0], grads_2T[:, :0], backend=backend)
    assert not any(part.any() for part in nothing)


def test_a_target_outside_the_vocabulary_is_no_quiet_number() -> None:
    hidden_TD, weight_VD, targets_T = draw()
    targets_T[5] = V
    if DEVICE == "cpu":
        with pytest.raises((RuntimeError, IndexError)):
            token_logprob(hidden_TD, weight_VD, targets_T)
    if INTERPRETED or DEVICE == "cuda":
        logprob_T, _ = token_logprob(hidden_TD, weight_VD, targets_T, backend="triton")
        assert logprob_T.isnan().nonzero().flatten().tolist() == [5]


def test_wrong_arguments_are_named() -> None:
    hidden_TD, weight_VD, targets_T = draw()
    for arguments, message in (
        ((hidden_TD, weight_VD[:, 1:], targets_T), r"\[37, 12\], \[300, 11\], \[37\]"),
        ((hidden_TD, weight_VD, targets_T[1:]), r"\[36\]"),
        ((hidden_TD.half(), weight_VD, targets_T), "one dtype and int64 targets"),
        ((hidden_TD, weight_VD, targets_T.int()), "torch.int32"),
    ):
        with pytest.raises(ValueError, match=message):
            token_logprob(*arguments)
    for options in ({"temperature": 0.0}, {"softcap": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            token_logprob(hidden_TD, weight_VD, targets_T, **options)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", FAST)
def test_no_tensor_is_larger_than_a_chunk_of_logits(backend: str, dtype: torch.dtype) -> None:
    hidden_TD, weight_VD, targets_T = draw(100)
    hidden_TD, weight_VD = hidden_TD.to(dtype), weight_VD.to(dtype)
    grads_2T = cotangents(100)
    with chunks_of(16), Sizes() as sizes:
        if backend == "sdpa":
            gradients(hidden_TD, weight_VD, targets_T, grads_2T)
        else:  # the operators' own bodies: an operator hides what it allocates from dispatch modes
            _, entropy_T, logsumexp_T = module._token_logprob._init_fn(
                hidden_TD, weight_VD, targets_T, 1.0, 0.0
            )
            module._token_logprob_backward._init_fn(
                hidden_TD, weight_VD, targets_T, logsumexp_T, entropy_T, *grads_2T, 1.0, 0.0, True
            )
    assert sizes.largest == 16 * (V if backend == "sdpa" else 320)  # rows begin 64 numbers apart
    with Sizes() as sizes:
        gradients(hidden_TD, weight_VD, targets_T, grads_2T, backend="reference")
    assert sizes.largest == 100 * V  # the probe sees what it is meant to see


@pytest.mark.parametrize("backend", FAST)
def test_only_two_numbers_a_token_are_kept(backend: str) -> None:
    hidden_TD, weight_VD, targets_T = draw()
    leaves = [hidden_TD.requires_grad_(), weight_VD.requires_grad_()]
    kept: list[int] = []

    def pack(saved: Tensor) -> Tensor:
        kept.append(saved.numel())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        logprob_T, _ = token_logprob(*leaves, targets_T, backend=backend)
    assert sorted(kept) == sorted([hidden_TD.numel(), weight_VD.numel(), T, T, T])
    with torch.no_grad():
        assert not token_logprob(*leaves, targets_T, backend=backend)[0].requires_grad
    assert logprob_T.requires_grad


@pytest.mark.parametrize("backend", FAST)
def test_a_frozen_matrix_has_no_gradient_and_changes_no_other(backend: str) -> None:
    hidden_TD, weight_VD, targets_T = draw()
    grads_2T = cotangents(T)
    with chunks_of(16):
        *_, expected_TD, _ = gradients(hidden_TD, weight_VD, targets_T, grads_2T, backend=backend)
        hidden_TD.requires_grad_()
        outputs = token_logprob(hidden_TD, weight_VD, targets_T, backend=backend)
        with mock.patch.object(module, "Gradients", wraps=module.Gradients) as made:
            (found_TD,) = torch.autograd.grad(outputs, [hidden_TD], [*grads_2T])
    assert torch.equal(found_TD, expected_TD)
    assert False in (made.call_args.args[-1], made.call_args.kwargs.get("of_weight"))
