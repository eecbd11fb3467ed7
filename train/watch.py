"""Everything that looks at a run: the live line, the files, the tracker. Rank 0 does most of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drivetrain.conf.schema import Precision, RunConfig
from drivetrain.model.flops import peak_flops, train_flops_per_token
from drivetrain.train.mesh import World
from drivetrain.train.metrics import MetricsFile, Pace, Shown, peak_memory_bytes
from drivetrain.train.progress import Progress
from drivetrain.train.stop import Stop
from drivetrain.train.trackers import build_tracker


class Watch:
    """Logs on rank 0, and knows on every rank whether somebody asked to stop."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        world: World,
        start_step: int,
        run_id: str | None,
        stop: Stop,
    ) -> None:
        self._world, self._config, self._stop = world, config, stop
        self._files = MetricsFile(run_dir, start_step, self.alarm) if world.is_main else None
        self._tracker = build_tracker(config, run_dir, run_id, world.is_main)
        self._progress = Progress(config.stage.steps, start_step) if world.is_main else None
        self._flops = train_flops_per_token(config.model, config.stage.seq_len, config.lora)
        self._peak = _peak(world, config)

    @property
    def run_id(self) -> str | None:
        return self._tracker.run_id

    @property
    def stop_requested(self) -> bool:
        return self._stop.requested

    def note(self, text: str) -> None:
        if self._progress is not None:
            self._progress.note(text)

    def alarm(self, text: str) -> None:
        self.note(f"warning: {text}")
        self._tracker.alert("drivetrain", text)

    def evaluated(self, step: int, found: dict[str, float], samples: Sequence[Shown]) -> None:
        if self._files is not None and samples:
            self._files.log_samples(step, samples)
            self._tracker.log_samples(step, samples)

    def log(self, step: int, metrics: dict[str, Any], pace: Pace) -> None:
        """Add pace and memory to `metrics` and write them everywhere."""
        seconds, rate = pace.take()
        metrics["step_seconds"], metrics["tokens_per_second"] = seconds, rate
        metrics["memory_bytes"] = peak_memory_bytes(self._world.device)
        peak = self._peak
        metrics["mfu"] = rate * self._flops / (peak * self._world.size) if peak is not None else None
        if self._files is None or self._progress is None:
            return
        self._files.log({"step": step, "tokens": step * self._config.stage.tokens_per_step, **metrics})
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        self._tracker.log(step, numbers)
        self._progress.update(step, numbers)

    def close(self, status: str) -> None:
        if self._progress is not None:
            self._progress.close()
        self._tracker.finish(status)
        if self._files is not None:
            self._files.close()


def _peak(world: World, config: RunConfig) -> float | None:
    if world.device.type != "cuda":
        return None
    import torch

    # fp32 matmuls run as TF32: train/build.py allows it.
    kind = "tf32" if config.engine.precision is Precision.fp32 else "bf16"
    return peak_flops(torch.cuda.get_device_name(world.device), kind)
