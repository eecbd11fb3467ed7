"""DPO, IPO and SimPO: values by hand, one curve on any ranks and engines, and a planted preference."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drivetrain.conf.schema import DpoConfig, PreferenceLoss
from drivetrain.train.preference import (
    bradley_terry_loss,
    dpo_loss,
    ipo_loss,
    pair_sums,
    preference_loss,
    simpo_loss,
)

RunRanks = Callable[..., dict[str, Any]]
WORKER = Path(__file__).with_name("preference_worker.py")
# log-probabilities of two pairs under the model and the reference, and tokens of each answer
POLICY = torch.tensor([[-10.0, -12.0], [-6.0, -3.0]])
REFERENCE = torch.tensor([[-11.0, -10.0], [-6.0, -3.0]])
COUNTS = torch.tensor([[2, 4], [3, 1]])


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_dpo_by_hand() -> None:
    loss_P, rewards_P2 = dpo_loss(POLICY, REFERENCE, beta=0.5)
    assert rewards_P2.tolist() == [[0.5, -1.0], [0.0, 0.0]]
    assert loss_P.tolist() == pytest.approx([-log_sigmoid(1.5), math.log(2)])
    smooth_P, _ = dpo_loss(POLICY, REFERENCE, beta=0.5, label_smoothing=0.1)
    assert smooth_P.tolist() == pytest.approx(
        [-0.9 * log_sigmoid(1.5) - 0.1 * log_sigmoid(-1.5), math.log(2)]
    )


def test_ipo_by_hand() -> None:
    loss_P, rewards_P2 = ipo_loss(POLICY, REFERENCE, COUNTS, beta=0.25)
    # (-10 + 11) / 2 = 0.5 and (-12 + 10) / 4 = -0.5: a lead of 1 where 1 / (2 · 0.25) = 2 is wanted
    assert loss_P.tolist() == pytest.approx([(1 - 2) ** 2, (0 - 2) ** 2])
    assert rewards_P2.tolist() == [[0.125, -0.125], [0.0, 0.0]]


def test_simpo_by_hand() -> None:
    loss_P, rewards_P2 = simpo_loss(POLICY, COUNTS, beta=2.0, margin=0.5)
    assert rewards_P2.tolist() == [[-10.0, -6.0], [-4.0, -6.0]]
    assert loss_P.tolist() == pytest.approx([-log_sigmoid(-4.5), -log_sigmoid(1.5)])


def test_bradley_terry_and_what_is_reported() -> None:
    rewards_P2 = torch.tensor([[1.0, 0.0], [2.0, 2.0], [-1.0, 1.0]])
    loss_P = bradley_terry_loss(rewards_P2)
    assert loss_P.tolist() == pytest.approx([-log_sigmoid(1), math.log(2), -log_sigmoid(-2)])
    sums = pair_sums(loss_P, rewards_P2, torch.tensor([1.0, 1.0, 0.0]))
    assert {name: float(value) for name, value in sums.items()} == pytest.approx(
        {
            "loss": -log_sigmoid(1) + math.log(2),
            "rewards/chosen": 3.0,
            "rewards/rejected": 2.0,
            "rewards/margin": 1.0,
            "rewards/accuracy": 1.0,
        }
    )


@given(st.data())
def test_the_gradient_raises_the_chosen_answer(data: st.DataObject) -> None:
    number = st.floats(-50, 0)
    policy, reference = ([[data.draw(number), data.draw(number)]] for _ in range(2))
    counts_P2 = torch.tensor([[data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))]])
    loss = data.draw(st.sampled_from([PreferenceLoss.dpo, PreferenceLoss.simpo]))
    cfg = DpoConfig(name="dpo", steps=1, seq_len=1, tokens_per_step=1, loss=loss, beta=0.1)
    policy_P2 = torch.tensor(policy, dtype=torch.float64, requires_grad=True)
    loss_P, _ = preference_loss(cfg, policy_P2, torch.tensor(reference, dtype=torch.float64), counts_P2)
    loss_P.sum().backward()
    assert policy_P2.grad is not None
    assert policy_P2.grad[0, 0] < 0 < policy_P2.grad[0, 1]


# --- runs ---------------------------------------------------------------------------------------------------


def case(
    name: str, small: list[str], pairs: Path, folder: Path, *words: str, steps: int = 4
) -> dict[str, Any]:
    general = [word for word in small if not word.startswith(("stage.seq_len", "stage.tokens"))]
    fixed = ["stage=dpo", *general, "model.vocab_size=280", "stage.seq_len=256"]
    fixed += ["stage.tokens_per_step=2048", "stage.eval_tokens=2048", f"data.path={pairs / 'shards'}"]
    return {"name": name, "overrides": [*fixed, *words], "steps": steps, "run_dir": str(folder / name)}


@pytest.fixture(scope="module")
def alone(
    small: list[str], pairs: Path, tmp_path_factory: pytest.TempPathFactory, run_ranks: RunRanks
) -> dict[str, Any]:
    """Runs on one rank, all in one process."""
    folder = tmp_path_factory.mktemp("alone")
    cases = [case("whole", small, pairs, folder, "stage.micro_batch=8")]
    learn = ["stage.micro_batch=8", "optim.lr=1e-2"]
    for loss, beta in (("dpo", 0.2), ("ipo", 0.2), ("simpo", 2.0)):
        words = [*learn, f"stage.loss={loss}", f"stage.beta={beta}"]
        cases.append(case(loss, small, pairs, folder, *words, steps=30))
    words = ["stage.micro_batch=8", "optim.lr=2e-2", "lora.rank=8", "stage.beta=1"]
    cases.append(case("lora", small, pairs, folder, *words, steps=30))
    return run_ranks(WORKER, 1, cases)


def test_one_curve_on_any_ranks_micro_batches_and_engines(
    alone: dict[str, Any], small: list[str], pairs: Path, tmp_path: Path, run_ranks: RunRanks
) -> None:
    cases = [
        case("fsdp", small, pairs, tmp_path, "stage.micro_batch=2"),
        case("reference", small, pairs, tmp_path, "stage.micro_batch=1", "kernels=reference"),
        case("zero", small, pairs, tmp_path, "stage.micro_batch=4", "engine=zero", "engine.zero_stage=2"),
    ]
    whole = alone["whole"]
    for found in run_ranks(WORKER, 2, cases).values():
        for row, expected in zip(found["rows"], whole["rows"], strict=True):
            assert row["digest"] == expected["digest"]
            assert row["norm"] == pytest.approx(expected["norm"], rel=1e-4)
            for key in ("loss", "rewards/chosen", "rewards/margin", "logprobs/rejected"):
                assert row[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-5)
        assert found["eval"] == pytest.approx(whole["eval"], rel=1e-5, abs=1e-5)
        np.testing.assert_allclose(found["reference"], whole["reference"], rtol=1e-5)
    first, last = whole["rows"][0], whole["rows"][-1]
    assert last["loss"] < first["loss"] and last["data/utilisation"] > 0.8 and 0 < last["data/epoch"] < 1
    assert set(whole["eval"]) == {"eval/loss", "eval/accuracy", "eval/margin"}
    (note,) = whole["notes"]
    assert "full; 1 are longer and left out" in note
    assert np.isnan(whole["reference"]).sum() == 2  # the long pair has no place in a row


@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo", "lora"])
def test_a_planted_preference_is_learned(name: str, alone: dict[str, Any]) -> None:
    found = alone[name]
    first = found["rows"][0]
    if name in ("dpo", "lora"):  # the reference is the model itself
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert first["rewards/margin"] == pytest.approx(0, abs=1e-5)
    if name == "ipo":
        assert first["loss"] == pytest.approx((0 - 1 / 0.4) ** 2, rel=1e-5)
    assert found["eval"]["eval/accuracy"] > 0.9 and found["eval"]["eval/margin"] > 0
    assert found["rows"][-1]["rewards/accuracy"] > 0.9
    assert (found["reference"] is None) == (name == "simpo")
    if name == "lora":
        assert all("lora_" in each for each in found["names"])
