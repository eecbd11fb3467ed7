"""Grouped-query attention over packed documents, causal or full.

T tokens · N query heads · K key/value heads (N a multiple of K) · H head dim · R rows of S tokens, T = R·S.

A causal document may branch: after a beginning that all of it sees come branches that do not see each other, as
several completions of one prompt do (Liu et al. 2025, https://arxiv.org/abs/2506.05433, train GRPO so).
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from drivetrain.kernels.attention_triton import interval_attention, variants
from drivetrain.kernels.op import Op, register


@dataclass(frozen=True, slots=True)
class Documents:
    """Where the packed documents of a batch begin and end, and who sees whom; no token sees another document.

    Attributes:
        cu_seqlens: int32 [documents + 1], cumulative lengths from 0 to T.
        max_seqlen: the longest document, in tokens.
        row_len: S. Documents never cross a multiple of S, so that T tokens are also R rows of S.
        mask_R1SS: for sdpa: True where a query may see a key (bool), or what is added to its score (0 or -inf);
            None when every row is one whole document.
        seen_4T: for triton, int32: the first key and one past the last key that each query sees, the first query
            and one past the last query that see each key.
        causal: a token sees none after it. sliding_window: as in `make_documents`, None where no document is
            longer.
        backend: whose parts are there; None for all.
        branches_2T: as in `make_documents`. shared_4T: for triton, what `seen_4T` is, of beginnings alone;
            `seen_4T` then holds what a token sees of its own branch.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    row_len: int
    mask_R1SS: Tensor | None
    seen_4T: Tensor | None = None
    causal: bool = True
    sliding_window: int | None = None
    backend: str | None = None
    branches_2T: Tensor | None = None
    shared_4T: Tensor | None = None

    def with_bias(self, dtype: torch.dtype) -> "Documents":
        """The mask as a bias of the compute dtype, made once for all layers; torch would make one in each."""
        if self.mask_R1SS is None or self.mask_R1SS.dtype != torch.bool:
            return self
        bias_R1SS = torch.zeros_like(self.mask_R1SS, dtype=dtype).masked_fill_(~self.mask_R1SS, float("-inf"))
        return replace(self, mask_R1SS=bias_R1SS)

    def check(self, backend: str, sliding_window: int | None, causal: bool) -> None:
        """Raise ValueError unless these were made for `backend` and for this view of each other."""
        if self.backend not in (None, backend):
            raise ValueError(
                f"these documents were made for attention={self.backend}, not {backend}; "
                f"call make_documents(..., backend={backend!r})"
            )
        asked = _window_that_matters(sliding_window, self.max_seqlen), causal
        if asked != (self.sliding_window, self.causal):
            raise ValueError(
                f"these documents were made for sliding_window={self.sliding_window} and causal={self.causal}, "
                f"attention was called with {asked[0]} and {causal}; give make_documents the same"
            )


def _window_that_matters(sliding_window: int | None, max_seqlen: int) -> int | None:
    return None if sliding_window is None or sliding_window >= max_seqlen else sliding_window


def make_documents(
    cu_seqlens: Tensor,
    max_seqlen: int,
    tokens: int,
    row_len: int,
    sliding_window: int | None = None,
    *,
    causal: bool = True,
    backend: str | None = None,
    branches_2T: Tensor | None = None,
) -> Documents:
    """Prepare what every layer of one forward pass shares, without waiting for the device.

    Args:
        cu_seqlens: int32 [documents + 1] on the batch's device.
        max_seqlen: the longest document.
        tokens: T.
        row_len: a length that divides T and that no document crosses.
        sliding_window: a token sees itself and the `sliding_window - 1` tokens before it; if not `causal`, as many
            after it.
        causal: whether a token sees none after it.
        backend: the one that attention will run on, so that no other's parts are made: sdpa's mask has T x row_len
            entries.
        branches_2T: int32, the first token of each token's branch and one past the last token of the beginning that
            the branch shares with others; both are the document's first token where it does not branch, and in its
            beginning.

    Raises:
        ValueError: branches with a sliding window, or without `causal`.
    """
    window = _window_that_matters(sliding_window, max_seqlen)
    if branches_2T is not None and (window is not None or not causal):
        raise ValueError(
            "documents that branch are causal and have no sliding window; give each branch its own"
        )
    index_T = torch.arange(tokens, device=cu_seqlens.device, dtype=torch.int32)
    past_T = torch.bucketize(index_T, cu_seqlens, right=True, out_int32=True)
    mask_R1SS = seen_4T = None
    if backend in (None, "sdpa"):
        mask_R1SS = _mask(cu_seqlens, past_T.view(-1, row_len), window, causal, branches_2T)
    if backend in (None, "triton"):
        seen_4T = _intervals(index_T, cu_seqlens[past_T - 1], cu_seqlens[past_T], window, causal)
    shared_4T = None
    if branches_2T is not None and seen_4T is not None:
        seen_4T, shared_4T = _branch_intervals(
            index_T, branches_2T, cu_seqlens[past_T - 1], cu_seqlens[past_T]
        )
    parts = mask_R1SS, seen_4T, causal, window, backend, branches_2T, shared_4T
    return Documents(cu_seqlens, max_seqlen, row_len, *parts)


