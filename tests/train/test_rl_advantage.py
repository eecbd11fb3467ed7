"""Advantages against numbers worked by hand."""

import math
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest

from drivetrain.conf.schema import Variant
from drivetrain.train.rl.advantage import advantages, leave_one_out, mixed
from drivetrain.train.rl.episodes import Played, Trajectory
from drivetrain.train.rl.exchange import columns, rows
from drivetrain.train.rl.report import unscored
from drivetrain.train.rl.rewards import Rewards, Sample
from drivetrain.train.rl.rollout import Group, Sampler, filled

NAN = math.nan

# Means 0.5 and 1. Squares about the mean: 4 · 0.25 = 1, over 3 is 1/3.
REWARDS_PG = np.array([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])


@pytest.mark.parametrize("variant", [Variant.grpo, Variant.dapo, Variant.gspo, Variant.cispo])
def test_group_relative(variant: Variant) -> None:
    half = 0.5 / (1 / 3) ** 0.5
    assert advantages(variant, REWARDS_PG) == pytest.approx(
        np.array([[half, -half, -half, half], [0, 0, 0, 0]]), rel=1e-5
    )


def test_without_the_deviation() -> None:
    assert advantages(Variant.dr_grpo, REWARDS_PG).tolist() == [[0.5, -0.5, -0.5, 0.5], [0, 0, 0, 0]]


def test_leave_one_out() -> None:
    """The mean of the others: 1/3 for a 1, 2/3 for a 0."""
    expected = np.array([[2 / 3, -2 / 3, -2 / 3, 2 / 3], [0, 0, 0, 0]])
    assert advantages(Variant.rloo, REWARDS_PG) == pytest.approx(expected)
    with pytest.raises(ValueError, match="at least two"):
        leave_one_out(np.ones((3, 1)), np.ones((3, 1), dtype=bool))


def test_over_the_whole_step() -> None:
    """Mean 6/8, squares 6/16 + 2 · 9/16 = 1.5, over 7."""
    deviation = (1.5 / 7) ** 0.5
    expected = (REWARDS_PG - 0.75) / deviation
    assert advantages(Variant.reinforce_pp, REWARDS_PG) == pytest.approx(expected, rel=1e-5)
    assert advantages(Variant.reinforce_pp, np.array([[2.0]])).tolist() == [[0.0]]


def test_groups_with_something_to_compare() -> None:
    assert mixed(REWARDS_PG, np.ones((2, 4), dtype=bool)).tolist() == [True, False]
    scored_PG = np.array([[True, False, False, True], [False] * 4])
    assert mixed(REWARDS_PG, scored_PG).tolist() == [False, False]


@pytest.mark.parametrize("variant", Variant)
@pytest.mark.parametrize("there", [0.0, 7.0, NAN])
def test_who_is_not_scored_has_no_advantage_and_changes_no_other(variant: Variant, there: float) -> None:
    """As if the step were without them, whatever number stands in their place."""
    rewards_PG = np.array([[1.0, 0.0, there, 0.25], [there, 0.5, 3.0, 1.0]])
    scored_PG = np.array([[True, True, False, True], [False, True, True, True]])
    found_PG = advantages(variant, rewards_PG, scored_PG)
    assert found_PG[~scored_PG].tolist() == [0, 0]
    alone_PG = advantages(variant, np.array([[1.0, 0.0, 0.25], [0.5, 3.0, 1.0]]))
    assert found_PG[scored_PG] == pytest.approx(alone_PG.ravel())
    assert advantages(variant, rewards_PG, np.zeros((2, 4), dtype=bool)).tolist() == [[0.0] * 4] * 2


def test_a_part_that_is_missing_is_worth_the_mean_of_its_group() -> None:
    assert filled([1.0, NAN, 0.0]) == [1.0, 0.5, 0.0]
    assert filled([1.0, float("inf"), 0.0]) == [1.0, 0.5, 0.0]
    assert filled([NAN] * 2) == [0.0, 0.0]


class Marks:
    """Gives the parts that it was told, one number for each sample in turn."""

    parts: tuple[str, ...] = ()

    def __init__(self, marks: dict[str, list[float]]) -> None:
        self.marks, self.reward = marks, self

    def score(self, samples: Sequence[Sample]) -> dict[str, list[float]]:
        return {name: list(values) for name, values in self.marks.items()}

    def correct(self, parts: dict[str, list[float]]) -> list[bool]:
        return [mark >= 1 for mark in parts["right"]]


def scored(own: dict[str, list[float]], more: dict[str, list[float]], weight: float = 1.0) -> list[Group]:
    """Groups of four, as the sampler makes them; an episode whose own mark is None has failed."""
    sampler = Sampler.__new__(Sampler)
    sampler.environment, sampler.rewards = Marks(own), Rewards({"more": (1.0, Marks(more))})  # type: ignore
    sampler.cfg = SimpleNamespace(environment_weight=weight)  # type: ignore[assignment]
    sampler.player = SimpleNamespace(prompt=lambda problem: [1])  # type: ignore[assignment]
    episodes = [
        Played(
            Trajectory([2], [True], [], [-1.0], "failed" if mark < 0 else "stop"),
            Sample([], "", 1, "stop"),
            {},
        )
        for mark in own["right"]
    ]
    task = SimpleNamespace(problem=None)
    groups = [(i // 4, task, episodes[i : i + 4]) for i in range(0, len(episodes), 4)]
    return sampler.scored(groups)  # type: ignore[arg-type]


def test_a_completion_that_lacks_a_part_is_neither_better_nor_worse_for_it() -> None:
    """Style 2, missing, missing, 4: the two without have the mean, 3. The failed one is not scored."""
    (group,) = scored({"right": [1.0, 1.0, 0.0, -1.0]}, {"style": [2.0, NAN, 4.0, 9.0]})
    assert group.rewards == [3.0, 4.0, 4.0, pytest.approx(11 / 3)]
    assert group.scored == [True, True, True, False]
    assert math.isnan(group.parts["more/style"][1]) and math.isnan(group.parts["right"][3])


@pytest.mark.parametrize("what", [float("inf"), -float("inf"), NAN])
def test_an_infinite_part_is_a_missing_one(what: float) -> None:
    (group,) = scored({"right": [1.0, 0.0, 0.0, 1.0]}, {"style": [0.0, what, 0.0, 0.0]})
    assert group.rewards == [1.0, 0.0, 0.0, 1.0] and unscored([group])["more/style"] == 1
    (group,) = scored({"right": [what, 0.0, 0.0, 1.0]}, {})
    assert group.scored == [False, True, True, True]
    rewards_PG, scored_PG = np.array([group.rewards]), np.array([group.scored])
    for variant in Variant:
        found_PG = advantages(variant, rewards_PG, scored_PG)
        assert np.isfinite(found_PG).all() and found_PG[0, 0] == 0


def test_right_and_wrong_decide_what_is_worth_training_on() -> None:
    """All wrong at different lengths; some right; the same where only lengths are rewarded; and no mark at all."""
    length = {"length": [0.0, -0.5, -1.0, 0.0] * 2}
    right = {"right": [0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]}
    assert [group.mixed for group in scored(right, length)] == [False, True]
    assert [group.mixed for group in scored(right, length, weight=0.0)] == [True, True]
    assert [group.mixed for group in scored({"right": [NAN] * 8}, length)] == [True, True]
    assert not scored({"right": [0.0, 0.0, 0.0, -1.0]}, {})[0].mixed
    again = rows(columns(scored(right, length)))
    assert [group.mixed for group in again] == [False, True]
