"""`decode_attention` in Triton: a kernel, and a second one that combines where a sequence's keys are split.

B sequences · Q new tokens of each · N query heads · K key/value heads, G = N/K heads a group · H head dim ·
P pages of L tokens · M pages a sequence at most, so that the longest has C = M·L tokens · S splits.

A sequence's keys are shared out among S programs, which leave a partial result and its log-sum-exp to be combined
("Flash-Decoding for long-context inference", Dao, Haziza, Massa, Sizov 2023). The queries of a group's heads are
the rows of one tile, so that keys and values, whose reading is the whole cost, are read once.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from drivetrain.kernels.op import Variant, kernel_op, launch, next_power_of_2, tl, triton

TILE_BYTES = 16 * 1024  # of keys, and as much of values, that a program loads at a time
# A key's address waits for its page, so Triton shares the stages between the two loads: 5 keep two tiles in flight.
STAGES = 5
PROGRAMS_PER_SM = 3  # that fit a Hopper SM's shared memory
ROUNDS = 6  # of programs that an SM goes through where the work allows: uneven lengths even out
LEAST_SPLIT = 128  # tokens that are worth a program of their own
GOOD_SPLIT = 1024  # tokens beside which the partial result costs next to nothing
MOST_SPLITS = 64


@triton.jit
def _span(length, Q, window, splits, TILE: tl.constexpr):
    """A sequence's first tile that any query sees, the tiles of one split, and how many splits have any."""
    first = tl.maximum(length - Q - window + 1, 0) // TILE
    tiles = tl.cdiv(length, TILE) - first
    each = tl.maximum(tl.cdiv(tiles, splits), 1)
    return first, each, tl.cdiv(tiles, each)


