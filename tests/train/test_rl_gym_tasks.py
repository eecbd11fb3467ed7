"""Every task of reasoning-gym: a problem is made, and its own answer is right, judged behind the walls."""

import json
from collections.abc import Iterator

import pytest

from drivetrain.train.rl.checkers import Checkers
from drivetrain.train.rl.gym_problems import CORRECT, GymEnvironment
from drivetrain.train.rl.rewards import Sample

DATASETS = pytest.importorskip("reasoning_gym.factory").DATASETS
# Made of other tasks, which its settings name.
LEFT_OUT = {"composite"}
# Problems with many right answers: where in the metadata reasoning-gym has one, and those of which it has none.
EXAMPLES = {
    "graph_color": "possible_answer",
    "propositional_logic": "example_answer",
    "rubiks_cube": "example_correct_answer",
}
NO_ANSWER = {"boxnet", "rush_hour"}
TAKES_ALL = {"game_of_life_halting"}  # its scoring has any text for a yes, its own "False" too


@pytest.fixture(scope="module")
def checkers() -> Iterator[Checkers]:
    """One process for all of them."""
    made = Checkers("gym", 1)
    yield made
    made.close()


@pytest.mark.parametrize("name", sorted(set(DATASETS) - LEFT_OUT))
def test_its_own_answer_is_right(name: str, checkers: Checkers, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = GymEnvironment(f"reasoning_gym:{name}", seed=0, held_out=1, unseen=False)
    monkeypatch.setattr(environment.reward, "_checkers", checkers)
    problem = environment.problem(0)
    assert problem.messages[0]["content"]
    entry = problem.reference
    answer = entry["metadata"][EXAMPLES[name]] if name in EXAMPLES else entry["answer"]
    text = answer if isinstance(answer, str) else json.dumps(answer)
    texts = [f"<answer>{text}</answer>", "<answer>no such thing</answer>"]
    samples = [Sample(problem.messages, text, 1, "stop", entry) for text in texts]
    right, wrong = environment.reward.score(samples)[CORRECT]
    assert 0 <= wrong < 1 or name in TAKES_ALL
    assert 0 <= right <= 1 if name in NO_ANSWER else right == 1
