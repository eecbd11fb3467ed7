"""SwiGLU's gate (Shazeer 2020, eq. 5). T tokens · F hidden width; gate and up lie in one buffer."""

import torch
import torch.nn.functional as F
from torch import Tensor

from drivetrain.kernels.op import Op, register


def swiglu_ref(gate_up_TG: Tensor) -> Tensor:
    """silu(gate) · up.

    Args:
        gate_up_TG: [T, 2F]: gate in the first F columns, up in the last.

    Returns:
        [T, F] in the same dtype.
    """
    gate_TF, up_TF = gate_up_TG.chunk(2, dim=-1)
    return F.silu(gate_TF) * up_TF


def swiglu(gate_up_TG: Tensor, *, backend: str = "sdpa") -> Tensor:
    """silu(gate) · up; see `swiglu_ref`."""
    return SWIGLU.fast.get(backend, swiglu_ref)(gate_up_TG)


def _example_inputs(dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor]:
    return (torch.randn(7, 48, generator=generator, dtype=torch.float64).to(dtype),)


SWIGLU = register(
    Op(
        name="swiglu",
        ref=swiglu_ref,
        fast={},
        example_inputs=_example_inputs,
        tolerances={torch.float32: 1e-5, torch.bfloat16: 2e-2},
    )
)
