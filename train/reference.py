"""The reference model's log-probabilities, computed before the first step by the model that is about to be trained.

P2: pairs, of which column 0 is the chosen answer. The reference *is* the model at step 0, whatever
`model.init_from`, `lora.init_from` and the engine made of it, so that no second one is ever in memory. A run keeps
the numbers in `reference/<source>_<split>.npy`, fp32 [pairs, 2] in nats, NaN for pairs that are longer than a row,
and beside each the digests that it belongs to. A resume needs them: the reference is not the model any more.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from drivetrain.conf.errors import CheckpointError
from drivetrain.conf.schema import ModelConfig
from drivetrain.data.batch import Batch
from drivetrain.data.packing import best_fit
from drivetrain.data.preference import PairBatch, Pairs, batch_from_pairs
from drivetrain.data.shards import MANIFEST, hash_file, sync_directory
from drivetrain.train.engine.base import Engine, LossSums
from drivetrain.train.mesh import World
from drivetrain.train.preference import answer_logprobs

CHUNK_ROWS = 64  # rows of a rank that are packed at once, so that a plan is small


class Reference:
    """The files of one run.

    Args:
        seq_len, micro_batch: tokens of a row, and rows that go through the model at once.
    """

    def __init__(
        self, folder: Path, cfg: ModelConfig, backend: str, world: World, seq_len: int, micro_batch: int
    ) -> None:
        self.folder, self.cfg, self.backend, self.world = folder, cfg, backend, world
        self.seq_len, self.micro_batch = seq_len, micro_batch

    def attach(self, sources: Mapping[str, Pairs], engine: Engine, resumed: bool) -> None:
        """Map each source's numbers, computed first where they are not there. Collective.

        Args:
            sources: all of one split, by name.
            resumed: whether the engine's weights have been trained already.

        Raises:
            CheckpointError: in a resume the numbers are missing, or belong to other data.
        """
        weights = None if resumed else weights_digest(engine)
        for name, pairs in sources.items():
            data = f"{hash_file(pairs.directory / MANIFEST)}/{pairs.split}"
            key = {"data": data, "weights": weights, "pairs": len(pairs), "row": self.seq_len}
            stem = self.folder / f"{name}_{pairs.split}"
            if resumed:
                self._check(stem, key)
            elif not self._has(stem, key):
                self._write(stem, self.compute(pairs, engine), key)
            pairs.reference = np.load(_file(stem, "npy"), mmap_mode="r", allow_pickle=False)

    def _has(self, stem: Path, key: dict[str, Any]) -> bool:
        """Rank 0's word, for all of them."""
        found = _key_of(stem) == key
        return self.world.any(self.world.is_main and found)

    def _check(self, stem: Path, key: dict[str, Any]) -> None:
        found = _key_of(stem)
        if found is None:
            raise CheckpointError(
                f"{stem}.npy, the reference's log-probabilities, is missing, and the model that would give them "
                "has been trained since; restore it, or start in another run_dir"
            )
        if {**found, "weights": None} != key:
            raise CheckpointError(
                f"{stem}.npy, the reference's log-probabilities, belongs to other data; resume with the data that "
                "the run began with, or start in another run_dir"
            )

    @torch.no_grad()
    def compute(self, pairs: Pairs, engine: Engine) -> np.ndarray:
        """The model's log-probabilities of all pairs that fit into a row, fp32 [pairs, 2]. Collective."""
        out_P2 = np.full((len(pairs), 2), np.nan, dtype=np.float32)
        found: list[Tensor] = []

        def read(model: nn.Module, batch: Batch) -> LossSums:
            assert isinstance(batch, PairBatch)
            logprobs_P2 = answer_logprobs(model, batch, self.cfg, self.backend)
            found.append(logprobs_P2)
            return logprobs_P2.sum(), {"sum": logprobs_P2.sum()}

        for numbers, batch in self._batches(pairs):
            engine.evaluate([batch], read)
            out_P2[numbers] = found.pop().cpu().numpy()
        return self._gathered(out_P2)

    def _batches(self, pairs: Pairs) -> Iterator[tuple[list[int], PairBatch]]:
        """This rank's batches with the pairs in them: as many on every rank, so some pairs come twice."""
        world, rows = self.world, self.micro_batch
        eos_id = pairs.manifest.eos_id
        size = max(1, int(CHUNK_ROWS * rows * world.size * self.seq_len // self._mean_length(pairs)))
        for first in range(0, len(pairs), size):
            numbers = np.arange(first, min(first + size, len(pairs)))
            lengths = pairs.lengths(numbers)
            numbers, lengths = numbers[lengths <= self.seq_len], lengths[lengths <= self.seq_len]
            packed = [numbers[row].tolist() for row in best_fit(lengths, self.seq_len)]
            for start in range(0, len(packed), rows * world.size):
                mine = packed[start + world.rank * rows : start + (world.rank + 1) * rows]
                mine = (mine or packed[:1]) + packed[:1] * (rows - max(1, len(mine)))
                batch = batch_from_pairs([(pairs, row) for row in mine], self.seq_len, eos_id)
                yield [number for row in mine for number in row], batch

    def _mean_length(self, pairs: Pairs) -> float:
        return pairs.manifest.tokens(pairs.split) / len(pairs)

    def _gathered(self, mine_P2: np.ndarray) -> np.ndarray:
        """Every rank's numbers in one array; a pair that several ranks read has their mean."""
        logprobs_P2 = torch.from_numpy(np.nan_to_num(mine_P2))
        found_P2 = torch.from_numpy(~np.isnan(mine_P2)).float()
        device = self.world.device
        both = torch.stack([logprobs_P2, found_P2]).to(device)
        torch.distributed.all_reduce(both)
        sums_P2, counts_P2 = both.cpu().numpy()
        with np.errstate(invalid="ignore"):
            mean_P2: np.ndarray = sums_P2 / counts_P2  # 0 / 0 where no rank read a pair: NaN
        return mean_P2.astype(np.float32)

    def _write(self, stem: Path, values_P2: np.ndarray, key: dict[str, Any]) -> None:
        """Rank 0 writes, the digests last; the others wait."""
        if self.world.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = _file(stem, "npy")
            temporary = _file(stem, "npy.tmp")
            with temporary.open("wb") as file:
                np.save(file, values_P2, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
            _file(stem, "json").unlink(missing_ok=True)
            temporary.replace(path)
            _file(stem, "json").write_text(json.dumps(key, indent=1))
            sync_directory(self.folder)
        self.world.barrier()


def _file(stem: Path, ending: str) -> Path:
    return stem.with_name(f"{stem.name}.{ending}")  # a source's name may have dots


def _key_of(stem: Path) -> dict[str, Any] | None:
    """What numbers belong to; None where they are not whole."""
    try:
        key: dict[str, Any] = json.loads(_file(stem, "json").read_text())
    except (OSError, ValueError):
        return None
    return key if _file(stem, "npy").is_file() else None


def weights_digest(engine: Engine) -> str:
    """xxh3 of all whole fp32 weights with their names, adapters merged: the same under any engine. Collective."""
    digest = xxhash.xxh3_128()
    for name, whole in engine.full_weights():
        digest.update(name.encode())
        digest.update(whole.contiguous().numpy().data)
    return digest.hexdigest()
