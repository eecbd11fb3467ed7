"""Root-mean-square layer norm (Zhang and Sennrich 2019, eq. 4). T tokens · D width."""

import torch
import torch.nn.functional as F
from torch import Tensor

from drivetrain.kernels.op import Op, register


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


def rms_norm(x_TD: Tensor, weight_D: Tensor, *, eps: float, backend: str = "sdpa") -> Tensor:
    """RMSNorm over the last dimension; see `rms_norm_ref`."""
    run = rms_norm_ref if backend == "reference" else RMS_NORM.fast[backend]
    return run(x_TD, weight_D, eps)


def _example_inputs(dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    x_TD = torch.randn(7, 48, generator=generator, dtype=torch.float64)
    weight_D = torch.randn(48, generator=generator, dtype=torch.float64)
    return x_TD.to(dtype), weight_D.to(dtype), 1e-5


RMS_NORM = register(
    Op(
        name="rms_norm",
        ref=rms_norm_ref,
        fast={"sdpa": rms_norm_torch},
        example_inputs=_example_inputs,
        tolerances={torch.float32: 1e-5, torch.bfloat16: 2e-2},
    )
)
