"""Shards of random documents of very uneven length, and a way to run several ranks without a launcher."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drivetrain.data.shards import Manifest, ShardWriter, dtype_for

WORKER = Path(__file__).with_name("parity_worker.py")
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, list[dict[str, Any]]], Any]:
    """`run_ranks(world_size, cases)` -> the rows of each case, by name."""

    def run(world_size: int, cases: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
        folder = tmp_path_factory.mktemp("ranks")
        (folder / "cases.json").write_text(json.dumps(cases))
        env = {
            **os.environ,
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "OMP_NUM_THREADS": "1",
            "PYTHONSAFEPATH": "1",
        }
        command = [sys.executable, str(WORKER), str(folder / "cases.json"), str(folder / "out.json")]
        logs = [(folder / f"rank_{rank}.log").open("w+") for rank in range(world_size)]
        ranks = [
            subprocess.Popen(
                command, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}, stdout=log, stderr=log
            )
            for r, log in enumerate(logs)
        ]
        statuses = [rank.wait(timeout=400) for rank in ranks]
        if any(statuses):
            said = "\n".join((folder / f"rank_{r}.log").read_text()[-3000:] for r in range(world_size))
            pytest.fail(f"ranks ended with {statuses}:\n{said}")
        return json.loads((folder / "out.json").read_text())  # type: ignore[no-any-return]

    return run
