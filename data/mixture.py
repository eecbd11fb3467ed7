"""Which source each sample comes from: a function of the sample's number, in exact proportion.

The samples of the first k blocks of 1,024 are split in two, each part in two again, along a Huffman tree of the
weights, whose leaves are the sources. Rounding n·share never falls as n grows and never grows faster than n, so
no source ever goes backwards (differences of rounded running sums would). The splits above a source leave it an
error of at most half the sum of its weight over each of theirs, which Huffman's tree keeps below two samples:
counts never drift. A keyed permutation deals the places of a block out.
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from drivetrain.data.permutation import Permutation

BLOCK = 1024
ONE = 1 << 53  # shares are whole multiples of 1 / ONE, so that splits are exact at any number of samples


@dataclass(frozen=True, slots=True)
class Segment:
    """Weights in force from sample `start` on, and how many samples of each source came before."""

    start: int
    weights: dict[str, float]
    before: dict[str, int]


class Mixture:
    """Assigns global sample numbers to sources.

    A run that resumes with other weights begins a new `Segment`; each source goes on where it was.
    """

    def __init__(self, segment: Segment, seed: int) -> None:
        self.segment, self.seed = segment, seed
        self.names = sorted(segment.weights)
        self._splits = _huffman([segment.weights[name] for name in self.names])
        self._block_number = -1
        self._block = (np.zeros(0, np.int64), np.zeros(0, np.int64))

    def _totals(self, block: int) -> np.ndarray:
        """Samples of each source before `block`, int64 [sources]."""
        counts = [0] * len(self.names) + [0] * len(self._splits)
        counts[-1] = BLOCK * block
        for node in reversed(range(len(self._splits))):
            first, second, share = self._splits[node]
            whole = counts[len(self.names) + node]
            counts[first] = (whole * share + ONE // 2) // ONE
            counts[second] = whole - counts[first]
        return np.array(counts[: len(self.names)], dtype=np.int64)

    def _deal(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Source of each place in the block, and the how-manieth of its source it is; int64 [1024] each."""
        if block != self._block_number:
            before = self._totals(block)
            counts = self._totals(block + 1) - before
            sources = np.repeat(np.arange(len(self.names)), counts)
            order = Permutation(BLOCK, f"{self.seed}/mixture/{self.segment.start}/{block}")(np.arange(BLOCK))
            dealt = sources[order]
            ordinal = np.empty(BLOCK, np.int64)
            for source in range(len(self.names)):
                places = np.flatnonzero(dealt == source)
                ordinal[places] = before[source] + np.arange(len(places))
            self._block_number, self._block = block, (dealt, ordinal)
        return self._block

    def assign(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sources (indices into `names`) and per-source sample numbers of global sample numbers.

        Args:
            samples: int64, ascending, at or after the segment's start.
        """
        relative = samples - self.segment.start
        if len(self.names) == 1:
            return np.zeros_like(samples), relative + self.segment.before.get(self.names[0], 0)
        sources, ordinals = np.empty_like(samples), np.empty_like(samples)
        blocks = relative // BLOCK
        for block in np.unique(blocks):
            here = blocks == block
            dealt, ordinal = self._deal(int(block))
            place = relative[here] - block * BLOCK
            sources[here], ordinals[here] = dealt[place], ordinal[place]
        before = np.array([self.segment.before.get(name, 0) for name in self.names], dtype=np.int64)
        return sources, ordinals + before[sources]

    def consumed(self, sample: int) -> dict[str, int]:
        """How many samples of each source come before global sample `sample`."""
        block, rest = divmod(sample - self.segment.start, BLOCK)
        totals = self._totals(block) + np.bincount(self._deal(block)[0][:rest], minlength=len(self.names))
        counts = dict(self.segment.before)
        for name, total in zip(self.names, totals, strict=True):
            counts[name] = counts.get(name, 0) + int(total)
        return counts

    def reweighted(self, weights: Mapping[str, float], sample: int) -> "Mixture":
        """The mixture from `sample` on under other weights; itself when they are the same."""
        if dict(weights) == self.segment.weights:
            return self
        return Mixture(Segment(sample, dict(weights), self.consumed(sample)), self.seed)


def _huffman(weights: list[float]) -> list[tuple[int, int, int]]:
    """(child, child, the first child's share times `ONE`) of each inner node; children come before parents.

    Nodes below len(weights) are leaves; inner node i is number len(weights) + i, the last one the root.
    """
    heap = [(weight, node) for node, weight in enumerate(weights)]
    heapq.heapify(heap)
    splits: list[tuple[int, int, int]] = []
    while len(heap) > 1:
        (light, first), (heavy, second) = heapq.heappop(heap), heapq.heappop(heap)
        heapq.heappush(heap, (light + heavy, len(weights) + len(splits)))
        splits.append((first, second, round(light / (light + heavy) * ONE)))
    return splits
