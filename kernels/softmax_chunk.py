"""What the losses over a vocabulary share: a chunk of logits at a time, and the sums of gradients over chunks.

T tokens · D width · V vocabulary · C tokens of one chunk · S = V rounded up to ALIGNED, a row's stride.
"""

import torch
from torch import Tensor

from drivetrain.kernels.chunks import CHUNK_TOKENS, TILE_ELEMENTS
from drivetrain.kernels.op import tl, triton

ALIGNED = 64  # elements: cuBLAS and 16-byte loads want aligned rows, which an odd vocabulary has not

BLOCK = 8192  # logits of one row that a program works on: 16 a thread, two loads of 16 bytes in bf16
WARPS = 16


def logits_buffer(hidden_TD: Tensor, weight_VD: Tensor, tokens: int) -> Tensor:
    """Memory for [C, V] logits in the inputs' dtype, rows S apart."""
    V = weight_VD.shape[0]
    stride = -(-V // ALIGNED) * ALIGNED
    return hidden_TD.new_empty(min(tokens, hidden_TD.shape[0]), stride)[:, :V]


def tile_rows(hidden_TD: Tensor, weight_VD: Tensor) -> int:
    """Rows of a chunk that go through the softmax together in plain PyTorch."""
    if hidden_TD.device.type != "cpu":
        return CHUNK_TOKENS
    return max(1, TILE_ELEMENTS // weight_VD.shape[0])


def like(buffer: Tensor, shape: Tensor) -> Tensor:
    """The first of `buffer`'s elements in the given tensor's shape."""
    return buffer[: shape.numel()].view(shape.shape)


def widened(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums over tokens and over the vocabulary are held in."""
    return torch.promote_types(dtype, torch.float32)


def cap_(logits: Tensor, softcap: float, wants_grad: bool) -> Tensor | None:
    """In place c·tanh(logits/c), Gemma 2's (section 2); its slope, or None when there is no cap or no wish."""
    if not softcap:
        return None
    logits.div_(softcap).tanh_()
    slope = 1 - logits.square() if wants_grad else None
    logits.mul_(softcap)
    return slope


class Gradients:
    """The gradients of logits = hidden · weightᵀ, from d loss/d logits of one chunk after the other.

    Over several chunks the weights' gradient is summed in fp32 (fp64 for fp64).

    Args:
        chunk: tokens of a chunk. scratch: on a CPU, memory of the wide dtype for a row of weights or more.
        of_weight: False for a frozen matrix, whose gradient is then empty, [0].
    """

    def __init__(
        self,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        chunk: int,
        scratch: Tensor | None = None,
        of_weight: bool = True,
    ) -> None:
        self.hidden_TD, self.weight_VD = hidden_TD, weight_VD
        narrow, several = weight_VD.dtype, hidden_TD.shape[0] > chunk
        self.grad_hidden_TD = hidden_TD.new_empty(hidden_TD.shape)
        self.begun, self.of_weight = False, of_weight
        self.part_VD: Tensor | None = None
        if not of_weight:
            self.total_VD = weight_VD.new_empty(0)
            return
        self.total_VD = weight_VD.new_empty(weight_VD.shape, dtype=widened(narrow) if several else narrow)
        if weight_VD.device.type == "cpu" and self.total_VD.dtype != narrow:
            # torch's CPU products write their inputs' dtype only.
            self.part_VD = weight_VD.new_empty(weight_VD.shape)
            self.scratch = self.total_VD.new_empty(weight_VD.shape[1]) if scratch is None else scratch

    def add(self, start: int, grad_CV: Tensor) -> None:
        """Add the chunk of tokens that begins at `start`."""
        rows = slice(start, start + grad_CV.shape[0])
        hidden_CD = self.hidden_TD[rows]
        torch.mm(grad_CV, self.weight_VD, out=self.grad_hidden_TD[rows])
        if not self.of_weight:
            return
        beta = int(self.begun)  # with 0 the memory's old content, NaN or not, is left out
        if self.part_VD is not None:
            torch.mm(grad_CV.T, hidden_CD, out=self.part_VD)
            self._add_part(self.part_VD)
        elif self.total_VD.dtype == grad_CV.dtype:
            torch.addmm(self.total_VD, grad_CV.T, hidden_CD, beta=beta, out=self.total_VD)
        else:
            wide = self.total_VD.dtype
            torch.addmm(self.total_VD, grad_CV.T, hidden_CD, out_dtype=wide, beta=beta, out=self.total_VD)
        self.begun = True

    def _add_part(self, part_VD: Tensor) -> None:
        """total += part, piece by piece: a sum of two dtypes makes a widened copy of the whole part on the CPU."""
        if not self.begun:
            self.total_VD.copy_(part_VD)
            return
        rows = max(1, self.scratch.numel() // part_VD.shape[1])
        for total, part in zip(self.total_VD.split(rows), part_VD.split(rows), strict=True):
            total += like(self.scratch, part).copy_(part)

    def result(self) -> tuple[Tensor, Tensor]:
        """[T, D] and [V, D] in the inputs' dtype."""
        if not self.begun:
            self.total_VD.zero_()
        if self.part_VD is not None:
            return self.grad_hidden_TD, self.part_VD.copy_(self.total_VD)
        return self.grad_hidden_TD, self.total_VD.to(self.weight_VD.dtype)


def check_shapes(op: str, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, *rows_T: Tensor) -> None:
    """
    Raises:
        ValueError: not [T, D], [V, D] of one dtype, int64 [T], and more of [T].
    """
    T, D = hidden_TD.shape
    if weight_VD.shape[1:] != (D,) or any(rows.shape != (T,) for rows in (targets_T, *rows_T)):
        found = ", ".join(str([*part.shape]) for part in (hidden_TD, weight_VD, targets_T, *rows_T))
        raise ValueError(f"{op} takes [T, D], [V, D] and as many rows of [T], not {found}")
    if hidden_TD.dtype != weight_VD.dtype or targets_T.dtype != torch.int64:
        raise ValueError(
            f"{op} takes hidden states and weights of one dtype and int64 targets, not "
            f"{hidden_TD.dtype}, {weight_VD.dtype}, {targets_T.dtype}"
        )


# --- parts of kernels ---------------------------------------------------------------------------------------


@triton.jit
def capped(x, softcap):
    """c·tanh(x/c), to a few units in the last place."""
    y = x * (1 / softcap)
    # 1 − 2/(1 + e^2|y|) cancels near 0, where five terms of the series are exact to 1e-8.
    y2 = y * y
    near = y * (1 + y2 * (-1 / 3 + y2 * (2 / 15 + y2 * (-17 / 315 + y2 * (62 / 2835)))))
    far = 1 - 2 / (1 + tl.exp(2 * tl.abs(y)))
    return softcap * tl.where(y2 < 0.0625, near, tl.where(y < 0, -far, far))


@triton.jit
def cap_slope(capped_x, softcap):
    y = capped_x * (1 / softcap)
    return 1 - y * y


@triton.jit
def load_logits(row_V, column, V, S, softcap, CAP: tl.constexpr):
    """Logits in fp32 after the soft cap, and beyond the vocabulary a value below every logit.

    It is finite, so that no difference makes a NaN. Padding up to S is read with the rest: S is a multiple of 16,
    so that this mask keeps 16-byte loads.
    """
    x = tl.load(row_V + column, mask=column < S, other=0.0).to(tl.float32)
    if CAP:
        x = capped(x, softcap)
    return tl.where(column < V, x, -1e30)


@triton.jit
def load_target(row_V, target, V, softcap, CAP: tl.constexpr):
    """The target's logit; NaN, which no later sum hides, for one outside the vocabulary."""
    x = tl.load(row_V + target, mask=(target >= 0) & (target < V), other=float("nan")).to(tl.float32)
    if CAP:
        x = capped(x, softcap)
    return x


@triton.jit
def clear(row_V, S, BLOCK: tl.constexpr):
    """Zeros in a row of logits."""
    for start in range(0, S, BLOCK):
        column = start + tl.arange(0, BLOCK)
        tl.store(row_V + column, tl.zeros([BLOCK], row_V.dtype.element_ty), mask=column < S)
