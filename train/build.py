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
from drivetrain.conf.schema import (
    SCHEMAS,
    Device,
    DpoConfig,
    FsdpConfig,
    GrpoConfig,
    ModelConfig,
    Precision,
    PretrainConfig,
    RewardModelConfig,
    RunConfig,
    SftConfig,
    ZeroConfig,
)
from drivetrain.conf.source import Kind, kind_of
from drivetrain.data.loader import Prefetcher, share_of
from drivetrain.model.backend import backend_for
from drivetrain.model.hf import fill_from_hf
from drivetrain.model.initialize import initialize
from drivetrain.model.lora import base_parameters, inject
from drivetrain.model.memory import choose_micro_batch
from drivetrain.model.parallelize import shard
from drivetrain.model.transformer import Transformer, build_model
from drivetrain.model.value_head import SCORE, give_value_head, has_value_head, with_value_head
from drivetrain.train import checkpoint
from drivetrain.train.adapters import Base, base_state, find_base, locate, lora_of, merged_with, with_adapters
from drivetrain.train.engine.base import Engine, Fill
from drivetrain.train.lock import lock_run_dir
from drivetrain.train.loop import Loop, Outcome, begin
from drivetrain.train.mesh import World, shard_mesh
from drivetrain.train.metrics import peak_memory_bytes, write_summary
from drivetrain.train.pinned import pinned
from drivetrain.train.stages.base import Stage
from drivetrain.train.stages.dpo import DpoStage
from drivetrain.train.stages.grpo import GrpoStage
from drivetrain.train.stages.pretrain import PretrainStage
from drivetrain.train.stages.reward_model import RewardModelStage
from drivetrain.train.stages.sft import SftStage
from drivetrain.train.stop import Stop
from drivetrain.train.watch import Watch


@dataclass(slots=True)
class Run:
    config: RunConfig
    run_dir: Path
    world: World
    loop: Loop
    prefetcher: Prefetcher | None  # none where batches depend on the last update
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
        if self.prefetcher is not None:
            self.prefetcher.close()
        if isinstance(self.loop.stage, GrpoStage):
            self.loop.stage.close()
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

    base = find_base(config, newest_weights, state, world)
    engine = build_engine(config, world, _fill(config, folder, base))
    if folder is not None and state is not None:
        engine.load_optimizer(
            lambda tensors: checkpoint.load_tensors(folder, tensors), int(state["optimizer_steps"])
        )
        watch.note(f"resumed from {folder.name}, saved on {state['world_size']} ranks with {state['engine']}")
    sequences = config.stage.tokens_per_step // config.stage.seq_len
    micro_batch = _micro_batch(config, world)
    share = share_of(sequences, micro_batch, world.rank, world.size)
    stage = build_stage(config, run_dir, share, world, state["source"] if state else None)
    for note in stage.notes:
        watch.note(note)
    if isinstance(stage, DpoStage):
        stage.prepare(engine, resumed=folder is not None)
    prefetcher = None
    if isinstance(stage, GrpoStage):
        stage.prepare(engine, build_reference(config, world, run_dir), watch.note, watch.alarm)
    else:
        pin = world.device.type == "cuda"
        prefetcher = Prefetcher(
            stage.source, config.data.prefetch, (lambda batch: batch.pin()) if pin else (lambda batch: batch)
        )
        stage.source = prefetcher
    checkpointer = checkpoint.Checkpointer(run_dir / "checkpoints", config.checkpoint, world)
    loop = Loop(config, world, engine, stage, checkpointer, watch, begin(state), base_state(base))
    return Run(config, run_dir, world, loop, prefetcher, start if folder is not None else None)


def build_engine(config: RunConfig, world: World, fill: Fill) -> Engine:
    """An engine whose weights `fill` has filled."""
    model = build_model(config.model, backend_for(config, world.device))
    # Frozen weights need no fp32 master copy: what bf16 casts at every use is kept cast. ZeRO-0 takes fp32 alone.
    wide = isinstance(config.engine, ZeroConfig) and config.engine.zero_stage == 0
    whole = wide or config.engine.precision is Precision.fp32
    inject(model, config.lora, torch.float32 if whole else torch.bfloat16)
    if isinstance(config.stage, RewardModelConfig):
        give_value_head(model)  # after that: it is trained beside adapters too
    match config.engine:
        case FsdpConfig():
            from drivetrain.train.engine.fsdp import FsdpEngine

            engine: Engine = FsdpEngine(config.engine, config.optim, config.model, model, world, fill)
        case ZeroConfig():
            from drivetrain.train.engine.zero import ZeroEngine

            engine = ZeroEngine(config.engine, config.optim, config.model, model, world, fill)
        case _:
            raise ConfigError(f"engine={config.engine.name} is not known; use fsdp or zero")
    engine.dropout_seed = config.seed if config.lora.rank and config.lora.dropout else None
    return engine


