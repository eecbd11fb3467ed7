"""`pytest tests/conf --update-golden` records the composed configurations anew; read the diff it makes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drivetrain.data.shards import HELD_OUT, TRAIN, Manifest, ShardInfo


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden")


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden", default=False))


@pytest.fixture
def shards(tmp_path: Path) -> Callable[..., Path]:
    """Makes a data directory that has its manifest and nothing else, which is all that validation reads."""

    def make(name: str = "data", *, train: int = 100_000, held_out: int = 10_000, **changes: Any) -> Path:
        counts = {TRAIN: train, HELD_OUT: held_out}
        infos = [
            ShardInfo(name=split, split=split, tokens=count, documents=1, files={})
            for split, count in counts.items()
            if count
        ]
        values = {"vocab_size": 2048, "eos_id": 0, "dtype": "uint16", "tokenizer_hash": "a" * 32} | changes
        directory = tmp_path / name
        directory.mkdir()
        Manifest(shards=infos, **values).write(directory)
        return directory

    return make
