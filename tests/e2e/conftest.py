"""The command line as a user types it, on shards that it built itself from real text."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

BIN = Path(sys.executable).parent
ENV = {**os.environ, "PYTHONSAFEPATH": "1", "COLUMNS": "200", "NO_COLOR": "1"}

KillTree = Callable[[subprocess.Popen[Any]], None]


@dataclass(frozen=True)
class Cli:
    """Runs `drivetrain` in a folder of its own."""

    folder: Path
    shards: Path
    overrides: list[str]
    kill_tree: KillTree

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

    def wait_until(
        self, found: Callable[[], bool], launcher: subprocess.Popen[str], seconds: float = 90
    ) -> None:
        deadline = time.monotonic() + seconds
        while not found():
            if launcher.poll() is not None:
                pytest.fail(f"the run ended before that: {launcher.communicate()[0]}")
            if time.monotonic() > deadline:
                self.kill_tree(launcher)
                pytest.fail("waited too long")
            time.sleep(0.0005)

    def wait_for_step(self, run_dir: str, step: int, launcher: subprocess.Popen[str]) -> None:
        def logged() -> bool:
            try:
                return any(row["step"] >= step for row in self.rows(run_dir))
            except ValueError:  # a line half-way written
                return False

        self.wait_until(logged, launcher)

    def small(self, run_dir: str, *more: str) -> list[str]:
        return ["launch", *self.overrides, f"data.path={self.shards}", f"run_dir={run_dir}", *more]

    def rows(self, run_dir: str) -> list[dict[str, Any]]:
        path = self.folder / run_dir / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def curve(self, run_dir: str) -> dict[int, tuple[float, str]]:
        """step -> (loss, digest of the data)."""
        return {row["step"]: (row["loss"], row["data_digest"]) for row in self.rows(run_dir)}

    def summary(self, run_dir: str) -> dict[str, Any]:
        return json.loads((self.folder / run_dir / "summary.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def built_shards(tmp_path_factory: pytest.TempPathFactory, kill_tree: KillTree) -> Path:
    """Tokenizer and shards of a few real modules, through the command line."""
    folder = tmp_path_factory.mktemp("text")
    texts = folder / "text"
    texts.mkdir()
    library = Path(json.__file__).parent.parent
    for path in sorted(library.glob("[a-d]*.py"))[:40]:
        (texts / path.name).write_text(path.read_text(encoding="utf-8"))
    run = Cli(folder, folder, [], kill_tree)
    run("tokenizer", "train", "text", "--vocab-size", "512", "--out", "tokenizer")
    words = ("--tokenizer", "tokenizer", "--out", "shards", "--held-out", "0.2", "--workers", "1")
    run("data", "build", "text", *words)
    return folder / "shards"


@pytest.fixture(scope="session")
def cli_in(small: list[str], built_shards: Path, kill_tree: KillTree) -> Callable[[Path], Cli]:
    """`cli_in(folder)` -> its Cli."""
    overrides = [
        *small,
        "model.vocab_size=512",
        "stage.micro_batch=2",
        "stage.steps=24",
        "stage.eval_every=12",
        "stage.eval_tokens=1024",
        "stage.save_every=4",
        "cluster.nproc=2",
    ]
    return lambda folder: Cli(folder, built_shards, overrides, kill_tree)


@pytest.fixture
def cli(cli_in: Callable[[Path], Cli], tmp_path: Path) -> Cli:
    return cli_in(tmp_path)


@pytest.fixture(scope="session")
def undisturbed(cli_in: Callable[[Path], Cli], tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """A run on two ranks that nobody touched, in the folder `whole`."""
    run = cli_in(tmp_path_factory.mktemp("undisturbed"))
    run(*run.small("whole"))
    return run
