"""Ranks on this machine: torchrun, its signals, and what to say when a rank fails."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from drivetrain.conf.schema import ClusterConfig, TorchrunConfig

_FAILED = re.compile(r"rank\s*:\s*(\d+) \(local_rank.*?exitcode\s*:\s*(-?\d+)", re.DOTALL)
_LAST_LINES = 15


@dataclass(frozen=True, slots=True)
class Failure:
    """The rank that failed first, as far as can be told, and why; no last lines where the reason says it all."""

    rank: int | None
    exit_status: int
    reason: str
    log: Path
    last_lines: list[str]


@dataclass(frozen=True, slots=True)
class Stopped:
    """Somebody asked, and the ranks ended without saving."""

    before_training: bool

    @property
    def reason(self) -> str:
        return "stopped while it was starting" if self.before_training else "ended at once, without a save"


def command(cluster: ClusterConfig, run_dir: Path) -> list[str]:
    """Exactly what is run; for `cluster=torchrun`, on every node."""
    match cluster:
        case TorchrunConfig():
            where = [
                f"--nnodes={cluster.nodes}",
                *("--rdzv-backend=c10d", f"--rdzv-endpoint={cluster.host}:{cluster.port}"),
                f"--rdzv-id={run_dir.name}",
            ]
        case _:
            where = ["--standalone"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *where, f"--nproc-per-node={cluster.nproc}"]
    return [*torchrun, "-m", "drivetrain.train", str(run_dir)]


def environment(cluster: ClusterConfig) -> dict[str, str]:
    """What is added to the environment of the ranks."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = cluster.omp_threads or max(1, cores // cluster.nproc)
    # The checkout's folders must not be importable under their bare names (`data`, `model`, ...).
    return {"OMP_NUM_THREADS": str(threads), "PYTHONSAFEPATH": "1", "TOKENIZERS_PARALLELISM": "false"}


def run(cluster: ClusterConfig, run_dir: Path) -> Failure | Stopped | None:
    """Start the ranks, stream rank 0, forward SIGINT and SIGTERM to the ranks, wait.

    The first signal asks the ranks to save and leave; a second one ends them at once.

    Returns:
        None when every rank has ended well, its work done or saved on request.
    """
    for stale in (run_dir / "logs").glob("rank_*.error.json"):
        stale.unlink()
    asked = 0
    process: subprocess.Popen[bytes] | None = None

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked += 1
        if process is not None:
            _stop(process.pid, asked)

    with (run_dir / "logs" / "torchrun.log").open("a+") as log:
        start = log.seek(0, os.SEEK_END)
        before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            # A session of its own: a Ctrl-C at the terminal reaches this process alone, which decides.
            process = subprocess.Popen(
                command(cluster, run_dir),
                stdout=None,
                stderr=log,
                env={**os.environ, **environment(cluster)},
                start_new_session=True,
            )
            if asked:
                _stop(process.pid, asked)
            status = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if process is not None and process.poll() is None:
                _kill(process.pid)
        log.seek(start)
        said = log.read()
    return None if status == 0 else _explain(run_dir, status, said, asked)


def _stop(torchrun: int, asked: int) -> None:
    if asked == 1:
        _signal_ranks(torchrun, signal.SIGTERM)
    else:
        _kill(torchrun)


def _kill(torchrun: int) -> None:
    """torchrun and its ranks, which have sessions of their own."""
    try:
        processes = [psutil.Process(torchrun), *psutil.Process(torchrun).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _signal_ranks(torchrun: int, number: int) -> None:
    """To the ranks, not to torchrun, which would give them half a minute and kill them while they save."""
    try:
        ranks = psutil.Process(torchrun).children()
    except psutil.NoSuchProcess:
        return
    for rank in ranks or [psutil.Process(torchrun)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.send_signal(number)


def _explain(run_dir: Path, status: int, said: str, asked: int) -> Failure | Stopped:
    """Which rank failed first: one killed by a signal, else the first that left a reason of its own."""
    logs = run_dir / "logs"
    failed = [(int(match[1]), int(match[2])) for match in _FAILED.finditer(said)]
    records = _records(logs)
    # A rank that lost its peer, or that was interrupted on request, is a consequence.
    own = [r for r in records if "Connection" not in r["message"] and not _interrupted(r)]
    on_request = {-signal.SIGTERM, -signal.SIGINT} | ({-signal.SIGKILL} if asked > 1 else set())
    left_a_record = {record["rank"] for record in records}
    if asked and not own and all(code in on_request or rank in left_a_record for rank, code in failed):
        return Stopped(before_training=asked == 1)
    for rank, code in failed:
        if code < 0 and code != -signal.SIGTERM:  # torchrun ends the others with SIGTERM
            reason = f"killed by {signal.Signals(-code).name}"
            if code == -signal.SIGKILL:
                reason += " (out of memory? see dmesg)"
            log = logs / f"rank_{rank}.log"
            return Failure(rank, 1, reason, log, _tail(log))
    if own or records:
        first = min(own or records, key=lambda record: record["time"])
        log = logs / f"rank_{first['rank']}.log"
        return Failure(
            first["rank"], first["status"], first["message"], log, _tail(log) if first["trace"] else []
        )
    log = logs / (f"rank_{failed[0][0]}.log" if failed else "torchrun.log")
    return Failure(
        failed[0][0] if failed else None, 1, f"torchrun ended with status {status}", log, _tail(log)
    )


def _records(logs: Path) -> list[dict[str, Any]]:
    """What the ranks that failed have said of themselves; one that a full disk cut short is left out."""
    found = []
    for path in logs.glob("rank_*.error.json"):
        with contextlib.suppress(OSError, ValueError):
            found.append(json.loads(path.read_text()))
    return found


def _interrupted(record: dict[str, Any]) -> bool:
    return str(record["message"]).startswith("KeyboardInterrupt")


def _tail(path: Path) -> list[str]:
    if not path.is_file():
        return []
    return path.read_text(errors="replace").splitlines()[-_LAST_LINES:]
