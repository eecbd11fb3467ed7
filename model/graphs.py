"""Decoding from CUDA graphs: one launch a step instead of some twenty a layer.

B rows · V vocabulary · M pages a row. Written for GPUs and so far run on none: neither the graphs nor their gain
have been measured. `FixedBatch`, which is all but the capture, is tested on the CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from drivetrain.model.cache import PAGE, PagedCache, PagedTokens

# (tokens_B, positions_B, keys) -> logits_BV
Forward = Callable[[Tensor, Tensor, PagedTokens], Tensor]
WARMUPS = 3  # passes before the capture, for what libraries and Triton set up when they first run


def buckets(max_batch: int) -> list[int]:
    """Batch sizes that have a graph: powers of two to 16, then multiples of 16, so that few rows are empty."""
    sizes = [1, 2, 4, 8, *range(16, max_batch, 16)]
    return [size for size in sizes if size < max_batch] + [max_batch]


@dataclass(frozen=True, slots=True)
class FixedBatch:
    """A pass whose tensors stay where they are; rows past the batch are empty (length 0) and write to page 0."""

    tokens_B: Tensor
    positions_B: Tensor
    keys: PagedTokens

    @staticmethod
    def empty(cache: PagedCache, rows: int, pages: int) -> "FixedBatch":
        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=cache.device)

        keys = PagedTokens(
            cache,
            zeros(rows, pages, dtype=torch.int32),
            zeros(rows, dtype=torch.int32),
            zeros(rows, dtype=torch.int64),
        )
        return FixedBatch(zeros(rows, dtype=torch.int64), zeros(rows, dtype=torch.int64), keys)

    def fill(self, tokens_B: Tensor, positions_B: Tensor, keys: PagedTokens) -> None:
        for mine, given in (
            (self.tokens_B, tokens_B),
            (self.positions_B, positions_B),
            (self.keys.lengths_B, keys.lengths_B),
            (self.keys.places_B, keys.places_B),
        ):
            mine[: len(given)] = given
            mine[len(given) :] = 0
        rows, pages = keys.table_BM.shape
        self.keys.table_BM[:rows, :pages] = keys.table_BM


class DecodeGraphs:
    """Captures a graph when a batch size is first needed, and replays it with every later step's inputs.

    A graph holds the addresses of weights and cache: weights may change in place, not move.

    Args:
        forward: the pass to capture; no call of it may wait for the device.
    """

    def __init__(self, cache: PagedCache, forward: Forward, max_batch: int, max_seq_len: int) -> None:
        self.cache, self.forward = cache, forward
        self.sizes, self.pages = buckets(max_batch), -(-max_seq_len // PAGE)
        self.captured: dict[int, tuple[torch.cuda.CUDAGraph, FixedBatch, Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def logits(self, tokens_B: Tensor, positions_B: Tensor, keys: PagedTokens) -> Tensor:
        """As `forward`; the result is overwritten by the next call."""
        B = len(tokens_B)
        size = next(size for size in self.sizes if size >= B)
        if size not in self.captured:
            self.captured[size] = self._capture(size)
        graph, batch, logits_BV = self.captured[size]
        batch.fill(tokens_B, positions_B, keys)
        graph.replay()
        return logits_BV[:B]

    def _capture(self, size: int) -> tuple[torch.cuda.CUDAGraph, FixedBatch, Tensor]:
        batch = FixedBatch.empty(self.cache, size, self.pages)
        side = torch.cuda.Stream(self.cache.device)
        side.wait_stream(torch.cuda.current_stream(self.cache.device))
        with torch.cuda.stream(side):
            for _ in range(WARMUPS):
                self.forward(batch.tokens_B, batch.positions_B, batch.keys)
        torch.cuda.current_stream(self.cache.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            logits_BV = self.forward(batch.tokens_B, batch.positions_B, batch.keys)
        return graph, batch, logits_BV
