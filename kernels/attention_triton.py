"""FlashAttention (Dao 2023, https://arxiv.org/abs/2307.08691) in Triton over intervals of packed tokens.

T tokens · N query heads · K key/value heads · H head dim · P = H padded to a power of two · Q queries and S keys of
a tile. `seen_4T` holds four int32 rows: the first key and one past the last key that a query sees, the first query
and one past the last query that see a key. Each row grows from token to token, so a tile of queries walks from its
first token's first key to its last token's last key, makes a mask only where not every query sees every key, and
loads no tile outside; a tile of keys likewise. Scores are kept times log2(e), since exp2 is what the hardware has.
Tiles that a loop loads come through tensor descriptors (Hopper's TMA), which fill with zeros beyond T and H and
need no registers for addresses. fp32 products are three tf32 ones, whose sum has nearly fp32's precision.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drivetrain.kernels.op import INTERPRETED, Variant, kernel_op, launch, next_power_of_2, tl, triton

MAX_HEAD_DIM = {torch.float32: 128, torch.bfloat16: 256, torch.float16: 256}  # beyond it, registers spill
PREPARE_ROWS = 32  # tokens that one program of _prepare works on
ALIGNMENT = 16  # bytes: what a tensor descriptor asks of an address and of strides


class Tile(NamedTuple):
    """Queries and keys that a program works on at a time, its warps, and how many loads are under way."""

    queries: int
    keys: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    forward: Tile
    keys: Tile  # of the kernel for the gradients of keys and values
    queries: Tile  # of the kernel for the gradient of queries


def choose_tiles(padded: int, itemsize: int) -> Tiles:
    """For a padded head dim (16 to 256) and the bytes of a number: what fits an SM of Hopper without spills."""
    if itemsize == 4 and padded <= 64:
        return Tiles(Tile(64, 64, 4, 2), Tile(32, 32, 4, 2), Tile(64, 64, 4, 2))
    if itemsize == 4:
        return Tiles(Tile(64, 32, 4, 2), Tile(32, 16, 8, 1), Tile(64, 32, 8, 1))
    if padded <= 64:
        return Tiles(Tile(128, 128, 4, 3), Tile(64, 128, 8, 3), Tile(128, 64, 8, 3))
    if padded <= 128:
        return Tiles(Tile(128, 64, 8, 3), Tile(32, 128, 8, 2), Tile(128, 64, 8, 2))
    return Tiles(Tile(64, 32, 4, 3), Tile(32, 64, 8, 2), Tile(64, 64, 8, 1))


# --- parts of kernels ---------------------------------------------------------------------------------------


@triton.jit
def _places(x_TH, begin, T, stride, H: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr):
    """Addresses of rows begin .. begin + ROWS, padded to P columns, and which of them exist."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, P)[None, :]
    start = begin * tl.cast(stride, tl.int64)
    return x_TH + start + row * stride + column, (begin + row < T) & (column < H)


@triton.jit
def _load(x_TH, begin, T, stride, H: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr):
    place, inside = _places(x_TH, begin, T, stride, H, P, ROWS)
    return tl.load(place, mask=inside, other=0.0)


@triton.jit
def _store(x_TH, value, begin, T, stride, H: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr):
    place, inside = _places(x_TH, begin, T, stride, H, P, ROWS)
    tl.store(place, value.to(x_TH.dtype.element_ty), mask=inside)


@triton.jit
def _interval(first_T, past_T, token, T):
    """What each token sees, nothing beyond T."""
    first = tl.load(first_T + token, mask=token < T, other=0)
    return first, tl.load(past_T + token, mask=token < T, other=0)


@triton.jit
def _span(first_T, past_T, begin, T, ROWS: tl.constexpr):
    """What any, and what every one, of the tokens begin .. begin + ROWS sees: low .. high and whole .. edge."""
    last = tl.minimum(begin + ROWS, T) - 1
    low = tl.load(first_T + begin)
    high = tl.load(past_T + last)
    whole = tl.load(first_T + last)
    edge = tl.load(past_T + begin)
    return low, high, whole, edge


