"""What kernels.py measures of attention: packed rows and documents, and decoding from a cache.

T tokens · S tokens of a row, R = T/S rows · N query heads · K key/value heads · H head dim · B sequences of at most
C cached tokens, M pages each.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from kernels_peers import Case, NotMeasured, Peers, Place, Run, Sizes, compiled, module
from torch import Tensor

PAGE = 16  # tokens, what vLLM takes by default
MEDIAN_DOCUMENT, SPREAD = 600, 1.2  # tokens, and the sigma of their logarithm
Make = Callable[[tuple[Tensor, ...]], Run]


def document_lengths(tokens: int) -> list[int]:
    """Lengths of mixed documents that fill `tokens`: log-normal, always the same."""
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    median = min(MEDIAN_DOCUMENT, tokens / 8)
    left = tokens
    while left:
        drawn = median * math.exp(SPREAD * float(torch.randn((), generator=generator)))
        lengths.append(max(1, min(int(drawn), left)))
        left -= lengths[-1]
    return lengths


def attention_case(sizes: Sizes, place: Place) -> Iterator[Case]:
    T = sizes.attention_tokens
    for S in sizes.rows:
        yield _attention_case(sizes, place, f"{T // S} rows of {S}", [S] * (T // S), S)
    lengths = document_lengths(T)
    yield _attention_case(sizes, place, f"{len(lengths)} documents in {T}", lengths, T)


def _attention_case(sizes: Sizes, place: Place, title: str, lengths: list[int], row_len: int) -> Case:
    from drivetrain.kernels.attention import attention, make_documents

    T, N, K, H = sizes.attention_tokens, sizes.heads, sizes.kv_heads, sizes.head_dim
    cu_seqlens = torch.tensor([0, *lengths], device=place.device).cumsum(0).int()
    longest = max(lengths)
    documents = make_documents(cu_seqlens, longest, T, row_len, backend=place.backend)
    dense = len(lengths) * row_len == T
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    flops = 4.0 * pairs * N * H
    return Case(
        op="attention",
        shape=f"{sizes.name} {title}",
        draw=lambda: (place.draw(T, N, H), place.draw(T, K, H), place.draw(T, K, H)),
        gradients=3,
        ours=lambda q, k, v: attention(q, k, v, documents, backend=place.backend),
        peers=_attention_peers(place, cu_seqlens, longest, row_len, dense),
        bound="flops",
        work={"forward": flops, "forward+backward": 3.5 * flops},  # FlashAttention-2, section 4.1
    )


def _attention_peers(place: Place, cu_seqlens: Tensor, longest: int, S: int, dense: bool) -> Peers:
    def rows(x_TNH: Tensor) -> Tensor:
        return x_TNH.view(-1, S, *x_TNH.shape[1:]).transpose(1, 2)

    def sdpa(backend: str) -> Make:
        def make(inputs: tuple[Tensor, ...]) -> Run:
            from torch.nn.attention import SDPBackend, sdpa_kernel

            if not dense:
                raise NotMeasured("takes whole rows only")
            grouped = inputs[0].shape[1] != inputs[1].shape[1]

            def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                with sdpa_kernel(getattr(SDPBackend, backend)):
                    out = F.scaled_dot_product_attention(
                        rows(q), rows(k), rows(v), is_causal=True, enable_gqa=grouped
                    )
                return out.transpose(1, 2)

            return run

        return make

    def masked(inputs: tuple[Tensor, ...]) -> Run:
        if dense:
            raise NotMeasured("for documents")
        document_T = torch.bucketize(torch.arange(S, device=place.device), cu_seqlens, right=True)
        mask_TT = (document_T[:, None] == document_T).tril_()
        groups = inputs[0].shape[1] // inputs[1].shape[1]

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # Repeated, since with grouped heads and a mask torch falls back to all T x T scores.
            k, v = (rows(x.repeat_interleave(groups, dim=1)) for x in (k, v))
            return F.scaled_dot_product_attention(rows(q), k, v, attn_mask=mask_TT).transpose(1, 2)

        return run

    def varlen(inputs: tuple[Tensor, ...]) -> Run:
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError as error:
            raise NotMeasured("this torch has no varlen_attn") from error
        lengths = (cu_seqlens, cu_seqlens, longest, longest)
        return lambda q, k, v: varlen_attn(q, k, v, *lengths, window_size=(-1, 0), enable_gqa=True)

    def packages(name: str) -> Make:
        def make(_: tuple[Tensor, ...]) -> Run:
            function = module(name, "flash-attn --no-build-isolation").flash_attn_varlen_func
            lengths = (cu_seqlens, cu_seqlens)
            return lambda q, k, v: function(
                q, k, v, *lengths, max_seqlen_q=longest, max_seqlen_k=longest, causal=True
            )

        return make

    return {
        "SDPA flash": sdpa("FLASH_ATTENTION"),
        "SDPA cuDNN": sdpa("CUDNN_ATTENTION"),
        "SDPA with a mask": masked,
        "torch varlen": varlen,
        "FlexAttention": _flex(place, cu_seqlens, S, rows, dense),
        "flash-attn 2": packages("flash_attn"),
        "flash-attn 3": packages("flash_attn_interface"),
    }


def _flex(place: Place, cu_seqlens: Tensor, T: int, rows: Run, dense: bool) -> Make:
    def make(inputs: tuple[Tensor, ...]) -> Run:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if dense:
            raise NotMeasured("for documents")
        document_T = torch.bucketize(torch.arange(T, device=place.device), cu_seqlens, right=True)

        def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (q >= k) & (document_T[q] == document_T[k])

        block_mask = create_block_mask(seen, None, None, T, T, device=place.device)
        attend = compiled(place, flex_attention)(inputs)
        grouped = inputs[0].shape[1] != inputs[1].shape[1]

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = attend(rows(q), rows(k), rows(v), block_mask=block_mask, enable_gqa=grouped)
            return out.transpose(1, 2)

        return run

    return make


def decode_attention_case(sizes: Sizes, place: Place) -> Iterator[Case]:
    for B, C in sizes.caches:
        yield _decode_case(sizes, place, f"{B} x {C}", torch.full((B,), C, dtype=torch.int32), C)
    B, C = sizes.caches[0]
    uneven_B = torch.rand(B, generator=torch.Generator().manual_seed(0)) * (C - 1) + 1
    yield _decode_case(sizes, place, f"{B} x 1 to {C}", uneven_B.int(), C)


def _decode_case(sizes: Sizes, place: Place, title: str, lengths_B: Tensor, C: int) -> Case:
    from drivetrain.kernels.decode_attention import decode_attention

    N, K, H = sizes.heads, sizes.kv_heads, sizes.head_dim
    B, M = len(lengths_B), C // PAGE
    tokens = int(lengths_B.sum())
    page_table_BM = torch.randperm(B * M, device=place.device).view(B, M).int()
    lengths_B = lengths_B.to(place.device)
    filled_BC = torch.arange(C, device=place.device) < lengths_B[:, None]
    even = tokens == B * C

    def dense(cache_PLKH: Tensor) -> Tensor:
        return cache_PLKH[page_table_BM.long()].view(B, C, K, H)

    def sdpa(inputs: tuple[Tensor, ...]) -> Run:
        k_BKCH, v_BKCH = (dense(x).transpose(1, 2) for x in inputs[1:])
        mask = None if even else filled_BC[:, None, None, :]

        def run(q_B1NH: Tensor, *_: Tensor) -> Tensor:
            q_BN1H = q_B1NH.transpose(1, 2)
            out = F.scaled_dot_product_attention(q_BN1H, k_BKCH, v_BKCH, attn_mask=mask, enable_gqa=N != K)
            return out.transpose(1, 2)

        return run

    def varlen(inputs: tuple[Tensor, ...]) -> Run:
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError as error:
            raise NotMeasured("this torch has no varlen_attn") from error
        k, v = (dense(x).flatten(0, 1) for x in inputs[1:])
        count_B = torch.arange(B + 1, device=place.device, dtype=torch.int32)
        cu = (count_B, count_B * C, 1, C)
        options = {"window_size": (-1, -1), "enable_gqa": True, "seqused_k": lengths_B}
        return lambda q_B1NH, *_: varlen_attn(q_B1NH[:, 0], k, v, *cu, **options)[:, None]

    def flex(inputs: tuple[Tensor, ...]) -> Run:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return k < lengths_B[b]

        block_mask = create_block_mask(seen, B, None, 1, C, device=place.device)
        attend = compiled(place, flex_attention)(inputs)
        k, v = (dense(x).transpose(1, 2) for x in inputs[1:])
        options = {"block_mask": block_mask, "enable_gqa": N != K}
        return lambda q_B1NH, *_: attend(q_B1NH.transpose(1, 2), k, v, **options).transpose(1, 2)

    def package(inputs: tuple[Tensor, ...]) -> Run:
        function = module("flash_attn", "flash-attn --no-build-isolation").flash_attn_with_kvcache
        k, v = (dense(x) for x in inputs[1:])
        return lambda q, *_: function(q, k, v, cache_seqlens=lengths_B, causal=True)

    read = 2.0 * (tokens * K + B * N) * H * place.bytes_each
    return Case(
        op="decode_attention",
        shape=f"{sizes.name} {title}",
        draw=lambda: (place.draw(B, 1, N, H), *(place.draw(B * M, PAGE, K, H) for _ in range(2))),
        gradients=0,
        ours=lambda q, k, v: decode_attention(q, k, v, page_table_BM, lengths_B, backend=place.backend),
        # The peers read one dense cache each, ours the pages in random order.
        peers={"SDPA": sdpa, "torch varlen": varlen, "FlexAttention": flex, "flash-attn 2": package},
        bound="bytes",
        work={"forward": read},
    )
