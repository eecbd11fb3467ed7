"""Problems are a function of (seed, number), and held-out ones stay held out."""

import time
from dataclasses import replace

import pytest

from drivetrain.conf.errors import ConfigError
from drivetrain.train.rl import gym_problems
from drivetrain.train.rl.environments import build_environment
from drivetrain.train.rl.gym_problems import HELD_OUT_SEED, GymEnvironment
from drivetrain.train.rl.rewards import Sample

SUMS = "reasoning_gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1"


def asked(environment: GymEnvironment, numbers: range) -> list[str]:
    return [environment.problem(number).messages[0]["content"] for number in numbers]


def test_problems_are_a_function_of_the_seed_and_their_number() -> None:
    one, again, other = (GymEnvironment(SUMS, seed, 10) for seed in (1, 1, 2))
    assert asked(one, range(20)) == asked(again, range(20)) != asked(other, range(20))
    assert asked(one, range(700, 703)) == [
        asked(again, range(number, number + 1))[0] for number in range(700, 703)
    ]
    assert len(set(asked(one, range(100)))) > 40
    assert one.held_out(10) == other.held_out(10)  # runs are compared on the same ones


def test_no_held_out_question_is_trained_on() -> None:
    """200 questions in all, about 80 of them held out."""
    environment = GymEnvironment(SUMS, 0, 100)
    held_out = {problem.messages[0]["content"] for problem in environment.held_out(100)}
    assert len(held_out) > 60
    assert not held_out & set(asked(environment, range(400)))
    assert all(environment._first + number < HELD_OUT_SEED for number in (0, 1 << 20))


def test_an_answer_gets_its_mark() -> None:
    environment = GymEnvironment(SUMS, 0, 1)
    problem = environment.problem(3)
    answer = problem.reference["answer"]
    samples = [
        Sample(problem.messages, text, 1, "stop", problem.reference)
        for text in (answer, f"It is <answer> {answer} </answer>", f" {answer}\n", "none", "")
    ]
    parts = environment.reward.score(samples)
    assert environment.correct(parts) == [True, True, True, False, False]


@pytest.mark.parametrize("kind", ["arc_agi", "countdown", "rubiks_cube", "basic_arithmetic"])
def test_right_answers_are_right_behind_the_walls_too(kind: str) -> None:
    """Entries with tuples (arc_agi), ones that are computed with (countdown)."""
    environment = GymEnvironment(f"reasoning_gym:{kind}", 0, 1)
    problem = environment.problem(0)
    samples = [Sample(problem.messages, text, 1, "stop", problem.reference) for text in ("x", "")]
    if kind != "rubiks_cube":  # which has no one right answer
        samples.append(replace(samples[0], completion=problem.reference["answer"]))
    marks = environment.reward.score(samples)["correct"]
    assert max(marks[:2]) < 1 and marks[2:] in ([], [1.0])
    environment.close()


def test_an_answer_that_takes_forever_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gym_problems, "SECONDS", 1.0)
    environment = GymEnvironment("reasoning_gym:countdown", 0, 1)
    problem = environment.problem(0)
    answers = ["9**9**9**9", problem.reference["answer"]]
    samples = [Sample(problem.messages, text, 1, "stop", problem.reference) for text in answers]
    began = time.monotonic()
    assert environment.correct(environment.reward.score(samples)) == [False, True]
    assert time.monotonic() - began < 60
    environment.close()


WRONG = {
    "chess": "stage.environment=chess is not known",
    "reasoning_gym:nothing": "stage.environment=reasoning_gym:nothing cannot be made",
    "reasoning_gym:chain_sum?zzz=3": "cannot be made",
    "reasoning_gym:chain_sum?seed=3": "seed and size follow from the run's seed",
    "reasoning_gym:chain_sum?min_terms=0": "cannot be made",
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_made_says_why(name: str) -> None:
    with pytest.raises(ConfigError, match=WRONG[name].replace("?", "[?]")):
        build_environment(name, 0, 1, True)


def test_a_kind_with_too_few_questions_to_hold_any_out() -> None:
    name = "reasoning_gym:gcd?min_numbers=2&max_numbers=2&min_value=1&max_value=2"
    with pytest.raises(ConfigError, match="so few questions that 64 in a row are held out"):
        GymEnvironment(name, 0, 200)
    assert GymEnvironment(name, 0, 200, unseen=False).problem(0).messages
