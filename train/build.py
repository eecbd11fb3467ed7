"""Configuration -> engine, stage, checkpointer, watch: every part of a run, put together visibly."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist

from drivetrain.conf.errors import CheckpointError, ConfigError
from drivetrain.conf.schema import Device, FsdpConfig, PretrainConfig, RunConfig, ZeroConfig
from drivetrain.data.loader import Prefetcher, share_of
from drivetrain.model.backend import backend_of
from drivetrain.model.initialize import initialize
from drivetrain.model.memory import choose_micro_batch
from drivetrain.model.transformer import Transformer, build_model, unique_parameters
from drivetrain.train import checkpoint
from drivetrain.train.engine.base import Engine, Fill
from drivetrain.train.lock import lock_run_dir
from drivetrain.train.loop import Loop, Outcome, begin
from drivetrain.train.mesh import World
from drivetrain.train.metrics import peak_memory_bytes, write_summary
from drivetrain.train.stages.pretrain import PretrainStage
from drivetrain.train.stop import Stop
from drivetrain.train.watch import Watch


@dataclass(slots=True)
class Run:
    config: RunConfig
    run_dir: Path
    world: World
    loop: Loop
    prefetcher: Prefetcher
    resumed_from: int | None

    def finish(self, outcome: Outcome, wall_seconds: float) -> None:
        """Write `summary.json`. Collective: the peak is the largest rank's."""
        peaks: list[int | None] = [None] * self.world.size
        dist.all_gather_object(peaks, peak_memory_bytes(self.world.device))
        if not self.world.is_main:
            return
        numbers = {**outcome.last, **{f"best/{name}": value for name, value in outcome.best.items()}}
        objective = self.config.objective
        summary = {
            "status": outcome.status,
            "steps": outcome.step,
            "final": outcome.last,
            "best": outcome.best,
            "objective": numbers.get(objective, outcome.last.get("loss")),
            "tokens_per_second_median": outcome.pace.median_rate,
            "peak_memory_bytes": max(peak or 0 for peak in peaks),
            "wall_seconds": wall_seconds,
            "resumed_from": self.resumed_from,
            "ranks": self.world.size,
        }
        write_summary(self.run_dir, summary)

    def close(self, status: str) -> None:
        self.prefetcher.close()
        self.loop.watch.close(status)


def build_run(config: RunConfig, run_dir: Path, world: World, stop: Stop) -> Run:
    """Everything on this rank, restored from the newest whole checkpoint of `run_dir` if it has one."""
    _seed(config.seed)
    if world.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    if world.is_main:
        lock_run_dir(run_dir)
    folder, notes = resume_point(run_dir, world)
    state = checkpoint.read_state(folder) if folder is not None else None
    start = int(state["step"]) if state is not None else 0
    if start >= config.stage.steps:
        raise ConfigError(
            f"{run_dir} has done {start} of stage.steps={config.stage.steps}; give a larger stage.steps to go on"
        )
    watch = Watch(config, run_dir, world, start, state["tracker_run_id"] if state else None, stop)
    for note in notes:
        watch.note(note)

    engine = build_engine(config, world, _fill(config, folder))
    if folder is not None and state is not None:
        engine.load_optimizer(
            lambda tensors: checkpoint.load_tensors(folder, tensors), int(state["optimizer_steps"])
        )
        watch.note(f"resumed from {folder.name}, saved on {state['world_size']} ranks with {state['engine']}")
    sequences = config.stage.tokens_per_step // config.stage.seq_len
    micro_batch = _micro_batch(config, world)
    share = share_of(sequences, micro_batch, world.rank, world.size)
    stage = build_stage(config, run_dir, share, world, state["source"] if state else None)
    pin = world.device.type == "cuda"
    prefetcher = Prefetcher(
        stage.source, config.data.prefetch, (lambda batch: batch.pin()) if pin else (lambda batch: batch)
    )
    stage.source = prefetcher
    checkpointer = checkpoint.Checkpointer(run_dir / "checkpoints", config.checkpoint, world)
    loop = Loop(config, world, engine, stage, checkpointer, watch, begin(state))
    return Run(config, run_dir, world, loop, prefetcher, start if folder is not None else None)


