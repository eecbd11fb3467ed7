"""What each rank of the test of tools trains; see rank.py. Each case: {"name", "overrides", "run_dir", "folder"},
and either "warm_up", steps after which the weights go to the folder, or "steps", for which they come from there;
without a folder they are random.

A model without any training calls no tool, so it is first shown some conversations in which one is called.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from drivetrain.conf.compose import compose
from drivetrain.data.batch import Batch
from drivetrain.data.conversations import conversation_of
from drivetrain.data.loader import share_of
from drivetrain.data.sft import batch_from_rows
from drivetrain.model.initialize import initialize
from drivetrain.train import checkpoint
from drivetrain.train.build import build_engine, build_reference, build_stage, fill_from
from drivetrain.train.mesh import World
from drivetrain.train.rl.episodes import Defaults, Problem, Step, Turn
from drivetrain.train.rl.policy import logprobs_of, trained_places
from drivetrain.train.rl.rewards import Sample
from drivetrain.train.stages.grpo import GrpoStage


def vowels(text: str) -> float:
    """Their share: something that a model without any training gets now and then."""
    return sum(letter in "aeiou" for letter in text) / max(1, len(text))


class LastTurn:
    def score(self, samples: Sequence[Sample]) -> dict[str, list[float]]:
        return {"last": [vowels(sample.completion) for sample in samples]}


class TwoTurns(Defaults):
    """Rewards vowels, in the first of two turns too."""

    parts = ("first",)

    def __init__(self, seed: int, held_out: int, unseen: bool) -> None:
        self.reward = LastTurn()

    def problem(self, number: int) -> Problem:
        return Problem([{"role": "user", "content": f"user {number}"}])

    def held_out(self, count: int) -> list[Problem]:
        return [self.problem(-1 - number) for number in range(count)]

    def correct(self, parts: Mapping[str, Sequence[float]]) -> list[bool]:
        return [share > 0.5 for share in parts["last"]]

    def reset(self, problem: Problem, seed: int) -> "OnceMore":
        return OnceMore()


class OnceMore:
    asked = False

    def step(self, turn: Turn) -> Step:
        if self.asked or turn.cut:
            return Step(done=True)
        self.asked = True
        return Step([{"role": "user", "content": "tool system tool"}], {"first": vowels(turn.text)})

    def end(self) -> Mapping[str, float]:
        return {}


def conversation(a: int, b: int, tools: list[dict[str, Any]]) -> dict[str, Any]:
    function = {"name": "calculator", "arguments": {"expression": f"{a} + {b}"}}
    messages = [
        {"role": "user", "content": f"{a} + {b}"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "content": str(a + b)},
        {"role": "assistant", "content": str(a + b)},
    ]
    return {"messages": messages, "tools": tools}


def warm_up(stage: GrpoStage, engine: Any, steps: int) -> None:
    """Supervised: the same batch on every rank."""
    tools = stage.environment.tools
    assert tools
    rng = np.random.default_rng(0)

    def loss(model: nn.Module, batch: Batch) -> Any:
        at_K = trained_places(batch)
        logprobs_K, _ = logprobs_of(model, batch, at_K, stage.model_cfg, stage.backend, 1.0)
        total = -logprobs_K.sum()
        return total, {"loss": total.detach()}

    for _ in range(steps):
        pairs = rng.integers(1, 10, (8, 2)).tolist()
        encoded = [stage.chat.encode(conversation_of(conversation(a, b, tools))) for a, b in pairs]
        rows = [[(tokens, weights)] for _, tokens, weights in encoded]
        engine.accumulate([batch_from_rows(rows, stage.cfg.seq_len, stage.eos_id)], loss)
        engine.step(1.0)


def looked_at(stage: GrpoStage, model: nn.Module, batch: Batch) -> dict[str, Any]:
    """What stands where a token is trained, and where not."""
    assert batch.token_weights_T is not None and batch.advantages_T is not None
    assert batch.behaviour_logprobs_T is not None
    trained_T = batch.loss_weights_T > 0
    gap_T = (stage._logprobs(model, batch) - batch.behaviour_logprobs_T)[trained_T]
    elsewhere = [batch.token_weights_T, batch.advantages_T, batch.behaviour_logprobs_T]
    return {
        "trained": batch.targets_T[trained_T].tolist(),
        "weight_elsewhere": max(float(each_T[~trained_T].abs().max()) for each_T in elsewhere),
        "least_weight": float(batch.token_weights_T[trained_T].min()) if trained_T.any() else 1.0,
        "gap": float(gap_T.abs().max()) if trained_T.any() else 0.0,
    }


def run_case(case: dict[str, Any], world: World) -> dict[str, Any]:
    config = compose(case["overrides"])
    share = share_of(world.size, int(config.stage.micro_batch), world.rank, world.size)
    stage = build_stage(config, Path(case["run_dir"]), share, world, None)
    assert isinstance(stage, GrpoStage)
    folder = Path(case.get("folder", ""))
    if "folder" not in case:
        engine = build_engine(config, world, lambda model: initialize(model, config.model, config.seed))
    elif "warm_up" in case:
        engine = build_engine(config, world, lambda model: initialize(model, config.model, config.seed))
        warm_up(stage, engine, case["warm_up"])
        saver = checkpoint.Checkpointer(folder, config.checkpoint, world)
        kept = {"step": 1, "optimizer_steps": engine.optimizer_steps(), "source": {}}
        failed = saver.save(1, engine.tensors(), kept) or saver.wait()
        assert failed is None, failed
        return {}
    else:
        engine = build_engine(config, world, fill_from(folder / "step_00000001", config.model))
    stage.prepare(
        engine, build_reference(config, world, Path(case["run_dir"])), lambda _: None, lambda _: None
    )
    rows, looks = [], []
    for step in range(1, case["steps"] + 1):
        batches = stage.source.next_step()
        looks += [looked_at(stage, engine.model, batch) for batch in batches]
        stats = engine.accumulate(batches, stage.loss)
        engine.step(1.0)
        stats |= stage.after_step(engine, step)
        every = [one for group in stage.rollouts.groups for one in group.completions]
        kept = [(one.tokens, one.written) for one in every]
        rows.append({**{k: v for k, v in stats.items() if "second" not in k}, "kept": kept})
    observed = [
        token for row in rows for one in row["kept"] for token, mine in zip(*one, strict=True) if not mine
    ]
    text = stage.sampler.tokenizer.decode(observed, skip_special_tokens=False)
    found = {"rows": rows, "looks": looks, "eval": stage.evaluate(engine), "observed": text}
    stage.close()
    return found
