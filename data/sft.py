"""The fine-tuning source: packed rows of conversations, and batches of them. T tokens of R rows of S."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from drivetrain.conf.errors import DataError
from drivetrain.conf.schema import DataConfig, TooLong
from drivetrain.data.batch import Batch
from drivetrain.data.loader import Share, mixture_of
from drivetrain.data.packing import Conversations, Place, Rows

Part = tuple[np.ndarray, np.ndarray]  # a conversation's tokens and weights


def batch_from_rows(rows: Sequence[Sequence[Part]], row_len: int, pad_id: int) -> Batch:
    """Pack R rows of conversations. What a row has left over is one more document, of `pad_id`, with weight 0.

    Args:
        rows: tokens and weights, [n] each, at most `row_len` in a row. The weight of a token is that of predicting
            it, and so goes to the token before it; a conversation's first token is never predicted.
    """
    R, S = len(rows), row_len
    T = R * S
    tokens_T = torch.full((T,), pad_id, dtype=torch.int32)
    loss_weights_T = torch.zeros(T)
    ends: list[int] = []
    for row, parts in enumerate(rows):
        at = row * S
        for tokens, weights in parts:
            tokens_T[at : at + len(tokens)] = torch.from_numpy(tokens.astype(np.int32))
            loss_weights_T[at : at + len(tokens) - 1] = torch.from_numpy(weights[1:].astype(np.float32))
            at += len(tokens)
            ends.append(at)
        if at < (row + 1) * S:
            ends.append((row + 1) * S)
    cu_seqlens = np.concatenate(([0], ends)).astype(np.int32)
    lengths = np.diff(cu_seqlens)
    positions_T = np.arange(T, dtype=np.int32) - np.repeat(cu_seqlens[:-1], lengths)
    targets_T = torch.empty(T, dtype=torch.int64)
    targets_T[:-1], targets_T[-1] = tokens_T[1:], pad_id
    return Batch(
        tokens_T=tokens_T,
        targets_T=targets_T,
        positions_T=torch.from_numpy(positions_T),
        loss_weights_T=loss_weights_T,
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=int(lengths.max()),
        row_len=S,
        digest=_digest(tokens_T.view(R, S).numpy(), loss_weights_T.view(R, S).numpy()),
    )


def _digest(tokens_RS: np.ndarray, weights_RS: np.ndarray) -> int:
    hashes = (
        xxhash.xxh3_64_intdigest(tokens.tobytes() + weights.tobytes())
        for tokens, weights in zip(tokens_RS, weights_RS, strict=True)
    )
    return sum(hashes) % (1 << 64)


def open_conversations(cfg: DataConfig, split: str) -> dict[str, Conversations]:
    """Every source's conversations by name; a single `data.path` is called "data"."""
    paths = {name: source.path for name, source in cfg.mixture.items()} or {"data": str(cfg.path)}
    return {name: Conversations(Path(path), split, sharing=len(paths)) for name, path in paths.items()}


class SftSource:
    """Rows of conversations, from several sources by weight.

    Every rank plans all rows of a step, from lengths alone, and reads the tokens of its own. A source's weight is
    its share of the rows.

    Args:
        state: from an earlier `state()`; other weights than then begin a new segment of the mixture.

    Raises:
        DataError: a source is missing, holds no conversations, or only such as are too long. CheckpointError: the
            state names other sources.
    """

    def __init__(
        self,
        cfg: DataConfig,
        seq_len: int,
        too_long: TooLong,
        share: Share,
        seed: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._share, self._seq_len = share, seq_len
        sources = self._open(cfg)
        eos = {source.manifest.eos_id for source in sources.values()}
        if len(eos) > 1:
            raise DataError(f"the sources of data.mixture end documents with different tokens: {sorted(eos)}")
        self.eos_id = eos.pop()
        self._sample, self._mixture = mixture_of(cfg, seed, state)
        self._tokens = int(state["tokens"]) if state else 0
        places = {name: Place(**place) for name, place in state["streams"].items()} if state else {}
        self.streams = {
            name: Rows(source, seq_len, too_long, seed, name, places.get(name))
            for name, source in sources.items()
        }

    def _open(self, cfg: DataConfig) -> dict[str, Conversations]:
        return open_conversations(cfg, "train")

    def next_step(self) -> list[Batch]:
        share = self._share
        rows = self._take(self._sample + np.arange(share.per_step, dtype=np.int64))
        self._sample += share.per_step
        mine = rows[share.first : share.first + share.sequences]
        return [
            self._batch(mine[cut : cut + share.micro_batch])
            for cut in range(0, share.sequences, share.micro_batch)
        ]

    def _take(self, samples: np.ndarray) -> list[tuple[Conversations, np.ndarray]]:
        """The rows of global samples: where they come from, and the numbers of their conversations."""
        sources, _ = self._mixture.assign(samples)
        taken = []
        for index, name in enumerate(self._mixture.names):
            stream = self.streams[name]
            rows = stream.take(int((sources == index).sum()))
            if rows:
                lengths = stream.conversations.lengths(np.concatenate(rows))
                self._tokens += int(np.minimum(lengths, self._seq_len).sum())
            taken.append(iter([(stream.conversations, row) for row in rows]))
        return [next(taken[source]) for source in sources.tolist()]

    def _batch(self, rows: list[tuple[Conversations, np.ndarray]]) -> Batch:
        parts = [[source.read(number, self._seq_len) for number in row.tolist()] for source, row in rows]
        return batch_from_rows(parts, self._seq_len, self.eos_id)

    def state(self) -> dict[str, Any]:
        return {
            "sample": self._sample,
            "tokens": self._tokens,
            "segment": asdict(self._mixture.segment),
            "streams": {name: asdict(stream.place) for name, stream in self.streams.items()},
        }


class HeldOutConversations:
    """Rows of held-out conversations: those of the first blocks, as many as are `wanted` or one epoch has."""

    def __init__(
        self, conversations: Conversations, seq_len: int, too_long: TooLong, seed: int, name: str, wanted: int
    ) -> None:
        self.conversations, self.seq_len = conversations, seq_len
        stream = Rows(conversations, seq_len, too_long, seed, f"{name}/held_out")
        self._rows: list[np.ndarray] = []
        while len(self._rows) < wanted:
            row = stream.take(1)[0]
            if stream.place.epoch:
                break
            self._rows.append(row)

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, numbers: np.ndarray) -> Batch:
        """The given rows, int64 numbers below the length, in any order."""
        parts = [
            [self.conversations.read(number, self.seq_len) for number in self._rows[row].tolist()]
            for row in numbers.tolist()
        ]
        return batch_from_rows(parts, self.seq_len, self.conversations.manifest.eos_id)
