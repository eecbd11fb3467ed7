"""SwiGLU's gate (Shazeer 2020, eq. 5). T tokens · F hidden width · G = 2F; gate and up lie in one buffer."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from drivetrain.kernels.op import Op, Variant, kernel_op, launch, register, tl, triton

BLOCK = 1024  # columns of one row that a program works on
WARPS = 4
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def swiglu_ref(gate_up_TG: Tensor) -> Tensor:
    """silu(gate) · up.

    Args:
        gate_up_TG: [T, 2F]: gate in the first F columns, up in the last.

    Returns:
        [T, F] in the same dtype.
    """
    gate_TF, up_TF = gate_up_TG.chunk(2, dim=-1)
    return functional.silu(gate_TF) * up_TF


@triton.jit
def _forward(gate_up_TG, out_TF, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    gate = tl.load(gate_up_TG + row * 2 * F + column, mask=inside).to(tl.float32)
    up = tl.load(gate_up_TG + row * 2 * F + F + column, mask=inside).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_TF + row * F + column, out.to(out_TF.dtype.element_ty), mask=inside)


@triton.jit
def _backward(gate_up_TG, grad_out_TF, grad_TG, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    gate = tl.load(gate_up_TG + row * 2 * F + column, mask=inside).to(tl.float32)
    up = tl.load(gate_up_TG + row * 2 * F + F + column, mask=inside).to(tl.float32)
    grad = tl.load(grad_out_TF + row * F + column, mask=inside).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    grad_gate = grad * up * (sigmoid + silu * (1 - sigmoid))
    tl.store(grad_TG + row * 2 * F + column, grad_gate.to(grad_TG.dtype.element_ty), mask=inside)
    tl.store(grad_TG + row * 2 * F + F + column, (grad * silu).to(grad_TG.dtype.element_ty), mask=inside)


@kernel_op("swiglu")
def _swiglu(gate_up_TG: Tensor) -> Tensor:
    T, G = gate_up_TG.shape
    out_TF = gate_up_TG.new_empty(T, G // 2)
    launch(_forward)[T, triton.cdiv(G // 2, BLOCK)](gate_up_TG, out_TF, G // 2, BLOCK=BLOCK, num_warps=WARPS)
    return out_TF


@kernel_op("swiglu_backward")
def _swiglu_backward(gate_up_TG: Tensor, grad_out_TF: Tensor) -> Tensor:
    T, G = gate_up_TG.shape
    grad_TG = torch.empty_like(gate_up_TG)
    grid = T, triton.cdiv(G // 2, BLOCK)
    launch(_backward)[grid](gate_up_TG, grad_out_TF, grad_TG, G // 2, BLOCK=BLOCK, num_warps=WARPS)
    return grad_TG


@_swiglu.register_fake
def _(gate_up_TG: Tensor) -> Tensor:
    return gate_up_TG.new_empty(gate_up_TG.shape[0], gate_up_TG.shape[1] // 2)


@_swiglu_backward.register_fake
def _(gate_up_TG: Tensor, grad_out_TF: Tensor) -> Tensor:
    return torch.empty_like(gate_up_TG)


def _keep(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad_out_TF: Tensor) -> Tensor:
    # The gate is computed again: keeping it would cost another T x F.
    return _swiglu_backward(*ctx.saved_tensors, grad_out_TF.contiguous())


_swiglu.register_autograd(_differentiate, setup_context=_keep)


def swiglu_triton(gate_up_TG: Tensor) -> Tensor:
    """One kernel forward, one backward; shapes and dtypes as in `swiglu_ref`. The arithmetic is fp32.

    Raises:
        ValueError: not two dimensions, an odd number of columns, or fp64.
    """
    if gate_up_TG.ndim != 2 or gate_up_TG.shape[1] % 2:
        raise ValueError(f"swiglu takes gate and up as one [T, 2F], not {tuple(gate_up_TG.shape)}")
    if gate_up_TG.dtype not in DTYPES:
        raise ValueError(
            f"swiglu in Triton takes fp32, bf16 and fp16, not {gate_up_TG.dtype}; use another backend"
        )
    return _swiglu(gate_up_TG.contiguous())


def swiglu(gate_up_TG: Tensor, *, backend: str = "sdpa") -> Tensor:
    """silu(gate) · up; see `swiglu_ref`."""
    return SWIGLU.implementation(backend)(gate_up_TG)


def _example_inputs(dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor]:
    return (torch.randn(7, 2402, generator=generator, dtype=torch.float64).to(dtype),)


def _variants() -> Iterator[Variant]:
    for kernel, pointers in (
        (_forward, ("gate_up_TG", "out_TF")),
        (_backward, ("gate_up_TG", "grad_out_TF", "grad_TG")),
    ):
        for dtype in ("bf16", "fp16", "fp32"):
            signature = {**dict.fromkeys(pointers, f"*{dtype}"), "F": "i32:16", "BLOCK": "constexpr"}
            yield Variant(kernel, signature, {"BLOCK": BLOCK}, num_warps=WARPS, num_stages=3)


SWIGLU = register(
    Op(
        name="swiglu",
        ref=swiglu_ref,
        fast={"triton": swiglu_triton},
        example_inputs=_example_inputs,
        tolerances={torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3},
        variants=_variants,
    )
)