def _mask(
    cu_seqlens: Tensor, document_RS: Tensor, window: int | None, causal: bool, branches_2T: Tensor | None
) -> Tensor | None:
    rows, row_len = document_RS.shape
    # As many documents as rows, and none crosses a row: every row is one document.
    if window is None and cu_seqlens.shape[0] - 1 == rows and branches_2T is None:
        return None
    place_S = torch.arange(row_len, device=cu_seqlens.device)
    age_SS = place_S[:, None] - place_S[None, :]
    near_RSS = _near(age_SS, window, causal)
    if branches_2T is not None:
        key_R1S = torch.arange(document_RS.numel(), device=cu_seqlens.device).view(rows, 1, row_len)
        near_RSS = near_RSS & _same_branch(key_R1S, branches_2T.view(2, rows, row_len, 1))
    return ((document_RS[:, :, None] == document_RS[:, None, :]) & near_RSS).unsqueeze(1)


def _same_branch(key: Tensor, branches_2: Tensor) -> Tensor:
    """Whether a key lies in a query's own branch or in the beginning that it shares; the second is of queries."""
    first, shared_end = branches_2
    return (key >= first) | (key < shared_end)


def _near(age: Tensor, window: int | None, causal: bool) -> Tensor:
    """Whether a query may see a key that lies `age` tokens before it in its document."""
    near = age >= 0 if causal else torch.ones_like(age, dtype=torch.bool)
    if window is None:
        return near
    return near & (age.abs() < window)


def _intervals(index_T: Tensor, start_T: Tensor, end_T: Tensor, window: int | None, causal: bool) -> Tensor:
    """`Documents.seen_4T`. Every row grows from token to token, which the kernels build on."""
    near_start_T = start_T if window is None else torch.maximum(start_T, index_T - (window - 1))
    near_end_T = end_T if window is None else torch.minimum(end_T, index_T + window)
    if causal:
        return torch.stack([near_start_T, index_T + 1, index_T, near_end_T])
    return torch.stack([near_start_T, near_end_T, near_start_T, near_end_T])


def _branch_intervals(
    index_T: Tensor, branches_2T: Tensor, start_T: Tensor, end_T: Tensor
) -> tuple[Tensor, Tensor]:
    """`Documents.seen_4T` and `shared_4T`; a token of a beginning shares nothing more, and a branch's token is
    shared by none: intervals of length 0."""
    first_T, shared_end_T = branches_2T
    T = index_T.shape[0]
    # The next token that is the first of its branch: the smallest such index from the next token on.
    begins_T = torch.where(first_T == index_T, index_T, T)
    after_T = torch.cat([begins_T[1:], begins_T.new_full((1,), T)])
    branch_end_T = after_T.flip(0).cummin(0).values.flip(0)
    seen_4T = torch.stack([first_T, index_T + 1, index_T, branch_end_T])
    document_shares_T = shared_end_T[(end_T - 1).long()]
    first_query_T = torch.where(index_T < document_shares_T, document_shares_T, end_T)
    shared_4T = torch.stack([start_T, shared_end_T, first_query_T, end_T])
    return seen_4T.to(torch.int32), shared_4T.to(torch.int32)


