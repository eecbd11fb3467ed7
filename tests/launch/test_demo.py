"""What the demo is made of."""

import json
import sys
from pathlib import Path

import pytest

from drivetrain.conf.compose import compose
from drivetrain.conf.schema import GrpoConfig
from drivetrain.data.conversations import conversation_of
from drivetrain.launch import demo
from drivetrain.train.evaluation.gym import answer_in

ASKED = "State the final answer to the following arithmetic problem: "


@pytest.mark.parametrize(
    ("question", "steps", "result"),
    [
        (f"{ASKED}4 + 9 - 1 + 0 =", "4+9=13, 13-1=12, 12+0=12", 12),
        (f"{ASKED}0 - 9 - 8 + 3 =", "0-9=-9, -9-8=-17, -17+3=-14", -14),
    ],
)
def test_a_sum_is_worked_out_from_left_to_right(question: str, steps: str, result: int) -> None:
    assert demo.worked(question) == demo.Sum(question, steps, result)


def test_results_are_those_of_reasoning_gym() -> None:
    import reasoning_gym

    settings = {"min_terms": 4, "max_terms": 4, "min_digits": 1, "max_digits": 1}
    for item in reasoning_gym.create_dataset("chain_sum", size=50, seed=3, **settings):
        assert str(demo.worked(item["question"]).result) == item["answer"]


def test_nothing_of_what_grpo_holds_out_is_learned_before() -> None:
    stage = compose(["experiment=demo_grpo"]).stage
    assert isinstance(stage, GrpoConfig)
    assert stage.environment == demo.SUMS and stage.eval_problems == demo.HELD_OUT and stage.eval_unseen
    held_out = {each.question for each in demo.held_out_sums(demo.HELD_OUT)}
    text, chat = (list(demo.sums(seed, 3000)) for seed in (demo.TEXT_SEED, demo.CHAT_SEED))
    assert len(held_out) > 120 and text != chat
    assert held_out.isdisjoint(each.question for each in text + chat)


def test_questions_are_conversations_and_some_answers_show_their_steps() -> None:
    found = list(demo.conversations(10, 3))
    assert [record["source"] for record in found] == ["chain_sum"] * 10 + ["gcd"] * 3
    assert found == list(demo.conversations(10, 3))
    answers = [conversation_of(record).messages[1]["content"] for record in found]
    assert [answer.startswith("<answer>") for answer in answers[:5]] == [True, True, True, False, False]
    for each, answer in zip(demo.sums(demo.CHAT_SEED, 10), answers, strict=False):
        assert answer_in(answer) == str(each.result)
        assert answer in (f"<answer>{each.result}</answer>", f"{each.steps} <answer>{each.result}</answer>")


def test_records_are_written_one_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "sources", lambda: iter([("a.py", "x = 1\\n"), ("b.py", "y = 2\\n")]))
    monkeypatch.setattr(demo, "LINES", 60)
    monkeypatch.setattr(sys, "argv", ["demo", "text", str(tmp_path / "new" / "text.jsonl")])
    demo.main()
    lines = (tmp_path / "new" / "text.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["source"] for record in records] == ["a.py", "b.py", "sums", "sums"]
    assert [record["text"].count("\n") for record in records[2:]] == [50, 10]


def test_an_unknown_verb_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["demo", "dance"])
    with pytest.raises(SystemExit, match="dance is not a verb of the demo; use text, chat or gain"):
        demo.main()
