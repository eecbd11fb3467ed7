"""What a step says of itself, and when it warns."""

import json

import pytest
import torch

from drivetrain.train.mesh import World
from drivetrain.train.rl.alarms import RlAlarms
from drivetrain.train.rl.episodes import Trajectory
from drivetrain.train.rl.report import Gap, rollout_metrics, unscored
from drivetrain.train.rl.rollout import Group


def group(correct: list[bool], lengths: list[int], cut: bool = False) -> Group:
    ones = [
        Trajectory([1] * (n + 2), [False] * 2 + [True] * n, [], [0.0] * n, "length" if cut else "stop", 2)
        for n in lengths
    ]
    marks = [float(mark) for mark in correct]
    return Group(
        0, [1], ones, {"correct": marks, "format": [0.5, 0.5]}, [mark + 0.5 for mark in marks], correct
    )


def test_the_numbers_of_a_step() -> None:
    found = rollout_metrics(
        [group([True, True], [1, 2]), group([True, False], [3, 4]), group([False, False], [5, 9], cut=True)]
    )
    expected = {
        "rl/reward_mean": 1.0,
        "rl/reward_std": 0.5,
        "rl/reward/correct": 0.5,
        "rl/reward/format": 0.5,
        "rl/reward/format_std": 0.0,
        "rl/correct": 0.5,
        "rl/groups_solved": 1 / 3,
        "rl/groups_mixed": 1 / 3,
        "rl/groups_unsolved": 1 / 3,
        "rl/groups_equal": 2 / 3,
        "rl/completion_tokens_mean": 4.0,
        "rl/completion_tokens_max": 9.0,
        "rl/truncated": 1 / 3,
        "rl/tokens": 24.0,
        "rl/unscored": 0.0,
        "rl/failed": 0.0,
        "rl/turns_mean": 2.0,
        "rl/observation_tokens_mean": 2.0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_the_gap_between_trainer_and_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ratios 1 and 2: (1 + 2)^2 / (2 · (1 + 4)) = 0.9. The third place is not trained."""
    world = World(0, 1, 0, torch.device("cpu"))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    gap = Gap()
    log_ratio_K = torch.tensor([0.0, 2.0]).clamp(min=1.0).log()
    gap.add(log_ratio_K[:1], torch.tensor([1.0]), torch.ones(1))
    gap.add(torch.cat([log_ratio_K[1:], torch.zeros(1)]), torch.tensor([3.0, 9.0]), torch.tensor([1.0, 0.0]))
    found = gap.take(world)
    assert found["rl/effective_samples"] == pytest.approx(0.9)
    assert found["rl/gap_max"] == pytest.approx(0.6931, abs=1e-4)
    assert found["rl/entropy"] == pytest.approx(2.0)
    assert gap.take(world)["rl/gap_max"] == 0


def test_an_entropy_that_collapses_is_said_once() -> None:
    alarms, said = RlAlarms(10), []
    for step in range(30):
        said += alarms.check(step, 0.8 if step < 20 else 0.01, 0.5, 0.5, 10)
    (sentence,) = said
    assert sentence.startswith("step 20: the entropy is 0.0100 nats a token, and was 0.8000 at first")


def test_growing_without_getting_better_is_said() -> None:
    longer, better = RlAlarms(10), RlAlarms(10)
    said = [line for step in range(20) for line in longer.check(step, 1, 0.5, 0.5, 10 + step)]
    assert len(said) == 1 and "completions have grown from 14 to 24 tokens" in said[0]
    assert not [line for step in range(20) for line in better.check(step, 1, 0.02 * step, 0.5, 10 + step)]


def test_a_resume_knows_what_the_first_steps_were_like() -> None:
    """Else what has collapsed would be what it began with."""
    whole, said = RlAlarms(10), list[list[str]]()
    for step in range(40):
        if step in (15, 25):
            whole = RlAlarms(10, json.loads(json.dumps(whole.state())))
        said.append(whole.check(step, 0.8 if step < 20 else 0.01, 0.5, 0.5, 10 + step))
    assert [step for step, lines in enumerate(said) for line in lines if "the entropy" in line] == [20]
    assert [step for step, lines in enumerate(said) for line in lines if "have grown" in line] == [19]
    assert RlAlarms(3, whole.state()).state()["lengths"] == [44, 45, 46, 47, 48, 49]


def test_parts_that_could_not_be_scored_are_counted_and_said_once() -> None:
    """A part that one prompt alone has is no part of the others; what was dropped is counted elsewhere."""
    nan = float("nan")
    one, other = group([True, True], [1, 2]), group([True, False], [3, 4])
    one.parts, other.parts = {"a": [nan, 1.0], "own": [nan, nan]}, {"a": [3.0, 2.0]}
    found = rollout_metrics([one, other])
    assert found["rl/reward/a"] == 2.0 and "rl/reward/own" not in found
    assert found["rl/unscored"] == 3 and found["rl/unscored/a"] == 1 and found["rl/unscored/own"] == 2
    other.parts["a"] = [3.0, nan]
    other.completions[1].finish_reason = "failed"
    many = unscored([one, other])
    assert many == {"a": 1, "own": 2}
    alarms = RlAlarms(10)
    (sentence,) = alarms.unscored(1, {**many, "b": 3}, 4)
    assert sentence.startswith("step 1: 3 of 4 completions could not be scored by b and go without it")
    assert alarms.unscored(2, {"b": 4}, 4) == [] and alarms.unscored(3, {"b": 0}, 4) == []
    assert len(alarms.unscored(4, {"b": 4}, 4)) == 1
