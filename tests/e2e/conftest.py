"""The command line as a user types it, on shards that it built itself from real text."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

BIN = Path(sys.executable).parent
ENV = {**os.environ, "PYTHONSAFEPATH": "1", "COLUMNS": "200", "NO_COLOR": "1"}

# 60k parameters, fp32: a launch takes as long as it takes to start.
SMALL = [
    "model=tiny",
    "model.vocab_size=512",
    "model.dim=32",
    "model.layers=2",
    "model.heads=4",
    "model.kv_heads=2",
    "model.head_dim=8",
    "model.ffn_dim=64",
    "stage.seq_len=32",
    "stage.tokens_per_step=256",
    "stage.micro_batch=2",
    "stage.steps=24",
    "stage.eval_every=12",
    "stage.eval_tokens=1024",
    "stage.save_every=4",
    "engine.precision=fp32",
    "optim.lr=3e-3",
    "optim.warmup_steps=4",
    "cluster.nproc=2",
]


@dataclass(frozen=True)
class Cli:
    """Runs `drivetrain` in a folder of its own."""

    folder: Path
    shards: Path

    def __call__(
        self, *words: str, status: int = 0, timeout: float = 240
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(BIN / "drivetrain"), *words],
            cwd=self.folder,
            env=ENV,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == status, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(BIN / "drivetrain"), *words],
            cwd=self.folder,
            env=ENV,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def small(self, run_dir: str, *more: str) -> list[str]:
        return ["launch", *SMALL, f"data.path={self.shards}", f"run_dir={run_dir}", *more]

    def rows(self, run_dir: str) -> list[dict[str, Any]]:
        path = self.folder / run_dir / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def curve(self, run_dir: str) -> dict[int, tuple[float, str]]:
        """step -> (loss, digest of the data)."""
        return {row["step"]: (row["loss"], row["data_digest"]) for row in self.rows(run_dir)}

    def summary(self, run_dir: str) -> dict[str, Any]:
        return json.loads((self.folder / run_dir / "summary.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def built_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer and shards of a few real modules, through the command line."""
    folder = tmp_path_factory.mktemp("text")
    texts = folder / "text"
    texts.mkdir()
    library = Path(json.__file__).parent.parent
    for path in sorted(library.glob("[a-d]*.py"))[:40]:
        (texts / path.name).write_text(path.read_text(encoding="utf-8"))
    run = Cli(folder, folder)
    run("tokenizer", "train", "text", "--vocab-size", "512", "--out", "tokenizer")
    words = ("--tokenizer", "tokenizer", "--out", "shards", "--held-out", "0.2", "--workers", "1")
    run("data", "build", "text", *words)
    return folder / "shards"


@pytest.fixture
def cli(tmp_path: Path, built_shards: Path) -> Cli:
    return Cli(tmp_path, built_shards)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, built_shards: Path) -> Cli:
    """A run on two ranks that nobody touched, in the folder `whole`."""
    run = Cli(tmp_path_factory.mktemp("undisturbed"), built_shards)
    run(*run.small("whole"))
    return run


def read_wandb(path: Path) -> list[dict[str, Any]]:
    """History rows of a `.wandb` file: a 7-byte header, then LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, data, rows = path.read_bytes(), 7, b"", []
    while at < len(content):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        data += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            record, data = Record.FromString(data), b""
            if record.HasField("history"):
                items = record.history.item
                rows.append(
                    {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
                )
    return rows


@pytest.fixture
def wandb_history() -> Callable[[Path], list[dict[str, Any]]]:
    return read_wandb
