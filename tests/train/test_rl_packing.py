"""A step's loss is one number, however its completions are packed, shared out and accumulated."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from drivetrain.conf.schema import GrpoConfig, Importance, KlEstimator, ModelConfig, Variant
from drivetrain.data.batch import Batch
from drivetrain.model.initialize import initialize
from drivetrain.model.transformer import build_model
from drivetrain.train.rl.episodes import Trajectory
from drivetrain.train.rl.packing import pack
from drivetrain.train.rl.policy import logprobs_of, policy_loss, trained_places
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


def trajectory(rng: np.random.Generator, length: int) -> Trajectory:
    """`length` tokens of the model's; where they are even, with 3 of the environment's after the first half."""
    written = [True] * length
    if length % 2 == 0:
        written[length // 2 : length // 2] = [False] * 3
    return Trajectory(
        rng.integers(1, 50, len(written)).tolist(), written, [], (-rng.random(length)).tolist(), "stop"
    )


def groups(lengths_PG: list[list[int]], seed: int) -> list[Group]:
    rng = np.random.default_rng(seed)
    return [
        Group(
            number,
            rng.integers(1, 50, int(rng.integers(1, 9))).tolist(),
            [trajectory(rng, length) for length in lengths],
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
    lengths_PG=st.lists(
        st.lists(st.integers(0, LONGEST), min_size=2, max_size=2), min_size=1, max_size=6
    ).filter(lambda lengths: any(map(any, lengths))),  # 0: dropped
    seed=st.integers(0, 100),
    row_len=st.integers(24, 60),
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
    """On-policy a token's loss is -advantage, and for cispo that times the token's log-probability."""
    made = groups([[1, 3], [2, 4]], seed=1)
    advantages_PG = np.array([[1.0, 2.0], [3.0, 4.0]])
    lengths = np.array([1, 3, 2, 4])
    logprob_mean = 0.0
    for advantage, one in zip(
        advantages_PG.ravel(), (one for group in made for one in group.completions), strict=True
    ):
        tokens = torch.tensor([token for token, mine in zip(one.tokens, one.written, strict=True) if mine])
        logprob_mean -= float(advantage * as_if(tokens, 0.0).sum()) / 10
    expected = {
        Variant.dapo: -(1 * 1 + 2 * 3 + 3 * 2 + 4 * 4) / 10,
        Variant.grpo: -(1 + 2 + 3 + 4) / 4,
        Variant.dr_grpo: -(1 * 1 + 2 * 3 + 3 * 2 + 4 * 4) / (4 * LONGEST),
        Variant.rloo: -(1 * 1 + 2 * 3 + 3 * 2 + 4 * 4) / 4,
        Variant.gspo: -(1 + 2 + 3 + 4) / 4,
        Variant.reinforce_pp: -(1 + 2 + 3 + 4) / 4,
        Variant.cispo: logprob_mean,
    }
    assert set(expected) == set(Variant)
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
            for batch in weighted(pack(made, 24, 1, rank, 2, 0), made, advantages_PG, cfg):
                at_K = trained_places(batch)
                logprobs_K = as_if(batch.targets_T[at_K], 0.0)
                (minimise, _), _ = policy_loss(logprobs_K, torch.zeros_like(logprobs_K), batch, at_K, cfg)
                total += float(minimise)
        assert total / lengths.sum() == pytest.approx(value, rel=1e-5)


def test_what_is_known_of_a_token_stands_where_it_is_predicted() -> None:
    made = [
        Group(
            0,
            [5, 6],
            [Trajectory([7, 8], [True] * 2, [], [-0.25, -0.5]), Trajectory([9], [True], [], [-1.0])],
        )
    ]
    (batch,) = pack(made, 8, 1, 0, 1, 0, share=False).batches
    assert batch.tokens_T.tolist() == [5, 6, 7, 8, 5, 6, 9, 0]
    assert batch.loss_weights_T.tolist() == [0, 1, 1, 0, 0, 1, 0, 0]
    assert batch.behaviour_logprobs_T is not None and batch.branches_2T is None
    assert batch.behaviour_logprobs_T.tolist() == [0, -0.25, -0.5, 0, 0, -1.0, 0, 0]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
    assert batch.targets_T[1:3].tolist() == [7, 8] and batch.targets_T[5] == 9

    (batch,) = pack(made, 8, 1, 0, 1, 0).batches
    assert batch.tokens_T.tolist() == [5, 6, 7, 8, 6, 9, 0, 0]
    assert batch.loss_weights_T.tolist() == [0, 1, 1, 0, 1, 0, 0, 0]
    assert batch.behaviour_logprobs_T is not None and batch.branches_2T is not None
    assert batch.behaviour_logprobs_T.tolist() == [0, -0.25, -0.5, 0, -1.0, 0, 0, 0]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 1, 2, 0, 1]
    assert batch.branches_2T.tolist() == [[0, 1, 1, 1, 4, 4, 6, 6], [0, 1, 1, 1, 1, 1, 6, 6]]
    assert batch.cu_seqlens.tolist() == [0, 6, 8]


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_a_prompt_in_common_changes_no_log_probability(backend: str) -> None:
    cfg = ModelConfig(
        name="x", dim=16, layers=2, heads=2, kv_heads=1, head_dim=8, ffn_dim=32, vocab_size=64, max_seq_len=64
    )
    model = build_model(cfg, backend)
    model.to_empty(device="cpu")
    initialize(model, cfg, 0)
    made = groups([[3, 8, 5], [12, 2, 7], [4, 4, 4]], seed=3)
    found = []
    for share in (False, True):
        packed = pack(made, 48, 2, 0, 1, pad_id=0, share=share)
        logprobs: dict[int, Tensor] = {}
        for batch, spans in zip(packed.batches, packed.spans, strict=True):
            at_K = trained_places(batch)
            out_T = torch.zeros(batch.tokens)
            with torch.no_grad():
                out_T[at_K] = logprobs_of(model, batch, at_K, cfg, backend, 1.0)[0]
            logprobs |= {span.sequence: out_T[span.places] for span in spans}
        found.append(torch.cat([logprobs[number] for number in range(9)]))
        assert share == any(batch.branches_2T is not None for batch in packed.batches)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_tokens_of_unknown_log_probability_are_corrected_by_nothing() -> None:
    """Those of a frozen model, which another learns from: their ratio to the weights before the step is 1."""
    nan = float("nan")
    made = [
        Group(0, [5], [Trajectory([7, 8], [True] * 2, [], [nan, nan]), Trajectory([9], [True], [], [-9.0])])
    ]
    cfg = config(Variant.dapo)
    (batch,) = weighted(pack(made, 24, 1, 0, 1, 0), made, np.ones((1, 2)), cfg)
    at_K = trained_places(batch)
    logprobs_K = torch.full(at_K.shape, -1.0)
    object.__setattr__(batch, "reference_logprobs_T", None)
    (minimise, sums), gap_K = policy_loss(logprobs_K, torch.zeros_like(logprobs_K), batch, at_K, cfg)
    assert sorted(gap_K.tolist()) == [0, 0, 8]  # -1 against -9
    assert float(sums["rl/importance"]) == 1 + 1 + cfg.importance_cap and minimise.isfinite()
