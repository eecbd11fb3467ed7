"""Shards of random documents of very uneven length."""

from pathlib import Path

import numpy as np
import pytest

from drivetrain.data.shards import Manifest, ShardWriter, dtype_for

EOS = 0
VOCAB = 96


def write_shards(folder: Path, seed: int, documents: int = 120) -> Path:
    """Documents of 1 to 300 tokens, mostly short; the next token depends on the last, so there is something
    to learn."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    shards = []
    for split, count in (("train", documents), ("held_out", max(4, documents // 4))):
        writer = ShardWriter(folder, f"{split}_00000", split, dtype_for(VOCAB))
        for _ in range(count):
            length = int(min(300, 1 + rng.pareto(0.7) * 4))
            tokens = np.cumsum(rng.integers(1, 4, length)) % (VOCAB - 1) + 1
            writer.add(np.append(tokens, EOS).astype(np.uint16))
        shards.append(writer.close())
    Manifest(
        dtype=dtype_for(VOCAB), vocab_size=VOCAB, eos_id=EOS, tokenizer_hash="made", shards=shards
    ).write(folder)
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "shards", seed=1)


@pytest.fixture(scope="session")
def other_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "other", seed=2)
