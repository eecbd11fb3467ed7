"""Log-probability of the taken tokens and entropy of what they were drawn from, without holding all the logits.

T tokens · D width · V vocabulary · C tokens of one chunk · S stride of a chunk's rows. The forward pass keeps two
numbers a token, logsumexp and entropy H; the backward pass computes each chunk's logits again and writes their
gradient in their place. With p the softmax of logits/temperature:

    d log p[target] / d logits = (onehot − p) / temperature        d H / d logits = −p·(log p + H) / temperature
"""

from collections.abc import Iterator
from typing import Any

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


def token_logprob_ref(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, temperature: float = 1.0, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """What `token_logprob` returns, from all T x V logits at once; fp64 for fp64 inputs."""
    logits_TV = F.linear(hidden_TD, weight_VD).to(widened(hidden_TD.dtype))
    if softcap:
        logits_TV = softcap * torch.tanh(logits_TV / softcap)
    logprobs_TV = (logits_TV / temperature).log_softmax(dim=-1)
    entropy_T = -(logprobs_TV.exp() * logprobs_TV).sum(dim=-1)
    return logprobs_TV.gather(1, targets_T[:, None]).squeeze(1), entropy_T


# --- plain PyTorch ------------------------------------------------------------------------------------------


def _statistics_tile(
    x_CV: Tensor, targets_C1: Tensor, temperature: float, softcap: float, spare: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, entropy and logsumexp, [C], of a few rows of wide logits, which are overwritten."""
    cap_(x_CV, softcap, wants_grad=False)
    if temperature != 1:
        x_CV.div_(temperature)
    max_C1 = x_CV.amax(dim=-1, keepdim=True)
    x_CV.sub_(max_C1)
    target_C1 = x_CV.gather(1, targets_C1)
    exp_CV = torch.exp(x_CV, out=like(spare, x_CV))
    sum_C1 = exp_CV.sum(dim=-1, keepdim=True)
    log_C1 = sum_C1.log()
    # −Σ p·log p, where log p = x − log Σ and p = exp(x)/Σ
    entropy_C1 = log_C1 - x_CV.mul_(exp_CV).sum(dim=-1, keepdim=True) / sum_C1
    return (target_C1 - log_C1).squeeze(1), entropy_C1.squeeze(1), (max_C1 + log_C1).squeeze(1)


def _gradient_tile(
    x_CV: Tensor,
    targets_C1: Tensor,
    kept_C: tuple[Tensor, ...],
    temperature: float,
    softcap: float,
    spare: Tensor,
) -> None:
    """Put the gradient in the place of a few rows of wide logits; `kept_C`: logsumexp, entropy, their gradients."""
    logsumexp_C1, entropy_C1, grad_logprob_C1, grad_entropy_C1 = (part[:, None] for part in kept_C)
    slope_CV = cap_(x_CV, softcap, wants_grad=True)
    if temperature != 1:
        x_CV.div_(temperature)
    x_CV.sub_(logsumexp_C1)
    p_CV = torch.exp(x_CV, out=like(spare, x_CV)).mul_(-1 / temperature)
    x_CV.add_(entropy_C1).mul_(grad_entropy_C1).add_(grad_logprob_C1).mul_(p_CV)
    x_CV.scatter_add_(1, targets_C1, grad_logprob_C1 / temperature)
    if slope_CV is not None:
        x_CV.mul_(slope_CV)


class _Chunks:
    """Buffers for the logits of a chunk in the inputs' dtype, and for two tiles of them in the wide one."""

    def __init__(self, hidden_TD: Tensor, weight_VD: Tensor) -> None:
        self.hidden_TD, self.weight_VD = hidden_TD, weight_VD
        self.rows, self.wide = tile_rows(hidden_TD, weight_VD), widened(hidden_TD.dtype)
        T, V = hidden_TD.shape[0], weight_VD.shape[0]
        self.buffer_CV = hidden_TD.new_empty(min(T, CHUNK_TOKENS), V)
        room = max(min(len(self.buffer_CV), self.rows) * V, weight_VD.shape[1])  # a tile, or a row of weights
        self.spare = hidden_TD.new_empty(room, dtype=self.wide)
        narrow = hidden_TD.dtype != self.wide
        self.tile = hidden_TD.new_empty(room, dtype=self.wide) if narrow else None

    def logits(self) -> Iterator[tuple[int, Tensor]]:
        """The first token and the [C, V] logits of each chunk."""
        for start in range(0, len(self.hidden_TD), CHUNK_TOKENS):
            hidden_CD = self.hidden_TD[start : start + CHUNK_TOKENS]
            yield start, torch.mm(hidden_CD, self.weight_VD.T, out=self.buffer_CV[: len(hidden_CD)])

    def tiles(self, start: int, logits_CV: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Of each tile its tokens, its logits, and those in the wide dtype, in the same memory if it is theirs."""
        for first in range(0, len(logits_CV), self.rows):
            part_CV = logits_CV[first : first + self.rows]
            wide_CV = part_CV if self.tile is None else like(self.tile, part_CV).copy_(part_CV)
            yield slice(start + first, start + first + len(part_CV)), part_CV, wide_CV


class _ChunkedLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, temperature: float, softcap: float
    ) -> tuple[Tensor, Tensor]:
        chunks = _Chunks(hidden_TD, weight_VD)
        logprob_T, entropy_T, logsumexp_T = (
            hidden_TD.new_empty(len(hidden_TD), dtype=chunks.wide) for _ in range(3)
        )
        for start, logits_CV in chunks.logits():
            for rows, _, wide_CV in chunks.tiles(start, logits_CV):
                logprob_T[rows], entropy_T[rows], logsumexp_T[rows] = _statistics_tile(
                    wide_CV, targets_T[rows, None], temperature, softcap, chunks.spare
                )
        ctx.save_for_backward(hidden_TD, weight_VD, targets_T, logsumexp_T, entropy_T)
        ctx.options = temperature, softcap
        return logprob_T, entropy_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logprob_T: Tensor, grad_entropy_T: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, targets_T, *kept_T = ctx.saved_tensors
        kept_T += [grad_logprob_T, grad_entropy_T]
        temperature, softcap = ctx.options
        chunks = _Chunks(hidden_TD, weight_VD)
        of_weight = ctx.needs_input_grad[1]
        gradients = Gradients(hidden_TD, weight_VD, CHUNK_TOKENS, chunks.spare, of_weight)
        for start, logits_CV in chunks.logits():
            for rows, part_CV, wide_CV in chunks.tiles(start, logits_CV):
                kept_C = tuple(part[rows] for part in kept_T)
                _gradient_tile(wide_CV, targets_T[rows, None], kept_C, temperature, softcap, chunks.spare)
                if wide_CV is not part_CV:
                    part_CV.copy_(wide_CV)
            gradients.add(start, logits_CV)
        grad_hidden_TD, grad_weight_VD = gradients.result()
        return grad_hidden_TD, grad_weight_VD if of_weight else None, None, None, None


def token_logprob_chunked(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, temperature: float = 1.0, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`token_logprob` through chunks of `CHUNK_TOKENS` tokens' logits."""
    return _ChunkedLogprob.apply(hidden_TD, weight_VD, targets_T, temperature, softcap)


# --- Triton -------------------------------------------------------------------------------------------------


@triton.jit
def _statistics(
    logits_CV,
    targets_C,
    logprob_C,
    entropy_C,
    logsumexp_C,
    V,
    S,
    inverse_temperature,
    softcap,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row's log-probability, entropy and logsumexp in one pass."""
    row = tl.program_id(0).to(tl.int64)
    row_V = logits_CV + row * S
    lane = tl.arange(0, BLOCK)
    highest = -1e30
    sums = tl.zeros([BLOCK], tl.float32)  # of exp(x − highest), lane by lane
    products = tl.zeros([BLOCK], tl.float32)  # of exp(x − highest)·(x − highest)
    for start in range(0, S, BLOCK):
        x = load_logits(row_V, start + lane, V, S, softcap, CAP) * inverse_temperature
        higher = tl.maximum(highest, tl.max(x, axis=0))
        shift = highest - higher
        shrink = tl.exp(shift)
        part = tl.exp(x - higher)
        products = shrink * (products + shift * sums) + part * (x - higher)
        sums = shrink * sums + part
        highest = higher
    total = tl.sum(sums, axis=0)
    target_logit = load_target(row_V, tl.load(targets_C + row), V, softcap, CAP) * inverse_temperature
    tl.store(logprob_C + row, target_logit - highest - tl.log(total))
    tl.store(entropy_C + row, tl.log(total) - tl.sum(products, axis=0) / total)
    tl.store(logsumexp_C + row, highest + tl.log(total))


@triton.jit
def _gradient(
    logits_CV,
    targets_C,
    logsumexp_C,
    entropy_C,
    grad_logprob_C,
    grad_entropy_C,
    V,
    S,
    inverse_temperature,
    softcap,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row's gradient in the place of its logits."""
    row = tl.program_id(0).to(tl.int64)
    row_V = logits_CV + row * S
    grad_logprob = tl.load(grad_logprob_C + row)
    grad_entropy = tl.load(grad_entropy_C + row)
    if (grad_logprob == 0) & (grad_entropy == 0):  # a prompt's token, most often
        clear(row_V, S, BLOCK)
        return

    target = tl.load(targets_C + row)
    logsumexp = tl.load(logsumexp_C + row)
    entropy = tl.load(entropy_C + row)
    for start in range(0, S, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = load_logits(row_V, column, V, S, softcap, CAP)
        logprob = x * inverse_temperature - logsumexp
        grad = -tl.exp(logprob) * (grad_logprob + grad_entropy * (logprob + entropy))
        grad = tl.where(column == target, grad + grad_logprob, grad) * inverse_temperature
        if CAP:
            grad *= cap_slope(x, softcap)
        tl.store(row_V + column, grad.to(logits_CV.dtype.element_ty), mask=column < S)


# Both opaque to torch.compile for the reasons that linear_cross_entropy's operator is.
@torch.library.custom_op("drivetrain::token_logprob", mutates_args=())
def _token_logprob(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, temperature: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    (T, D), V = hidden_TD.shape, weight_VD.shape[0]
    chunk = chunk_tokens(T, V, D, hidden_TD.element_size())
    buffer_CV = logits_buffer(hidden_TD, weight_VD, chunk)
    logprob_T, entropy_T, logsumexp_T = (hidden_TD.new_empty(T, dtype=torch.float32) for _ in range(3))
    for start in range(0, T, chunk):
        rows = slice(start, min(start + chunk, T))
        logits_CV = torch.mm(hidden_TD[rows], weight_VD.T, out=buffer_CV[: rows.stop - start])
        _statistics[(len(logits_CV),)](
            logits_CV,
            targets_T[rows],
            logprob_T[rows],
            entropy_T[rows],
            logsumexp_T[rows],
            V,
            logits_CV.stride(0),
            1 / temperature,
            softcap,
            CAP=softcap != 0,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return logprob_T, entropy_T, logsumexp_T


@torch.library.custom_op("drivetrain::token_logprob_backward", mutates_args=())
def _token_logprob_backward(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    logsumexp_T: Tensor,
    entropy_T: Tensor,
    grad_logprob_T: Tensor,
    grad_entropy_T: Tensor,
    temperature: float,
    softcap: float,
    of_weight: bool,
) -> tuple[Tensor, Tensor]:
    (T, D), V = hidden_TD.shape, weight_VD.shape[0]
    chunk = chunk_tokens(T, V, D, hidden_TD.element_size())
    logits_CV = buffer_CV = logits_buffer(hidden_TD, weight_VD, chunk)
    gradients = Gradients(hidden_TD, weight_VD, chunk, of_weight=of_weight)
    for start in range(0, T, chunk):
        rows = slice(start, min(start + chunk, T))
        logits_CV = torch.mm(hidden_TD[rows], weight_VD.T, out=buffer_CV[: rows.stop - start])
        _gradient[(len(logits_CV),)](
            logits_CV,
            targets_T[rows],
            logsumexp_T[rows],
            entropy_T[rows],
            grad_logprob_T[rows],
            grad_entropy_T[rows],
            V,
            logits_CV.stride(0),
            1 / temperature,
            softcap,
            CAP=softcap != 0,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
        gradients.add(start, logits_CV)
    del buffer_CV, logits_CV  # before the narrow gradient is made
    return gradients.result()


@_token_logprob.register_fake
def _(hidden_TD: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    a, b, c = (hidden_TD.new_empty(hidden_TD.shape[0], dtype=torch.float32) for _ in range(3))
    return a, b, c


@_token_logprob_backward.register_fake
def _(hidden_TD: Tensor, weight_VD: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    of_weight = rest[-1]
    return hidden_TD.new_empty(hidden_TD.shape), weight_VD.new_empty(weight_VD.shape if of_weight else (0,))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden_TD, weight_VD, targets_T, *ctx.options = inputs
    _, entropy_T, logsumexp_T = output
    ctx.mark_non_differentiable(logsumexp_T)
    ctx.save_for_backward(hidden_TD, weight_VD, targets_T, logsumexp_T, entropy_T)


def _differentiate(
    ctx: Any, grad_logprob_T: Tensor, grad_entropy_T: Tensor, _: Tensor
) -> tuple[Tensor | None, ...]:
    grads_T = grad_logprob_T.contiguous(), grad_entropy_T.contiguous()
    of_weight = ctx.needs_input_grad[1]
    grad_hidden_TD, grad_weight_VD = _token_logprob_backward(
        *ctx.saved_tensors, *grads_T, *ctx.options, of_weight
    )
    return grad_hidden_TD, grad_weight_VD if of_weight else None, None, None, None


_token_logprob.register_autograd(_differentiate, setup_context=_keep)


def token_logprob_triton(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, temperature: float = 1.0, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`token_logprob` through chunks of logits: cuBLAS's products, and one kernel on each chunk."""
    options = float(temperature), float(softcap)
    logprob_T, entropy_T, _ = _token_logprob(hidden_TD, weight_VD, targets_T.contiguous(), *options)
    return logprob_T, entropy_T


# --- what others call ---------------------------------------------------------------------------------------


def token_logprob(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float = 0.0,
    backend: str = "sdpa",
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under softmax(logits/temperature), and that distribution's entropy, in nats.

    Args:
        hidden_TD, weight_VD: [T, D] and [V, D] of one dtype: fp32, bf16, fp16 (fp64 but in Triton).
        targets_T: int64 in [0, V). Another target is an error on a CPU, and makes a NaN in Triton.
        temperature: above 0.
        softcap: c > 0 makes logits c·tanh(logits/c) before they are divided (Gemma 2,
            https://arxiv.org/abs/2408.00118, section 2).

    Returns:
        Two of fp32 [T]; both carry gradients to hidden states and weights.

    Raises:
        ValueError: shapes or dtypes that do not fit together, an option out of range. KeyError: no such backend.
    """
    check_shapes("token_logprob", hidden_TD, weight_VD, targets_T)
    if temperature <= 0 or softcap < 0:
        raise ValueError(f"temperature={temperature} must be above 0, softcap={softcap} at least 0")
    run = TOKEN_LOGPROB.implementation(backend)
    return run(hidden_TD, weight_VD, targets_T, temperature, softcap)


def _example_inputs(dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    hidden_TD = torch.randn(37, 24, generator=generator, dtype=torch.float64)
    weight_VD = torch.randn(50, 24, generator=generator, dtype=torch.float64)
    targets_T = torch.randint(0, 50, (37,), generator=generator)
    return hidden_TD.to(dtype), weight_VD.to(dtype), targets_T, 0.7, 20.0


def _variants() -> Iterator[Variant]:
    kept = {
        _statistics: ("logprob_C", "entropy_C", "logsumexp_C"),
        _gradient: ("logsumexp_C", "entropy_C", "grad_logprob_C", "grad_entropy_C"),
    }
    for kernel, pointers in kept.items():
        for dtype in ("bf16", "fp16", "fp32"):
            signature = {
                "logits_CV": f"*{dtype}",
                "targets_C": "*i64",
                **dict.fromkeys(pointers, "*fp32"),
                **{"V": "i32", "S": "i32:16", "inverse_temperature": "fp32", "softcap": "fp32"},
                **{"CAP": "constexpr", "BLOCK": "constexpr"},
            }
            for cap in (False, True):
                constants = {"CAP": cap, "BLOCK": BLOCK}
                yield Variant(kernel, signature, constants, num_warps=WARPS, num_stages=3)


TOKEN_LOGPROB = register(
    Op(
        name="token_logprob",
        ref=token_logprob_ref,
        fast={"sdpa": token_logprob_chunked, "triton": token_logprob_triton},
        example_inputs=_example_inputs,
        tolerances={torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3},
        variants=_variants,
    )
)
