"""Rotary position embedding (Su et al. 2021), the halves layout that Llama checkpoints use.

T tokens · N query heads · K key/value heads · H head dim · h angles a token, at most H/2. Channel i < h turns with
channel i + h; channels from 2h on stay as they are (partial rotary).
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from drivetrain.kernels.op import Op, Variant, kernel_op, launch, next_power_of_2, register, tl, triton

TILE = 2048  # pairs of channels that a program turns at a time
WARPS = 4
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rope_frequencies(
    rotary_dim: int,
    theta: float,
    *,
    factor: float = 1.0,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    original_max_seq_len: int = 8192,
) -> Tensor:
    """Angles per position, fp32 [rotary_dim/2]: theta^(-2i/rotary_dim), with Llama 3.1's scaling.

    `rotary_dim` is the number of channels that turn: the head dim, or an even number below it.
    With `factor` other than 1, wavelengths above original/low_freq_factor are stretched by `factor`, those below
    original/high_freq_factor are kept, and those between are blended linearly (Llama 3 report, section 3.2).
    """
    inverse_h = theta ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float32, device="cpu") / rotary_dim)
    if factor == 1.0:
        return inverse_h
    turns_h = original_max_seq_len * inverse_h / (2 * math.pi)
    keep_h = ((turns_h - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return inverse_h * (keep_h + (1 - keep_h) / factor)


def rope_tables(positions_T: Tensor, frequencies_h: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [T, h], of each token's position; computed once a forward pass."""
    angles_Th = positions_T.float()[:, None] * frequencies_h[None, :]
    return angles_Th.cos(), angles_Th.sin()


def _rotate(x_TNH: Tensor, cos_Th: Tensor, sin_Th: Tensor) -> Tensor:
    h, H = cos_Th.shape[-1], x_TNH.shape[-1]
    first_TNh, second_TNh, rest_TNr = x_TNH.split((h, h, H - 2 * h), dim=-1)
    cos_T1h, sin_T1h = cos_Th.unsqueeze(1), sin_Th.unsqueeze(1)
    # bf16 times fp32 is fp32: the products are wide without a widened copy of the input.
    turned_TNh = first_TNh * cos_T1h - second_TNh * sin_T1h, second_TNh * cos_T1h + first_TNh * sin_T1h
    return torch.cat([*(part.to(x_TNH.dtype) for part in turned_TNh), rest_TNr], dim=-1)


