"""What one forward and backward pass eats: packed documents, no padding. T tokens."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """T packed tokens of one micro-batch.

    Attributes:
        tokens_T: int32. targets_T: int64, the token after each. positions_T: int32, from 0 in each document.
        loss_weights_T: fp32; 0 where there is nothing to predict (a document's last token).
        cu_seqlens: int32 [documents + 1], cumulative document lengths.
        max_seqlen: the longest document; row_len: divides T, and no document crosses a multiple of it.
        branches_2T: int32, None where no document branches: the first token of each token's branch, and one past
            the last token of the beginning that all branches of its document see (kernels/attention.py).
        digest: sum modulo 2^64 of a hash of each window, so that it does not depend on order or ranks.

    Reinforcement learning alone, fp32 at the places that predict a completion's tokens and 0 elsewhere:
        token_weights_T: of the objective, times the trained tokens of the whole step. advantages_T.
        behaviour_logprobs_T: of the sampler, at its temperature and before its filters. old_logprobs_T: of the
        weights that sampled, computed as in training. reference_logprobs_T: of the reference model.
    """

    tokens_T: Tensor
    targets_T: Tensor
    positions_T: Tensor
    loss_weights_T: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    row_len: int
    digest: int = 0
    branches_2T: Tensor | None = None
    token_weights_T: Tensor | None = None
    advantages_T: Tensor | None = None
    behaviour_logprobs_T: Tensor | None = None
    old_logprobs_T: Tensor | None = None
    reference_logprobs_T: Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.tokens_T.shape[0]

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`; copies from pinned memory overlap with computation."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> "Batch":
        """The same batch in page-locked memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **{**values, **changed})


def batch_from_windows(windows_BS1: np.ndarray, eos_id: int) -> Batch:
    """Pack B windows of S + 1 tokens. Every window starts a document of its own, and so does the token after
    each `eos_id`; a document's last token has nothing to predict.

    Args:
        windows_BS1: integer tokens, C-contiguous; the last column is only ever a target.
    """
    B, S1 = windows_BS1.shape
    S = S1 - 1
    T = B * S
    inputs_BS = windows_BS1[:, :-1]
    last_BS = inputs_BS == eos_id
    cuts = np.flatnonzero(last_BS)
    last_BS[:, -1] = True
    ends = np.flatnonzero(last_BS) if len(cuts) else np.arange(S - 1, T, S)
    starts = np.zeros(len(ends) + 1, dtype=np.int32)
    starts[1:] = ends + 1
    lengths = np.diff(starts)

    # One allocation for the four: the allocator gives a large block back with its pages, and small ones without.
    memory = torch.empty(20 * T, dtype=torch.uint8)
    targets_T = memory[: 8 * T].view(torch.int64)
    tokens_T, positions_T = memory[8 * T : 16 * T].view(torch.int32).split(T)
    loss_weights_T = memory[16 * T :].view(torch.float32)
    np.copyto(targets_T.numpy().reshape(B, S), windows_BS1[:, 1:])
    np.copyto(tokens_T.numpy().reshape(B, S), inputs_BS)
    np.subtract(np.arange(T, dtype=np.int32), np.repeat(starts[:-1], lengths), out=positions_T.numpy())
    weights_T = loss_weights_T.numpy()
    weights_T.fill(1)
    weights_T[cuts] = 0
    return Batch(
        tokens_T=tokens_T,
        targets_T=targets_T,
        positions_T=positions_T,
        loss_weights_T=loss_weights_T,
        cu_seqlens=torch.from_numpy(starts),
        max_seqlen=int(lengths.max()),
        row_len=S,
        digest=sum(map(xxhash.xxh3_64_intdigest, windows_BS1)) % (1 << 64),
    )
