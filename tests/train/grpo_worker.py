"""What each rank of the reinforcement learning tests trains; see rank.py.

Each case: {"name", "overrides", "steps", "run_dir", and optionally "save": folder and "save_after": step, "load":
folder}. The rewards are those of `reward` below.
"""

import hashlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drivetrain.conf.compose import compose
from drivetrain.data.loader import share_of
from drivetrain.model.initialize import initialize
from drivetrain.train import checkpoint
from drivetrain.train.build import build_engine, build_reference, build_stage, fill_from
from drivetrain.train.mesh import World
from drivetrain.train.optim import lr_factor
from drivetrain.train.rl.rewards import Sample
from drivetrain.train.stages.grpo import GrpoStage


def reward(samples: Sequence[Sample]) -> list[float]:
    """The share of vowels: something that a model without any training gets now and then."""
    return [
        sum(letter in "aeiou" for letter in sample.completion) / max(1, len(sample.completion))
        for sample in samples
    ]


def hangs_once(samples: Sequence[Sample]) -> list[float]:
    """As `reward`, but for the first problem of rank 1, with which it never comes to an end."""
    if os.environ["RANK"] == "1":
        hung.setdefault("problem", repr(samples[0].reference))
        if any(repr(sample.reference) == hung["problem"] for sample in samples):
            threading.Event().wait()
    return reward(samples)


hung: dict[str, str] = {}


def run_case(case: dict[str, Any], world: World) -> dict[str, Any]:
    config = compose(case["overrides"])
    stage_cfg = config.stage
    folder = Path(case["load"]) if "load" in case else None
    state = checkpoint.read_state(folder) if folder else None
    share = share_of(world.size, int(stage_cfg.micro_batch), world.rank, world.size)
    stage = build_stage(config, Path(case["run_dir"]), share, world, state["source"] if state else None)
    assert isinstance(stage, GrpoStage)

    def fill(model: Any) -> None:
        if folder is None:
            initialize(model, config.model, config.seed)
        else:
            fill_from(folder, config.model)(model)

    engine = build_engine(config, world, fill)
    if folder and state:
        engine.load_optimizer(lambda t: checkpoint.load_tensors(folder, t), state["optimizer_steps"])
    said: list[str] = []
    stage.prepare(engine, build_reference(config, world, Path(case["run_dir"])), said.append, said.append)
    start = int(state["step"]) if state else 0
    rows = []
    for step in range(start + 1, start + case["steps"] + 1):
        batches = stage.source.next_step()
        stats = engine.accumulate(batches, stage.loss)
        result = engine.step(lr_factor(config.optim, step - 1, stage_cfg.steps))
        stats |= stage.after_step(engine, step)
        timeless = {k: v for k, v in stats.items() if "second" not in k}
        text = repr(
            [(group.prompt, [one.tokens for one in group.completions]) for group in stage.rollouts.groups]
        )
        rows.append(
            {
                **timeless,
                "rollout": hashlib.sha256(text.encode()).hexdigest(),
                "digest": world.sum_u64(sum(batch.digest for batch in batches) % (1 << 64)),
                "norm": result.grad_norm,
                "prompts": [group.number for group in stage.rollouts.groups],
            }
        )
        if case.get("save_after") == step:
            saver = checkpoint.Checkpointer(Path(case["save"]), config.checkpoint, world)
            kept = {"step": step, "optimizer_steps": engine.optimizer_steps(), "source": stage.source.state()}
            failed = saver.save(step, engine.tensors(), kept) or saver.wait()
            assert failed is None, failed
    found = {"rows": rows, "eval": stage.evaluate(engine), "samples": stage.samples(engine), "said": said}
    stage.close()
    return found
