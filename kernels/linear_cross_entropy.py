"""Cross-entropy of hidden states against a vocabulary matrix, without ever holding all the logits.

T tokens · D width · V vocabulary · C tokens of one chunk · S stride of a chunk's rows. The gradient is computed
in the forward pass, chunk by chunk: one logits buffer of C x V serves the loss, its softmax and the gradient, so
memory does not grow with T and the backward pass is a multiplication by a scalar. To compute the logits again
there would be a fourth product of 2·T·V·D operations beside the three.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from drivetrain.kernels.chunks import CHUNK_TOKENS, chunk_tokens
from drivetrain.kernels.op import Op, Variant, register, tl, triton
from drivetrain.kernels.softmax_chunk import (
    BLOCK,
    WARPS,
    Gradients,
    cap_,
    cap_slope,
    check_shapes,
    clear,
    like,
    load_logits,
    load_target,
    logits_buffer,
    tile_rows,
    widened,
)

IGNORED = -100  # PyTorch's ignore_index


class Options(NamedTuple):
    """See `linear_cross_entropy`."""

    z_loss: float
    label_smoothing: float
    softcap: float


def _without_ignored(targets_T: Tensor, loss_weights_T: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Targets that may be looked up, and weights of 0 where they mean nothing."""
    ignored_T = targets_T == ignore_index
    return targets_T.masked_fill(ignored_T, 0), loss_weights_T.masked_fill(ignored_T, 0)


def linear_cross_entropy_ref(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    loss_weights_T: Tensor,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    ignore_index: int = IGNORED,
) -> tuple[Tensor, Tensor]:
    """The two sums of `linear_cross_entropy` from all T x V logits at once; fp64 for fp64 inputs."""
    logits_TV = F.linear(hidden_TD, weight_VD).to(widened(hidden_TD.dtype))
    if softcap:
        logits_TV = softcap * torch.tanh(logits_TV / softcap)
    targets_T, weights_T = _without_ignored(targets_T, loss_weights_T, ignore_index)
    logsumexp_T = logits_TV.logsumexp(dim=-1)
    nll_T = logsumexp_T - logits_TV.gather(1, targets_T[:, None]).squeeze(1)
    smooth_T = nll_T
    if label_smoothing:
        smooth_T = (1 - label_smoothing) * nll_T + label_smoothing * (logsumexp_T - logits_TV.mean(dim=-1))
    loss = (weights_T * (smooth_T + z_loss * logsumexp_T.square())).sum()
    return loss, (weights_T * nll_T).sum().detach()


# --- plain PyTorch ------------------------------------------------------------------------------------------


