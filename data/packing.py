"""Rows of `row_len` tokens out of whole conversations: as few rows as best-fit finds, none of them cut.

The conversations of an epoch are shuffled by a keyed permutation and packed block by block, so that a plan needs
the lengths of one block and no more. Which rows there are is a function of (seed, name, epoch, block) alone.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from drivetrain.conf.errors import DataError
from drivetrain.conf.schema import TooLong
from drivetrain.data.permutation import Permutation
from drivetrain.data.shards import DTYPES, Manifest, map_document_ends, map_lengths, map_tokens, map_weights
from drivetrain.data.windows import open_maps

BLOCK_ROWS = 256  # about as many rows are packed at once: one row that stays half empty is 0.2% of them
MOST_CONVERSATIONS = 1 << 16  # in a block: packing takes about a microsecond for each
_MAPS = 4  # a shard's tokens, weights, lengths and starts


def best_fit(lengths: np.ndarray, row_len: int) -> list[list[int]]:
    """Indices of `lengths` row by row: the longest first, each into the fullest row that still has room for it.

    Best-fit decreasing needs at most 11/9 of the fewest rows, and one (Johnson 1973).

    Args:
        lengths: integers [n], each in 1..row_len.
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # rows by the room that is left in them
    rooms: list[int] = []  # the keys of by_room, ascending
    order = np.argsort(-lengths, kind="stable")
    for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        place = bisect_left(rooms, length)
        if place == len(rooms):
            row, room = len(rows), row_len
            rows.append([])
        else:
            room = rooms[place]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        rows[row].append(index)
        if left := room - length:
            if left not in by_room:
                by_room[left] = []
                insort(rooms, left)
            by_room[left].append(row)
    return rows


