"""The source of preference learning: packed rows of pairs. T tokens of R rows of S · P pairs · Q learned tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drivetrain.conf.errors import DataError
from drivetrain.conf.schema import DataConfig, TooLong
from drivetrain.data.batch import Batch
from drivetrain.data.loader import Share
from drivetrain.data.packing import Conversations
from drivetrain.data.sft import HeldOutConversations, Part, SftSource, batch_from_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class PairBatch(Batch):
    """A micro-batch of whole pairs; column 0 is the chosen one of a pair, column 1 the rejected one.

    The loss weight of a pair stands at its first token, so that a step's loss weights sum to its pairs.

    Attributes:
        starts_P: int64, the first token of each pair. ends_P2: int64, the last token of each conversation.
        learned_Q: int64, ascending: the tokens after which a token of an answer comes.
        counts_P2: int64, how many of these each conversation has, at least 1.
        reference_P2: fp32, the reference model's log-probability of each answer in nats; NaN without one.
    """

    starts_P: Tensor
    ends_P2: Tensor
    learned_Q: Tensor
    counts_P2: Tensor
    reference_P2: Tensor

    @property
    def weights_P(self) -> Tensor:
        """The loss weight of each pair, fp32: 1, or 0 for one that only fills a batch up."""
        return self.loss_weights_T[self.starts_P]


class Pairs(Conversations):
    """One split of a directory of preference pairs; numbers and lengths are those of pairs.

    Args:
        directory: what `drivetrain data build --pairs` made.

    Attributes:
        reference: fp32 [pairs, 2], what `PairBatch.reference_P2` is taken from; None without a reference model.
    """

    paired = True

    def __init__(self, directory: Path, split: str, sharing: int = 1) -> None:
        super().__init__(directory, split, sharing)
        self.reference: np.ndarray | None = None

    def __len__(self) -> int:
        return super().__len__() // 2

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Tokens of the given pairs, both conversations together, int64."""
        return super().lengths(2 * numbers) + super().lengths(2 * numbers + 1)

    def longer_than(self, limit: int) -> int:
        """How many have more tokens than `limit`."""
        lengths = (self._open(shard)[2].astype(np.int64) for shard in range(len(self.shards)))
        return sum(int((each[0::2] + each[1::2] > limit).sum()) for each in lengths)

    def both(self, number: int) -> list[Part]:
        """Tokens and weights of the chosen and of the rejected conversation."""
        return [self.read(2 * number + side, 1 << 31) for side in (0, 1)]

    def reference_of(self, number: int) -> np.ndarray:
        """fp32 [2]."""
        if self.reference is None:
            return np.full(2, np.nan, dtype=np.float32)
        return self.reference[number]


def open_pairs(cfg: DataConfig, split: str, seq_len: int) -> dict[str, Pairs]:
    """Every source's pairs by name; a single `data.path` is called "data".

    Raises:
        DataError: a source is missing, holds no pairs, or only such as are too long for a row.
    """
    paths = {name: source.path for name, source in cfg.mixture.items()} or {"data": str(cfg.path)}
    found = {name: Pairs(Path(path), split, sharing=len(paths)) for name, path in paths.items()}
    for pairs in found.values():
        if pairs.longer_than(seq_len) == len(pairs):
            raise DataError(
                f"all {len(pairs)} {split} pairs of {pairs.directory} have, both conversations together, more than "
                f"stage.seq_len={seq_len} tokens; lengthen it"
            )
    return found


def batch_from_pairs(rows: Sequence[tuple[Pairs, Sequence[int]]], row_len: int, pad_id: int) -> PairBatch:
    """Pack R rows of pairs, given as numbers of them; see `batch_from_rows`."""
    parts = [[part for number in numbers for part in pairs.both(number)] for pairs, numbers in rows]
    batch = batch_from_rows(parts, row_len, pad_id)
    # Of each conversation, where it begins and how long it is; what a row has left over is not among them.
    lengths = np.array([len(tokens) for row in parts for tokens, _ in row], dtype=np.int64)
    firsts = [np.cumsum([0, *(len(tokens) for tokens, _ in row[:-1])]) for row in parts]
    begins = np.concatenate([row * row_len + first for row, first in enumerate(firsts)])
    learned_Q = np.flatnonzero(batch.loss_weights_T.numpy())
    counts = np.searchsorted(learned_Q, begins + lengths) - np.searchsorted(learned_Q, begins)
    starts_P = torch.from_numpy(begins[0::2])
    pair_weights_T = torch.zeros_like(batch.loss_weights_T)
    pair_weights_T[starts_P] = 1
    reference_P2 = np.stack([pairs.reference_of(number) for pairs, numbers in rows for number in numbers])
    same = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return PairBatch(
        **{**same, "loss_weights_T": pair_weights_T},
        starts_P=starts_P,
        ends_P2=torch.from_numpy(begins + lengths - 1).view(-1, 2),
        learned_Q=torch.from_numpy(learned_Q),
        counts_P2=torch.from_numpy(counts).view(-1, 2),
        reference_P2=torch.from_numpy(reference_P2),
    )


class PairSource(SftSource):
    """Rows of whole pairs, from several sources by weight; a pair that is longer than a row is left out."""

    def __init__(
        self, cfg: DataConfig, seq_len: int, share: Share, seed: int, state: dict[str, Any] | None = None
    ) -> None:
        super().__init__(cfg, seq_len, TooLong.drop, share, seed, state)

    def _open(self, cfg: DataConfig) -> dict[str, Conversations]:
        self.pairs = open_pairs(cfg, "train", self._seq_len)
        return {**self.pairs}

    def _batch(self, rows: list[tuple[Conversations, np.ndarray]]) -> Batch:
        return batch_from_pairs(
            [(source, numbers.tolist()) for source, numbers in rows if isinstance(source, Pairs)],
            self._seq_len,
            self.eos_id,
        )


class HeldOutPairs(HeldOutConversations):
    """Rows of held-out pairs: those of the first blocks, as many as are `wanted` or one epoch has."""

    def __init__(self, pairs: Pairs, seq_len: int, seed: int, name: str, wanted: int) -> None:
        super().__init__(pairs, seq_len, TooLong.drop, seed, name, wanted)
        self.pairs = pairs

    def batch(self, numbers: np.ndarray) -> PairBatch:
        rows = [(self.pairs, self._rows[row].tolist()) for row in numbers.tolist()]
        return batch_from_pairs(rows, self.seq_len, self.pairs.manifest.eos_id)
