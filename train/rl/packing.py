"""Trajectories as packed batches. S of a step · T packed tokens of a micro-batch.

A token is predicted at the place before it: what is known of the tokens that the model wrote stands there, and 0
elsewhere, so at those that the environment wrote too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from drivetrain.data.batch import Batch
from drivetrain.data.packing import best_fit
from drivetrain.data.sft import batch_from_rows
from drivetrain.train.rl.episodes import Trajectory
from drivetrain.train.rl.rollout import Group

ROW_STEP = 64  # tokens; few different shapes, for allocators and compilers


@dataclass(frozen=True, slots=True)
class Span:
    """Where the model's tokens of trajectory number `sequence` of the step are predicted, int64 [n]."""

    sequence: int
    places: Tensor


@dataclass(frozen=True, slots=True)
class Packed:
    """This rank's micro-batches of a step, and the trajectories in each of them."""

    batches: list[Batch]
    spans: list[list[Span]]
    sequences: int  # of all ranks


@dataclass(frozen=True, slots=True)
class Tree:
    """Trajectories that follow one prompt: `sequences`, by their numbers in the step.

    As packed, the tokens are those of the prompt but its last one, and of each trajectory the prompt's last token
    and its own. Only where there are several do they branch.
    """

    prompt: list[int]
    sequences: list[int]
    branches: list[Trajectory]

    @property
    def length(self) -> int:
        return len(self.prompt) - 1 + sum(1 + len(one.tokens) for one in self.branches)


def pack(
    groups: Sequence[Group],
    row_len: int,
    micro_batch: int,
    rank: int,
    ranks: int,
    pad_id: int,
    share: bool = True,
) -> Packed:
    """Rows of whole trajectories with their prompts: the same rows on any number of ranks, dealt out evenly.

    Every rank gets as many micro-batches, of as many rows, up to `micro_batch`; some rows may be empty. Rows are as
    long as the step's fullest needs, in multiples of `ROW_STEP`, and at most `row_len`. `loss_weights_T` is 1 where
    a token is predicted that the model wrote.

    Args:
        share: the trajectories of a group that fit into one row have their prompt in common there, as documents
            that branch; the same numbers for less work.
    """
    trees = list(_trees(groups, row_len if share else 0))
    rows = best_fit(np.array([tree.length for tree in trees]), row_len)
    fullest = max(sum(trees[i].length for i in row) for row in rows)
    row_len = min(row_len, -(-fullest // ROW_STEP) * ROW_STEP)
    passes = -(-len(rows) // (ranks * micro_batch))
    each = -(-len(rows) // (ranks * passes))
    batches, spans = [], []
    for index in range(passes):
        first = (index * ranks + rank) * each
        mine = [[trees[i] for i in row] for row in rows[first : first + each]]
        mine += [[]] * (each - len(mine))
        batch, found = _batch(mine, row_len, pad_id)
        batches.append(batch)
        spans.append(found)
    return Packed(batches, spans, sum(len(group.completions) for group in groups))


def _trees(groups: Sequence[Group], room: int) -> Iterator[Tree]:
    """As few a group as have up to `room` tokens each; where that is too little for two, each has its own."""
    number = 0
    for group in groups:
        tree = Tree(group.prompt, [], [])
        for one in group.completions:
            if tree.branches and (len(group.prompt) < 2 or tree.length + 1 + len(one.tokens) > room):
                yield tree
                tree = Tree(group.prompt, [], [])
            tree.sequences.append(number)
            tree.branches.append(one)
            number += 1
        yield tree


def _batch(rows: list[list[Tree]], row_len: int, pad_id: int) -> tuple[Batch, list[Span]]:
    parts: list[list[tuple[np.ndarray, np.ndarray]]] = []
    branches_2T = np.zeros((2, len(rows) * row_len), dtype=np.int32)
    positions_T = np.zeros(len(rows) * row_len, dtype=np.int32)
    spans, behaviour, digest = [], {}, 0
    for number, row in enumerate(rows):
        at = number * row_len
        parts.append([])
        for tree in row:
            *shared, last = tree.prompt
            tokens, weights = [*shared], [False] * len(shared)
            branches_2T[:, at : at + tree.length] = at
            positions_T[at : at + len(shared)] = np.arange(len(shared))
            for sequence, one in zip(tree.sequences, tree.branches, strict=True):
                first, length = at + len(tokens), 1 + len(one.tokens)
                if len(tree.branches) > 1:
                    branches_2T[:, first : first + length] = [[first], [at + len(shared)]]
                positions_T[first : first + length] = np.arange(len(shared), len(shared) + length)
                spans.append(Span(sequence, torch.from_numpy(first + np.flatnonzero(one.written))))
                behaviour[sequence] = one.behaviour_logprobs
                tokens += [last, *one.tokens]
                weights += [False, *one.written]
                whole = np.array([*tree.prompt, *one.tokens], dtype=np.int64)
                digest += xxhash.xxh3_64_intdigest(whole.tobytes())
            parts[-1].append((np.array(tokens, dtype=np.int64), np.array(weights)))
            at += tree.length
        left = (number + 1) * row_len - at
        branches_2T[:, at : at + left] = at
        positions_T[at : at + left] = np.arange(left)
    batch = replace(
        batch_from_rows(parts, row_len, pad_id),
        digest=digest % (1 << 64),
        positions_T=torch.from_numpy(positions_T),
    )
    if any(len(tree.branches) > 1 for row in rows for tree in row):
        batch = replace(batch, branches_2T=torch.from_numpy(branches_2T))
    return replace(batch, behaviour_logprobs_T=spread(batch.tokens, spans, behaviour)), spans


def spread(tokens: int, spans: Sequence[Span], values: Any) -> Tensor:
    """fp32 [T]: from `values[sequence]` one value of each trajectory, or one for each of the model's tokens."""
    out_T = torch.zeros(tokens)
    for span in spans:
        out_T[span.places] = torch.as_tensor(values[span.sequence], dtype=torch.float32)
    return out_T
