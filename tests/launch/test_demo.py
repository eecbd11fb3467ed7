"""What the demo is made of."""

import json
import sys
from pathlib import Path

import pytest

from drivetrain.data.conversations import conversation_of
from drivetrain.launch import demo


def test_every_kind_of_question_is_a_conversation() -> None:
    found = list(demo.conversations(3))
    assert [record["source"] for record in found] == [name for name in demo.QUESTIONS for _ in range(3)]
    assert found == list(demo.conversations(3)) != list(demo.conversations(3, seed=1))
    for record in found:
        question, answer = conversation_of(record).messages
        assert question["role"] == "user" and len(question["content"]) < 150 and len(answer["content"]) < 4


def test_records_are_written_one_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "sources", lambda: iter([("a.py", "x = 1\\n"), ("b.py", "y = 2\\n")]))
    monkeypatch.setattr(sys, "argv", ["demo", "text", str(tmp_path / "new" / "text.jsonl")])
    demo.main()
    lines = (tmp_path / "new" / "text.jsonl").read_text().splitlines()
    assert [json.loads(line)["source"] for line in lines] == ["a.py", "b.py"]
