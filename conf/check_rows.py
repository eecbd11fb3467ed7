"""Whether a row of `stage.seq_len` tokens has room for any conversation or pair, from the shards' indices.

data/shards.py describes the files. A split is read until something fits: most often a few kilobytes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from drivetrain.conf.schema import RunConfig, SftConfig, TooLong

IDX_HEADER_BYTES = 34
SPLITS = {"train": "training", "held_out": "held-out"}
CHUNK = 1 << 16  # conversations at once; even, so that no pair is cut


def row_problems(key: str, manifest: dict[str, Any], config: RunConfig) -> Iterator[str]:
    """One sentence for every split that the run reads and of which nothing fits.

    Args:
        key: `data.path=DIR`, or the word of a mixture's source. manifest: its content; its files are all there.
    """
    stage, directory = config.stage, Path(key.partition("=")[2])
    cuts = isinstance(stage, SftConfig) and stage.too_long is TooLong.truncate
    for split in SPLITS if stage.eval_every else ("train",):
        shards = [shard for shard in manifest["shards"] if shard["split"] == split]
        kind = f"{SPLITS[split]} {'pair' if manifest.get('pairs') else 'conversation'}"
        if not shards:
            continue  # which is a problem of its own
        if cuts:
            if not any(_learns(directory, shard, stage.seq_len) for shard in shards):
                yield (
                    f"{key} has no {kind} with a learned token among its first stage.seq_len={stage.seq_len}; "
                    "lengthen it"
                )
        elif (
            shortest := _shortest(directory, shards, bool(manifest.get("pairs")), stage.seq_len)
        ) is not None:
            truncate = ", or use stage.too_long=truncate" if isinstance(stage, SftConfig) else ""
            yield (
                f"{key} has no {kind} of at most stage.seq_len={stage.seq_len} tokens, the shortest has "
                f"{shortest}; lengthen it{truncate}"
            )


def _lengths(directory: Path, shard: dict[str, Any]) -> Iterator[np.ndarray]:
    """Tokens of a shard's conversations, int64, chunk by chunk."""
    count = int(shard["documents"])
    with (directory / f"{shard['name']}.idx").open("rb") as file:
        file.seek(IDX_HEADER_BYTES)
        for first in range(0, count, CHUNK):
            yield np.frombuffer(file.read(4 * min(CHUNK, count - first)), dtype="<i4").astype(np.int64)


def _shortest(directory: Path, shards: list[dict[str, Any]], pairs: bool, most: int) -> int | None:
    """Tokens of the shortest conversation, or of the shortest pair's two; None where one has at most `most`."""
    shortest = 1 << 62
    for shard in shards:
        for lengths in _lengths(directory, shard):
            wholes = lengths[0::2] + lengths[1::2] if pairs else lengths
            shortest = min(shortest, int(wholes.min()))
            if shortest <= most:
                return None
    return shortest


def _learns(directory: Path, shard: dict[str, Any], limit: int) -> bool:
    """Whether any conversation has weight on a token after its first and before `limit`."""
    with (directory / f"{shard['name']}.weights").open("rb") as file:
        start = 0
        for lengths in _lengths(directory, shard):
            for length in lengths.tolist():
                file.seek(start)
                if any(file.read(min(length, limit))[1:]):
                    return True
                start += length
    return False