def _tile(
    logits_CV: Tensor,
    targets_C1: Tensor,
    weights_C1: Tensor,
    options: Options,
    wants_grad: bool,
    buffer: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Loss and negative log-likelihood of a few rows, before weighting, [C]; their logits are overwritten.

    `buffer` is memory of the wide dtype for logits of another dtype.
    With `wants_grad` by d loss/d logits = w·(softmax·(1 + 2·z_loss·logsumexp) − s/V − (1 − s)·onehot), times the
    soft cap's slope, else by nothing of use.
    """
    wide_CV = logits_CV if buffer is None else like(buffer, logits_CV).copy_(logits_CV)
    smoothing = options.label_smoothing
    slope_CV = cap_(wide_CV, options.softcap, wants_grad)
    target_C1 = wide_CV.gather(1, targets_C1)
    mean_C1 = wide_CV.mean(dim=-1, keepdim=True) if smoothing else None
    max_C1 = wide_CV.amax(dim=-1, keepdim=True)
    sum_C1 = wide_CV.sub_(max_C1).exp_().sum(dim=-1, keepdim=True)
    logsumexp_C1 = max_C1 + sum_C1.log()
    nll_C1 = loss_C1 = logsumexp_C1 - target_C1
    if mean_C1 is not None:
        loss_C1 = loss_C1 + smoothing * (target_C1 - mean_C1)
    if options.z_loss:
        loss_C1 = loss_C1 + options.z_loss * logsumexp_C1.square()
    if wants_grad:
        wide_CV.mul_(weights_C1 * (1 + 2 * options.z_loss * logsumexp_C1) / sum_C1)
        wide_CV.scatter_add_(1, targets_C1, weights_C1 * (smoothing - 1))
        if smoothing:
            wide_CV.sub_(weights_C1 * (smoothing / wide_CV.shape[1]))
        if slope_CV is not None:
            wide_CV.mul_(slope_CV)
        if buffer is not None:
            logits_CV.copy_(wide_CV)
    return loss_C1.squeeze(1), nll_C1.squeeze(1)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        weights_T: Tensor,
        options: Options,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        wants_grad = grad_enabled and any(ctx.needs_input_grad[:2])  # type: ignore[attr-defined]
        T, V = hidden_TD.shape[0], weight_VD.shape[0]
        rows, wide = tile_rows(hidden_TD, weight_VD), widened(hidden_TD.dtype)
        # Allocated once: memory that is given back and taken again costs a page fault for every 4 KiB.
        buffer_CV = hidden_TD.new_empty(min(T, CHUNK_TOKENS), V)
        buffer = None
        if hidden_TD.dtype != wide:  # a tile of logits, or a row of weights
            buffer = hidden_TD.new_empty(max(min(len(buffer_CV), rows) * V, weight_VD.shape[1]), dtype=wide)
        gradients = None
        if wants_grad:
            of_weight = ctx.needs_input_grad[1]  # type: ignore[attr-defined]
            gradients = Gradients(hidden_TD, weight_VD, CHUNK_TOKENS, buffer, of_weight)
        loss_T, nll_T = torch.empty(2, T, dtype=wide, device=hidden_TD.device)
        for start in range(0, T, CHUNK_TOKENS):
            hidden_CD = hidden_TD[start : start + CHUNK_TOKENS]
            logits_CV = buffer_CV[: len(hidden_CD)]
            torch.mm(hidden_CD, weight_VD.T, out=logits_CV)
            for first in range(start, start + len(hidden_CD), rows):
                part = slice(first, min(first + rows, start + len(hidden_CD)))
                loss_T[part], nll_T[part] = _tile(
                    logits_CV[first - start : part.stop - start],
                    targets_T[part, None],
                    weights_T[part, None],
                    options,
                    wants_grad,
                    buffer,
                )
            if gradients is not None:
                gradients.add(start, logits_CV)
        loss, nll = (weights_T * loss_T).sum(), (weights_T * nll_T).sum()
        if gradients is not None:
            ctx.save_for_backward(*gradients.result())
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_loss: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        grad_hidden_TD, grad_weight_VD = ctx.saved_tensors  # type: ignore[attr-defined]
        of_weight = ctx.needs_input_grad[1]  # type: ignore[attr-defined]
        return grad_hidden_TD * grad_loss, grad_weight_VD * grad_loss if of_weight else None, *[None] * 4


def linear_cross_entropy_chunked(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    loss_weights_T: Tensor,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    ignore_index: int = IGNORED,
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy` through chunks of `CHUNK_TOKENS` tokens' logits."""
    targets_T, weights_T = _without_ignored(targets_T, loss_weights_T, ignore_index)
    options = Options(z_loss, label_smoothing, softcap)
    # Asked here because needs_input_grad is True under no_grad too, and inside forward the mode is always off.
    grad_enabled = torch.is_grad_enabled()
    return _ChunkedLoss.apply(hidden_TD, weight_VD, targets_T, weights_T, options, grad_enabled)


# --- Triton -------------------------------------------------------------------------------------------------


@triton.jit
def _loss_of_rows(
    logits_CV,
    targets_C,
    weights_C,
    loss_C,
    nll_C,
    V,
    S,
    ignore_index,
    z_loss,
    smoothing,
    softcap,
    GRAD: tl.constexpr,
    SMOOTH: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: its weighted loss and negative log-likelihood, then in the logits' place their gradient."""
    row = tl.program_id(0).to(tl.int64)
    row_V = logits_CV + row * S
    target = tl.load(targets_C + row)
    weight = tl.load(weights_C + row).to(tl.float32)
    if (weight == 0) | (target == ignore_index):
        tl.store(loss_C + row, 0.0)
        tl.store(nll_C + row, 0.0)
        if GRAD:
            clear(row_V, S, BLOCK)
        return

    # Read before anything is overwritten: the reductions that follow keep all warps behind this load.
    target_logit = load_target(row_V, target, V, softcap, CAP)
    lane = tl.arange(0, BLOCK)
    highest = -1e30
    sums = tl.zeros(
        [BLOCK], tl.float32
    )  # of exp(logit − highest), lane by lane: one reduction a block, not two
    totals = tl.zeros([BLOCK], tl.float32)
    for start in range(0, S, BLOCK):
        x = load_logits(row_V, start + lane, V, S, softcap, CAP)
        higher = tl.maximum(highest, tl.max(x, axis=0))
        sums = sums * tl.exp(highest - higher) + tl.exp(x - higher)
        highest = higher
        if SMOOTH:
            totals += tl.where(start + lane < V, x, 0.0)
    total = tl.sum(sums, axis=0)
    logsumexp = highest + tl.log(total)
    nll = logsumexp - target_logit
    loss = nll + z_loss * logsumexp * logsumexp
    if SMOOTH:
        loss += smoothing * (target_logit - tl.sum(totals, axis=0) / V)
    tl.store(loss_C + row, weight * loss)
    tl.store(nll_C + row, weight * nll)
    if GRAD:
        scale = weight * (1 + 2 * z_loss * logsumexp) / total
        for start in range(0, S, BLOCK):
            column = start + lane
            x = load_logits(row_V, column, V, S, softcap, CAP)
            grad = tl.exp(x - highest) * scale
            grad = tl.where(column == target, grad - weight * (1 - smoothing), grad)
            if SMOOTH:
                grad -= weight * smoothing / V
            if CAP:
                grad *= cap_slope(x, softcap)
            tl.store(row_V + column, grad.to(logits_CV.dtype.element_ty), mask=column < S)


# Opaque to torch.compile, unlike an operator of `kernel_op`: the chunks must stay a loop over one buffer, and
# Inductor has no lowering of addmm with an out_dtype (https://github.com/pytorch/pytorch/issues/163880).
@torch.library.custom_op("drivetrain::linear_cross_entropy", mutates_args=())
def _loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    loss_weights_T: Tensor,
    z_loss: float,
    label_smoothing: float,
    softcap: float,
    ignore_index: int,
    wants_grad: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (T, D), V = hidden_TD.shape, weight_VD.shape[0]
    chunk = chunk_tokens(T, V, D, hidden_TD.element_size())
    logits_CV = buffer_CV = logits_buffer(hidden_TD, weight_VD, chunk)
    gradients = Gradients(hidden_TD, weight_VD, chunk, of_weight=of_weight) if wants_grad else None
    loss_T, nll_T = torch.empty(2, T, dtype=torch.float32, device=hidden_TD.device)
    for start in range(0, T, chunk):
        rows = slice(start, min(start + chunk, T))
        logits_CV = buffer_CV[: rows.stop - start]
        torch.mm(hidden_TD[rows], weight_VD.T, out=logits_CV)
        _loss_of_rows[(len(logits_CV),)](
            logits_CV,
            targets_T[rows],
            loss_weights_T[rows],
            loss_T[rows],
            nll_T[rows],
            V,
            logits_CV.stride(0),
            ignore_index,
            z_loss,
            label_smoothing,
            softcap,
            GRAD=wants_grad,
            SMOOTH=label_smoothing != 0,
            CAP=softcap != 0,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
        if gradients is not None:
            gradients.add(start, logits_CV)
    del buffer_CV, logits_CV  # before the narrow gradient is made
    loss, nll = loss_T.sum(), nll_T.sum()
    if gradients is None:
        return loss, nll, hidden_TD.new_empty(0), weight_VD.new_empty(0)
    return loss, nll, *gradients.result()


@_loss.register_fake
def _(hidden_TD: Tensor, weight_VD: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, wants_grad, of_weight = rest
    loss, nll = (hidden_TD.new_empty((), dtype=torch.float32) for _ in range(2))
    sizes = hidden_TD.shape if wants_grad else (0,), weight_VD.shape if wants_grad and of_weight else (0,)
    return loss, nll, hidden_TD.new_empty(sizes[0]), weight_VD.new_empty(sizes[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, nll, grad_hidden_TD, grad_weight_VD = output
    ctx.mark_non_differentiable(nll, grad_hidden_TD, grad_weight_VD)
    ctx.of_weight = inputs[-1]
    ctx.save_for_backward(grad_hidden_TD, grad_weight_VD)


def _differentiate(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grad_hidden_TD, grad_weight_VD = ctx.saved_tensors
    return grad_hidden_TD * grad_loss, grad_weight_VD * grad_loss if ctx.of_weight else None, *[None] * 8


_loss.register_autograd(_differentiate, setup_context=_keep)


def linear_cross_entropy_triton(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    loss_weights_T: Tensor,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    ignore_index: int = IGNORED,
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy` through chunks of logits: cuBLAS's products, and one kernel between them."""
    wants_grad = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    options = float(z_loss), float(label_smoothing), float(softcap), ignore_index
    targets_T, loss_weights_T = targets_T.contiguous(), loss_weights_T.contiguous()
    wanted = wants_grad, weight_VD.requires_grad
    loss, nll, _, _ = _loss(hidden_TD, weight_VD, targets_T, loss_weights_T, *options, *wanted)
    return loss, nll


# --- what others call ---------------------------------------------------------------------------------------


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    loss_weights_T: Tensor,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    ignore_index: int = IGNORED,
    backend: str = "sdpa",
) -> tuple[Tensor, Tensor]:
    """Weighted sums (not means) of the loss and of the plain negative log-likelihood, in nats.

    Σ w·((1 − s)·nll + s·mean over V of −log p + z_loss·logsumexp²), and Σ w·nll.

    Args:
        hidden_TD, weight_VD: [T, D] and [V, D] of one dtype: fp32, bf16, fp16 (fp64 but in Triton).
        targets_T: int64 in [0, V), or `ignore_index`: such a token adds nothing whatever its weight. Another
            target is an error on a CPU, and makes a NaN in Triton. loss_weights_T: fp32.
        z_loss: PaLM's auxiliary loss (https://arxiv.org/abs/2204.02311, section 5).
        label_smoothing: s in [0, 1], as in torch.nn.functional.cross_entropy.
        softcap: c > 0 makes logits c·tanh(logits/c) (Gemma 2, https://arxiv.org/abs/2408.00118, section 2), for
            the negative log-likelihood too.

    Returns:
        Two fp32 scalars; only the first carries a gradient, to hidden states and weights.

    Raises:
        ValueError: shapes or dtypes that do not fit together, an option out of range. KeyError: no such backend.
    """
    check_shapes("linear_cross_entropy", hidden_TD, weight_VD, targets_T, loss_weights_T)
    if not 0 <= label_smoothing <= 1 or softcap < 0:
        raise ValueError(f"label_smoothing={label_smoothing} must be in [0, 1], softcap={softcap} at least 0")
    run = LINEAR_CROSS_ENTROPY.implementation(backend)
    return run(
        hidden_TD, weight_VD, targets_T, loss_weights_T, z_loss, label_smoothing, softcap, ignore_index
    )


def _example_inputs(dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    hidden_TD = torch.randn(37, 24, generator=generator, dtype=torch.float64)
    weight_VD = torch.randn(50, 24, generator=generator, dtype=torch.float64)
    targets_T = torch.randint(0, 50, (37,), generator=generator)
    targets_T[3] = IGNORED
    loss_weights_T = torch.rand(37, generator=generator)
    loss_weights_T[::5] = 0
    return hidden_TD.to(dtype), weight_VD.to(dtype), targets_T, loss_weights_T, 1e-3, 0.1, 20.0


def _variants() -> Iterator[Variant]:
    for dtype in ("bf16", "fp16", "fp32"):
        signature = {
            "logits_CV": f"*{dtype}",
            "targets_C": "*i64",
            **dict.fromkeys(("weights_C", "loss_C", "nll_C"), "*fp32"),
            "V": "i32",
            "S": "i32:16",
            "ignore_index": "i32",
            **dict.fromkeys(("z_loss", "smoothing", "softcap"), "fp32"),
            **dict.fromkeys(("GRAD", "SMOOTH", "CAP", "BLOCK"), "constexpr"),
        }
        for grad, options in ((False, False), (False, True), (True, False), (True, True)):
            constants = {"GRAD": grad, "SMOOTH": options, "CAP": options, "BLOCK": BLOCK}
            yield Variant(_loss_of_rows, signature, constants, num_warps=WARPS, num_stages=3)


LINEAR_CROSS_ENTROPY = register(
    Op(
        name="linear_cross_entropy",
        ref=linear_cross_entropy_ref,
        fast={"sdpa": linear_cross_entropy_chunked, "triton": linear_cross_entropy_triton},
        example_inputs=_example_inputs,
        tolerances={torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3},
        variants=_variants,
    )
)
