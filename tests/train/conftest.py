"""Shards of random documents of very uneven length."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from drivetrain.data.build import build
from drivetrain.data.shard_writer import ShardWriter
from drivetrain.data.shards import Manifest, dtype_for
from drivetrain.data.tokenizer import train_tokenizer

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


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions with two answers of which the chosen one speaks of cats; one pair is very long."""
    folder, draw = tmp_path_factory.mktemp("pairs"), random.Random(0)

    def answer(animal: str, words: int) -> list[dict[str, str]]:
        said = [draw.choice(["red", "old", "big", "wet"]) for _ in range(words)]
        said.insert(draw.randint(0, words), animal)
        return [{"role": "assistant", "content": " ".join(said)}]

    records = []
    for number in range(150):
        long = 300 if number == 7 else 0
        records.append(
            {
                "prompt": [{"role": "user", "content": f"which one {number}"}],
                "chosen": answer("cat", draw.randint(1, 6) + long),
                "rejected": answer("dog", draw.randint(1, 6)),
            }
        )
    source = folder / "a.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "a.txt").write_text(" which one cat dog red old big wet user assistant 1234567890" * 30)
    train_tokenizer([folder / "a.txt"], 280, folder / "tokenizer")
    build([source], folder / "tokenizer", folder / "shards", 1, held_out=0.2, progress=False, pairs=True)
    return folder
