"""What a run writes about itself: `metrics.jsonl`, `samples.jsonl`, `summary.json`; and its alarms."""

import contextlib
import json
import math
import os
import resource
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from drivetrain.conf.schema import AlarmConfig

# What is shown of the model: a prompt, its completion, and where there are any, scores by name.
Shown = tuple[str, str] | tuple[str, str, dict[str, float]]
METRICS, SAMPLES, SUMMARY = "metrics.jsonl", "samples.jsonl", "summary.json"


def plain(value: Any) -> Any:
    """The same, with null for what JSON cannot say: NaN and the infinities."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def records(rows: Sequence[Shown]) -> list[dict[str, Any]]:
    """Rows with their names; all rows have the same ones."""
    return [
        {"prompt": prompt, "completion": completion, **(scores[0] if scores else {})}
        for prompt, completion, *scores in rows
    ]


class MetricsFile:
    """One JSON object a line, flushed at once. A resume drops what was logged after its checkpoint.

    A disk that takes no more lines is warned about once and never stops the training.

    Args:
        start_step: the last step to keep. warn: told why a line could not be written.
    """

    def __init__(self, run_dir: Path, start_step: int, warn: Callable[[str], object]) -> None:
        self._warn, self._warned = warn, False
        for name in (METRICS, SAMPLES):
            _drop_after(run_dir / name, start_step)
        self._metrics = (run_dir / METRICS).open("a", encoding="utf-8")
        self._samples = (run_dir / SAMPLES).open("a", encoding="utf-8")

    def log(self, row: dict[str, Any]) -> None:
        self._write(self._metrics, json.dumps(plain(row)))

    def log_samples(self, step: int, rows: Sequence[Shown]) -> None:
        for record in records(rows):
            self._write(self._samples, json.dumps({"step": step, **plain(record)}, ensure_ascii=False))

    def _write(self, file: TextIO, line: str) -> None:
        try:
            print(line, file=file, flush=True)
        except OSError as error:
            if not self._warned:
                self._warn(
                    f"{file.name} takes no more lines: {error.strerror}; the training goes on without them"
                )
            self._warned = True

    def close(self) -> None:
        for file in (self._metrics, self._samples):
            with contextlib.suppress(OSError):  # closing writes what was refused once more
                file.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All rows; a line torn by a crash is left out."""
    path = run_dir / METRICS
    return _rows(path) if path.is_file() else []


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    # Bytes, since a torn line may end inside a character; "\n" alone, since U+2028 and U+0085 stand in samples.
    for line in path.read_bytes().split(b"\n"):
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _drop_after(path: Path, step: int) -> None:
    if not path.is_file():
        return
    kept = [row for row in _rows(path) if row.get("step", 0) <= step]
    temporary = path.with_suffix(".tmp")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """Replace `summary.json` in one motion."""
    temporary = run_dir / (SUMMARY + ".tmp")
    with temporary.open("w") as file:
        json.dump(plain(summary), file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(run_dir / SUMMARY)


def peak_memory_bytes(device: torch.device) -> int:
    """The most this process has held: on the GPU, or resident in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Alarms:
    """Says when the loss spikes or the gradient is not finite. `skipped_total` counts from what it is given."""

    def __init__(self, cfg: AlarmConfig, skipped_total: int = 0) -> None:
        self._cfg = cfg
        self._losses: deque[float] = deque(maxlen=cfg.window)
        self.skipped_total, self.skipped_in_a_row = skipped_total, 0

    def check(self, step: int, loss: float, skipped: bool) -> list[str]:
        """Sentences about this step; most steps have none."""
        found = []
        if skipped:
            self.skipped_total += 1
            self.skipped_in_a_row += 1
            found.append(f"step {step}: the gradient is not finite; the step was skipped on every rank")
        else:
            self.skipped_in_a_row = 0
        # A loss that takes both signs, as a policy gradient's does, has no usual size to be a multiple of.
        full = len(self._losses) == self._losses.maxlen and min(self._losses) > 0
        if full and loss > (limit := self._cfg.spike_factor * statistics.median(self._losses)):
            found.append(f"step {step}: loss {loss:.3f} is a spike, above {limit:.3f}")
        if math.isfinite(loss):
            self._losses.append(loss)
        return found

    @property
    def gave_up(self) -> bool:
        return 0 < self._cfg.max_skipped <= self.skipped_in_a_row


class Pace:
    """Seconds and tokens between two log lines, evaluation and saving left out."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._seconds, self._tokens, self._steps = 0.0, 0, 0
        self.rates: list[float] = []

    def begin(self) -> None:
        self._began = time.perf_counter()

    def end(self, tokens: int) -> None:
        self._seconds += time.perf_counter() - self._began
        self._tokens += tokens
        self._steps += 1

    def take(self) -> tuple[float, float]:
        """(seconds a step, tokens a second) since the last call."""
        seconds, rate = self._seconds / self._steps, self._tokens / self._seconds
        self.rates.append(rate)
        self._seconds, self._tokens, self._steps = 0.0, 0, 0
        return seconds, rate

    @property
    def median_rate(self) -> float | None:
        """Median tokens a second, the first line (warm-up, compilation) left out where there are others."""
        rates = self.rates[1:] or self.rates
        return statistics.median(rates) if rates else None
