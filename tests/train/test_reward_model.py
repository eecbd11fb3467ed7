"""Reward models: one curve on any ranks and engines, a planted preference, and a head of their own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RunRanks = Callable[..., dict[str, Any]]
WORKER = Path(__file__).with_name("preference_worker.py")


def case(name: str, small: list[str], pairs: Path, *words: str, steps: int = 4) -> dict[str, Any]:
    general = [word for word in small if not word.startswith(("stage.seq_len", "stage.tokens"))]
    fixed = ["stage=reward_model", *general, "model.vocab_size=280", "stage.seq_len=256"]
    fixed += ["stage.tokens_per_step=2048", "stage.eval_tokens=2048", f"data.path={pairs / 'shards'}"]
    return {"name": name, "overrides": [*fixed, *words], "steps": steps, "run_dir": str(pairs)}


@pytest.fixture(scope="module")
def alone(small: list[str], pairs: Path, run_ranks: RunRanks) -> dict[str, Any]:
    """Runs on one rank, all in one process."""
    whole = "stage.micro_batch=8"
    cases = [
        case("untied", small, pairs, whole, "model.tie_embeddings=false"),
        case("tied", small, pairs, whole, "model.tie_embeddings=true"),
        case("learns", small, pairs, whole, "optim.lr=1e-2", steps=30),
        case("lora", small, pairs, whole, "optim.lr=5e-2", "lora.rank=8", steps=30),
    ]
    return run_ranks(WORKER, 1, cases)


def test_one_curve_on_any_ranks_micro_batches_and_engines(
    alone: dict[str, Any], small: list[str], pairs: Path, run_ranks: RunRanks
) -> None:
    engines = {
        "fsdp": ["stage.micro_batch=2"],
        "zero2": ["stage.micro_batch=4", "engine=zero", "engine.zero_stage=2"],
        "zero3": ["stage.micro_batch=1", "engine=zero", "engine.zero_stage=3"],
    }
    ties = {"untied": "model.tie_embeddings=false", "tied": "model.tie_embeddings=true"}
    pairings = [("untied", "fsdp"), ("untied", "zero3"), ("tied", "fsdp"), ("tied", "zero2")]
    cases = [case(f"{tie} {name}", small, pairs, ties[tie], *engines[name]) for tie, name in pairings]
    for name, found in run_ranks(WORKER, 2, cases).items():
        whole = alone[name.partition(" ")[0]]
        for row, expected in zip(found["rows"], whole["rows"], strict=True):
            assert row["digest"] == expected["digest"]
            assert row["norm"] == pytest.approx(expected["norm"], rel=1e-4)
            for key in ("loss", "rewards/chosen", "rewards/margin"):
                assert row[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-5)
        assert found["eval"] == pytest.approx(whole["eval"], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", ["learns", "lora"])
def test_a_planted_preference_is_learned(name: str, alone: dict[str, Any]) -> None:
    found = alone[name]
    assert found["eval"]["eval/accuracy"] > 0.9 and found["eval"]["eval/loss"] < 0.3
    assert found["reference"] is None
    assert "model.head.score" in found["names"] and "model.head.weight" not in found["names"]