def build_engine(config: RunConfig, world: World, fill: Fill) -> Engine:
    model = build_model(config.model, backend_of(config.kernels, world.device))
    match config.engine:
        case FsdpConfig():
            from drivetrain.train.engine.fsdp import FsdpEngine

            return FsdpEngine(config.engine, config.optim, config.model, model, world, fill)
        case ZeroConfig():
            from drivetrain.train.engine.zero import ZeroEngine

            return ZeroEngine(config.engine, config.optim, config.model, model, world, fill)
        case _:
            raise ConfigError(f"engine={config.engine.name} is not known; use fsdp or zero")


def build_stage(
    config: RunConfig, run_dir: Path, share: Any, world: World, state: dict[str, Any] | None
) -> PretrainStage:
    match config.stage:
        case PretrainConfig():
            return PretrainStage(config, share, world, run_dir / "tokenizer", state)
        case _:
            raise ConfigError(f"stage={config.stage.name} is not known; use pretrain")


def _seed(seed: int) -> None:
    """Nothing in training draws from these; a library that does is at least repeatable."""
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.manual_seed(seed)


def resume_point(run_dir: Path, world: World) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, chosen by rank 0 for all, and what it said on the way.

    Raises:
        CheckpointError: there are checkpoints, but none is whole; starting over would bury that.
    """
    folder = run_dir / "checkpoints"
    notes: list[str] = []
    chosen: list[Any] = [None, notes, False]
    if world.is_main:
        chosen[0] = checkpoint.newest_whole(folder, notes.append)
        chosen[2] = bool(checkpoint.complete_steps(folder))
        if chosen[0] is not None:
            checkpoint.set_aside(folder, chosen[0], notes.append)
    dist.broadcast_object_list(chosen, src=0)
    step, notes, any_saved = chosen
    if step is None and any_saved:
        raise CheckpointError(
            f"{folder} holds no whole checkpoint: {'; '.join(notes)}; restore one, or start in another run_dir"
        )
    return (folder / checkpoint.checkpoint_name(step) if step is not None else None), notes


def _fill(config: RunConfig, folder: Path | None) -> Fill:
    """Initial weights, those of `model.init_from`, or those of a checkpoint."""
    source = folder
    if source is None and config.model.init_from is not None:
        source = weights_folder(Path(config.model.init_from))
    if source is None:
        return lambda model: initialize(model, config.model, config.seed)

    def read(model: Transformer) -> None:
        tensors = {f"model.{name}": p.detach() for name, p in unique_parameters(model)}
        checkpoint.load_tensors(source, tensors)

    return read


def weights_folder(source: Path) -> Path:
    """The checkpoint that a run directory (its newest whole one) or a checkpoint folder stands for.

    Raises:
        ConfigError: there is none.
    """
    if (source / checkpoint.MARKER).is_file():
        checkpoint.verify(source)
        return source
    passed_over: list[str] = []
    step = checkpoint.newest_whole(source / "checkpoints", passed_over.append)
    if step is None:
        why = f" ({'; '.join(passed_over)})" if passed_over else ""
        raise ConfigError(f"{source} holds no whole checkpoint{why}; name a run directory that has saved one")
    return source / "checkpoints" / checkpoint.checkpoint_name(step)


def _micro_batch(config: RunConfig, world: World) -> int:
    """The configured size, or the largest that the memory plan says fits on every rank."""
    if config.stage.micro_batch != "auto":
        return int(config.stage.micro_batch)
    if world.device.type == "cuda":
        memory = torch.cuda.get_device_properties(world.device).total_memory
    else:
        memory = psutil.virtual_memory().available // world.size
    return choose_micro_batch(config, world.min(memory), Device(world.device.type))
