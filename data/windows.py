"""Windows over one split of a directory of shards, in a shuffled order that needs no memory."""

import resource
from pathlib import Path

import numpy as np

from drivetrain.conf.errors import DataError
from drivetrain.data.batch import Batch, batch_from_windows
from drivetrain.data.permutation import Permutation
from drivetrain.data.shards import DTYPES, Manifest, map_tokens

BLOCK = 4096  # places dealt at once: the permutation costs by the call and hardly by the place
MAPS = 1 << 14  # open at once at most: Linux lets a process have 65,530 (vm.max_map_count)


def open_maps() -> int:
    """How many shards of one split may stay mapped: Python's mmap holds a descriptor for each. A quarter of what
    the process may open: training and held-out data take half at most."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAPS if files == resource.RLIM_INFINITY else min(MAPS, files // 4)


class Windows:
    """Windows of S + 1 tokens, S apart, that do not cross shards; each shard is memory-mapped when first read.

    Args:
        directory: what `drivetrain data build` made.
        split: "train" or "held_out".
        seq_len: S.
        sharing: how many `Windows`, this one among them, share out the maps that may be open.

    Raises:
        DataError: no manifest, no such split, or no shard with S + 1 tokens.
    """

    def __init__(self, directory: Path, split: str, seq_len: int, sharing: int = 1) -> None:
        self.directory, self.split, self.seq_len = directory, split, seq_len
        self.manifest = Manifest.read(directory)
        self.shards = self.manifest.split(split)
        counts = np.array([max(0, (shard.tokens - 1) // seq_len) for shard in self.shards], dtype=np.int64)
        self._first = np.concatenate(([0], np.cumsum(counts)))
        self.dtype = DTYPES[self.manifest.dtype]
        self._maps: dict[int, np.ndarray] = {}
        self._most_maps = max(1, open_maps() // sharing)
        if len(self) == 0:
            raise DataError(
                f"{directory} has no {split} shard with {seq_len + 1} tokens; lower stage.seq_len or build it "
                "from more text"
            )

    def __len__(self) -> int:
        return int(self._first[-1])

    def read(self, windows: np.ndarray) -> np.ndarray:
        """Tokens of the given windows, in the shards' dtype: [len(windows), S + 1].

        Args:
            windows: int64 window numbers, in any order.

        Raises:
            DataError: a shard is missing, or its size is not what the manifest says.
        """
        S = self.seq_len
        out = np.empty((len(windows), S + 1), dtype=self.dtype)
        shards = np.searchsorted(self._first, windows, side="right") - 1
        starts = (windows - self._first[shards]) * S
        for row, (shard, start) in enumerate(zip(shards.tolist(), starts.tolist(), strict=True)):
            tokens = self._maps.get(shard)
            if tokens is None:
                tokens = self._open(shard)
            out[row] = tokens[start : start + S + 1]
        return out

    def batch(self, windows: np.ndarray) -> Batch:
        """The given windows as one batch."""
        return batch_from_windows(self.read(windows), self.manifest.eos_id)

    def _open(self, shard: int) -> np.ndarray:
        if (
            len(self._maps) >= self._most_maps
        ):  # the oldest goes: in a shuffled order none is likelier than another
            del self._maps[next(iter(self._maps))]
        self._maps[shard] = map_tokens(self.directory, self.shards[shard], self.manifest.dtype)
        return self._maps[shard]


class ShuffledWindows:
    """An endless stream of windows: every epoch in an order of its own, keyed by (seed, name, epoch)."""

    def __init__(self, windows: Windows, seed: int, name: str) -> None:
        self.windows, self._seed, self._name = windows, seed, name
        self._blocks = -(-len(windows) // BLOCK)  # in an epoch
        self._dealt: dict[int, np.ndarray] = {}

    def read(self, ordinals: np.ndarray) -> np.ndarray:
        """Windows number `ordinals` (int64, from 0, across epochs) of the stream: [n, S + 1]."""
        epochs, places = np.divmod(ordinals, len(self.windows))
        blocks = epochs * self._blocks + places // BLOCK
        numbers = np.empty_like(places)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            numbers[here] = self._deal(block)[places[here] % BLOCK]
        return self.windows.read(numbers)

    def _deal(self, block: int) -> np.ndarray:
        """Window numbers of one block's places, int64 [at most BLOCK]; the last two blocks are kept."""
        if block not in self._dealt:
            epoch, number = divmod(block, self._blocks)
            order = Permutation(len(self.windows), f"{self._seed}/{self._name}/epoch/{epoch}")
            places = np.arange(number * BLOCK, min((number + 1) * BLOCK, len(self.windows)))
            self._dealt = {**dict(list(self._dealt.items())[-1:]), block: order(places)}
        return self._dealt[block]
