"""Root-mean-square layer norm (Zhang and Sennrich 2019, eq. 4), alone or after a residual sum.

T rows (tokens, or tokens x heads) · D width · R rows of one tile · P programs of the backward pass.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from drivetrain.kernels.op import Op, Variant, kernel_op, launch, next_power_of_2, register, tl, triton

MAX_WIDTH = 16_384  # a wider row does not fit in an SM's registers
TILE = 4096  # elements that a program holds when rows are short
WIDE = 8192  # the gradient of a wider row leaves no registers for the weights, nor for a gradient of the sum
INTERPRETED_PROGRAMS = 3
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rms_norm_ref(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension.

    Args:
        x_TD: any leading shape; weight_D: same dtype.

    Returns:
        Same shape and dtype as `x_TD`; the mean is taken in fp32 (fp64 for fp64 inputs).
    """
    wide_TD = x_TD.to(torch.float64 if x_TD.dtype == torch.float64 else torch.float32)
    scale_T1 = torch.rsqrt(wide_TD.square().mean(dim=-1, keepdim=True) + eps)
    return (wide_TD * scale_T1).to(x_TD.dtype) * weight_D


def rms_norm_torch(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """torch's own; shapes and dtypes as in `rms_norm_ref`."""
    return F.rms_norm(x_TD, (x_TD.shape[-1],), weight_D, eps)


def add_rms_norm_ref(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The norm of x + residual, and that sum.

    Args:
        x_TD, residual_TD: any leading shape; weight_D: same dtype.

    Returns:
        Two tensors of `x_TD`'s shape and dtype; the sum is rounded to that dtype before it is normed.
    """
    sum_TD = x_TD + residual_TD
    return rms_norm_ref(sum_TD, weight_D, eps), sum_TD


def add_rms_norm_torch(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """torch's own two operations; shapes and dtypes as in `add_rms_norm_ref`."""
    sum_TD = x_TD + residual_TD
    return rms_norm_torch(sum_TD, weight_D, eps), sum_TD


@triton.jit
def _forward(
    x, inner, outer_stride, inner_stride, residual_TD, weight_D, sum_TD, out_TD, rstd_T, T, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (column < D)[None, :]
    if ROWS > 1:
        inside &= (row < T)[:, None]
    start = (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride
    flat = row.to(tl.int64)[:, None] * D + column[None, :]
    x_RD = tl.load(x + start[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if residual_TD is not None:
        x_RD += tl.load(residual_TD + flat, mask=inside, other=0.0).to(tl.float32)
        rounded_RD = x_RD.to(sum_TD.dtype.element_ty)
        tl.store(sum_TD + flat, rounded_RD, mask=inside)
        x_RD = rounded_RD.to(tl.float32)
    weight = tl.load(weight_D + column, mask=column < D, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x_RD * x_RD, axis=1) / D + eps)
    out_RD = x_RD * rstd[:, None] * weight[None, :]
    tl.store(rstd_T + row, rstd, mask=row < T)
    tl.store(out_TD + flat, out_RD.to(out_TD.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    x, inner, outer_stride, inner_stride, weight_D, rstd_T, grad_out_TD, grad_sum_TD, grad_x_TD, grad_weight_PD, T,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, RELOAD: tl.constexpr,
):  # fmt: skip
    # With n = x·rstd and g = grad_out·weight: grad_x = rstd·(g − n·mean(g·n)), grad_weight = Σ grad_out·n.
    column = tl.arange(0, BLOCK)
    weight_kept = tl.load(weight_D + column, mask=column < D, other=0.0)
    grad_weight_RD = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = (column < D)[None, :]
        if ROWS > 1:
            inside &= (row < T)[:, None]
        start = (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride
        flat = row.to(tl.int64)[:, None] * D + column[None, :]
        rstd = tl.load(rstd_T + row, mask=row < T, other=0.0)[:, None]
        x_RD = tl.load(x + start[:, None] + column[None, :], mask=inside, other=0.0)
        grad_RD = tl.load(grad_out_TD + flat, mask=inside, other=0.0).to(tl.float32)
        normed_RD = x_RD.to(tl.float32) * rstd
        grad_weight_RD += grad_RD * normed_RD
        weight = tl.load(weight_D + column, mask=column < D, other=0.0) if RELOAD else weight_kept
        grad_RD *= weight.to(tl.float32)[None, :]
        slope = tl.sum(grad_RD * normed_RD, axis=1)[:, None] / D
        grad_x_RD = rstd * (grad_RD - normed_RD * slope)
        if grad_sum_TD is not None:
            grad_x_RD += tl.load(grad_sum_TD + flat, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x_TD + flat, grad_x_RD.to(grad_x_TD.dtype.element_ty), mask=inside)
    part = tl.program_id(0).to(tl.int64) * D + column
    tl.store(grad_weight_PD + part, tl.sum(grad_weight_RD, axis=0), mask=column < D)


def _tile(width: int) -> tuple[int, int]:
    """Columns (a power of two) and rows of one tile."""
    block = max(64, next_power_of_2(width))
    return block, max(1, TILE // block)


def _forward_warps(block: int, residual: bool) -> int:
    """Four 16-byte loads a thread of a 2-byte dtype, from one input or from two."""
    return max(8, block // 512) if residual else max(4, block // 1024)


def _backward_warps(block: int) -> int:
    """16 elements a thread, 32 of the widest rows: the sums of the weight gradient stay in registers."""
    return min(16, max(8, block // 512))


def _backward_stages(block: int) -> int:
    """Tiles being loaded, worked on and stored at a time; those being loaded wait in shared memory."""
    return 3 if block <= WIDE else 2


def _programs(device: torch.device, block: int) -> int:
    """Programs that walk over all rows: as many as can be resident, so that partial sums are few."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    resident = 2 if block <= TILE else 1
    return resident * torch.cuda.get_device_properties(device).multi_processor_count


def _two_strides(x: Tensor) -> tuple[int, int, int] | None:
    """(inner, outer stride, inner stride): row r begins at r // inner · outer + r % inner · inner stride.

    None when the leading dimensions of `x` do not merge into two or the last one is not contiguous.
    """
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        return None
    merged: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        elif size != 1:
            merged.append((size, stride))
    match merged:
        case []:
            return 1, 0, 0
        case [(_, stride)]:
            return 1, stride, 0
        case [(_, outer), (inner, stride)]:
            return inner, outer, stride
    return None


def _rows_of(x: Tensor) -> tuple[Tensor, int, int, int]:
    """`x`, copied if its rows lie in no two strides, and those strides."""
    strides = _two_strides(x)
    return (x, *strides) if strides is not None else (x.contiguous(), 1, x.shape[-1], 0)


@kernel_op("rms_norm")
def _rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    D = x.shape[-1]
    T = x.numel() // D
    out, rstd_T = x.new_empty(x.shape), x.new_empty(T, dtype=torch.float32)
    block, rows = _tile(D)
    tile = {"D": D, "BLOCK": block, "ROWS": rows, "num_warps": _forward_warps(block, False)}
    launch(_forward)[(triton.cdiv(T, rows),)](*_rows_of(x), None, weight_D, None, out, rstd_T, T, eps, **tile)
    return out, rstd_T


@kernel_op("add_rms_norm")
def _add_rms_norm(x: Tensor, residual: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    D = x.shape[-1]
    T = x.numel() // D
    out, total, rstd_T = x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(T, dtype=torch.float32)
    block, rows = _tile(D)
    tile = {"D": D, "BLOCK": block, "ROWS": rows, "num_warps": _forward_warps(block, True)}
    launch(_forward)[(triton.cdiv(T, rows),)](
        *_rows_of(x), residual.contiguous(), weight_D, total, out, rstd_T, T, eps, **tile
    )
    return out, total, rstd_T


@kernel_op("rms_norm_backward")
def _rms_norm_backward(
    x: Tensor, weight_D: Tensor, rstd_T: Tensor, grad_out: Tensor, grad_sum: Tensor | None
) -> tuple[Tensor, Tensor]:
    D = x.shape[-1]
    block, rows = _tile(D)
    programs = _programs(x.device, block)
    grad_x, grad_weight_PD = x.new_empty(x.shape), x.new_empty(programs, D, dtype=torch.float32)
    fused = grad_sum if block <= WIDE else None
    launch(_backward)[(programs,)](
        *_rows_of(x),
        weight_D,
        rstd_T,
        grad_out.contiguous(),
        None if fused is None else fused.contiguous(),
        grad_x,
        grad_weight_PD,
        x.numel() // D,
        D=D,
        BLOCK=block,
        ROWS=rows,
        STAGES=_backward_stages(block),
        RELOAD=block > WIDE,
        num_warps=_backward_warps(block),
    )
    if grad_sum is not None and fused is None:
        grad_x += grad_sum
    return grad_x, grad_weight_PD.sum(dim=0).to(weight_D.dtype)


@_rms_norm.register_fake
def _(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


@_add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    rstd_T = x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape), rstd_T


@_rms_norm_backward.register_fake
def _(
    x: Tensor, weight_D: Tensor, rstd_T: Tensor, grad_out: Tensor, grad_sum: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight_D)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    x, weight_D, _ = inputs
    ctx.save_for_backward(x, weight_D, output[1])


def _keep_sum(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    _, total, rstd_T = output
    ctx.save_for_backward(total, inputs[2], rstd_T)
    # An output that nobody uses has no gradient: zeros would be another tensor to write and read.
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
    grad_x, grad_weight_D = _rms_norm_backward(*ctx.saved_tensors, grad_out, None)
    return grad_x, grad_weight_D, None


def _differentiate_sum(
    ctx: Any, grad_out: Tensor | None, grad_sum: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    if grad_out is None:
        return grad_sum, grad_sum, None, None
    grad, grad_weight_D = _rms_norm_backward(*ctx.saved_tensors, grad_out, grad_sum)
    return grad, grad, grad_weight_D, None  # x and residual enter by their sum alone


_rms_norm.register_autograd(_differentiate, setup_context=_keep)
_add_rms_norm.register_autograd(_differentiate_sum, setup_context=_keep_sum)


def _check(x: Tensor, weight_D: Tensor) -> None:
    D = x.shape[-1]
    if x.dtype not in DTYPES:
        raise ValueError(f"rms_norm in Triton takes fp32, bf16 and fp16, not {x.dtype}; use another backend")
    if weight_D.dtype != x.dtype:
        raise ValueError(f"rms_norm needs x and weight of one dtype; x is {x.dtype}, weight {weight_D.dtype}")
    if weight_D.shape != (D,):
        raise ValueError(
            f"rms_norm of rows of {D} needs a weight of shape ({D},), not {tuple(weight_D.shape)}"
        )
    if not 0 < D <= MAX_WIDTH:
        raise ValueError(
            f"rms_norm in Triton takes rows of 1 to {MAX_WIDTH:,}, not {D:,}; use another backend"
        )


def rms_norm_triton(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """One kernel forward, one and a small sum backward; shapes and dtypes as in `rms_norm_ref`.

    Everything between loads and stores is fp32. Rows of up to two nested strides are read in place.

    Raises:
        ValueError: x and weight differ in dtype or width, or are fp64, or rows are wider than 16,384.
    """
    _check(x_TD, weight_D)
    return _rms_norm(x_TD, weight_D.contiguous(), eps)[0]


def add_rms_norm_triton(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """As `rms_norm_triton`, with the sum in the same kernels; see `add_rms_norm_ref`.

    Raises:
        ValueError: as `rms_norm_triton`, or x and residual differ in shape or dtype.
    """
    _check(x_TD, weight_D)
    if residual_TD.shape != x_TD.shape or residual_TD.dtype != x_TD.dtype:
        raise ValueError(
            f"add_rms_norm needs x and residual of one shape and dtype; x is {tuple(x_TD.shape)} {x_TD.dtype}, "
            f"residual {tuple(residual_TD.shape)} {residual_TD.dtype}"
        )
    return _add_rms_norm(x_TD, residual_TD, weight_D.contiguous(), eps)[:2]


def rms_norm(x_TD: Tensor, weight_D: Tensor, *, eps: float, backend: str = "sdpa") -> Tensor:
    """RMSNorm over the last dimension; see `rms_norm_ref`."""
    return RMS_NORM.implementation(backend)(x_TD, weight_D, eps)


def add_rms_norm(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, *, eps: float, backend: str = "sdpa"
) -> tuple[Tensor, Tensor]:
    """RMSNorm of x + residual, and the sum for the next residual; see `add_rms_norm_ref`."""
    return ADD_RMS_NORM.implementation(backend)(x_TD, residual_TD, weight_D, eps)


def _draw(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def _example_inputs(dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    return _draw(generator, dtype, 37, 5, 48), _draw(generator, dtype, 48), 1e-5


def _add_example_inputs(
    dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, float]:
    x_TD, residual_TD = _draw(generator, dtype, 131, 80), _draw(generator, dtype, 131, 80)
    return x_TD, residual_TD, _draw(generator, dtype, 80), 1e-5


def _signature(kernel: Any, dtype: str, constants: dict[str, Any]) -> dict[str, str]:
    """Types by name; strides of a multiple of 16 elements let 16 bytes be loaded at once."""
    kinds = {"rstd_T": "*fp32", "grad_weight_PD": "*fp32", "inner": "i32", "T": "i32", "eps": "fp32"}
    kinds |= {"outer_stride": "i32:16", "inner_stride": "i32:16"}
    return {
        name: "constexpr" if name in constants else kinds.get(name, f"*{dtype}") for name in kernel.arg_names
    }


def _variants_of(residual: bool) -> Iterator[Variant]:
    """Both kernels at every tile, for a width that fills its tile and one that does not."""
    for width in (part << exponent for exponent in range(4, 13) for part in (3, 4)):
        block, rows = _tile(width)
        tile = {"D": width, "BLOCK": block, "ROWS": rows}
        if residual or width > 256:
            tile["inner"] = 1  # norms of heads alone read rows of two strides
        absent = {} if residual else {"residual_TD": None, "sum_TD": None}
        loop = {"STAGES": _backward_stages(block), "RELOAD": block > WIDE}
        fused = {} if residual and block <= WIDE else {"grad_sum_TD": None}
        for kernel, constants, warps in (
            (_forward, {**tile, **absent}, _forward_warps(block, residual)),
            (_backward, {**tile, **loop, **fused}, _backward_warps(block)),
        ):
            for dtype in ("bf16", "fp16", "fp32"):
                yield Variant(kernel, _signature(kernel, dtype, constants), constants, warps, num_stages=3)


def _variants() -> Iterator[Variant]:
    yield from _variants_of(residual=False)


def _add_variants() -> Iterator[Variant]:
    yield from _variants_of(residual=True)


TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}

RMS_NORM = register(
    Op(
        name="rms_norm",
        ref=rms_norm_ref,
        fast={"sdpa": rms_norm_torch, "triton": rms_norm_triton},
        example_inputs=_example_inputs,
        tolerances=TOLERANCES,
        variants=_variants,
    )
)

ADD_RMS_NORM = register(
    Op(
        name="add_rms_norm",
        ref=add_rms_norm_ref,
        fast={"sdpa": add_rms_norm_torch, "triton": add_rms_norm_triton},
        example_inputs=_add_example_inputs,
        tolerances=TOLERANCES,
        variants=_add_variants,
    )
)
