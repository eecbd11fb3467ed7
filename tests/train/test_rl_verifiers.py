"""Environments of the library `verifiers`: local tasksets, verifiers_plugins/, played without a network."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("verifiers.v1", reason="verifiers is not installed")

from drivetrain.conf.errors import ConfigError
from drivetrain.train.rl.calls import Call
from drivetrain.train.rl.environments import build_environment
from drivetrain.train.rl.episodes import Environment, EpisodeError, Problem, Step, Turn
from drivetrain.train.rl.rollout import judged

PLUGINS = str(Path(__file__).with_name("verifiers_plugins"))


@pytest.fixture(scope="module", autouse=True)
def plugins() -> Iterator[None]:
    """Importable here and in the servers of tools."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PLUGINS)
        patch.setenv("PYTHONPATH", os.pathsep.join([PLUGINS, os.environ.get("PYTHONPATH", "")]))
        yield


@pytest.fixture(scope="module")
def sums() -> Iterator[Environment]:
    environment = build_environment("verifiers:vf_sums?largest=5&solved=2", 0, 3, True)
    yield environment
    environment.close()


def answer(problem: Problem) -> str:
    a, _, b = problem.messages[-1]["content"].split()
    return str(int(a) + int(b))


def turn(text: str, *calls: Call, cut: bool = False) -> Turn:
    return Turn(text, cut, calls, text)


def test_tasks_are_problems(sums: Environment) -> None:
    assert sums.problem(0).messages[0] == {"role": "system", "content": "Add."}
    held_out = [problem.messages[-1]["content"] for problem in sums.held_out(3)]
    epochs = [[sums.problem(9 * e + n).messages[-1]["content"] for n in range(9)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
    assert len(set(epochs[0])) == 9 and len(held_out) == 3 and not set(held_out) & set(epochs[0])
    assert sums.tools is None and sums.parts == ("right", "short", "reward")


def test_an_answer_gets_the_rewards_of_the_task(sums: Environment) -> None:
    problem = sums.problem(1)
    rewards = []
    for text in (answer(problem), "none"):
        episode = sums.reset(problem, 0)
        assert episode.step(turn(text)) == Step(done=True)
        rewards.append(episode.end())
    assert rewards == [{"right": right, "short": 0.25, "reward": 0.0} for right in (2.0, 0.0)]
    parts = {name: [each[name] for each in rewards] for name in sums.parts}
    assert sums.correct(parts) == [True, False]
    assert judged(sums, []) == ({name: [] for name in sums.parts}, [])


def test_an_episode_that_is_cut_is_scored_as_it_is(sums: Environment) -> None:
    problem = sums.problem(1)
    episode = sums.reset(problem, 0)
    assert episode.step(turn(answer(problem), cut=True)).done
    assert episode.end()["right"] == 2
    unplayed = sums.reset(problem, 0)
    assert unplayed.end() == {"right": 0.0, "short": 0.25, "reward": 0.0}


def test_many_at_once(sums: Environment) -> None:
    problems = [sums.problem(number) for number in range(9)]
    episodes = [sums.reset(problem, 0) for problem in problems]
    steps: list[Step | None] = [None] * 9

    def play(place: int) -> None:
        steps[place] = episodes[place].step(turn(answer(problems[place])))

    threads = [threading.Thread(target=play, args=(place,)) for place in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert steps == [Step(done=True)] * 9
    assert [episode.end()["right"] for episode in episodes] == [2.0] * 9


def test_tools(tmp_path: Path) -> None:
    environment = build_environment("verifiers:vf_sums_tools?largest=3", 0, 1, True)
    try:
        assert environment.tools and environment.tools[0]["function"]["name"] == "add"
        problem = environment.problem(0)
        a, _, b = problem.messages[-1]["content"].split()
        episode = environment.reset(problem, 0)
        calls = Call("add", {"a": int(a), "b": int(b)}), Call("sub", {}), Call("add", error="no JSON")
        step = episode.step(turn("I add.", *calls))
        assert step.observation == [
            {"role": "tool", "content": answer(problem)},
            {"role": "tool", "content": "error: there is no tool 'sub'; there is add"},
            {"role": "tool", "content": "error: no JSON"},
        ]
        assert not step.done and episode.step(turn(answer(problem))).done
        assert episode.end()["right"] == 2
    finally:
        environment.close()


def test_what_was_said_before_has_to_stay(sums: Environment) -> None:
    problem = sums.problem(0)
    episode = sums.reset(
        Problem([*problem.messages, {"role": "user", "content": "And?"}], problem.reference), 0
    )
    with pytest.raises(EpisodeError, match="leaves out what was said before"):
        episode.step(turn("1"))
    other = [problem.messages[0], {"role": "user", "content": "Another question"}]
    episode = sums.reset(Problem(other, problem.reference), 0)
    with pytest.raises(EpisodeError, match="changes what was said before"):
        episode.step(turn("1"))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("nothing_of_that_name", "not found"),
        ("vf_sums?smallest=3", "smallest"),
        ("vf_sums?largest=2", "has 3 tasks, and stage.eval_problems=3 are held out"),
    ],
)
def test_what_cannot_be_made_says_why(name: str, wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        build_environment(f"verifiers:{name}", 0, 3, True)