@triton.jit
def _forward(
    q_BQNH,
    k_PLKH,
    v_PLKH,
    page_table_BM,
    lengths_B,
    out_SBQNH,
    lse_SBQN,  # base 2; not touched where PARTIAL is False
    B,
    Q,
    N,
    G,
    M,
    page_stride_k,
    token_stride_k,
    head_stride_k,
    page_stride_v,
    token_stride_v,
    head_stride_v,
    window,
    splits,
    scale,  # times log2(e)
    L: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    head_kv = tl.program_id(0)
    split = tl.program_id(1) % splits
    b = tl.program_id(2)
    length = tl.load(lengths_B + b)
    first, each, live = _span(length, Q, window, splits, TILE)
    if PARTIAL and split >= live:
        return
    row = (tl.program_id(1) // splits) * ROWS + tl.arange(0, ROWS)
    valid = row < Q * G
    query = row // G
    head = head_kv * G + row % G
    column = tl.arange(0, BLOCK_H)
    wide = column < H
    at_q = (b * Q + query) * N + head
    q = tl.load(q_BQNH + at_q[:, None] * H + column, mask=valid[:, None] & wide, other=0.0)
    position = length - Q + query

    # Finite, so that a row that has seen nothing yet gives exp2(-inf) = 0 and never inf - inf.
    top = tl.full([ROWS], -1.0e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_H], tl.float32)
    begin = (first + split * each) * TILE
    # Every tile is masked: the loop waits for memory, not for arithmetic.
    for start in range(begin, tl.minimum(begin + each * TILE, length), TILE):
        token = start + tl.arange(0, TILE)
        filled = token < length
        page = tl.load(page_table_BM + b * M + token // L, mask=filled, other=0).to(tl.int64)
        at_k = page * page_stride_k + (token % L) * token_stride_k + head_kv * head_stride_k
        at_v = page * page_stride_v + (token % L) * token_stride_v + head_kv * head_stride_v
        there = filled[:, None] & wide
        k = tl.load(k_PLKH + at_k[:, None] + column, mask=there, other=0.0)
        v = tl.load(v_PLKH + at_v[:, None] + column, mask=there, other=0.0)
        age = position[:, None] - token
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where((age >= 0) & (age < window), scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = new_top

    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    at_out = split.to(tl.int64) * B * Q * N + at_q
    spot = out_SBQNH + at_out[:, None] * H + column
    tl.store(spot, out.to(out_SBQNH.dtype.element_ty), mask=valid[:, None] & wide)
    if PARTIAL:
        tl.store(lse_SBQN + at_out, top + tl.log2(total), mask=valid)


@triton.jit
def _combine(
    partial_SBQNH,
    lse_SBQN,
    lengths_B,
    out_BQNH,
    B,
    Q,
    N,
    window,
    splits,
    H: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    b = tl.program_id(1)
    at = b * Q * N + tl.program_id(0)
    _, _, live = _span(tl.load(lengths_B + b), Q, window, splits, TILE)
    split = tl.arange(0, BLOCK_S)
    there = split < live
    at_S = split.to(tl.int64) * B * Q * N + at
    lse = tl.load(lse_SBQN + at_S, mask=there, other=float("-inf"))
    weight = tl.exp2(lse - tl.maximum(tl.max(lse, axis=0), -1.0e30))
    column = tl.arange(0, BLOCK_H)
    wide = column < H
    partial = tl.load(partial_SBQNH + at_S[:, None] * H + column, mask=there[:, None] & wide, other=0.0)
    total = tl.sum(weight, axis=0)
    out = tl.sum(partial * weight[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    tl.store(out_BQNH + at.to(tl.int64) * H + column, out.to(out_BQNH.dtype.element_ty), mask=wide)


def tiling(head_dim: int, rows: int, bytes_each: int) -> tuple[int, int, int]:
    """Rows and tokens of a program's tile, and its warps, for Q·G rows of `bytes_each` bytes a number.

    The matrix units take 16 rows at least. fp32 does not use them: its products need many registers.
    """
    if bytes_each == 4:
        return 16, max(16, min(32, 2048 // next_power_of_2(head_dim))), 8
    tile_rows = max(16, min(64, next_power_of_2(rows)))
    block = next_power_of_2(head_dim)
    tokens = max(16, min(128, TILE_BYTES // (block * bytes_each)))
    return tile_rows, tokens, 8 if block * tile_rows > 64 * 128 else 4


def choose_splits(programs: int, tokens: int, multiprocessors: int) -> int:
    """How many programs share a sequence's keys.

    Enough to give every SM its PROGRAMS_PER_SM while each keeps LEAST_SPLIT tokens, and enough for ROUNDS times
    that while each keeps GOOD_SPLIT; at most MOST_SPLITS.

    Args:
        programs: how many there are with one split. tokens: the most keys that a sequence can have.
    """
    places = PROGRAMS_PER_SM * multiprocessors
    filling = min(-(-places // programs), tokens // LEAST_SPLIT)
    evening = min(-(-ROUNDS * places // programs), tokens // GOOD_SPLIT)
    return max(1, min(MOST_SPLITS, max(filling, evening)))


@kernel_op("decode_attention")
def _decode_attention(
    q_BQNH: Tensor,
    k_cache_PLKH: Tensor,
    v_cache_PLKH: Tensor,
    page_table_BM: Tensor,
    lengths_B: Tensor,
    scale: float,
    window: int,
    splits: int,
) -> Tensor:
    B, Q, N, H = q_BQNH.shape
    L, K = k_cache_PLKH.shape[1:3]
    rows = Q * N // K
    tile_rows, tile, num_warps = tiling(H, rows, q_BQNH.element_size())
    out_BQNH = torch.empty_like(q_BQNH)
    partial = splits > 1
    partial_SBQNH = q_BQNH.new_empty(splits, B, Q, N, H, dtype=torch.float32) if partial else out_BQNH
    lse_SBQN = q_BQNH.new_empty(splits, B, Q, N, dtype=torch.float32) if partial else out_BQNH
    launch(_forward)[K, splits * triton.cdiv(rows, tile_rows), B](
        q_BQNH,
        k_cache_PLKH,
        v_cache_PLKH,
        page_table_BM,
        lengths_B,
        partial_SBQNH,
        lse_SBQN,
        B,
        Q,
        N,
        N // K,
        page_table_BM.shape[1],
        *k_cache_PLKH.stride()[:3],
        *v_cache_PLKH.stride()[:3],
        window,
        splits,
        scale * math.log2(math.e),
        L=L,
        H=H,
        ROWS=tile_rows,
        TILE=tile,
        BLOCK_H=next_power_of_2(H),
        PARTIAL=partial,
        num_warps=num_warps,
        num_stages=STAGES,
    )
    if partial:
        launch(_combine)[Q * N, B](
            partial_SBQNH,
            lse_SBQN,
            lengths_B,
            out_BQNH,
            B,
            Q,
            N,
            window,
            splits,
            H=H,
            TILE=tile,
            BLOCK_H=next_power_of_2(H),
            BLOCK_S=next_power_of_2(splits),
            num_warps=4,
        )
    return out_BQNH


@_decode_attention.register_fake
def _(q_BQNH: Tensor, *_rest: object) -> Tensor:
    return torch.empty_like(q_BQNH)


def decode_attention_triton(
    q_BQNH: Tensor,
    k_cache_PLKH: Tensor,
    v_cache_PLKH: Tensor,
    page_table_BM: Tensor,
    lengths_B: Tensor,
    scale: float | None = None,
    sliding_window: int | None = None,
    splits: int | None = None,
) -> Tensor:
    """One kernel, and a second where the keys are split; shapes and dtypes as in `decode_attention`.

    Args:
        splits: programs a sequence; by `choose_splits` when None. The order of the sums, and so the last bits,
            depends on it.

    Raises:
        ValueError: a head dim that is no multiple of 16 or above 256, a cache whose last dimension is strided.
    """
    B, Q, N, H = q_BQNH.shape
    L, K = k_cache_PLKH.shape[1:3]
    if H % 16 or H > 256:
        raise ValueError(f"decode_attention's Triton kernel takes head dims 16, 32, ... 256, this is {H}")
    if k_cache_PLKH.stride(3) != 1 or v_cache_PLKH.stride(3) != 1:
        raise ValueError("decode_attention needs caches whose last dimension is contiguous")
    longest = page_table_BM.shape[1] * L
    window = longest if sliding_window is None else sliding_window
    if splits is None:
        rows = Q * N // K
        programs = B * K * triton.cdiv(rows, tiling(H, rows, q_BQNH.element_size())[0])
        splits = choose_splits(programs, min(longest, window + Q), _multiprocessors(q_BQNH.device))
    return _decode_attention(
        q_BQNH.contiguous(),
        k_cache_PLKH,
        v_cache_PLKH,
        page_table_BM.contiguous(),
        lengths_B.contiguous(),
        H**-0.5 if scale is None else scale,
        window,
        splits,
    )


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # the interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count


def variants() -> Iterator[Variant]:
    strides = [f"{of}_stride_{x}" for x in "kv" for of in ("page", "token", "head")]
    for dtype, bytes_each in (("bf16", 2), ("fp32", 4)):  # fp16 takes what bf16 does
        forward = {
            **dict.fromkeys(("q_BQNH", "k_PLKH", "v_PLKH"), f"*{dtype}"),
            **dict.fromkeys(("page_table_BM", "lengths_B"), "*i32"),
            **dict.fromkeys(("out_SBQNH", "lse_SBQN"), "*fp32"),
            **dict.fromkeys(("B", "Q", "N", "G", "M"), "i32"),
            **dict.fromkeys(strides, "i32:16"),
            **{"window": "i32", "splits": "i32", "scale": "fp32"},
            **dict.fromkeys(("L", "H", "ROWS", "TILE", "BLOCK_H", "PARTIAL"), "constexpr"),
        }
        combine = {
            **{"partial_SBQNH": "*fp32", "lse_SBQN": "*fp32", "lengths_B": "*i32", "out_BQNH": f"*{dtype}"},
            **dict.fromkeys(("B", "Q", "N", "window", "splits"), "i32"),
            **dict.fromkeys(("H", "TILE", "BLOCK_H", "BLOCK_S"), "constexpr"),
        }
        for H in (64, 80, 96, 128, 256):
            sizes = {"H": H, "BLOCK_H": next_power_of_2(H)}
            for rows, tile, num_warps in dict.fromkeys(tiling(H, 1 << i, bytes_each) for i in range(4, 7)):
                constants = {**sizes, "L": 16, "ROWS": rows, "TILE": tile, "PARTIAL": True}
                yield Variant(_forward, forward, constants, num_warps=num_warps, num_stages=STAGES)
            yield Variant(_combine, combine, {**sizes, "TILE": tile, "BLOCK_S": MOST_SPLITS}, 4, 3)
