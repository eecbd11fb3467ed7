"""Shards, a folder of one's own, and a console that can be read, for what the launcher does in this process."""

import io
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from drivetrain.conf.compose import compose
from drivetrain.conf.schema import RunConfig
from drivetrain.data.shards import HELD_OUT, TRAIN, Manifest, ShardWriter, dtype_for
from drivetrain.launch import job, sweep

VOCAB = 2048  # the vocabulary of model=tiny


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens enough for windows of `small`'s length."""
    folder = tmp_path_factory.mktemp("data") / "shards"
    folder.mkdir()
    infos = []
    for split in (TRAIN, HELD_OUT):
        writer = ShardWriter(folder, f"{split}_00000", split, dtype_for(VOCAB))
        writer.add(np.arange(1000, dtype=np.uint16))
        infos.append(writer.close())
    Manifest(dtype=dtype_for(VOCAB), vocab_size=VOCAB, eos_id=0, tokenizer_hash="made", shards=infos).write(
        folder
    )
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, on a machine without a key for W&B and without a GPU."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for variable in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("drivetrain.launch.fit.local_gpus", lambda: ())
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


@pytest.fixture
def words(small: list[str], shards: Path) -> list[str]:
    """Overrides of a job that can run."""
    return [*small, f"data.path={shards}", "stage.steps=8", "cluster.nproc=2"]


@cache
def _composed(words: tuple[str, ...]) -> RunConfig:
    return compose(words)


@pytest.fixture(autouse=True)
def _compose_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same words are composed once, which takes a quarter of a second; tests/conf has tests of that."""
    for module in (job, sweep):
        monkeypatch.setattr(module, "compose", lambda words: _composed(tuple(words)))


class Said(Console):
    """A console whose text can be read."""

    def __init__(self) -> None:
        self.text = io.StringIO()
        super().__init__(file=self.text, width=300)

    def __str__(self) -> str:
        return self.text.getvalue()


@pytest.fixture
def console() -> Said:
    return Said()
