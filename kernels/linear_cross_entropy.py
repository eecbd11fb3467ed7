"""Cross-entropy of hidden states against a vocabulary matrix, without ever holding all the logits.

T tokens · D width · V vocabulary · C tokens of one chunk. The gradient is computed in the forward pass, chunk
by chunk: one logits buffer of C x V serves the loss, its softmax and the gradient, so memory does not grow
with T and the backward pass is a multiplication by a scalar.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from drivetrain.kernels.op import Op, register

CHUNK_TOKENS = 1024
# Logits that go through the softmax together on a CPU: 2 MiB of fp32 stay in its cache.
TILE_ELEMENTS = 1 << 19


def linear_cross_entropy_ref(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, loss_weights_T: Tensor, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Σ w·(nll + z_loss·logsumexp²) and Σ w·nll, from all T x V logits at once.

    Args:
        hidden_TD, weight_VD: same floating dtype. targets_T: int64 in [0, V). loss_weights_T: fp32; a token of
            weight 0 adds nothing. z_loss: PaLM's auxiliary loss (section 5).

    Returns:
        Two fp32 scalars (fp64 for fp64 inputs); only the first carries a gradient.
    """
    wide = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
    logits_TV = F.linear(hidden_TD, weight_VD).to(wide)
    logsumexp_T = logits_TV.logsumexp(dim=-1)
    nll_T = logsumexp_T - logits_TV.gather(1, targets_T[:, None]).squeeze(1)
    loss = (loss_weights_T * (nll_T + z_loss * logsumexp_T.square())).sum()
    return loss, (loss_weights_T * nll_T).sum().detach()


