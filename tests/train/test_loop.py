"""The loop around parts that do nothing: what it says, keeps and counts."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from drivetrain.conf.compose import compose
from drivetrain.conf.schema import RunConfig
from drivetrain.train.engine.base import StepResult
from drivetrain.train.loop import Loop, Outcome, begin
from drivetrain.train.mesh import World
from drivetrain.train.metrics import Pace, read_metrics
from drivetrain.train.stop import Stop
from drivetrain.train.watch import Watch

FAILED = "the checkpoint of step 2 could not be written: no space left"


@dataclass(frozen=True, slots=True)
class OneRank(World):
    """A world that needs no process group."""

    def sum(self, values: list[float]) -> list[float]:
        return values

    def sum_u64(self, value: int) -> int:
        return value


WORLD = OneRank(0, 1, 0, torch.device("cpu"))


@dataclass
class Parts:
    """Engine, stage, source, checkpointer and watch at once: step n has loss n; evaluations come from `evals`."""

    evals: list[float] = field(default_factory=list)
    skip: tuple[int, ...] = ()
    stop_at: int | None = None
    fails_at: int | None = None  # a save that was begun there fails one step later
    step_: int = 0
    saving: int | None = None
    said: list[tuple[int, str]] = field(default_factory=list)
    saved: dict[int, dict[str, Any]] = field(default_factory=dict)
    run_id: str | None = None

    @property
    def source(self) -> "Parts":
        return self

    def next_step(self) -> list[Any]:
        self.step_ += 1
        return []

    def state(self) -> dict[str, Any]:
        return {}

    def accumulate(self, batches: list[Any], loss: Any) -> dict[str, float]:
        return {"loss": float(self.step_)}

    def loss(self) -> None: ...

    def step(self, factor: float) -> StepResult:
        return StepResult(grad_norm=1.0, skipped=self.step_ in self.skip)

    def after_step(self, engine: Any, step: int) -> dict[str, float]:
        return {}

    def optimizer_steps(self) -> int:
        return self.step_

    def tensors(self) -> dict[str, Any]:
        return {}

    def evaluate(self, engine: Any) -> dict[str, float]:
        return {"eval/loss": self.evals.pop(0)}

    def samples(self, engine: Any) -> list[tuple[str, str]]:
        return []

    def evaluated(self, *_: Any) -> None: ...

    def log(self, step: int, metrics: dict[str, Any], pace: Pace) -> None: ...

    @property
    def stop_requested(self) -> bool:
        return self.stop_at is not None and self.step_ >= self.stop_at

    def alarm(self, text: str) -> None:
        self.said.append((self.step_, text))

    def save(self, step: int, tensors: dict[str, Any], state: dict[str, Any]) -> str | None:
        failed = self.wait()
        self.saving = step
        self.saved[step] = json.loads(json.dumps(state, allow_nan=False))
        return failed

    def finished(self) -> bool:
        return self.saving is not None and self.step_ > self.saving

    def wait(self) -> str | None:
        step, self.saving = self.saving, None
        return FAILED if step is not None and step == self.fails_at else None


@pytest.fixture
def config(small: list[str], shards: Path) -> RunConfig:
    words = ["model.vocab_size=96", "stage.steps=12", "stage.save_every=2", "stage.eval_every=0"]
    return compose([*small, *words, f"data.path={shards}"])


def run(config: RunConfig, parts: Any, state: dict[str, Any] | None = None) -> Outcome:
    return Loop(config, WORLD, parts, parts, parts, parts, begin(state)).run()


def test_a_failed_save_in_the_background_is_said_at_the_next_step(config: RunConfig) -> None:
    config.stage.save_every = 5
    parts = Parts(fails_at=5)
    assert run(config, parts).status == "completed"
    assert [(step, text) for step, text in parts.said if "could not" in text] == [(6, FAILED)]


def test_best_skipped_and_last_survive_a_resume(config: RunConfig) -> None:
    config.stage.eval_every, config.stage.save_every = 4, 6
    first = Parts(evals=[2.0], skip=(2, 3), stop_at=6)
    assert run(config, first).status == "preempted"
    second = Parts(evals=[2.5, float("nan")], skip=(9,), step_=6)
    outcome = run(config, second, first.saved[6])
    assert outcome.best == {"eval/loss": 2.0} and outcome.skipped == 3 and outcome.step == 12
    assert outcome.last["skipped"] == 3
    assert second.saved[12]["last"]["eval/loss"] is None  # NaN, as JSON can say it


def test_asked_to_stop_while_starting_is_preempted_with_nothing_done(config: RunConfig) -> None:
    parts = Parts(stop_at=0)
    outcome = run(config, parts)
    assert (outcome.status, outcome.step, parts.saved, parts.step_) == ("preempted", 0, {}, 0)
    earlier = Parts(stop_at=6)
    run(config, earlier)
    again = Parts(stop_at=0, step_=6)
    outcome = run(config, again, earlier.saved[6])
    assert (outcome.status, outcome.step, again.saved) == ("preempted", 6, {})
    assert outcome.last["loss"] == 6.0  # the summary's numbers are still those of the run


def test_a_checkpoints_state_says_what_made_it(config: RunConfig) -> None:
    parts = Parts()
    run(config, parts)
    state = parts.saved[12]
    assert state["config"]["model"]["dim"] == 32 and state["config"]["engine"]["precision"] == "fp32"
    assert state["versions"]["torch"] == torch.__version__.split("+")[0] or state["versions"]["torch"]
    assert {"python", "drivetrain", "torch", "deepspeed", "numpy"} <= set(state["versions"])


def test_mfu_is_null_where_the_peak_is_not_known(config: RunConfig, tmp_path: Path) -> None:
    watch = Watch(config, tmp_path, WORLD, 0, None, Stop())
    pace = Pace()
    pace.begin()
    pace.end(tokens=256)
    watch.log(1, {"loss": 1.0}, pace)
    watch.close("completed")
    assert read_metrics(tmp_path)[0]["mfu"] is None
