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
    """Makes a data directory whose files are as long as its manifest says, and empty: validation reads no token."""

    def make(
        name: str = "data",
        *,
        train: int = 100_000,
        held_out: int = 10_000,
        parts: int = 1,
        chat: bool = False,
        **changes: Any,
    ) -> Path:
        counts = {TRAIN: train, HELD_OUT: held_out}
        infos = [
            ShardInfo(
                name=f"{split}_{part}",
                split=split,
                tokens=count // parts,
                documents=2 * (part + 1),
                files={},
                loss_tokens=count // parts // 2 if chat else None,
            )
            for split, count in counts.items()
            for part in range(parts)
            if count
        ]
        values = {"vocab_size": 2048, "eos_id": 0, "dtype": "uint16", "tokenizer_hash": "a" * 32} | changes
        directory = tmp_path / name
        directory.mkdir()
        for info in infos:
            for file, size in info.sizes(str(values["dtype"])).items():
                with (directory / file).open("wb") as empty:
                    empty.truncate(size)
        Manifest(shards=infos, **values).write(directory)
        return directory

    return make


@pytest.fixture
def saved_run(tmp_path: Path) -> Path:
    """A run directory with a checkpoint and a tokenizer, as far as validation looks."""
    run = tmp_path / "saved_run"
    (run / "checkpoints" / "step_00000100").mkdir(parents=True)
    (run / "checkpoints" / "step_00000100" / "complete.json").touch()
    (run / "tokenizer").mkdir()
    (run / "tokenizer" / "tokenizer.json").touch()
    return run
