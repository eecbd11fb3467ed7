"""Completions as packed batches. S completions of a step · T packed tokens of a micro-batch.

A token is predicted at the place before it: what is known of a completion's tokens stands there, and 0 elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from drivetrain.data.batch import Batch
from drivetrain.data.packing import best_fit
from drivetrain.data.sft import batch_from_rows
from drivetrain.model.generate import Completion
from drivetrain.train.rl.rollout import Group


@dataclass(frozen=True, slots=True)
class Span:
    """Where completion number `sequence` of the step is predicted: `length` places from `first` on."""

    sequence: int
    first: int
    length: int

    @property
    def places(self) -> slice:
        return slice(self.first, self.first + self.length)


@dataclass(frozen=True, slots=True)
class Packed:
    """This rank's micro-batches of a step, and the completions in each of them."""

    batches: list[Batch]
    spans: list[list[Span]]
    sequences: int  # of all ranks


def pack(
    groups: Sequence[Group], row_len: int, micro_batch: int, rank: int, ranks: int, pad_id: int
) -> Packed:
    """Rows of whole completions with their prompts: the same rows on any number of ranks, dealt out evenly.

    Every rank gets as many micro-batches, of as many rows, up to `micro_batch`; some rows may be empty.
    `loss_weights_T` is 1 where a completion's token is predicted.
    """
    sequences = [(group.prompt, one) for group in groups for one in group.completions]
    lengths = np.array([len(prompt) + len(one.tokens) for prompt, one in sequences])
    rows = best_fit(lengths, row_len)
    passes = -(-len(rows) // (ranks * micro_batch))
    each = -(-len(rows) // (ranks * passes))
    batches, spans = [], []
    for index in range(passes):
        first = (index * ranks + rank) * each
        mine = [*rows[first : first + each]]
        mine += [[]] * (each - len(mine))
        batch, found = _batch(sequences, mine, row_len, pad_id)
        batches.append(batch)
        spans.append(found)
    return Packed(batches, spans, len(sequences))


def _batch(
    sequences: list[tuple[list[int], Completion]], rows: list[list[int]], row_len: int, pad_id: int
) -> tuple[Batch, list[Span]]:
    parts: list[list[tuple[np.ndarray, np.ndarray]]] = []
    spans, digest = [], 0
    for number, row in enumerate(rows):
        at = number * row_len
        parts.append([])
        for sequence in row:
            prompt, one = sequences[sequence]
            tokens = np.array([*prompt, *one.tokens], dtype=np.int64)
            weights = np.arange(len(tokens)) >= len(prompt)
            parts[-1].append((tokens, weights))
            spans.append(Span(sequence, at + len(prompt) - 1, len(one.tokens)))
            digest += xxhash.xxh3_64_intdigest(tokens.tobytes())
            at += len(tokens)
    batch = batch_from_rows(parts, row_len, pad_id)
    behaviour_T = spread(batch.tokens, spans, [one.behaviour_logprobs for _, one in sequences])
    return replace(batch, digest=digest % (1 << 64), behaviour_logprobs_T=behaviour_T), spans


def spread(tokens: int, spans: Sequence[Span], values: Any) -> Tensor:
    """fp32 [T]: from `values[sequence]` one value of each completion, or one for each of its tokens."""
    out_T = torch.zeros(tokens)
    for span in spans:
        out_T[span.places] = torch.as_tensor(values[span.sequence], dtype=torch.float32)
    return out_T
