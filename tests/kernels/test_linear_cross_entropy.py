"""The chunked loss: the same sums and gradients at every chunk length, and never a T x V tensor."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from drivetrain.kernels import linear_cross_entropy as module
from drivetrain.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_ref

T, D, V = 37, 12, 300


def draw(tokens: int = T, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden_TD = torch.randn(tokens, D, generator=generator)
    weight_VD = torch.randn(V, D, generator=generator)
    targets_T = torch.randint(0, V, (tokens,), generator=generator)
    targets_T[:2] = torch.tensor([0, V - 1])
    return hidden_TD, weight_VD, targets_T, torch.rand(tokens, generator=generator)


def gradients(hidden_TD: Tensor, weight_VD: Tensor, *rest: Any, upstream: float = 1.0) -> list[Tensor]:
    """Loss, nll and the gradients of hidden states and weights of the chunked loss."""
    leaves = [hidden_TD.clone().requires_grad_(), weight_VD.clone().requires_grad_()]
    targets_T, loss_weights_T, z_loss = rest
    loss, nll = linear_cross_entropy(*leaves, targets_T, loss_weights_T, z_loss=z_loss)
    return [loss.detach(), nll, *torch.autograd.grad(loss * upstream, leaves)]


def exact(hidden_TD: Tensor, weight_VD: Tensor, *rest: Any, upstream: float = 1.0) -> list[Tensor]:
    """The same from torch's cross_entropy in float64."""
    targets_T, loss_weights_T, z_loss = rest
    leaves = [hidden_TD.double().requires_grad_(), weight_VD.double().requires_grad_()]
    logits_TV = leaves[0] @ leaves[1].T
    nll_T = torch.nn.functional.cross_entropy(logits_TV, targets_T, reduction="none")
    weights_T = loss_weights_T.double()
    nll = (weights_T * nll_T).sum()
    loss = nll + z_loss * (weights_T * logits_TV.logsumexp(-1) ** 2).sum()
    return [loss.detach(), nll.detach(), *torch.autograd.grad(loss * upstream, leaves)]


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("chunk", [1, 5, 36, 37, 38])
def test_any_chunk_gives_float64s_sums_and_gradients(
    chunk: int, z_loss: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_TOKENS", chunk)
    inputs = draw()
    for ours, truth in zip(
        gradients(*inputs, z_loss, upstream=-2.5), exact(*inputs, z_loss, upstream=-2.5), strict=True
    ):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-4)


def test_gradients_are_the_slopes_of_the_loss() -> None:
    """Finite differences along random directions: independent of anybody's derivative."""
    hidden_TD, weight_VD, *rest = draw(seed=3)
    _, _, *grads = gradients(hidden_TD, weight_VD, *rest, 1e-2)
    generator = torch.Generator().manual_seed(4)
    for grad, place in zip(grads, (0, 1), strict=True):
        inputs = [hidden_TD.double(), weight_VD.double()]
        direction = torch.randn(grad.shape, generator=generator, dtype=torch.float64)
        sides = []
        for sign in (1, -1):
            moved = list(inputs)
            moved[place] = inputs[place] + sign * 1e-5 * direction
            sides.append(linear_cross_entropy_ref(moved[0], moved[1], *rest, 1e-2)[0])
        slope = (sides[0] - sides[1]) / 2e-5
        torch.testing.assert_close((grad.double() * direction).sum(), slope, rtol=1e-4, atol=1e-3)


def test_the_references_own_derivative_passes_gradcheck() -> None:
    hidden_TD, weight_VD, targets_T, loss_weights_T = draw(5)
    leaves = [hidden_TD.double().requires_grad_(), weight_VD[:20].double().requires_grad_()]
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy_ref(h, w, targets_T % 20, loss_weights_T.double(), 0.05)[0], leaves
    )


def test_a_token_of_weight_zero_adds_nothing() -> None:
    hidden_TD, weight_VD, targets_T, loss_weights_T = draw()
    loss_weights_T[::3] = 0
    kept = loss_weights_T > 0
    loss, nll, grad_hidden, grad_weight = gradients(hidden_TD, weight_VD, targets_T, loss_weights_T, 1e-3)
    rest = gradients(hidden_TD[kept], weight_VD, targets_T[kept], loss_weights_T[kept], 1e-3)
    torch.testing.assert_close([loss, nll, grad_hidden[kept], grad_weight], rest)
    assert not grad_hidden[~kept].any()
    silent = gradients(hidden_TD, weight_VD, targets_T, torch.zeros(T), 1e-3)
    assert not any(part.any() for part in silent)


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
def test_no_tensor_is_larger_than_a_chunk_of_logits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_TOKENS", 16)
    hidden_TD, weight_VD, targets_T, loss_weights_T = draw(100)
    leaves = [hidden_TD.to(dtype).requires_grad_(), weight_VD.to(dtype).requires_grad_()]
    with Sizes() as sizes:
        linear_cross_entropy(*leaves, targets_T, loss_weights_T)[0].backward()
    assert sizes.largest == 16 * V
    with Sizes() as sizes:
        linear_cross_entropy(*leaves, targets_T, loss_weights_T, backend="reference")[0].backward()
    assert sizes.largest == 100 * V  # the probe sees what it is meant to see


def test_evaluation_computes_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_TOKENS", 2)
    hidden_TD, weight_VD, targets_T, loss_weights_T = draw()
    leaves = [hidden_TD.requires_grad_(), weight_VD.requires_grad_()]
    trained, _ = linear_cross_entropy(*leaves, targets_T, loss_weights_T)
    with torch.no_grad(), Sizes() as sizes:
        loss, _ = linear_cross_entropy(*leaves, targets_T, loss_weights_T)
    assert sizes.largest == 2 * V  # one chunk of logits, and no gradient of V x D
    assert not loss.requires_grad and loss == trained.detach()