class Conversations:
    """One split of a directory of conversations; shards are memory-mapped when first read.

    Args:
        directory: what `drivetrain data build --chat` made; `data.preference.Pairs` reads what `--pairs` made.
        sharing: how many of these, this one among them, share out the maps that may be open.

    Raises:
        DataError: no manifest, documents without weights, or no such split.
    """

    paired = False

    def __init__(self, directory: Path, split: str, sharing: int = 1) -> None:
        self.directory, self.split = directory, split
        self.manifest = Manifest.read(directory)
        self.shards = self.manifest.split(split)
        if not self.manifest.chat:
            raise DataError(
                f"{directory} holds documents and no conversations; build it with `drivetrain data build --chat`"
            )
        if self.manifest.pairs != self.paired:
            holds, option = (
                ("preference pairs", "--chat") if self.manifest.pairs else ("conversations", "--pairs")
            )
            raise DataError(f"{directory} holds {holds}; build it with `drivetrain data build {option}`")
        if not self.shards:
            raise DataError(
                f"{directory} has no {split} conversations; build it from more, or with --held-out"
            )
        self._first = np.concatenate(([0], np.cumsum([shard.documents for shard in self.shards])))
        self._item = DTYPES[self.manifest.dtype].itemsize
        self._maps: dict[int, tuple[np.ndarray, ...]] = {}
        self._most_maps = max(1, open_maps() // (_MAPS * sharing))

    def __len__(self) -> int:
        return int(self._first[-1])

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Tokens of the given conversations, int64."""
        shards = np.searchsorted(self._first, numbers, side="right") - 1
        out = np.empty(len(numbers), dtype=np.int64)
        for shard in np.unique(shards).tolist():
            here = shards == shard
            out[here] = self._open(shard)[2][numbers[here] - self._first[shard]]
        return out

    def longer_than(self, limit: int) -> int:
        """How many have more tokens than `limit`: reads the four bytes of each one's length."""
        return sum(int((self._open(shard)[2] > limit).sum()) for shard in range(len(self.shards)))

    def read(self, number: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (in the shards' dtype) and weights (uint8) of the first `limit` tokens of a conversation."""
        shard = int(np.searchsorted(self._first, number, side="right")) - 1
        tokens, weights, lengths, starts = self._open(shard)
        place = number - int(self._first[shard])
        start = int(starts[place]) // self._item
        stop = start + min(int(lengths[place]), limit)
        return tokens[start:stop], weights[start:stop]

    def _open(self, shard: int) -> tuple[np.ndarray, ...]:
        if shard not in self._maps:
            if len(self._maps) >= self._most_maps:
                del self._maps[next(iter(self._maps))]
            info, dtype = self.shards[shard], self.manifest.dtype
            self._maps[shard] = (
                map_tokens(self.directory, info, dtype),
                map_weights(self.directory, info, dtype),
                map_lengths(self.directory, info),
                map_document_ends(self.directory, info),
            )
        return self._maps[shard]


@dataclass(slots=True)
class Place:
    """Where a stream of rows goes on; `conversations` counts those that it has given out."""

    epoch: int = 0
    block: int = 0
    row: int = 0
    conversations: int = 0


class Rows:
    """An endless stream of rows, each a list of conversations: every epoch in an order of its own.

    Args:
        too_long: what becomes of conversations with more than `row_len` tokens: they are left out, or their first
            `row_len` tokens are taken (unless none of these is learned).
        place: from an earlier stream; it is changed as rows are taken.

    Raises:
        DataError: every conversation is too long.
    """

    def __init__(
        self,
        conversations: Conversations,
        row_len: int,
        too_long: TooLong,
        seed: int,
        name: str,
        place: Place | None = None,
    ) -> None:
        self.conversations, self.row_len, self.too_long = conversations, row_len, too_long
        self.place = place or Place()
        self._key = f"{seed}/{name}"
        manifest = conversations.manifest
        mean = manifest.tokens(conversations.split) / len(conversations)
        self._block = int(min(MOST_CONVERSATIONS, max(1, BLOCK_ROWS * row_len / mean)))
        self.blocks = -(-len(conversations) // self._block)
        self.longer = conversations.longer_than(row_len)
        if self.longer == len(conversations) and too_long is TooLong.drop:
            raise DataError(
                f"all {self.longer} {conversations.split} conversations of {conversations.directory} have more "
                f"than stage.seq_len={row_len} tokens; lengthen it, or use stage.too_long=truncate"
            )
        self._planned: tuple[int, int] = (-1, -1)
        self._rows: list[np.ndarray] = []

    @property
    def kept(self) -> int:
        """Conversations in an epoch; those without a learned token in what is left after cutting count too."""
        return len(self.conversations) - (self.longer if self.too_long is TooLong.drop else 0)

    def utilisation(self) -> float:
        """The share of the tokens of the block's rows that are conversations'."""
        rows = self._plan(self.place.epoch, self.place.block)
        if not rows:
            return 0.0
        lengths = self.conversations.lengths(np.concatenate(rows))
        return float(np.minimum(lengths, self.row_len).sum() / (len(rows) * self.row_len))

    def take(self, count: int) -> list[np.ndarray]:
        """The next rows, as numbers of conversations, int64."""
        taken: list[np.ndarray] = []
        while len(taken) < count:
            more = self._rows_here()[self.place.row :][: count - len(taken)]
            self.place.row += len(more)
            self.place.conversations += sum(len(row) for row in more)
            taken += more
        return taken

    def _rows_here(self) -> list[np.ndarray]:
        """The rows of the block where the stream stands, or of the next one that has some left."""
        for _ in range(self.blocks + 1):
            rows = self._plan(self.place.epoch, self.place.block)
            if self.place.row < len(rows):
                return rows
            self.place.row = 0
            self.place.block += 1
            if self.place.block == self.blocks:
                self.place.epoch, self.place.block = self.place.epoch + 1, 0
        raise DataError(
            f"no conversation of {self.conversations.directory} has a learned token among its first "
            f"stage.seq_len={self.row_len}; lengthen it"
        )

    def _plan(self, epoch: int, block: int) -> list[np.ndarray]:
        """The rows of one block; the last plan is kept."""
        if self._planned != (epoch, block):
            numbers, lengths = self._kept(epoch, block)
            rows = best_fit(lengths, self.row_len)
            self._rows = []
            if rows:  # best-fit leaves the longest conversations in the first rows
                order = Permutation(len(rows), f"{self._key}/rows/{epoch}/{block}")
                self._rows = [numbers[rows[row]] for row in order(np.arange(len(rows))).tolist()]
            self._planned = (epoch, block)
        return self._rows

    def _kept(self, epoch: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers and lengths in a row of the block's conversations, without those left out."""
        size = len(self.conversations)
        order = Permutation(size, f"{self._key}/epoch/{epoch}")
        numbers = order(np.arange(block * self._block, min((block + 1) * self._block, size)))
        lengths = self.conversations.lengths(numbers)
        kept = lengths <= self.row_len
        if self.too_long is TooLong.truncate:
            for index in np.flatnonzero(~kept).tolist():
                weights = self.conversations.read(int(numbers[index]), self.row_len)[1]
                kept[index] = weights[
                    1:
                ].any()  # a row without a learned token could be a step without a loss
        return numbers[kept], np.minimum(lengths[kept], self.row_len)