def attention_ref_with_lse(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    documents: Documents,
    sliding_window: int | None = None,
    scale: float | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """`attention_ref`, and the natural log-sum-exp of each query's scores: [N, T], fp32, fp64 for fp64 inputs."""
    T, N, H = q_TNH.shape
    wide = torch.float64 if q_TNH.dtype == torch.float64 else torch.float32
    groups = N // k_TKH.shape[1]
    k_TNH = k_TKH.repeat_interleave(groups, dim=1).to(wide)
    v_TNH = v_TKH.repeat_interleave(groups, dim=1).to(wide)
    index_T = torch.arange(T, device=q_TNH.device, dtype=torch.int32)
    document_T = torch.bucketize(index_T, documents.cu_seqlens, right=True)
    near_TT = _near(index_T[:, None] - index_T[None, :], sliding_window, causal)
    seen_TT = (document_T[:, None] == document_T[None, :]) & near_TT
    if documents.branches_2T is not None:
        seen_TT = seen_TT & _same_branch(index_T[None, :], documents.branches_2T[:, :, None])
    scores_NTT = torch.einsum("tnh,snh->nts", q_TNH.to(wide), k_TNH) * _scale(scale, H)
    scores_NTT = scores_NTT.masked_fill(~seen_TT, float("-inf"))
    out_TNH = torch.einsum("nts,snh->tnh", scores_NTT.softmax(dim=-1), v_TNH).to(q_TNH.dtype)
    return out_TNH, scores_NTT.detach().logsumexp(dim=-1)


def attention_ref(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    documents: Documents,
    sliding_window: int | None = None,
    scale: float | None = None,
    causal: bool = True,
) -> Tensor:
    """The definition, with all T x T scores in memory: softmax(scale · q kᵀ) v within each document.

    Args:
        q_TNH: queries; k_TKH, v_TKH: keys and values, same dtype; head n reads head n·K//N.
        sliding_window, causal: see `make_documents`.
        scale: of the scores, 1/√H unless given.

    Returns:
        [T, N, H] in the dtype of `q_TNH`. The arithmetic is fp32, or fp64 for fp64 inputs.
    """
    return attention_ref_with_lse(q_TNH, k_TKH, v_TKH, documents, sliding_window, scale, causal)[0]


def _scale(scale: float | None, head_dim: int) -> float:
    return head_dim**-0.5 if scale is None else scale


def attention_sdpa(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    documents: Documents,
    sliding_window: int | None = None,
    scale: float | None = None,
    causal: bool = True,
) -> Tensor:
    """torch's scaled_dot_product_attention, a row at a time; the mask is left out where rows are whole.

    Arguments and result as in `attention_ref`; ValueError where `documents` were made for others.
    """
    documents.check("sdpa", sliding_window, causal)
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
        is_causal=causal and documents.mask_R1SS is None,
        scale=scale,
        enable_gqa=N != K,
    )
    return out_RNSH.transpose(1, 2).reshape(T, N, H)


