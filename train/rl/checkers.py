"""Answers that a library compares with the right one, in processes with a deadline: mathematics can hang."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from drivetrain.conf.errors import ConfigError, DataError
from drivetrain.conf.rewards import Extract
from drivetrain.train.rl.checker import to_line
from drivetrain.train.rl.extract import after_thought, answer_in
from drivetrain.train.rl.rewards import UNSCORED, Sample, answers

_AT_ONCE = 64  # answers that a process is sent together; their replies fit into a pipe
_KEPT = ("PATH", "HOME", "LANG", "PYTHONPATH", "LD_LIBRARY_PATH")


class Checkers:
    """Processes of `checker.py`, each with a few answers in a row; one that does not end in time is replaced.

    Raises:
        ConfigError: the library for `kind`, "math" or "gym", is not installed.
    """

    def __init__(self, kind: str, count: int) -> None:
        if count < 1:
            raise ConfigError(f"stage.rewards.checkers={count}; use 1 or more")
        self.workers = [_Worker(kind) for _ in range(count)]
        self.idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self.workers:
            self.idle.put(worker)
        self.pool = ThreadPoolExecutor(count, "checker")

    def check(self, requests: Sequence[dict[str, Any] | None]) -> list[float]:
        """The score of each; NaN for None and where there is nothing to compare with."""
        scores = [UNSCORED] * len(requests)
        asked = [place for place, request in enumerate(requests) if request is not None]
        size = min(_AT_ONCE, max(1, -(-len(asked) // len(self.workers))))
        parts = [asked[first : first + size] for first in range(0, len(asked), size)]
        found = self.pool.map(self._some, ([to_line(requests[place]) for place in part] for part in parts))
        for part, values in zip(parts, found, strict=True):
            for place, value in zip(part, values, strict=True):
                scores[place] = value
        return scores

    def _some(self, lines: list[bytes]) -> list[float]:
        worker = self.idle.get()
        try:
            return worker.ask(lines)
        finally:
            self.idle.put(worker)

    def close(self) -> None:
        self.pool.shutdown()
        for worker in self.workers:
            worker.close()


class _Worker:
    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._start()

    def _start(self) -> None:
        # Its own session: a signal to the trainer's terminal reaches it by the end of its input.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "drivetrain.train.rl.checker", self.kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env={
                **{name: os.environ[name] for name in _KEPT if name in os.environ},
                **{"PYTHONSAFEPATH": "1", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
            },
        )
        said = self._hear()
        if said is None or "error" in said:
            self.close()
            raise ConfigError(said["error"] if said else "the process that checks answers does not start")

    def ask(self, lines: list[bytes]) -> list[float]:
        """An answer that takes too long, or that breaks the library, is a wrong one: its form is the model's."""
        replies: list[dict[str, Any]] = []
        while len(replies) < len(lines):
            assert self.process.stdin
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(b"".join(lines[len(replies) :]))
                self.process.stdin.flush()
            while len(replies) < len(lines) and (said := self._hear()) is not None:
                replies.append(said)
            if len(replies) < len(lines):  # it ended over this one
                replies.append({"score": 0.0})
                self.close()
                self._start()
        for said in replies:
            if "error" in said:
                raise DataError(said["error"])
        return [UNSCORED if said["score"] is None else float(said["score"]) for said in replies]

    def _hear(self) -> dict[str, Any] | None:
        assert self.process.stdout
        line = self.process.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                stream.close()  # type: ignore[union-attr]


class Math:
    """1 where math-verify finds the answer equal to `reference["answer"]`, else 0."""

    def __init__(self, seconds: float, checkers: int) -> None:
        self.seconds, self.checkers = _limit("math", seconds), Checkers("math", checkers)

    def score(self, samples: Sequence[Sample]) -> dict[str, list[float]]:
        return {"math": self.checkers.check([self._request(sample) for sample in samples])}

    def _request(self, sample: Sample) -> dict[str, Any] | None:
        right = answers(sample)
        text = after_thought(sample.completion)
        return {"right": right, "text": text, "seconds": self.seconds} if right else None

    def close(self) -> None:
        self.checkers.close()


class Gym:
    """reasoning-gym's score of an answer to `reference["entry"]`, or to the reference where it is an entry itself;
    `reference["settings"]` are those of the data set that made it (none: its defaults)."""

    def __init__(self, extract: Extract, seconds: float, checkers: int) -> None:
        self.extract, self.seconds = extract, _limit("gym", seconds)
        self.checkers = Checkers("gym", checkers)

    def score(self, samples: Sequence[Sample]) -> dict[str, list[float]]:
        return {"gym": self.checkers.check([self._request(sample) for sample in samples])}

    def _request(self, sample: Sample) -> dict[str, Any] | None:
        entry = sample.reference.get("entry", sample.reference)
        if "source_dataset" not in entry.get("metadata", {}):
            return None
        return {
            "kind": entry["metadata"]["source_dataset"],
            "entry": entry,
            "settings": sample.reference.get("settings") or {},
            "answer": answer_in(sample.completion, self.extract),
            "seconds": self.seconds,
        }

    def close(self) -> None:
        self.checkers.close()


def _limit(name: str, seconds: float) -> float:
    if not 0 < seconds < 1e6:
        raise ConfigError(f"stage.rewards.{name}.seconds={seconds}; use a number above 0")
    return seconds