def rope_ref(q_TNH: Tensor, k_TKH: Tensor, cos_Th: Tensor, sin_Th: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions.

    Args:
        q_TNH, k_TKH: one dtype. cos_Th, sin_Th: fp32 from `rope_tables`, one row a token.

    Returns:
        Two tensors of the inputs' shapes and dtypes; channels from 2h on are copied.
    """
    return _rotate(q_TNH, cos_Th, sin_Th), _rotate(k_TKH, cos_Th, sin_Th)


@triton.jit
def _turn(
    x,
    token_stride,
    head_stride,
    out_TNH,
    cos_Bh,
    sin_Bh,
    token,
    T,
    N: tl.constexpr,
    H: tl.constexpr,
    h: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
):
    """All heads of a few tokens, HEADS at a time."""
    pair = tl.arange(0, PAIRS)[None, None, :]
    token_B11 = token.to(tl.int64)[:, None, None]
    for first_head in range(0, N, HEADS):
        head = first_head + tl.arange(0, HEADS)[None, :, None]
        here = (token_B11 < T) & (head < N)
        source = x + token_B11 * token_stride + head.to(tl.int64) * head_stride
        target = out_TNH + token_B11 * (N * H) + head * H
        inside = here & (pair < h)
        first = tl.load(source + pair, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(source + h + pair, mask=inside, other=0.0).to(tl.float32)
        turned = first * cos_Bh - second * sin_Bh
        tl.store(target + pair, turned.to(out_TNH.dtype.element_ty), mask=inside)
        turned = second * cos_Bh + first * sin_Bh
        tl.store(target + h + pair, turned.to(out_TNH.dtype.element_ty), mask=inside)
        if 2 * h < H:
            channel = 2 * h + tl.arange(0, REST)[None, None, :]
            kept = here & (channel < H)
            tl.store(target + channel, tl.load(source + channel, mask=kept), mask=kept)


@triton.jit
def _rotate_heads(
    q,
    q_token_stride,
    q_head_stride,
    k,
    k_token_stride,
    k_head_stride,
    cos_Th,
    sin_Th,
    q_out_TNH,
    k_out_TKH,
    T,
    INVERSE: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    h: tl.constexpr,
    TOKENS: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    pair = tl.arange(0, PAIRS)[None, None, :]
    angle = token.to(tl.int64)[:, None, None] * h + pair
    inside = (token < T)[:, None, None] & (pair < h)
    cos_Bh = tl.load(cos_Th + angle, mask=inside, other=0.0)
    sin_Bh = tl.load(sin_Th + angle, mask=inside, other=0.0)
    if INVERSE:
        sin_Bh = -sin_Bh
    _turn(
        q, q_token_stride, q_head_stride, q_out_TNH, cos_Bh, sin_Bh, token, T, N, H, h, Q_HEADS, PAIRS, REST
    )
    _turn(
        k, k_token_stride, k_head_stride, k_out_TKH, cos_Bh, sin_Bh, token, T, K, H, h, K_HEADS, PAIRS, REST
    )


def _tile(N: int, K: int, H: int, h: int) -> dict[str, int]:
    """The kernel's constants: all heads of a few tokens if they fit, else heads in a loop."""
    pairs, rest = next_power_of_2(h), next_power_of_2(max(1, H - 2 * h))
    rows = max(1, TILE // max(pairs, rest // 2))
    q_heads, k_heads = (min(next_power_of_2(heads), rows) for heads in (N, K))
    tokens = max(1, rows // max(q_heads, k_heads))
    constants = {"N": N, "K": K, "H": H, "h": h, "TOKENS": tokens}
    return constants | {"Q_HEADS": q_heads, "K_HEADS": k_heads, "PAIRS": pairs, "REST": rest}


def _dense(x: Tensor) -> Tensor:
    """`x`, copied if its channels do not lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


@kernel_op("rope")
def _rope(q: Tensor, k: Tensor, cos_Th: Tensor, sin_Th: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    T, N, H = q.shape
    tile = _tile(N, k.shape[1], H, cos_Th.shape[1])
    q, k, q_out, k_out = _dense(q), _dense(k), q.new_empty(q.shape), k.new_empty(k.shape)
    launch(_rotate_heads)[(triton.cdiv(T, tile["TOKENS"]),)](
        q,
        q.stride(0),
        q.stride(1),
        k,
        k.stride(0),
        k.stride(1),
        cos_Th,
        sin_Th,
        q_out,
        k_out,
        T,
        INVERSE=inverse,
        num_warps=WARPS,
        **tile,
    )
    return q_out, k_out


@_rope.register_fake
def _(q: Tensor, k: Tensor, cos_Th: Tensor, sin_Th: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _keep(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, bool], output: tuple[Tensor, Tensor]
) -> None:
    ctx.save_for_backward(inputs[2], inputs[3])
    ctx.inverse = inputs[4]


def _differentiate(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
    # A rotation is orthogonal: its transpose turns back.
    return *_rope(grad_q, grad_k, *ctx.saved_tensors, not ctx.inverse), None, None, None


_rope.register_autograd(_differentiate, setup_context=_keep)


def _check(q_TNH: Tensor, k_TKH: Tensor, cos_Th: Tensor, sin_Th: Tensor) -> None:
    q, k, cos = tuple(q_TNH.shape), tuple(k_TKH.shape), tuple(cos_Th.shape)
    if len(q) != 3 or len(k) != 3 or q[::2] != k[::2]:
        raise ValueError(f"rope needs queries [T, N, H] and keys [T, K, H]; they are {q} and {k}")
    if q_TNH.dtype not in DTYPES or k_TKH.dtype != q_TNH.dtype:
        raise ValueError(
            f"rope in Triton takes queries and keys of one dtype, fp32, bf16 or fp16, not {q_TNH.dtype} and "
            f"{k_TKH.dtype}; use another backend"
        )
    if cos_Th.dtype != torch.float32 or sin_Th.dtype != torch.float32 or cos != tuple(sin_Th.shape):
        raise ValueError("rope needs cos and sin of one shape in fp32, as rope_tables makes them")
    if len(cos) != 2 or cos[0] != q[0] or not 0 < 2 * cos[1] <= q[2]:
        raise ValueError(
            f"rope of {q[0]} tokens, head dim {q[2]}, needs tables [{q[0]}, 1 to {q[2] // 2}], not {cos}"
        )


def rope_triton(q_TNH: Tensor, k_TKH: Tensor, cos_Th: Tensor, sin_Th: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys in one kernel, backward in the same one turned back; shapes and dtypes as in `rope_ref`.

    Views with contiguous channels, such as parts of one buffer of queries, keys and values, are read in place. The
    arithmetic is fp32, the outputs are contiguous; cos and sin get no gradient.

    Raises:
        ValueError: shapes or dtypes other than `rope_ref` states, or fp64.
    """
    _check(q_TNH, k_TKH, cos_Th, sin_Th)
    return _rope(q_TNH, k_TKH, cos_Th.contiguous(), sin_Th.contiguous(), False)


def rope(
    q_TNH: Tensor, k_TKH: Tensor, cos_Th: Tensor, sin_Th: Tensor, *, backend: str = "sdpa"
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys; see `rope_ref`."""
    return ROPE.implementation(backend)(q_TNH, k_TKH, cos_Th, sin_Th)


def _example_inputs(dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q_TNH = torch.randn(37, 6, 80, generator=generator, dtype=torch.float64)
    k_TKH = torch.randn(37, 2, 80, generator=generator, dtype=torch.float64)
    positions_T = torch.cat((torch.arange(11), torch.arange(26)))
    cos_Th, sin_Th = rope_tables(positions_T, rope_frequencies(48, 10000.0))
    return q_TNH.to(dtype), k_TKH.to(dtype), cos_Th, sin_Th


def _variants() -> Iterator[Variant]:
    """Head counts and dims of Llama 3 8B and 70B, GPT-2, Gemma and Phi-2, and the smallest partial rotation."""
    for N, K, H, h in (
        (32, 8, 128, 64),
        (64, 8, 128, 64),
        (25, 25, 64, 32),
        (12, 12, 64, 32),
        (8, 1, 256, 128),
        (32, 32, 80, 16),
        (3, 1, 96, 1),
    ):
        for dtype in ("bf16", "fp16", "fp32"):
            for inverse in (False, True):
                constants = {"INVERSE": inverse, **_tile(N, K, H, h)}
                kinds = dict.fromkeys(_rotate_heads.arg_names, f"*{dtype}")
                kinds |= {"cos_Th": "*fp32", "sin_Th": "*fp32", "T": "i32"}
                kinds |= {f"{x}_{of}_stride": "i32:16" for x in "qk" for of in ("token", "head")}
                kinds |= dict.fromkeys(constants, "constexpr")
                yield Variant(_rotate_heads, kinds, constants, WARPS, num_stages=3)


ROPE = register(
    Op(
        name="rope",
        ref=rope_ref,
        fast={"triton": rope_triton},
        example_inputs=_example_inputs,
        tolerances={torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3},
        variants=_variants,
    )
)