def build_reference(config: RunConfig, world: World, run_dir: Path) -> Transformer | None:
    """The frozen model that `stage.kl_coef` keeps the trained one close to: the weights that the run began with,
    sharded over all ranks under either engine. None: nothing asks for it.

    Raises:
        CheckpointError: at a resume they are not there any more.
    """
    if not isinstance(config.stage, GrpoConfig) or not config.stage.kl_coef:
        return None
    model = build_model(config.model, backend_for(config, world.device))
    model.requires_grad_(False)
    shard(model, FsdpConfig(precision=config.engine.precision), shard_mesh(world, 1))
    model.materialize(world.device)
    if config.model.init_from is None:
        initialize(model, config.model, config.seed)
    else:
        folder = pinned(run_dir, Path(config.model.init_from), newest_weights, world)
        fill_from(folder, config.model)(model)
    return model


def build_stage(
    config: RunConfig, run_dir: Path, share: Any, world: World, state: dict[str, Any] | None
) -> Stage:
    match config.stage:
        case PretrainConfig():
            return PretrainStage(config, share, world, run_dir / "tokenizer", state)
        case SftConfig():
            return SftStage(config, share, world, run_dir / "tokenizer", state)
        case DpoConfig():
            return DpoStage(config, share, world, run_dir, state)
        case RewardModelConfig():
            return RewardModelStage(config, share, world, state)
        case GrpoConfig():
            return GrpoStage(config, share.micro_batch, world, run_dir / "tokenizer", state)
        case _:
            raise ConfigError(f"stage={config.stage.name} is not known; use {', '.join(SCHEMAS['stage'])}")


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


def _fill(config: RunConfig, folder: Path | None, base: Base | None = None) -> Fill:
    """Initial weights, those of `model.init_from`, or those of a checkpoint; with a base, adapters on it."""
    if base is not None:
        return with_adapters(config, folder, fill_from(Path(base.path), config.model))
    if folder is not None:
        return fill_from(folder, config.model)
    if config.model.init_from is None:
        return lambda model: initialize(model, config.model, config.seed)
    fill = fill_from(Path(config.model.init_from), config.model)
    return with_value_head(fill, config.seed) if isinstance(config.stage, RewardModelConfig) else fill


def fill_from(source: Path, cfg: ModelConfig) -> Fill:
    """The weights of a run directory, a checkpoint folder or a Hugging Face directory; a LoRA run's are merged.

    What it returns fills a materialised model in place; of a sharded parameter each rank reads its own rows only.

    Raises:
        ConfigError: a run without a whole checkpoint. CheckpointError, also when filling: the weights are damaged,
            or not those of this model.
    """
    if kind_of(source) is Kind.hugging_face:
        return lambda model: fill_from_hf(model, cfg, source)
    folder = weights_folder(source)
    scores = checkpoint.is_reward_model(folder)
    if (adapted := lora_of(folder)) is not None:
        lora, base = adapted
        fill = merged_with(folder, lora, scores, fill_from(locate(base, None, newest_weights), cfg))
    else:

        def fill(model: Transformer) -> None:
            named = ((name, p) for name, p in base_parameters(model) if scores or name != SCORE)
            checkpoint.load_tensors(folder, {f"model.{name}": p.detach() for name, p in named})

    return _fill_scores(folder, fill) if scores else fill


def _fill_scores(folder: Path, fill: Fill) -> Fill:
    """A reward model's weights, for a reward model only."""

    def checked(model: Transformer) -> None:
        if not has_value_head(model):
            raise checkpoint.no_logits(folder)
        fill(model)

    return checked


def newest_weights(source: Path) -> Path:
    """A Hugging Face directory itself, or what `weights_folder` finds."""
    return source if kind_of(source) is Kind.hugging_face else weights_folder(source)


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
