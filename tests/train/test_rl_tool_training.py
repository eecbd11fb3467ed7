"""Small models are trained on episodes of two turns: the stage as it is, a calculator, one rank and two."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drivetrain.data.tokenizer import train_tokenizer

WORKER = Path(__file__).with_name("tools_worker.py")
STEPS = 3


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tools")
    text = (
        'Functions that you may call, as JSON schemas: {"type": "function", "function": {"name": "calculator", '
        '"description": "Computes an arithmetic expression, such as (3 + 4) * 12 / 7 or sqrt(2) ** 3.", '
        '"parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": '
        '["expression"]}}} Call one by writing its name and arguments between the marks: '
        '{"name": NAME, "arguments": OBJECT}\n'
        '{"name": "calculator", "arguments": {"expression": "1 + 2"}}\n system user assistant tool '
    )
    (folder / "a.txt").write_text(text * 30)
    train_tokenizer([folder / "a.txt"], 420, folder / "tokenizer")
    pairs = [(a, b) for a in range(1, 10) for b in range(1, 10)]
    lines = [json.dumps({"question": f"{a} + {b}", "answer": str(a + b)}) for a, b in pairs]
    (folder / "questions.jsonl").write_text("\n".join(lines))
    return folder


def case(name: str, small: list[str], run_dir: Path, **more: Any) -> dict[str, Any]:
    general = [word for word in small if not word.startswith(("stage.seq_len", "stage.tokens", "optim.lr"))]
    environment = f"questions:{run_dir / 'questions.jsonl'}?tools=calculator&max_turns=2&penalty=0.1"
    words = ["stage=grpo", *general, "model.vocab_size=420", "model.max_seq_len=512", "stage.seq_len=384"]
    words += [f"stage.environment='{environment}'", "stage.max_completion=60", "stage.prompts_per_step=4"]
    words += ["stage.group_size=4", "stage.micro_batch=2", "stage.eval_problems=6", "stage.steps=1000"]
    words += ["optim.lr=1e-2", "optim.schedule=constant", "optim.warmup_steps=1"]
    paths = {"run_dir": str(run_dir), "folder": str(run_dir / "warm")}
    return {"name": name, "overrides": words, **paths, **more}


def test_training_with_a_calculator(
    small: list[str], run_dir: Path, run_ranks: Callable[..., dict[str, Any]]
) -> None:
    warm, cold = case("warm", small, run_dir, warm_up=80), case("trained", small, run_dir, steps=STEPS)
    alone = run_ranks(WORKER, 1, [warm, cold])["trained"]
    pair = run_ranks(WORKER, 2, [cold])["trained"]
    for found in (alone, pair):
        for row in found["rows"]:
            assert 1.2 < row["rl/turns_mean"] <= 2 and row["rl/observation_tokens_mean"] > 5
            assert row["rl/gap_max"] < 1e-4  # of the model's tokens, and of these their own log-probabilities
            assert set(row) >= {"rl/reward/correct", "rl/reward/tool_errors", "rl/failed"}
        for look in found["looks"]:
            assert look["weight_elsewhere"] == 0 < look["least_weight"] and look["gap"] < 1e-4
        turns = found["observed"].split("<|im_start|>assistant\n")
        assert len(turns) > 20 and turns.pop() == ""
        assert all(turn.startswith("\n<|im_start|>tool\n<tool_response>\n") for turn in turns)
    wrote = [t for row in alone["rows"] for one in row["kept"] for t, mine in zip(*one, strict=True) if mine]
    assert sorted(token for look in alone["looks"] for token in look["trained"]) == sorted(wrote)
    for one, two in zip(alone["rows"], pair["rows"], strict=True):
        assert one["kept"] == two["kept"]
        numbers = {k: v for k, v in one.items() if isinstance(v, float) and k != "rl/gap_max"}
        assert {k: two[k] for k in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-5)
    assert alone["eval"] == pair["eval"]


def test_what_is_rewarded_in_any_turn_gets_likelier(
    small: list[str], run_dir: Path, run_ranks: Callable[..., dict[str, Any]]
) -> None:
    found = case("turns", small, run_dir, steps=24)
    del found["folder"]
    found["overrides"] += ["stage.environment='custom:tools_worker:TwoTurns'", "stage.seq_len=128"]
    found["overrides"] += ["stage.max_completion=24", "stage.prompts_per_step=8", "stage.group_size=8"]
    found["overrides"] += ["stage.eval_every=0"]
    first, *_, last = run_ranks(WORKER, 1, [found])["turns"]["rows"]
    for name, more in (("rl/reward/first", 0.1), ("rl/reward/last", 0.1), ("rl/turns_mean", 0.2)):
        assert last[name] > first[name] + more
