"""Reinforcement learning: the same rollouts and curve on any ranks and engines, and after a resume."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drivetrain.data.tokenizer import train_tokenizer

RunRanks = Callable[..., dict[str, Any]]
WORKER = Path(__file__).with_name("grpo_worker.py")
STEPS = 5


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grpo")
    text = folder / "a.txt"
    text.write_text(" State the final answer to the following arithmetic problem: 1234567890 + - = user" * 30)
    train_tokenizer([text], 280, folder / "tokenizer")
    return folder


def case(name: str, small: list[str], run_dir: Path, *words: str, **more: Any) -> dict[str, Any]:
    general = [word for word in small if not word.startswith(("stage.seq_len", "stage.tokens"))]
    fixed = ["stage=grpo", *general, "model.vocab_size=280", "model.max_seq_len=256"]
    fixed += ["stage.seq_len=192", "stage.prompts_per_step=4", "stage.group_size=4", "stage.max_completion=8"]
    fixed += ["stage.micro_batch=2", "stage.eval_problems=6", "stage.eval_samples=2", "stage.steps=100"]
    fixed += ["stage.rewards.custom.weight=1", "stage.rewards.custom.target=grpo_worker:reward"]
    return {"name": name, "overrides": [*fixed, *words], "steps": STEPS, "run_dir": str(run_dir), **more}


ZERO = ("engine=zero", "engine.zero_stage=2")


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for row, other in zip(found["rows"], expected["rows"], strict=True):
        assert row["rollout"] == other["rollout"] and row["digest"] == other["digest"]
        assert row["norm"] == pytest.approx(other["norm"], rel=1e-3)
        rest = {k: v for k, v in row.items() if isinstance(v, float) and k not in ("norm", "rl/gap_max")}
        assert rest == pytest.approx({k: other[k] for k in rest}, rel=1e-5, abs=1e-5)
    assert found["eval"] == expected["eval"]


def test_one_curve_on_any_ranks_micro_batches_and_engines(
    small: list[str], run_dir: Path, run_ranks: RunRanks
) -> None:
    alone = run_ranks(
        WORKER,
        1,
        [
            case("fsdp", small, run_dir, "stage.micro_batch=64"),
            case("zero", small, run_dir, *ZERO),
            case("kl", small, run_dir, "stage.kl_coef=0.1", "stage.updates=2", "stage.variant=dapo"),
        ],
    )
    first = alone["fsdp"]["rows"]
    assert 0 < first[0]["rl/reward_mean"] < 1 and first[0]["rl/gap_max"] < 1e-4
    assert first[0]["rl/ratio"] == 1 and first[0]["rl/effective_samples"] == pytest.approx(1)
    assert len({row["rollout"] for row in first}) == STEPS
    assert set(alone["fsdp"]["eval"]) >= {"eval/accuracy", "eval/error", "eval/pass@1", "eval/pass@2"}
    assert [row["rl/staleness"] for row in alone["kl"]["rows"]] == [0, 1, 0, 1, 0]
    kl = [row["rl/kl"] for row in alone["kl"]["rows"]]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[4] > 1e-6
    assert alone["kl"]["rows"][1]["rl/ratio"] != 1
    same(alone["zero"], alone["fsdp"])
    pair = run_ranks(
        WORKER,
        2,
        [
            case("fsdp", small, run_dir),
            case("zero", small, run_dir, *ZERO),
            case("kl", small, run_dir, "stage.kl_coef=0.1", "stage.updates=2", "stage.variant=dapo"),
        ],
    )
    for name in ("fsdp", "zero", "kl"):
        same(pair[name], alone[name])


def test_a_resumed_run_is_the_same_to_the_last_bit(
    small: list[str], run_dir: Path, run_ranks: RunRanks, tmp_path: Path
) -> None:
    words = [
        "stage.dynamic_sampling=true",
        "stage.environment_weight=0",  # nothing is right yet, and vowels are what is compared
        "stage.kl_coef=0.1",
        "stage.kl_in=reward",
        "stage.kl_estimator=k1",
    ]
    whole = case("whole", small, run_dir, *words, steps=4, save=str(tmp_path / "saved"), save_after=2)
    first = run_ranks(WORKER, 1, [whole])["whole"]
    folder = tmp_path / "saved" / "step_00000002"
    second = run_ranks(WORKER, 1, [case("rest", small, run_dir, *words, steps=2, load=str(folder))])["rest"]
    assert second["rows"] == first["rows"][2:]
    assert second["eval"] == first["eval"] and second["samples"] == first["samples"]


def test_a_stop_within_a_rollout_loses_no_prompt(
    small: list[str], run_dir: Path, run_ranks: RunRanks, tmp_path: Path
) -> None:
    """Two steps share four prompts, and the run stops after the first."""
    words = ["stage.prompts_per_step=2", "stage.updates=2", "stage.eval_problems=2"]
    kept = {"save": str(tmp_path / "saved"), "save_after": 1}
    whole = run_ranks(WORKER, 1, [case("whole", small, run_dir, *words, steps=4, **kept)])["whole"]
    assert [row["prompts"] for row in whole["rows"]] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    again = case("rest", small, run_dir, *words, steps=3, load=str(tmp_path / "saved" / "step_00000001"))
    rest = run_ranks(WORKER, 1, [again])["rest"]
    assert [row["prompts"] for row in rest["rows"]] == [[2, 3], [4, 5], [6, 7]]


FILTERS = {
    "top_p": ("stage.top_p=0.8",),
    "top_k": ("stage.top_k=20", "stage.temperature=1.5"),
    "padded": ("model.vocab_size=320",),
    "all": ("model.vocab_size=320", "stage.top_p=0.8", "stage.top_k=20", "stage.rollout.copy=true"),
}


def test_at_equal_weights_trainer_and_sampler_agree_whatever_is_left_out(
    small: list[str], run_dir: Path, run_ranks: RunRanks
) -> None:
    words = ("stage.importance=sequence", "stage.updates=2", "stage.save_every=2")
    cases = [case(name, small, run_dir, *more, *words, steps=1) for name, more in FILTERS.items()]
    for name, found in run_ranks(WORKER, 1, cases).items():
        (row,) = found["rows"]
        assert row["rl/gap_max"] < 1e-4, name
        assert row["rl/importance"] == pytest.approx(1, abs=1e-3), name
        assert row["rl/ratio"] == pytest.approx(1, abs=1e-5) and row["norm"] > 1e-3, name


def test_what_is_rewarded_gets_likelier(small: list[str], run_dir: Path, run_ranks: RunRanks) -> None:
    words = ["optim.lr=1e-2", "stage.prompts_per_step=8", "stage.group_size=8", "optim.schedule=constant"]
    rows = run_ranks(WORKER, 1, [case("long", small, run_dir, *words, steps=25)])["long"]["rows"]
    assert rows[-1]["rl/reward_mean"] > rows[0]["rl/reward_mean"] + 0.2