def _tile(
    logits_CV: Tensor,
    targets_C1: Tensor,
    weights_C1: Tensor,
    z_loss: float,
    wants_grad: bool,
    buffer: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood and logsumexp of a few rows, fp32 [C]; their logits are overwritten.

    `buffer` is fp32 memory for logits of another dtype.
    With `wants_grad` by d loss/d logits = w·(softmax·(1 + 2·z_loss·logsumexp) − onehot), else by nothing of use.
    """
    wide_CV = logits_CV if buffer is None else _like(buffer, logits_CV).copy_(logits_CV)
    target_C1 = wide_CV.gather(1, targets_C1)
    max_C1 = wide_CV.amax(dim=-1, keepdim=True)
    sum_C1 = wide_CV.sub_(max_C1).exp_().sum(dim=-1, keepdim=True)
    logsumexp_C1 = max_C1 + sum_C1.log()
    if wants_grad:
        wide_CV.mul_(weights_C1 * (1 + 2 * z_loss * logsumexp_C1) / sum_C1)
        wide_CV.scatter_add_(1, targets_C1, -weights_C1)
        if buffer is not None:
            logits_CV.copy_(wide_CV)
    return (logsumexp_C1 - target_C1).squeeze(1), logsumexp_C1.squeeze(1)


def _like(buffer: Tensor, shape: Tensor) -> Tensor:
    """The first of `buffer`'s elements in the given tensor's shape."""
    return buffer[: shape.numel()].view(shape.shape)


def _add(total_VD: Tensor, part_VD: Tensor, buffer: Tensor) -> None:
    """total += part, piece by piece: a sum of two dtypes makes a widened copy of the whole part on the CPU."""
    rows = max(1, buffer.numel() // part_VD.shape[1])
    for total, part in zip(total_VD.split(rows), part_VD.split(rows), strict=True):
        total += _like(buffer, part).copy_(part)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        loss_weights_T: Tensor,
        z_loss: float,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        wants_grad = grad_enabled and any(ctx.needs_input_grad[:2])  # type: ignore[attr-defined]
        grad_hidden_TD = torch.empty_like(hidden_TD) if wants_grad else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_grad else None
        T, V = hidden_TD.shape[0], weight_VD.shape[0]
        rows = max(1, TILE_ELEMENTS // V) if hidden_TD.device.type == "cpu" else CHUNK_TOKENS
        # Allocated once: memory that is given back and taken again costs a page fault for every 4 KiB.
        buffer_CV = hidden_TD.new_empty(min(T, CHUNK_TOKENS), V)
        narrow = hidden_TD.dtype != torch.float32
        room = max(min(len(buffer_CV), rows) * V, weight_VD.shape[1])  # a tile of logits, or a row of weights
        wide = hidden_TD.new_empty(room, dtype=torch.float32) if narrow else None
        part_VD = torch.empty_like(weight_VD) if narrow and wants_grad else None
        nll_T, logsumexp_T = torch.empty(2, T, dtype=torch.float32, device=hidden_TD.device)
        for start in range(0, T, CHUNK_TOKENS):
            hidden_CD = hidden_TD[start : start + CHUNK_TOKENS]
            logits_CV = buffer_CV[: len(hidden_CD)]
            torch.mm(hidden_CD, weight_VD.T, out=logits_CV)
            for first in range(start, start + len(hidden_CD), rows):
                part = slice(first, min(first + rows, start + len(hidden_CD)))
                nll_T[part], logsumexp_T[part] = _tile(
                    logits_CV[first - start : part.stop - start],
                    targets_T[part, None],
                    loss_weights_T[part, None],
                    z_loss,
                    wants_grad,
                    wide,
                )
            if grad_hidden_TD is None or grad_weight_VD is None:
                continue
            torch.mm(logits_CV, weight_VD, out=grad_hidden_TD[start : start + CHUNK_TOKENS])
            if wide is None or part_VD is None:
                grad_weight_VD.addmm_(logits_CV.T, hidden_CD)
            else:
                _add(grad_weight_VD, torch.mm(logits_CV.T, hidden_CD, out=part_VD), wide)
        nll = (loss_weights_T * nll_T).sum()
        loss = (loss_weights_T * (nll_T + z_loss * logsumexp_T.square())).sum()
        if grad_hidden_TD is not None and grad_weight_VD is not None:
            whole_VD = grad_weight_VD if part_VD is None else part_VD.copy_(grad_weight_VD)
            ctx.save_for_backward(grad_hidden_TD, whole_VD)
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_loss: Tensor, _: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None, None]:
        grad_hidden_TD, grad_weight_VD = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad_hidden_TD * grad_loss, grad_weight_VD * grad_loss, None, None, None, None


def linear_cross_entropy_chunked(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, loss_weights_T: Tensor, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The same sums through chunks of `CHUNK_TOKENS` logits; shapes as in `linear_cross_entropy_ref`."""
    # Asked here because needs_input_grad is True under no_grad too, and inside forward the mode is always off.
    grad_enabled = torch.is_grad_enabled()
    return _ChunkedLoss.apply(hidden_TD, weight_VD, targets_T, loss_weights_T, z_loss, grad_enabled)


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    loss_weights_T: Tensor,
    *,
    z_loss: float = 0.0,
    backend: str = "sdpa",
) -> tuple[Tensor, Tensor]:
    """Weighted sums (not means) of the loss and of the plain negative log-likelihood, in nats.

    See `linear_cross_entropy_ref` for shapes and dtypes.
    """
    run = linear_cross_entropy_ref if backend == "reference" else LINEAR_CROSS_ENTROPY.fast[backend]
    return run(hidden_TD, weight_VD, targets_T, loss_weights_T, z_loss)


def _example_inputs(
    dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    hidden_TD = torch.randn(37, 24, generator=generator, dtype=torch.float64)
    weight_VD = torch.randn(50, 24, generator=generator, dtype=torch.float64)
    targets_T = torch.randint(0, 50, (37,), generator=generator)
    loss_weights_T = torch.rand(37, generator=generator)
    loss_weights_T[::5] = 0
    return hidden_TD.to(dtype), weight_VD.to(dtype), targets_T, loss_weights_T, 1e-3


LINEAR_CROSS_ENTROPY = register(
    Op(
        name="linear_cross_entropy",
        ref=linear_cross_entropy_ref,
        fast={"sdpa": linear_cross_entropy_chunked},
        example_inputs=_example_inputs,
        tolerances={torch.float32: 1e-5, torch.bfloat16: 3e-2},
    )
)
