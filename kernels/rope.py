"""Rotary position embedding (Su et al. 2021), the halves layout that Llama checkpoints use.

T tokens · N query heads · K key/value heads · H head dim. Channel i turns with channel i + H/2.
"""

import math

import torch
from torch import Tensor

from drivetrain.kernels.op import Op, register


def rope_frequencies(
    head_dim: int,
    theta: float,
    *,
    factor: float = 1.0,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    original_max_seq_len: int = 8192,
) -> Tensor:
    """Angles per position, fp32 [H/2]: theta^(-2i/H), with Llama 3.1's scaling when `factor` is not 1.

    Wavelengths above original/low_freq_factor are stretched by `factor`, those below
    original/high_freq_factor are kept, and those between are blended linearly (Llama 3 report, section 3.2).
    """
    inverse_h = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    if factor == 1.0:
        return inverse_h
    turns_h = original_max_seq_len * inverse_h / (2 * math.pi)
    keep_h = ((turns_h - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return inverse_h * (keep_h + (1 - keep_h) / factor)


def rope_tables(positions_T: Tensor, frequencies_h: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [T, H/2], of each token's position; computed once a forward pass."""
    angles_Th = positions_T.float()[:, None] * frequencies_h[None, :]
    return angles_Th.cos(), angles_Th.sin()


def _rotate(x_TNH: Tensor, cos_Th: Tensor, sin_Th: Tensor) -> Tensor:
    first_TNh, second_TNh = x_TNH.chunk(2, dim=-1)
    cos_T1h, sin_T1h = cos_Th.unsqueeze(1), sin_Th.unsqueeze(1)
    # bf16 times fp32 is fp32: the products are wide without a widened copy of the input.
    turned_TNh = first_TNh * cos_T1h - second_TNh * sin_T1h, second_TNh * cos_T1h + first_TNh * sin_T1h
    return torch.cat(turned_TNh, dim=-1).to(x_TNH.dtype)


def rope_ref(q_TNH: Tensor, k_TKH: Tensor, cos_Th: Tensor, sin_Th: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions; outputs have the inputs' shapes and dtypes."""
    return _rotate(q_TNH, cos_Th, sin_Th), _rotate(k_TKH, cos_Th, sin_Th)


def rope(
    q_TNH: Tensor, k_TKH: Tensor, cos_Th: Tensor, sin_Th: Tensor, *, backend: str = "sdpa"
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys; see `rope_ref`."""
    run = ROPE.fast.get(backend, rope_ref)
    return run(q_TNH, k_TKH, cos_Th, sin_Th)


def _example_inputs(dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q_TNH = torch.randn(9, 4, 16, generator=generator, dtype=torch.float64)
    k_TKH = torch.randn(9, 2, 16, generator=generator, dtype=torch.float64)
    cos_Th, sin_Th = rope_tables(torch.arange(9), rope_frequencies(16, 10000.0))
    return q_TNH.to(dtype), k_TKH.to(dtype), cos_Th, sin_Th


ROPE = register(
    Op(
        name="rope",
        ref=rope_ref,
        fast={},
        example_inputs=_example_inputs,
        tolerances={torch.float32: 1e-5, torch.bfloat16: 2e-2},
    )
)