def attention_triton_with_lse(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    documents: Documents,
    sliding_window: int | None = None,
    scale: float | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """Our kernels: no tile of keys or queries that lies outside what a tile may see is loaded, and forward and
    backward give the same bits each time. Results as in `attention_ref_with_lse`, arguments as in
    `interval_attention`; ValueError where `documents` were made for others."""
    documents.check("triton", sliding_window, causal)
    seen_4T = documents.seen_4T
    if seen_4T is None or seen_4T.shape[1] != q_TNH.shape[0]:
        raise ValueError(
            f"attention=triton needs documents of {q_TNH.shape[0]} tokens from make_documents, these have "
            f"{'no intervals' if seen_4T is None else f'{seen_4T.shape[1]} tokens'}"
        )
    return interval_attention(
        q_TNH, k_TKH, v_TKH, seen_4T, _scale(scale, q_TNH.shape[2]), documents.shared_4T
    )


def attention_triton(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    documents: Documents,
    sliding_window: int | None = None,
    scale: float | None = None,
    causal: bool = True,
) -> Tensor:
    """`attention_triton_with_lse` without its second result."""
    return attention_triton_with_lse(q_TNH, k_TKH, v_TKH, documents, sliding_window, scale, causal)[0]


def attention_flash_attn(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    documents: Documents,
    sliding_window: int | None = None,
    scale: float | None = None,
    causal: bool = True,
) -> Tensor:
    """FlashAttention-2 of the flash-attn package: bf16 and fp16, on a GPU. Arguments as in `attention_ref`.

    Raises:
        ValueError: the package is not installed, or documents branch.
    """
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise ValueError(
            "attention=flash_attn needs the flash-attn package: pip install 'drivetrain[flash]'"
        ) from error
    if documents.branches_2T is not None:
        raise ValueError(
            "attention=flash_attn takes no documents that branch; give each branch its own document"
        )
    reach = -1 if sliding_window is None else sliding_window - 1  # keys before a query, -1 for all
    out_TNH: Tensor = flash_attn_varlen_func(
        q_TNH,
        k_TKH,
        v_TKH,
        documents.cu_seqlens,
        documents.cu_seqlens,
        documents.max_seqlen,
        documents.max_seqlen,
        softmax_scale=scale,
        causal=causal,
        window_size=(reach, 0 if causal else reach),
    )
    return out_TNH


def _check_inputs(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> None:
    if q_TNH.ndim != 3 or k_TKH.ndim != 3 or k_TKH.shape != v_TKH.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q_TNH, k_TKH, v_TKH))
        raise ValueError(f"attention takes q [T, N, H] and k and v [T, K, H], these are {shapes}")
    (T, N, H), (keys, K, key_H) = q_TNH.shape, k_TKH.shape
    if (keys, key_H) != (T, H) or N % K:
        raise ValueError(
            f"attention takes as many tokens and the same head dim in q {tuple(q_TNH.shape)} and k "
            f"{tuple(k_TKH.shape)}, and a number of query heads that key heads divide"
        )
    if not q_TNH.dtype == k_TKH.dtype == v_TKH.dtype:
        raise ValueError(
            f"attention takes q, k and v of one dtype, these are {q_TNH.dtype}, {k_TKH.dtype}, {v_TKH.dtype}"
        )


def attention(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    documents: Documents,
    *,
    sliding_window: int | None = None,
    scale: float | None = None,
    causal: bool = True,
    backend: str = "sdpa",
) -> Tensor:
    """Grouped-query attention within each document; see `attention_ref` for shapes and dtypes.

    Raises:
        KeyError: `backend` is not one of `OPS["attention"].fast` or "reference".
        ValueError: shapes or dtypes that don't fit together, that the backend doesn't take, or `documents` made
            for another backend, window or `causal`.
    """
    _check_inputs(q_TNH, k_TKH, v_TKH)
    run = ATTENTION.implementation(backend)
    out_TNH: Tensor = run(q_TNH, k_TKH, v_TKH, documents, sliding_window, scale, causal)
    return out_TNH


def attention_with_lse(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    documents: Documents,
    *,
    sliding_window: int | None = None,
    scale: float | None = None,
    causal: bool = True,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`attention`, and the natural log-sum-exp of each query's scaled scores: fp32 [N, T], without a gradient.

    Raises:
        KeyError: `backend` is neither "triton" nor "reference". ValueError: as `attention`.
    """
    _check_inputs(q_TNH, k_TKH, v_TKH)
    run = {"reference": attention_ref_with_lse, "triton": attention_triton_with_lse}[backend]
    return run(q_TNH, k_TKH, v_TKH, documents, sliding_window, scale, causal)


def _example_inputs(dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    def draw(heads: int) -> Tensor:
        return torch.randn(48, heads, 16, generator=generator, dtype=torch.float64).to(dtype)

    cu_seqlens = torch.tensor([0, 5, 24, 25, 48], dtype=torch.int32)
    return draw(6), draw(2), draw(2), make_documents(cu_seqlens, 23, 48, 48)


ATTENTION = register(
    Op(
        name="attention",
        ref=attention_ref,
        fast={"sdpa": attention_sdpa, "triton": attention_triton, "flash_attn": attention_flash_attn},
        example_inputs=_example_inputs,
        tolerances={torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3},
        variants=variants,
    )
)