# --- forward ------------------------------------------------------------------------------------------------


@triton.jit
def _forward(
    q_TNH, k_TKH, v_TKH, seen_4T, out_TNH, lse_NT, T, q_token, q_head, k_token, k_head, v_token, v_head, scale,
    N: tl.constexpr, GROUP: tl.constexpr, H: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, S: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    # The last tokens of a document see the most keys: their programs go first, so that none of them ends last.
    begin = (tl.num_programs(1) - 1 - tl.program_id(1)) * Q
    low, high, whole, edge = _span(seen_4T, seen_4T + T, begin, T, Q)
    query_Q = begin + tl.arange(0, Q)
    first_Q, past_Q = _interval(seen_4T, seen_4T + T, query_Q, T)
    q_QP = _load(q_TNH + head * q_head, begin, T, q_token, H, P, Q)
    keys = tl.make_tensor_descriptor(k_TKH + head // GROUP * k_head, [T, H], [k_token, 1], [S, P])
    values = tl.make_tensor_descriptor(v_TKH + head // GROUP * v_head, [T, H], [v_token, 1], [S, P])
    out_QP = tl.zeros((Q, P), tl.float32)
    # Finite, so that a row which has seen no key yet takes exp2(-inf - top) = 0 and no NaN from masked scores.
    top_Q = tl.full((Q,), -1e30, tl.float32)
    sum_Q = tl.zeros((Q,), tl.float32)
    for start in range(low, high, S):  # the online softmax (Dao 2023, algorithm 1)
        k_SP = keys.load([start, 0])
        score_QS = tl.dot(q_QP, tl.trans(k_SP), input_precision=PRECISION)
        if (start < whole) | (start + S > edge):
            key = start + tl.arange(0, S)[None, :]
            seen_QS = (key >= first_Q[:, None]) & (key < past_Q[:, None])
            score_QS = tl.where(seen_QS, score_QS, float("-inf"))
        new_top_Q = tl.maximum(top_Q, tl.max(score_QS, 1) * scale)
        p_QS = tl.exp2(score_QS * scale - new_top_Q[:, None])
        shrink_Q = tl.exp2(top_Q - new_top_Q)
        sum_Q = sum_Q * shrink_Q + tl.sum(p_QS, 1)
        v_SP = values.load([start, 0])
        out_QP = tl.dot(p_QS.to(v_SP.dtype), v_SP, out_QP * shrink_Q[:, None], input_precision=PRECISION)
        top_Q = new_top_Q
    sum_Q = tl.where(query_Q < T, sum_Q, 1.0)
    _store(out_TNH + head * H, out_QP / sum_Q[:, None], begin, T, N * H, H, P, Q)
    lse_Q = (top_Q + tl.log2(sum_Q)) * 0.6931471805599453  # ln 2
    tl.store(lse_NT + head * T + query_Q, lse_Q, mask=query_Q < T)


# --- backward -----------------------------------------------------------------------------------------------


@triton.jit
def _prepare(
    out_TNH, grad_TNH, lse_NT, rows_2NT, T,
    N: tl.constexpr, H: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of each row of scores: its log-sum-exp in base 2, and the sum of out · grad (Dao 2023, section 2.3.2)."""
    head = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * ROWS
    out = _load(out_TNH + head * H, begin, T, N * H, H, P, ROWS).to(tl.float32)
    grad = _load(grad_TNH + head * H, begin, T, N * H, H, P, ROWS).to(tl.float32)
    token = begin + tl.arange(0, ROWS)
    lse = tl.load(lse_NT + head * T + token, mask=token < T, other=0.0)
    rows_T = rows_2NT + head * T
    tl.store(rows_T + token, lse * 1.4426950408889634, mask=token < T)  # log2(e)
    tl.store(rows_T + N * tl.cast(T, tl.int64) + token, tl.sum(out * grad, 1), mask=token < T)


@triton.jit
def _backward_keys(
    q_TNH, k_TKH, v_TKH, seen_4T, grad_TNH, rows_2NT, dk_TKH, dv_TKH, T,
    q_token, q_head, k_token, k_head, v_token, v_head, scale, softmax_scale,
    N: tl.constexpr, GROUP: tl.constexpr, H: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, S: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values, over all queries of the group's heads. Scores are transposed, so that
    they go on as the left operand of the next product from registers."""
    kv_head = tl.program_id(0)
    begin = tl.program_id(1) * S
    first_T = seen_4T + 2 * tl.cast(T, tl.int64)
    low, high, whole, edge = _span(first_T, first_T + T, begin, T, S)
    first_S, past_S = _interval(first_T, first_T + T, begin + tl.arange(0, S), T)
    k_SP = _load(k_TKH + kv_head.to(tl.int64) * k_head, begin, T, k_token, H, P, S)
    v_SP = _load(v_TKH + kv_head.to(tl.int64) * v_head, begin, T, v_token, H, P, S)
    queries = tl.make_tensor_descriptor(q_TNH, [T, N, H], [q_token, q_head, 1], [Q, 1, P])
    grads = tl.make_tensor_descriptor(grad_TNH, [T, N, H], [N * H, H, 1], [Q, 1, P])
    dk_SP = tl.zeros((S, P), tl.float32)
    dv_SP = tl.zeros((S, P), tl.float32)
    head = kv_head * GROUP
    start = low
    for _ in range(
        tl.cdiv(high - low, Q) * GROUP
    ):  # over heads and queries, so that loads run on across heads
        query_Q = start + tl.arange(0, Q)
        row_Q = rows_2NT + head * tl.cast(T, tl.int64) + query_Q
        q_QP = queries.load([start, head, 0]).reshape(Q, P)
        lse_Q = tl.load(row_Q, mask=query_Q < T, other=0.0)
        score_SQ = tl.dot(k_SP, tl.trans(q_QP), input_precision=PRECISION)
        p_SQ = tl.exp2(score_SQ * scale - lse_Q[None, :])
        if (start < whole) | (start + Q > edge):
            seen_SQ = (query_Q[None, :] >= first_S[:, None]) & (query_Q[None, :] < past_S[:, None])
            p_SQ = tl.where(seen_SQ, p_SQ, 0.0)
        grad_QP = grads.load([start, head, 0]).reshape(Q, P)
        dp_SQ = tl.dot(v_SP, tl.trans(grad_QP), input_precision=PRECISION)
        delta_Q = tl.load(row_Q + N * tl.cast(T, tl.int64), mask=query_Q < T, other=0.0)
        ds_SQ = p_SQ * (dp_SQ - delta_Q[None, :])
        dv_SP = tl.dot(p_SQ.to(grad_QP.dtype), grad_QP, dv_SP, input_precision=PRECISION)
        dk_SP = tl.dot(ds_SQ.to(q_QP.dtype), q_QP, dk_SP, input_precision=PRECISION)
        start += Q
        head = tl.where(start < high, head, head + 1)
        start = tl.where(start < high, start, low)
    K: tl.constexpr = N // GROUP
    _store(dk_TKH + kv_head * H, dk_SP * softmax_scale, begin, T, K * H, H, P, S)
    _store(dv_TKH + kv_head * H, dv_SP, begin, T, K * H, H, P, S)


@triton.jit
def _backward_queries(
    q_TNH, k_TKH, v_TKH, seen_4T, grad_TNH, rows_2NT, dq_TNH, T,
    q_token, q_head, k_token, k_head, v_token, v_head, scale, softmax_scale,
    N: tl.constexpr, GROUP: tl.constexpr, H: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, S: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    begin = (tl.num_programs(1) - 1 - tl.program_id(1)) * Q  # as in _forward
    low, high, whole, edge = _span(seen_4T, seen_4T + T, begin, T, Q)
    query_Q = begin + tl.arange(0, Q)
    first_Q, past_Q = _interval(seen_4T, seen_4T + T, query_Q, T)
    row_Q = rows_2NT + head * T + query_Q
    lse_Q = tl.load(row_Q, mask=query_Q < T, other=0.0)
    delta_Q = tl.load(row_Q + N * tl.cast(T, tl.int64), mask=query_Q < T, other=0.0)
    q_QP = _load(q_TNH + head * q_head, begin, T, q_token, H, P, Q)
    grad_QP = _load(grad_TNH + head * H, begin, T, N * H, H, P, Q)
    keys = tl.make_tensor_descriptor(k_TKH + head // GROUP * k_head, [T, H], [k_token, 1], [S, P])
    values = tl.make_tensor_descriptor(v_TKH + head // GROUP * v_head, [T, H], [v_token, 1], [S, P])
    dq_QP = tl.zeros((Q, P), tl.float32)
    for start in range(low, high, S):
        k_SP = keys.load([start, 0])
        score_QS = tl.dot(q_QP, tl.trans(k_SP), input_precision=PRECISION)
        v_SP = values.load([start, 0])
        dp_QS = tl.dot(grad_QP, tl.trans(v_SP), input_precision=PRECISION)
        p_QS = tl.exp2(score_QS * scale - lse_Q[:, None])
        if (start < whole) | (start + S > edge):
            key = start + tl.arange(0, S)[None, :]
            p_QS = tl.where((key >= first_Q[:, None]) & (key < past_Q[:, None]), p_QS, 0.0)
        ds_QS = p_QS * (dp_QS - delta_Q[:, None])
        dq_QP = tl.dot(ds_QS.to(k_SP.dtype), k_SP, dq_QP, input_precision=PRECISION)
    _store(dq_TNH + head * H, dq_QP * softmax_scale, begin, T, N * H, H, P, Q)


# --- operators ----------------------------------------------------------------------------------------------


def _strides(*inputs: Tensor) -> list[int]:
    """Of tokens, then of heads, of each input."""
    return [stride for x in inputs for stride in x.stride()[:2]]


def _describable(x_TNH: Tensor) -> Tensor:
    """Itself, or a copy that a tensor descriptor can describe."""
    steps = [x_TNH.storage_offset(), *x_TNH.stride()[:2]]
    aligned = all(step * x_TNH.itemsize % ALIGNMENT == 0 for step in steps)
    if aligned and 0 not in steps[1:] and x_TNH.stride(2) == 1:
        return x_TNH
    return x_TNH.clone(memory_format=torch.contiguous_format)


def _options(q_TNH: Tensor, k_TKH: Tensor) -> dict[str, Any]:
    _, N, H = q_TNH.shape
    precision = "tf32x3" if q_TNH.dtype == torch.float32 else "tf32"
    return {"N": N, "GROUP": N // k_TKH.shape[1], "H": H, "P": padded(H), "PRECISION": precision}


def padded(head_dim: int) -> int:
    """The width of a tile: a power of two, at least the 16 that a matrix product takes."""
    return max(16, next_power_of_2(head_dim))


def _shape(tile: Tile) -> dict[str, int]:
    return {"Q": tile.queries, "S": tile.keys, "num_warps": tile.warps, "num_stages": tile.stages}


def _lend_scratch(device: torch.device) -> None:
    """Descriptors that a kernel makes lie in memory which Triton asks for at the launch, in this thread."""
    if not INTERPRETED:
        triton.set_allocator(
            lambda size, _alignment, _stream: torch.empty(size, dtype=torch.int8, device=device)
        )


@kernel_op("attention")
def _attention(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, seen_4T: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    T, N, H = q_TNH.shape
    q_TNH, k_TKH, v_TKH = map(_describable, (q_TNH, k_TKH, v_TKH))
    out_TNH = q_TNH.new_empty(T, N, H)
    lse_NT = q_TNH.new_empty(N, T, dtype=torch.float32)
    tile = choose_tiles(padded(H), q_TNH.itemsize).forward
    _lend_scratch(q_TNH.device)
    launch(_forward)[N, triton.cdiv(T, tile.queries)](
        q_TNH, k_TKH, v_TKH, seen_4T, out_TNH, lse_NT, T, *_strides(q_TNH, k_TKH, v_TKH),
        scale * math.log2(math.e), **_options(q_TNH, k_TKH), **_shape(tile),
    )  # fmt: skip
    return out_TNH, lse_NT


@kernel_op("attention_backward")
def _attention_backward(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    seen_4T: Tensor,
    out_TNH: Tensor,
    lse_NT: Tensor,
    grad_TNH: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    T, N, H = q_TNH.shape
    K = k_TKH.shape[1]
    q_TNH, k_TKH, v_TKH = map(_describable, (q_TNH, k_TKH, v_TKH))
    tiles = choose_tiles(padded(H), q_TNH.itemsize)
    rows_2NT = lse_NT.new_empty(2, N, T)
    _lend_scratch(q_TNH.device)
    launch(_prepare)[N, triton.cdiv(T, PREPARE_ROWS)](
        out_TNH, grad_TNH, lse_NT, rows_2NT, T, N=N, H=H, P=padded(H), ROWS=PREPARE_ROWS, num_warps=4
    )
    dq_TNH = q_TNH.new_empty(T, N, H)
    dk_TKH, dv_TKH = k_TKH.new_empty(T, K, H), k_TKH.new_empty(T, K, H)
    inputs = q_TNH, k_TKH, v_TKH, seen_4T, grad_TNH, rows_2NT
    scalars = T, *_strides(q_TNH, k_TKH, v_TKH), scale * math.log2(math.e), scale
    options = _options(q_TNH, k_TKH)
    launch(_backward_keys)[K, triton.cdiv(T, tiles.keys.keys)](
        *inputs, dk_TKH, dv_TKH, *scalars, **options, **_shape(tiles.keys)
    )
    launch(_backward_queries)[N, triton.cdiv(T, tiles.queries.queries)](
        *inputs, dq_TNH, *scalars, **options, **_shape(tiles.queries)
    )
    return dq_TNH, dk_TKH, dv_TKH


@_attention.register_fake
def _(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, seen_4T: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    T, N, H = q_TNH.shape
    return q_TNH.new_empty(T, N, H), q_TNH.new_empty(N, T, dtype=torch.float32)


@_attention_backward.register_fake
def _(q_TNH: Tensor, k_TKH: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q_TNH.new_empty(q_TNH.shape), k_TKH.new_empty(k_TKH.shape), k_TKH.new_empty(k_TKH.shape)


def _keep(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, float], output: tuple[Tensor, Tensor]
) -> None:
    *tensors, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, grad_TNH: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    grads = _attention_backward(*ctx.saved_tensors, grad_TNH.contiguous(), ctx.scale)
    return *grads, None, None


_attention.register_autograd(_differentiate, setup_context=_keep)


@kernel_op("attention_two")
def _attention_two(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, seen_4T: Tensor, more_4T: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Over two intervals that share no key, of which the second may be empty: a mean of the two results, each with
    the share of the exponentials that its interval has."""
    own_TNH, own_NT = _attention(q_TNH, k_TKH, v_TKH, seen_4T, scale)
    more_TNH, more_NT = _attention(q_TNH, k_TKH, v_TKH, more_4T, scale)
    empty_T = more_4T[0] == more_4T[1]
    more_NT = more_NT.masked_fill(empty_T, float("-inf"))
    lse_NT = torch.logaddexp(own_NT, more_NT)
    share_TN1 = (more_NT - lse_NT).exp().T.unsqueeze(-1)
    more_TNH = more_TNH.float().masked_fill(empty_T[:, None, None], 0.0)
    return torch.lerp(own_TNH.float(), more_TNH, share_TN1).to(q_TNH.dtype), lse_NT


@_attention_two.register_fake
def _(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, seen_4T: Tensor, more_4T: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    T, N, H = q_TNH.shape
    return q_TNH.new_empty(T, N, H), q_TNH.new_empty(N, T, dtype=torch.float32)


def _keep_two(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float], output: tuple[Tensor, Tensor]
) -> None:
    *tensors, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _differentiate_two(ctx: Any, grad_TNH: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    """With the result and the log-sum-exp over both, either interval's part of the gradients is what the kernels
    compute of it alone."""
    q_TNH, k_TKH, v_TKH, seen_4T, more_4T, out_TNH, lse_NT = ctx.saved_tensors
    both = [
        _attention_backward(q_TNH, k_TKH, v_TKH, each_4T, out_TNH, lse_NT, grad_TNH.contiguous(), ctx.scale)
        for each_4T in (seen_4T, more_4T)
    ]
    return *(own + more for own, more in zip(*both, strict=True)), None, None, None


_attention_two.register_autograd(_differentiate_two, setup_context=_keep_two)


def interval_attention(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    seen_4T: Tensor,
    scale: float,
    more_4T: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ) v of each query over its interval of keys.

    Args:
        q_TNH: [T, N, H], with H a multiple of 8 up to 256, in fp32 up to 128. k_TKH, v_TKH: [T, K, H], K dividing
            N. fp32, bf16 or fp16, all the same; any strides (a last dimension that is not contiguous costs a copy).
        seen_4T: int32 [4, T], see the top of this file; every query sees at least one key.
        scale: positive.
        more_4T: a second interval of each query, of keys that its first does not have; it may be empty.

    Returns:
        [T, N, H] in the inputs' dtype and, without a gradient, the natural log-sum-exp of the scores, fp32 [N, T].
        All sums are in fp32 and in an order that depends on shapes and `seen_4T` alone: forward and backward give
        the same bits each time.

    Raises:
        ValueError: a head dim, dtype or scale that the kernels don't take.
    """
    H, dtype = q_TNH.shape[2], q_TNH.dtype
    if dtype not in MAX_HEAD_DIM:
        raise ValueError(f"attention=triton takes fp32, bf16 and fp16, this is {dtype}; use attention=sdpa")
    if H % 8 or not 8 <= H <= MAX_HEAD_DIM[dtype]:
        raise ValueError(
            f"attention=triton takes head dims that are multiples of 8 up to {MAX_HEAD_DIM[dtype]} for {dtype}, "
            f"this is {H}; use attention=sdpa"
        )
    if not scale > 0:
        raise ValueError(f"attention=triton needs a positive softmax scale, this is {scale}")
    if more_4T is not None:
        return _attention_two(q_TNH, k_TKH, v_TKH, seen_4T, more_4T, float(scale))
    return _attention(q_TNH, k_TKH, v_TKH, seen_4T, float(scale))


# --- variants -----------------------------------------------------------------------------------------------

HEAD_DIMS = {"bf16": (16, 32, 64, 80, 96, 128, 256), "fp16": (128,), "fp32": (16, 64, 128)}
TYPES = {
    "seen_4T": "*i32",
    "T": "i32:16",
    **dict.fromkeys(("lse_NT", "rows_2NT"), "*fp32"),
    **dict.fromkeys(("q_token", "q_head", "k_token", "k_head", "v_token", "v_head"), "i32:16"),
    **dict.fromkeys(("scale", "softmax_scale"), "fp32"),
}


def _variant(kernel: Any, dtype: str, constants: dict[str, Any], warps: int, stages: int) -> Variant:
    types = TYPES | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, f"*{dtype}") for name in kernel.arg_names}
    return Variant(kernel, signature, constants, warps, stages)


def variants() -> Iterator[Variant]:
    """Every tile that `choose_tiles` gives, and the padded head dims of the models we know."""
    for dtype, H in ((dtype, H) for dtype, head_dims in HEAD_DIMS.items() for H in head_dims):
        heads = {"N": 32, "H": H, "P": padded(H)}
        options = {**heads, "GROUP": 4, "PRECISION": "tf32x3" if dtype == "fp32" else "tf32"}
        tiles = choose_tiles(padded(H), 4 if dtype == "fp32" else 2)
        for kernel, tile in zip((_forward, _backward_keys, _backward_queries), tiles, strict=True):
            constants = {**options, "Q": tile.queries, "S": tile.keys}
            yield _variant(kernel, dtype, constants, tile.warps, tile.stages)
        yield _variant(_prepare, dtype, {**heads, "ROWS": PREPARE_ROWS}, 4, 3)
