"""Held-out loss and bits per byte."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn

from drivetrain.data.batch import Batch
from drivetrain.data.permutation import Permutation
from drivetrain.data.tokenizer import token_byte_lengths
from drivetrain.kernels.attention import Documents, make_documents
from drivetrain.train.engine.base import Loss, LossSums
from drivetrain.train.mesh import World


def documents_of(batch: Batch, sliding_window: int | None, backend: str) -> Documents:
    return make_documents(
        batch.cu_seqlens,
        batch.max_seqlen,
        batch.tokens,
        batch.row_len,
        sliding_window,
        backend=backend,
        branches_2T=batch.branches_2T,
    )


class Sequences(Protocol):
    """Held-out sequences of `seq_len` tokens."""

    seq_len: int

    def __len__(self) -> int: ...

    def batch(self, numbers: np.ndarray) -> Batch:
        """The sequences with these numbers, int64 below the length."""


class Evaluates(Protocol):
    """An engine, as far as evaluations need one."""

    def evaluate(self, batches: list[Batch], loss: Loss) -> dict[str, float]:
        """The loss's sums over all batches, divided by their loss weight."""


class HeldOut:
    """A fixed random sample of held-out sequences from every source, dealt out over the ranks.

    Args:
        tokens: how many to read in all, shared evenly by the sources.
    """

    def __init__(
        self,
        sources: Mapping[str, Sequences],
        tokens: int,
        micro_batch: int,
        seed: int,
        world: World,
        tokenizer_dir: Path,
    ) -> None:
        self.sources, self.world = sources, world
        self.tokens, self.micro_batch, self.seed = tokens, micro_batch, seed
        self.byte_lengths_V = torch.from_numpy(token_byte_lengths(tokenizer_dir)).to(world.device)

    def evaluate(self, engine: Evaluates, loss: Loss) -> dict[str, float]:
        """`eval/loss` (nats a token) and `eval/bits_per_byte`, and with several sources each one's own.

        Bits per byte: summed nats / ln 2 / UTF-8 bytes of the predicted tokens. End-of-text tokens count in the
        nats and stand for no bytes. Collective.
        """

        def with_bytes(model: nn.Module, batch: Batch) -> LossSums:
            minimise, stats = loss(model, batch)
            lengths_T = self.byte_lengths_V[batch.targets_T]
            return minimise, {**stats, "bytes": (lengths_T * batch.loss_weights_T).sum()}

        found: dict[str, float] = {}
        parts = {
            name: engine.evaluate(self._batches(name, source), with_bytes)
            for name, source in self.sources.items()
        }
        for name, part in parts.items():
            if len(parts) > 1:
                found[f"eval/{name}/loss"] = part["loss"]
                found[f"eval/{name}/bits_per_byte"] = part["loss"] / math.log(2) / part["bytes"]
        mean_loss = sum(part["loss"] for part in parts.values()) / len(parts)
        mean_bytes = sum(part["bytes"] for part in parts.values()) / len(parts)
        return {
            "eval/loss": mean_loss,
            "eval/bits_per_byte": mean_loss / math.log(2) / mean_bytes,
            **found,
        }

    def _batches(self, name: str, source: Sequences) -> list[Batch]:
        wanted = max(1, self.tokens // len(self.sources) // source.seq_len)
        return dealt_batches(source, wanted, self.micro_batch, f"{self.seed}/{name}", self.world)


def dealt_batches(source: Sequences, wanted: int, micro_batch: int, key: str, world: World) -> list[Batch]:
    """This rank's batches of `wanted` random sequences; ranks have as many, so some are repeated with weight 0."""
    numbers = Permutation(len(source), f"{key}/held_out")(np.arange(min(wanted, len(source)), dtype=np.int64))
    rounds = math.ceil(len(numbers) / (micro_batch * world.size))
    batches = []
    for round_ in range(rounds):
        first = (round_ * world.size + world.rank) * micro_batch
        mine = numbers[first : first + micro_batch]
        padded = np.resize(mine if len(mine) else numbers[:1], micro_batch)
        batch = source.batch(padded)
        weights_T = batch.loss_weights_T.clone()
        weights_T[len(mine) * source.seq_len :] = 0
        batches.append(replace(batch, loss_weights_T=weights_T))
    return batches
