"""Fine-tuning: the same curve on any ranks, micro-batches and engines, and what it reports."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drivetrain.data.build import build
from drivetrain.data.tokenizer import train_tokenizer

RunRanks = Callable[..., dict[str, Any]]
WORKER = Path(__file__).with_name("sft_worker.py")


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions whose answer repeats their word, one of them very long."""
    folder, draw = tmp_path_factory.mktemp("chats"), random.Random(0)
    records = []
    for number in range(150):
        word = draw.choice(["cat", "dog", "hen"])
        turns = [
            message
            for _ in range(draw.randint(1, 3))
            for message in (
                {"role": "user", "content": f"say {word} {number}"},
                {"role": "assistant", "content": f"{word} " * (300 if number == 7 else draw.randint(1, 5))},
            )
        ]
        records.append({"messages": turns})
    source = folder / "a.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    text = folder / "a.txt"
    text.write_text(" say cat dog hen user assistant 1234567890" * 30)
    train_tokenizer([text], 280, folder / "tokenizer")
    build([source], folder / "tokenizer", folder / "shards", 1, held_out=0.2, progress=False, chat=True)
    return folder


def case(name: str, small: list[str], chats: Path, *words: str) -> dict[str, Any]:
    general = [word for word in small if not word.startswith(("stage.seq_len", "stage.tokens"))]
    fixed = ["stage=sft", *general]
    fixed += [
        "model.vocab_size=280",
        "stage.seq_len=128",
        "stage.tokens_per_step=1024",
        "stage.eval_tokens=1024",
    ]
    fixed += [
        "stage.sample_prompts=[say cat 1, say dog 2]",
        "stage.sample_tokens=4",
        f"data.path={chats / 'shards'}",
    ]
    return {"name": name, "overrides": [*fixed, *words], "steps": 4, "run_dir": str(chats)}


def test_one_curve_on_any_ranks_micro_batches_and_engines(
    small: list[str], chats: Path, run_ranks: RunRanks
) -> None:
    cases = [
        case("fsdp", small, chats, "stage.micro_batch=2"),
        case("reference", small, chats, "stage.micro_batch=1", "kernels=reference"),
        case("zero", small, chats, "stage.micro_batch=4", "engine=zero", "engine.zero_stage=2"),
    ]
    alone = run_ranks(WORKER, 1, [case("whole", small, chats, "stage.micro_batch=8")])["whole"]
    for found in run_ranks(WORKER, 2, cases).values():
        for row, expected in zip(found["rows"], alone["rows"], strict=True):
            assert row["digest"] == expected["digest"]
            assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert row["norm"] == pytest.approx(expected["norm"], rel=1e-4)
            assert {key: row[key] for key in row if key.startswith("data/")} == {
                key: expected[key] for key in expected if key.startswith("data/")
            }
        assert found["eval"] == pytest.approx(alone["eval"], rel=1e-5)
        assert [prompt for prompt, _ in found["samples"]] == ["say cat 1", "say dog 2"]
    assert alone["rows"][-1]["loss"] < alone["rows"][0]["loss"]
    assert alone["rows"][-1]["data/utilisation"] > 0.9 and 0 < alone["rows"][-1]["data/epoch"] < 1
    assert set(alone["eval"]) == {"eval/loss", "eval/bits_per_byte"}
    (note,) = alone["notes"]
    assert "full; 1 are longer and left out (stage.too_long=drop)" in note


def test_sources_are_named_and_long_conversations_cut(
    small: list[str], chats: Path, run_ranks: RunRanks
) -> None:
    source = f"{{path: {chats / 'shards'}}}"
    words = ["data.path=null", f"data.mixture={{a: {source}, b: {source}}}", "stage.too_long=truncate"]
    found = run_ranks(WORKER, 1, [case("mixed", small, chats, *words, "stage.micro_batch=8")])["mixed"]
    assert {"data/a/epoch", "data/b/epoch", "data/utilisation"} <= set(found["rows"][0])
    assert "eval/a/loss" in found["eval"]
    assert all("1 are longer and cut to their first 128 tokens" in note for note in found["notes"])
