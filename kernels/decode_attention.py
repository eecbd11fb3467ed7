"""Attention of a few new tokens over a paged cache of keys and values, for a sampler.

B sequences · Q new tokens of each · N query heads · K key/value heads · H head dim · P pages of L tokens · M pages
a sequence at most, so that the longest has C = M·L tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from drivetrain.kernels.decode_attention_triton import decode_attention_triton, variants
from drivetrain.kernels.op import Op, register


def _visible(lengths_B: Tensor, Q: int, C: int, sliding_window: int | None) -> tuple[Tensor, Tensor]:
    """Which of C places hold a token, bool [B, C], and which of them each query sees, bool [B, Q, C]."""
    place_C = torch.arange(C, device=lengths_B.device)
    position_BQ = lengths_B[:, None] - Q + torch.arange(Q, device=lengths_B.device)
    age_BQC = position_BQ[:, :, None] - place_C
    seen_BQC = age_BQC >= 0
    if sliding_window is not None:
        seen_BQC = seen_BQC & (age_BQC < sliding_window)
    return place_C < lengths_B[:, None], seen_BQC


def _gather(cache_PLKH: Tensor, page_table_BM: Tensor, filled_BC: Tensor) -> Tensor:
    """The sequences' own keys or values [B, C, K, H], with zeros where they hold none."""
    pages_BM = page_table_BM.masked_fill(~filled_BC[:, :: cache_PLKH.shape[1]], 0).long()
    return cache_PLKH[pages_BM].flatten(1, 2).masked_fill(~filled_BC[:, :, None, None], 0)


def decode_attention_ref(
    q_BQNH: Tensor,
    k_cache_PLKH: Tensor,
    v_cache_PLKH: Tensor,
    page_table_BM: Tensor,
    lengths_B: Tensor,
    scale: float | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ) v over the keys that each query sees; see `decode_attention` for the arguments.

    The arithmetic is fp32, or fp64 for fp64 inputs.
    """
    Q, N, H = q_BQNH.shape[1:]
    L, K = k_cache_PLKH.shape[1:3]
    wide = torch.float64 if q_BQNH.dtype == torch.float64 else torch.float32
    filled_BC, seen_BQC = _visible(lengths_B, Q, page_table_BM.shape[1] * L, sliding_window)
    k_BCNH, v_BCNH = (
        _gather(cache, page_table_BM, filled_BC).to(wide).repeat_interleave(N // K, dim=2)
        for cache in (k_cache_PLKH, v_cache_PLKH)
    )
    scores_BNQC = torch.einsum("bqnh,bcnh->bnqc", q_BQNH.to(wide), k_BCNH)
    scale = H**-0.5 if scale is None else scale
    hidden_B1QC = ~seen_BQC.unsqueeze(1)
    probs_BNQC = (scores_BNQC * scale).masked_fill(hidden_B1QC, float("-inf")).softmax(dim=-1)
    # Filled again: the softmax of a query that sees nothing is NaN.
    return torch.einsum("bnqc,bcnh->bqnh", probs_BNQC.masked_fill(hidden_B1QC, 0), v_BCNH).to(q_BQNH.dtype)


def decode_attention_sdpa(
    q_BQNH: Tensor,
    k_cache_PLKH: Tensor,
    v_cache_PLKH: Tensor,
    page_table_BM: Tensor,
    lengths_B: Tensor,
    scale: float | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """torch's scaled_dot_product_attention over a copy of the pages; shapes and dtypes as in `decode_attention`."""
    Q, N = q_BQNH.shape[1:3]
    L, K = k_cache_PLKH.shape[1:3]
    filled_BC, seen_BQC = _visible(lengths_B, Q, page_table_BM.shape[1] * L, sliding_window)
    out_BNQH = F.scaled_dot_product_attention(
        q_BQNH.transpose(1, 2),
        _gather(k_cache_PLKH, page_table_BM, filled_BC).transpose(1, 2),
        _gather(v_cache_PLKH, page_table_BM, filled_BC).transpose(1, 2),
        attn_mask=seen_BQC.unsqueeze(1),
        scale=scale,
        enable_gqa=N != K,
    )
    blind_BQ11 = ~seen_BQC.any(dim=-1)[:, :, None, None]
    return out_BNQH.transpose(1, 2).masked_fill(blind_BQ11, 0)


