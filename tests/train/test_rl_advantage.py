"""Advantages against numbers worked by hand."""

import numpy as np
import pytest

from drivetrain.conf.schema import Variant
from drivetrain.train.rl.advantage import advantages, leave_one_out, mixed
from drivetrain.train.rl.rollout import filled

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
        leave_one_out(np.ones((3, 1)))


def test_over_the_whole_step() -> None:
    """Mean 6/8, squares 6/16 + 2 · 9/16 = 1.5, over 7."""
    deviation = (1.5 / 7) ** 0.5
    expected = (REWARDS_PG - 0.75) / deviation
    assert advantages(Variant.reinforce_pp, REWARDS_PG) == pytest.approx(expected, rel=1e-5)
    assert advantages(Variant.reinforce_pp, np.array([[2.0]])).tolist() == [[0.0]]


def test_groups_with_something_to_compare() -> None:
    assert mixed(REWARDS_PG).tolist() == [True, False]


def test_a_reward_that_is_missing_is_worth_the_mean_of_its_group() -> None:
    assert filled([1.0, float("nan"), 0.0]) == [1.0, 0.5, 0.0]
    assert filled([float("nan")] * 2) == [0.0, 0.0]
