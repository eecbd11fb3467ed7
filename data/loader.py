"""The pretraining source: this rank's micro-batches of each step, and a background thread that reads ahead."""

import queue
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from drivetrain.conf.errors import CheckpointError, DataError
from drivetrain.conf.schema import DataConfig
from drivetrain.data.batch import Batch, batch_from_windows
from drivetrain.data.mixture import Mixture, Segment
from drivetrain.data.windows import ShuffledWindows, Windows


class Source(Protocol):
    """Where batches come from. The global batch of a step depends on (seed, step) alone."""

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next step."""

    def state(self) -> dict[str, Any]:
        """A few integers, JSON, the same on every rank, that say where `next_step` goes on."""


@dataclass(frozen=True, slots=True)
class Share:
    """This rank's part of each step: `sequences` of the `per_step`, from place `first` on."""

    first: int
    sequences: int
    per_step: int
    micro_batch: int


def share_of(sequences_per_step: int, micro_batch: int, rank: int, world_size: int) -> Share:
    mine = sequences_per_step // world_size
    return Share(first=rank * mine, sequences=mine, per_step=sequences_per_step, micro_batch=micro_batch)


def open_sources(cfg: DataConfig, split: str, seq_len: int) -> dict[str, Windows]:
    """The windows of every source, by name; a single `data.path` is called "data"."""
    paths = {name: source.path for name, source in cfg.mixture.items()} or {"data": str(cfg.path)}
    return {name: Windows(Path(path), split, seq_len, sharing=len(paths)) for name, path in paths.items()}


def mixture_of(cfg: DataConfig, seed: int, state: dict[str, Any] | None) -> tuple[int, Mixture]:
    """The next sample's number and the mixture from there on, from a source's `state` or from the beginning.

    Raises:
        CheckpointError: the state names other sources.
    """
    weights = {name: source.weight for name, source in cfg.mixture.items()} or {"data": 1.0}
    sample, segment = 0, Segment(0, weights, {})
    if state is not None:
        sample, segment = int(state["sample"]), Segment(**state["segment"])
        if set(segment.weights) != set(weights):
            raise CheckpointError(
                f"the checkpoint was trained on {sorted(segment.weights)}, this run names {sorted(weights)}; "
                "a resume may change weights and paths, not names"
            )
    return sample, Mixture(segment, seed).reweighted(weights, sample)


class PretrainSource:
    """Windows of the document stream(s), shuffled globally.

    Args:
        state: from an earlier `state()`; other weights than then begin a new segment of the mixture.

    Raises:
        DataError: a source is missing or too small. CheckpointError: the state names other sources.
    """

    def __init__(
        self, cfg: DataConfig, seq_len: int, share: Share, seed: int, state: dict[str, Any] | None = None
    ) -> None:
        sources = open_sources(cfg, "train", seq_len)
        eos = {windows.manifest.eos_id for windows in sources.values()}
        if len(eos) > 1:
            raise DataError(f"the sources of data.mixture end documents with different tokens: {sorted(eos)}")
        self.eos_id = eos.pop()
        self._share = share
        self._sample, self._mixture = mixture_of(cfg, seed, state)
        self._streams = {name: ShuffledWindows(windows, seed, name) for name, windows in sources.items()}

    def next_step(self) -> list[Batch]:
        share = self._share
        mine = self._sample + share.first + np.arange(share.sequences, dtype=np.int64)
        windows_BS1 = self._read(mine)
        self._sample += share.per_step
        cuts = range(0, share.sequences, share.micro_batch)
        return [batch_from_windows(windows_BS1[cut : cut + share.micro_batch], self.eos_id) for cut in cuts]

    def _read(self, samples: np.ndarray) -> np.ndarray:
        names = self._mixture.names
        if len(names) == 1:
            return self._streams[names[0]].read(self._mixture.assign(samples)[1])
        sources, ordinals = self._mixture.assign(samples)
        parts = {
            source: self._streams[names[source]].read(ordinals[sources == source]) for source in set(sources)
        }
        first = next(iter(parts.values()))
        out = np.empty((len(samples), first.shape[1]), dtype=np.int32)
        for source, windows in parts.items():
            out[sources == source] = windows
        return out

    def state(self) -> dict[str, Any]:
        return {"sample": self._sample, "segment": asdict(self._mixture.segment)}


class Prefetcher:
    """Reads `depth` steps ahead in a thread. `state` is that of the steps handed out, not of those read.

    An error in the thread is raised from `next_step`.
    """

    def __init__(
        self, source: Source, depth: int, prepare: Callable[[Batch], Batch] = lambda batch: batch
    ) -> None:
        self._source, self._prepare = source, prepare
        self._state = source.state()
        self._queue: queue.Queue[tuple[list[Batch], dict[str, Any]] | Exception] = queue.Queue(max(1, depth))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while not self._stop.is_set():
            item: tuple[list[Batch], dict[str, Any]] | Exception
            try:
                item = ([self._prepare(batch) for batch in self._source.next_step()], self._source.state())
            except Exception as error:
                item = error
            while not self._stop.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, Exception):
                return

    def next_step(self) -> list[Batch]:
        item = self._queue.get()
        if isinstance(item, Exception):
            self._queue.put(item)  # the thread has ended: whoever asks again would wait for ever
            raise item
        batches, self._state = item
        return batches

    def state(self) -> dict[str, Any]:
        return self._state

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