def decode_attention(
    q_BQNH: Tensor,
    k_cache_PLKH: Tensor,
    v_cache_PLKH: Tensor,
    page_table_BM: Tensor,
    lengths_B: Tensor,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    backend: str = "sdpa",
) -> Tensor:
    """Grouped-query attention of each sequence's newest Q tokens to its cached tokens, these Q included.

    A cache that is not paged, [B, C, K, H], is one of B pages of C tokens each:
    `page_table_BM = torch.arange(B, dtype=torch.int32, device=device)[:, None]`.

    Args:
        q_BQNH: queries; query i stands at position length - Q + i and sees the keys up to its own. Head n reads
            head n·K//N.
        k_cache_PLKH, v_cache_PLKH: pages of keys and values, same dtype, of any strides but the last; what lies in
            no sequence's length is never used.
        page_table_BM: int32; token t of sequence b lies in page `page_table_BM[b, t // L]`. Entries past the length
            are ignored, those before it must lie in [0, P).
        lengths_B: int32, tokens of each sequence, at most M·L. A query that sees no key (one of a sequence
            shorter than Q) gives zeros.
        scale: of the scores; 1/√H when None.
        sliding_window: a token sees itself and the `sliding_window - 1` tokens before it.

    Returns:
        [B, Q, N, H] in the dtype of `q_BQNH`. There is no backward pass.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or an input that asks for a gradient.
        KeyError: `backend` is not one of `OPS["decode_attention"].fast` or "reference".
    """
    _check(q_BQNH, k_cache_PLKH, v_cache_PLKH, page_table_BM, lengths_B, sliding_window)
    run = DECODE_ATTENTION.implementation(backend)
    found: Tensor = run(q_BQNH, k_cache_PLKH, v_cache_PLKH, page_table_BM, lengths_B, scale, sliding_window)
    return found


def _check(
    q_BQNH: Tensor,
    k_cache_PLKH: Tensor,
    v_cache_PLKH: Tensor,
    page_table_BM: Tensor,
    lengths_B: Tensor,
    sliding_window: int | None,
) -> None:
    def fail(why: str) -> None:
        raise ValueError(f"decode_attention: {why}")

    if q_BQNH.dim() != 4 or k_cache_PLKH.dim() != 4 or k_cache_PLKH.shape != v_cache_PLKH.shape:
        shapes = [list(x.shape) for x in (q_BQNH, k_cache_PLKH, v_cache_PLKH)]
        fail(f"queries must be [B, Q, N, H] and both caches [P, L, K, H], these are {shapes}")
    B, _, N, H = q_BQNH.shape
    K = k_cache_PLKH.shape[2]
    if k_cache_PLKH.shape[3] != H or N % K:
        fail(f"{N} query heads of {H} cannot read {K} key/value heads of {k_cache_PLKH.shape[3]}")
    if not q_BQNH.dtype == k_cache_PLKH.dtype == v_cache_PLKH.dtype:
        fail(f"queries, keys and values differ: {q_BQNH.dtype}, {k_cache_PLKH.dtype}, {v_cache_PLKH.dtype}")
    if page_table_BM.dtype != torch.int32 or page_table_BM.dim() != 2 or page_table_BM.shape[0] != B:
        fail(f"the page table must be int32 [{B}, M], is {page_table_BM.dtype} {list(page_table_BM.shape)}")
    if lengths_B.dtype != torch.int32 or lengths_B.shape != (B,):
        fail(f"lengths must be int32 [{B}], are {lengths_B.dtype} {list(lengths_B.shape)}")
    devices = {x.device for x in (q_BQNH, k_cache_PLKH, v_cache_PLKH, page_table_BM, lengths_B)}
    if len(devices) > 1:
        fail(f"inputs lie on several devices: {sorted(map(str, devices))}")
    if sliding_window is not None and sliding_window < 1:
        fail(f"a sliding window of {sliding_window} shows a token nothing, use at least 1")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q_BQNH, k_cache_PLKH, v_cache_PLKH)):
        fail("it has no backward pass and an input requires grad: call it under torch.no_grad()")


def _example_inputs(
    dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    page_table_BM = torch.randperm(13, generator=generator)[:12].view(3, 4).int()
    lengths_B = torch.tensor([2, 64, 37], dtype=torch.int32)
    return draw(3, 2, 4, 32), draw(13, 16, 2, 32), draw(13, 16, 2, 32), page_table_BM, lengths_B


DECODE_ATTENTION = register(
    Op(
        name="decode_attention",
        ref=decode_attention_ref,
        fast={"sdpa": decode_attention_sdpa, "triton": decode_attention_triton},
        example_inputs=_example_inputs,
        tolerances={torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3},
        variants=variants,
        differentiable=False,
    )
)
