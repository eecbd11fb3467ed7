"""Held-out answers that hang, fail or cannot be judged are left out of the accuracy, and counted."""

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from drivetrain.conf.errors import ConfigError
from drivetrain.conf.rollout import RolloutConfig
from drivetrain.conf.schema import GrpoConfig
from drivetrain.model.generate import Request, Sampling
from drivetrain.train.mesh import World
from drivetrain.train.rl.accuracy import held_out_accuracy
from drivetrain.train.rl.episodes import Played, Problem, SingleTurn, Trajectory
from drivetrain.train.rl.guard import Warnings
from drivetrain.train.rl.play import Task
from drivetrain.train.rl.rewards import Sample
from drivetrain.train.rl.rollout import joined

FAULTS: dict[str, Callable[[], Any]] = {
    "hangs": lambda: threading.Event().wait(),
    "raises": lambda: 1 / 0,
}


class Marks(SingleTurn):
    """Problem 0 is right, 1 wrong, 2 cannot be scored, and 3 is trouble."""

    def __init__(self, fault: Callable[[], Any]) -> None:
        self.reward, self.fault = self, fault

    def score(self, samples: Sequence[Sample]) -> Mapping[str, list[float]]:
        numbers = [sample.reference["number"] for sample in samples]
        if 3 in numbers:
            self.fault()
        return {"mark": [[1.0, 0.0, math.nan][number] for number in numbers]}

    def problem(self, number: int) -> Problem:
        return Problem([], {"number": number})

    def held_out(self, count: int) -> list[Problem]:
        return [self.problem(number) for number in range(count)]

    def correct(self, parts: Mapping[str, Sequence[float]]) -> list[bool]:
        return [mark >= 1 for mark in parts["mark"]]


def answered(task: Task, lost: int) -> list[Played]:
    """Of each problem, its last `lost` answers failed."""
    reason = ["stop"] * (task.samples - lost) + ["failed"] * lost
    whole = Trajectory([1, 2], [True] * 2, [], [-1.0] * 2, "stop", 1)
    return [
        Played(
            whole if each == "stop" else Trajectory(finish_reason="failed"),
            Sample([], "", 2, each, task.problem.reference),
            {},
        )
        for each in reason
    ]


def sampler(fault: Callable[[], Any], lost: int = 0) -> Any:
    rollout = RolloutConfig(timeout_seconds=0.5, retries=1)

    def play(tasks: Sequence[Task], generate: Any, any_rank: Any) -> list[list[Played]]:
        generate([Request([1], task.sampling, samples=task.samples) for task in tasks])
        return [answered(task, lost if task.samples > 1 else 0) for task in tasks]

    return SimpleNamespace(
        world=World(0, 1, 0, torch.device("cpu")),
        cfg=GrpoConfig(seq_len=32, prompts_per_step=1, group_size=2, max_completion=4, rollout=rollout),
        environment=Marks(fault),
        player=SimpleNamespace(play=play),
        sampling=lambda name: Sampling(),
        evaluator=SimpleNamespace(collective=True),
        generate=lambda requests: [],
        warnings=Warnings(),
    )


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_judge_that_fails_costs_its_answers(fault: str) -> None:
    began = time.monotonic()
    found = held_out_accuracy(sampler(FAULTS[fault]), 4, 0)
    assert time.monotonic() - began < 4
    assert found == {
        "eval/failed": 2,
        "eval/accuracy": 0.5,
        "eval/error": 0.5,
        "eval/completion_tokens_mean": 2,
    }


def test_answers_that_failed_are_not_wrong() -> None:
    found = held_out_accuracy(sampler(FAULTS["raises"], lost=1), 2, 3)
    assert found["eval/failed"] == 2 and found["eval/accuracy"] == 0.5
    assert found["eval/pass@1"] == found["eval/pass@3"] == 0.5
    found = held_out_accuracy(sampler(FAULTS["raises"], lost=3), 1, 3)
    assert found["eval/failed"] == 3 and found["eval/accuracy"] == 1 and "eval/pass@1" not in found


def test_a_server_that_fails_is_tried_again() -> None:
    made, tries = sampler(FAULTS["raises"]), list[int]()

    def generate(requests: Sequence[Request]) -> Any:
        tries.append(len(requests))
        raise OSError("gone")

    made.evaluator.collective, made.generate = False, generate
    held_out_accuracy(made, 2, 0)
    assert tries == [2, 2]


def test_parts_of_one_name_are_refused() -> None:
    class Twice(Marks):
        parts = ("mark",)

    with pytest.raises(ConfigError, match="two parts of the reward have the name 'mark'; rename"):
        held_out_accuracy(with_environment(Twice(FAULTS["raises"])), 1, 0)
    assert joined({"a": [1.0]}, {"b": [2.0]}) == {"a": [1.0], "b": [2.0]}
    with pytest.raises(ConfigError, match=r"name 'custom'; rename .* or turn stage\.rewards\.custom off"):
        joined({"custom": [1.0]}, {"custom": [2.0]})


def with_environment(environment: Any) -> Any:
    made = sampler(environment.fault)
    made.environment = environment
    made.player.play = lambda tasks, *_: [
        [replace(one, rewards={"mark": 1.0}) for one in answered(task, 0)] for task in tasks
    ]
    return made


def test_what_a_user_has_to_mend_ends_the_run() -> None:
    def mend() -> None:
        raise ConfigError("mend this")

    with pytest.raises(ConfigError, match="mend this"):
        held_out_accuracy(sampler(mend), 4, 0)
