"""Causal attention over packed documents.

T tokens · N query heads · K key/value heads (N a multiple of K) · H head dim · R rows of S tokens, T = R·S.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from drivetrain.kernels.op import Op, register


@dataclass(frozen=True, slots=True)
class Documents:
    """Where the packed documents of a batch begin and end; no token sees another document.

    Attributes:
        cu_seqlens: int32 [documents + 1], cumulative lengths from 0 to T.
        max_seqlen: the longest document, in tokens.
        row_len: S. Documents never cross a multiple of S, so that T tokens are also R rows of S.
        mask_R1SS: True where a query may see a key (bool), or what is added to its score (0 or -inf); None when
            every row is one whole document.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    row_len: int
    mask_R1SS: Tensor | None

    def with_bias(self, dtype: torch.dtype) -> "Documents":
        """The mask as a bias of the compute dtype, made once for all layers; torch would make one in each."""
        if self.mask_R1SS is None or self.mask_R1SS.dtype != torch.bool:
            return self
        bias_R1SS = torch.zeros_like(self.mask_R1SS, dtype=dtype).masked_fill_(~self.mask_R1SS, float("-inf"))
        return replace(self, mask_R1SS=bias_R1SS)


def make_documents(
    cu_seqlens: Tensor, max_seqlen: int, tokens: int, row_len: int, sliding_window: int | None = None
) -> Documents:
    """Prepare what every layer of one forward pass shares.

    Args:
        cu_seqlens: int32 [documents + 1] on the batch's device.
        max_seqlen: the longest document.
        tokens: T.
        row_len: a length that divides T and that no document crosses.
        sliding_window: a token sees itself and the `sliding_window - 1` tokens before it.
    """
    rows = tokens // row_len
    whole_rows = cu_seqlens.shape[0] - 1 == rows  # as many documents as rows, and none crosses a row
    if whole_rows and (sliding_window is None or sliding_window >= row_len):
        return Documents(cu_seqlens, max_seqlen, row_len, None)
    index_T = torch.arange(tokens, device=cu_seqlens.device, dtype=torch.int32)
    document_RS = torch.bucketize(index_T, cu_seqlens, right=True, out_int32=True).view(rows, row_len)
    place_S = torch.arange(row_len, device=cu_seqlens.device)
    age_SS = place_S[:, None] - place_S[None, :]
    seen_SS = age_SS >= 0 if sliding_window is None else (age_SS >= 0) & (age_SS < sliding_window)
    mask_R1SS = ((document_RS[:, :, None] == document_RS[:, None, :]) & seen_SS).unsqueeze(1)
    return Documents(cu_seqlens, max_seqlen, row_len, mask_R1SS)


def attention_ref(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, documents: Documents, sliding_window: int | None = None
) -> Tensor:
    """The definition, with all T x T scores in memory: softmax(q kᵀ / √H) v within each document.

    Args:
        q_TNH: queries; k_TKH, v_TKH: keys and values, same dtype; head n reads head n·K//N.

    Returns:
        [T, N, H] in the dtype of `q_TNH`. The arithmetic is fp32, or fp64 for fp64 inputs.
    """
    T, N, H = q_TNH.shape
    wide = torch.float64 if q_TNH.dtype == torch.float64 else torch.float32
    groups = N // k_TKH.shape[1]
    k_TNH = k_TKH.repeat_interleave(groups, dim=1).to(wide)
    v_TNH = v_TKH.repeat_interleave(groups, dim=1).to(wide)
    index_T = torch.arange(T, device=q_TNH.device, dtype=torch.int32)
    document_T = torch.bucketize(index_T, documents.cu_seqlens, right=True)
    age_TT = index_T[:, None] - index_T[None, :]
    seen_TT = (document_T[:, None] == document_T[None, :]) & (age_TT >= 0)
    if sliding_window is not None:
        seen_TT = seen_TT & (age_TT < sliding_window)
    scores_NTT = torch.einsum("tnh,snh->nts", q_TNH.to(wide), k_TNH) * H**-0.5
    probs_NTT = scores_NTT.masked_fill(~seen_TT, float("-inf")).softmax(dim=-1)
    return torch.einsum("nts,snh->tnh", probs_NTT, v_TNH).to(q_TNH.dtype)


def attention_sdpa(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, documents: Documents, sliding_window: int | None = None
) -> Tensor:
    """torch's scaled_dot_product_attention, a row at a time; the mask is left out where rows are whole.

    `documents` must have been made with the same `sliding_window`. Shapes and dtypes as in `attention_ref`.
    """
    T, N, H = q_TNH.shape
    K = k_TKH.shape[1]
    S = documents.row_len
    q_RNSH = q_TNH.view(T // S, S, N, H).transpose(1, 2)
    k_RKSH = k_TKH.view(T // S, S, K, H).transpose(1, 2)
    v_RKSH = v_TKH.view(T // S, S, K, H).transpose(1, 2)
    out_RNSH = F.scaled_dot_product_attention(
        q_RNSH,
        k_RKSH,
        v_RKSH,
        attn_mask=documents.mask_R1SS,
        is_causal=documents.mask_R1SS is None,
        enable_gqa=N != K,
    )
    return out_RNSH.transpose(1, 2).reshape(T, N, H)


def attention(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    documents: Documents,
    *,
    sliding_window: int | None = None,
    backend: str = "sdpa",
) -> Tensor:
    """Causal grouped-query attention within each document; see `attention_ref` for shapes and dtypes.

    Raises:
        KeyError: `backend` is not one of `OPS["attention"].fast` or "reference".
    """
    run = attention_ref if backend == "reference" else ATTENTION.fast[backend]
    return run(q_TNH, k_TKH, v_TKH, documents, sliding_window)


def _example_inputs(
    dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Documents]:
    def draw(heads: int) -> Tensor:
        return torch.randn(48, heads, 16, generator=generator, dtype=torch.float64).to(dtype)

    cu_seqlens = torch.tensor([0, 5, 24, 25, 48], dtype=torch.int32)
    return draw(6), draw(2), draw(2), make_documents(cu_seqlens, 23, 48, 48)


ATTENTION = register(
    Op(
        name="attention",
        ref=attention_ref,
        fast={"sdpa": attention_sdpa},
        example_inputs=_example_inputs,
        tolerances={torch.float32: 1e-5, torch.bfloat16: 2e-2},
    )
)
