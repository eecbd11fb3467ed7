"""A step's loss is one number, however its completions are packed, shared out and accumulated."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from drivetrain.conf.schema import GrpoConfig, Importance, KlEstimator, Variant
from drivetrain.data.batch import Batch
from drivetrain.model.generate import Completion
from drivetrain.train.rl.packing import pack
from drivetrain.train.rl.policy import policy_loss, trained_places
from drivetrain.train.rl.rollout import Group
from drivetrain.train.rl.source import weighted

LONGEST = 12  # tokens of a completion


def config(variant: Variant) -> GrpoConfig:
    return GrpoConfig(
        seq_len=32,
        prompts_per_step=1,
        group_size=2,
        max_completion=LONGEST,
        variant=variant,
        kl_coef=0.1,
        kl_estimator=KlEstimator.k3,
        entropy_coef=0.01,
        importance=Importance.sequence,
    )


def groups(lengths_PG: list[list[int]], seed: int) -> list[Group]:
    rng = np.random.default_rng(seed)
    return [
        Group(
            number,
            rng.integers(1, 50, int(rng.integers(1, 9))).tolist(),
            [
                Completion(rng.integers(1, 50, length).tolist(), [], (-rng.random(length)).tolist(), "stop")
                for length in lengths
            ],
        )
        for number, lengths in enumerate(lengths_PG)
    ]


def as_if(tokens: Tensor, phase: float) -> Tensor:
    """Log-probabilities that a model might give, a function of the token."""
    return -1.5 + (tokens.double() * 1.7 + phase).sin()


def passed(batch: Batch, cfg: GrpoConfig) -> dict[str, float]:
    """The sums of one micro-batch."""
    at_K = trained_places(batch)
    tokens_K, mask_K = batch.targets_T[at_K], batch.loss_weights_T[at_K]
    assert batch.behaviour_logprobs_T is not None

    def filled(values_K: Tensor) -> Tensor:
        out_T = torch.zeros(batch.tokens, dtype=torch.float64)
        out_T[at_K] = values_K * mask_K
        return out_T

    object.__setattr__(batch, "old_logprobs_T", filled(as_if(tokens_K, 0.3)))
    object.__setattr__(batch, "reference_logprobs_T", filled(as_if(tokens_K, 0.6)))
    (_, sums), _ = policy_loss(as_if(tokens_K, 0.0), as_if(tokens_K, 2.0).abs(), batch, at_K, cfg)
    return {name: float(value) for name, value in sums.items()}


def step(
    made: list[Group], advantages_PG: np.ndarray, cfg: GrpoConfig, row_len: int, micro_batch: int, ranks: int
) -> tuple[dict[str, float], int]:
    """What the engine reports of all ranks: sums over the trained tokens; and the digest."""
    totals: dict[str, float] = {}
    weight, digest, passes = 0.0, 0, set()
    for rank in range(ranks):
        packed = pack(made, row_len, micro_batch, rank, ranks, pad_id=0)
        batches = weighted(packed, made, advantages_PG, cfg)
        passes.add((len(batches), *(batch.tokens for batch in batches)))
        for batch in batches:
            weight += float(batch.loss_weights_T.sum())
            digest += batch.digest
            for name, value in passed(batch, cfg).items():
                totals[name] = totals.get(name, 0.0) + value
    assert len(passes) == 1  # every rank has as many micro-batches of one size: passes are collective
    return {name: value / weight for name, value in totals.items()}, digest % (1 << 64)


@pytest.mark.parametrize("variant", Variant)
@settings(max_examples=15)
@given(
    lengths_PG=st.lists(st.lists(st.integers(1, LONGEST), min_size=2, max_size=2), min_size=1, max_size=6),
    seed=st.integers(0, 100),
    row_len=st.integers(20, 60),
    micro_batch=st.integers(1, 4),
    ranks=st.integers(1, 5),
)
def test_the_loss_does_not_change_with_ranks_micro_batches_and_rows(
    variant: Variant, lengths_PG: list[list[int]], seed: int, row_len: int, micro_batch: int, ranks: int
) -> None:
    cfg, made = config(variant), groups(lengths_PG, seed)
    advantages_PG = np.random.default_rng(seed).standard_normal((len(made), 2))
    whole, digest = step(made, advantages_PG, cfg, 1024, 1, 1)
    found, other = step(made, advantages_PG, cfg, row_len, micro_batch, ranks)
    assert other == digest
    assert found == pytest.approx(whole, rel=1e-5, abs=1e-7)


def test_the_loss_is_the_mean_that_the_variant_names() -> None:
    """On-policy a token's loss is -advantage."""
    made = groups([[1, 3], [2, 4]], seed=1)
    advantages_PG = np.array([[1.0, 2.0], [3.0, 4.0]])
    lengths = np.array([1, 3, 2, 4])
    expected = {
        Variant.dapo: -(1 * 1 + 2 * 3 + 3 * 2 + 4 * 4) / 10,
        Variant.grpo: -(1 + 2 + 3 + 4) / 4,
        Variant.dr_grpo: -(1 * 1 + 2 * 3 + 3 * 2 + 4 * 4) / (4 * LONGEST),
        Variant.rloo: -(1 * 1 + 2 * 3 + 3 * 2 + 4 * 4) / 4,
        Variant.gspo: -(1 + 2 + 3 + 4) / 4,
    }
    for variant, value in expected.items():
        cfg = GrpoConfig(
            seq_len=32,
            prompts_per_step=2,
            group_size=2,
            max_completion=LONGEST,
            variant=variant,
            importance=Importance.off,
        )
        total = 0.0
        for rank in range(2):
            for batch in weighted(pack(made, 16, 1, rank, 2, 0), made, advantages_PG, cfg):
                at_K = trained_places(batch)
                logprobs_K = as_if(batch.targets_T[at_K], 0.0)
                (minimise, _), _ = policy_loss(logprobs_K, torch.zeros_like(logprobs_K), batch, at_K, cfg)
                total += float(minimise)
        assert total / lengths.sum() == pytest.approx(value, rel=1e-5)


def test_what_is_known_of_a_token_stands_where_it_is_predicted() -> None:
    made = [
        Group(0, [5, 6], [Completion([7, 8], [], [-0.25, -0.5], "stop"), Completion([9], [], [-1.0], "stop")])
    ]
    (batch,) = pack(made, 8, 1, 0, 1, 0).batches
    assert batch.tokens_T.tolist() == [5, 6, 7, 8, 5, 6, 9, 0]
    assert batch.loss_weights_T.tolist() == [0, 1, 1, 0, 0, 1, 0, 0]
    assert batch.behaviour_logprobs_T is not None
    assert batch.behaviour_logprobs_T.tolist() == [0, -0.25, -0.5, 0, 0, -1.0, 0, 0]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
    assert batch.targets_T[1:3].tolist() == [7, 8] and batch.targets_T[5] == 9
