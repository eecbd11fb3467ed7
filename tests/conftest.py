"""What all tests share."""

import contextlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton asks when it first sees a kernel, so before any is imported

# A busy machine is no failure: how long an example takes says nothing about whether it is right. The same examples
# at every run; `pytest --hypothesis-profile=search` draws others.
settings.register_profile("drivetrain", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None, print_blob=True)
settings.load_profile("drivetrain")

RANK = Path(__file__).with_name("rank.py")
RANKS_SECONDS = 400.0


@pytest.fixture(scope="session")
def small() -> list[str]:
    """Overrides of a model of about 50 thousand parameters, in fp32, that learns within 20 steps: every part is
    there, and a run takes as long as it takes to start."""
    return [
        "model=tiny",
        "model.dim=32",
        "model.layers=2",
        "model.heads=4",
        "model.kv_heads=2",
        "model.head_dim=8",
        "model.ffn_dim=64",
        "stage.seq_len=32",
        "stage.tokens_per_step=256",
        "engine.precision=fp32",
        "optim.lr=3e-3",
        "optim.warmup_steps=4",
    ]


# --- processes ----------------------------------------------------------------------------------------------


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _kill_tree(process: subprocess.Popen[Any]) -> None:
    if process.poll() is None:
        launcher = psutil.Process(process.pid)
        for each in (launcher, *launcher.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    process.communicate(timeout=30)


def _wait_for_all(processes: list[subprocess.Popen[Any]], seconds: float) -> list[int]:
    deadline = time.monotonic() + seconds
    try:
        while any(process.poll() is None for process in processes):
            if any(process.returncode for process in processes) or time.monotonic() > deadline:
                break
            time.sleep(0.01)
    finally:
        for process in processes:
            _kill_tree(process)
    return [process.returncode for process in processes]


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    return _free_port


@pytest.fixture(scope="session")
def kill_tree() -> Callable[[subprocess.Popen[Any]], None]:
    """`kill_tree(process)`: SIGKILL to it and to all that it started."""
    return _kill_tree


@pytest.fixture(scope="session")
def wait_for_all() -> Callable[[list[subprocess.Popen[Any]], float], list[int]]:
    """`wait_for_all(processes, seconds)` -> their exit statuses. Once one has failed, or the time is over, the
    others are killed with all that they started: -9."""
    return _wait_for_all


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """`run_ranks(worker, world_size, cases)` -> what rank 0 found, by the cases' names; see rank.py."""

    def run(worker: Path, world_size: int, cases: list[dict[str, Any]]) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("ranks")
        (folder / "cases.json").write_text(json.dumps(cases))
        command = [sys.executable, *map(str, (RANK, worker, folder / "cases.json", folder / "out.json"))]
        group = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        env = {**os.environ, **group, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
        logs = [folder / f"rank_{rank}.log" for rank in range(world_size)]
        ranks = []
        for rank, log in enumerate(logs):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with log.open("w") as file:
                ranks.append(
                    subprocess.Popen(command, env=env | place, stdout=file, stderr=subprocess.STDOUT)
                )
        statuses = _wait_for_all(ranks, RANKS_SECONDS)
        if any(statuses):
            said = "\n".join(f"{log.name}:\n{log.read_text()[-3000:]}" for log in logs)
            pytest.fail(
                f"ranks ended with {statuses} (-9: killed once another failed or after {RANKS_SECONDS:.0f} s)"
                f"\n{said}"
            )
        return json.loads((folder / "out.json").read_text())  # type: ignore[no-any-return]

    return run


# --- W&B's offline files ------------------------------------------------------------------------------------


def _wandb_records(run_dir: Path) -> Iterator[tuple[str, Any]]:
    from wandb.proto.wandb_internal_pb2 import Record

    for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        content, at, record = file.read_bytes(), 7, b""
        while at < len(content):
            if (room := 32768 - at % 32768) < 7:
                at += room
                continue
            _, length, kind = struct.unpack_from("<IHB", content, at)
            record += content[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # a whole record, or the last piece of one
                yield file.name, Record.FromString(record)
                record = b""


@pytest.fixture(scope="session")
def wandb_records() -> Callable[[Path], Iterator[tuple[str, Any]]]:
    """`wandb_records(run_dir)` yields (file, record) of all `.wandb` files, oldest first: a 7-byte header, then
    LevelDB's log format."""
    return _wandb_records


@pytest.fixture(scope="session")
def wandb_history() -> Callable[[Path, str], list[tuple[int, float]]]:
    """`wandb_history(run_dir, metric)` -> (step, value) in the order they were logged."""

    def history(run_dir: Path, metric: str) -> list[tuple[int, float]]:
        points = []
        for _, record in _wandb_records(run_dir):
            if record.HasField("history"):
                row = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                if metric in row:
                    points.append((json.loads(row["step"]), json.loads(row[metric])))
        return points

    return history


# --- a model to evaluate ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """268 tokens: the bytes, a few merges and the special ones."""
    from drivetrain.data.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "a.txt").write_text("the cat sat on the mat; " * 50)
    train_tokenizer([folder / "a.txt"], 268, folder / "tok")
    return folder / "tok"


@pytest.fixture(scope="session")
def tiny_hf(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Callable[..., Path]:
    """`tiny_hf(window=None, vocab=272)` -> the directory of a random Llama, or of a Mistral with a sliding window,
    whose predictions differ clearly. It sees 96 tokens; those from 268 on are padding that has no text."""

    def make(window: int | None = None, vocab: int = 272) -> Path:
        import transformers

        folder = tmp_path_factory.mktemp("hf")
        sizes: dict[str, Any] = {"vocab_size": vocab, "hidden_size": 32, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
        sizes |= {"max_position_embeddings": 96, "bos_token_id": 0, "eos_token_id": 258}
        kind = "Llama" if window is None else "Mistral"
        config = getattr(transformers, f"{kind}Config")(
            **sizes, **({} if window is None else {"sliding_window": window})
        )
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.2)
        model.save_pretrained(folder)
        shutil.copytree(tiny_tokenizer, folder, dirs_exist_ok=True)
        return folder

    return make
