"""Every variant against numbers worked by hand."""

import math

import numpy as np
import pytest
import torch

from drivetrain.conf.schema import Importance, KlEstimator, Variant
from drivetrain.train.rl.objective import (
    divergence,
    importance_weights,
    sequence_log_ratio,
    sequence_weights,
    surrogate,
)

LOG = math.log
# Two completions, of three tokens and of one. Ratios 0.5, 1.5, 1, 1.5; advantages +1 and -2.
SEQUENCE_K = torch.tensor([0, 0, 0, 1])
OLD_K = torch.tensor([-1.0, -2.0, -0.5, -3.0])
RATIO_K = torch.tensor([0.5, 1.5, 1.0, 1.5])
ADVANTAGE_K = torch.tensor([1.0, 1.0, 1.0, -2.0])


def run(variant: Variant, low: float = 0.2, high: float = 0.3) -> tuple[list[float], list[bool], list[float]]:
    """Loss, clipped, gradient with respect to the log-probabilities."""
    logprobs_K = (OLD_K + RATIO_K.log()).requires_grad_()
    found = surrogate(variant, logprobs_K, OLD_K, ADVANTAGE_K, SEQUENCE_K, low, high)
    found.loss.sum().backward()
    assert logprobs_K.grad is not None
    return found.loss.tolist(), found.clipped.tolist(), logprobs_K.grad.tolist()


@pytest.mark.parametrize(
    "variant", [Variant.grpo, Variant.dr_grpo, Variant.dapo, Variant.rloo, Variant.reinforce_pp]
)
def test_the_clipped_objective(variant: Variant) -> None:
    """-min(r A, clip(r, 0.8, 1.3) A). A > 0: below the range the bound is the ratio itself, above it 1.3 without a
    gradient. A < 0: 1.5 is worse than 1.3, and keeps its gradient, -r A."""
    loss, clipped, gradient = run(variant)
    assert loss == pytest.approx([-0.5, -1.3, -1.0, 3.0])
    assert clipped == [False, True, False, False]
    assert gradient == pytest.approx([-0.5, 0.0, -1.0, 3.0])


def test_clipping_from_below() -> None:
    """A < 0 and a ratio of 0.5: clip gives 0.8, so the loss is 1.6 where the ratio's is 1.0; no gradient."""
    logprobs_K = torch.tensor([LOG(0.5)], requires_grad=True)
    zero_K = torch.zeros(1, dtype=torch.int64)
    found = surrogate(Variant.grpo, logprobs_K, torch.zeros(1), torch.tensor([-2.0]), zero_K, 0.2, 0.2)
    found.loss.sum().backward()
    assert found.loss.item() == pytest.approx(1.6) and found.clipped.item() and logprobs_K.grad == 0.0


def test_cispo_weighs_with_the_clipped_ratio() -> None:
    """-sg(clip(r, 0.8, 1.3)) A log p: every token has the gradient -clip(r) A."""
    loss, clipped, gradient = run(Variant.cispo)
    logprobs = (OLD_K + RATIO_K.log()).tolist()
    expected = [-0.8 * logprobs[0], -1.3 * logprobs[1], -1.0 * logprobs[2], 2.6 * logprobs[3]]
    assert loss == pytest.approx(expected)
    assert clipped == [True, True, False, True]
    assert gradient == pytest.approx([-0.8, -1.3, -1.0, 2.6])


def test_gspo_takes_the_ratio_of_whole_completions() -> None:
    """(0.5 · 1.5 · 1)^(1/3) = 0.75^(1/3) = 0.9086 for the first, 1.5 for the second. The gradient of s with respect
    to each of n log-probabilities is s / n, and n tokens have it: A s in all, for each one A s / n · n."""
    s = 0.75 ** (1 / 3)
    loss, clipped, gradient = run(Variant.gspo)
    assert loss == pytest.approx([-s, -s, -s, 3.0])
    assert clipped == [False, False, False, False]
    assert gradient == pytest.approx([-s, -s, -s, 3.0])
    narrow_loss, narrow_clipped, narrow_gradient = run(Variant.gspo, low=0.05, high=0.05)
    assert narrow_loss[:3] == pytest.approx([-s] * 3) and not any(narrow_clipped[:3])
    assert narrow_gradient[:3] == pytest.approx([-s] * 3)  # A > 0 below the range: the pessimistic bound is s
    assert sequence_log_ratio(RATIO_K.log(), SEQUENCE_K).tolist() == pytest.approx(
        [LOG(0.75) / 3] * 3 + [LOG(1.5)]
    )


def test_on_policy_every_variant_has_reinforces_gradient() -> None:
    for variant in Variant:
        logprobs_K = OLD_K.clone().requires_grad_()
        found = surrogate(variant, logprobs_K, OLD_K, ADVANTAGE_K, SEQUENCE_K, 0.2, 0.2)
        found.loss.sum().backward()
        assert logprobs_K.grad is not None and not found.clipped.any()
        assert logprobs_K.grad.tolist() == pytest.approx((-ADVANTAGE_K).tolist())
        assert found.ratio.tolist() == pytest.approx([1.0] * 4)


def test_divergence_estimates() -> None:
    """log p - log q = log 2: k1 = log 2, k2 = (log 2)^2 / 2, k3 = 1/2 - 1 + log 2."""
    p, q = torch.tensor([LOG(0.5), LOG(0.2)]), torch.tensor([LOG(0.25), LOG(0.2)])
    assert divergence(KlEstimator.k1, p, q).tolist() == pytest.approx([LOG(2), 0])
    assert divergence(KlEstimator.k2, p, q).tolist() == pytest.approx([LOG(2) ** 2 / 2, 0])
    assert divergence(KlEstimator.k3, p, q).tolist() == pytest.approx([LOG(2) - 0.5, 0])


def test_estimates_have_the_divergence_as_their_mean() -> None:
    """k1 and k3 exactly, over all tokens of a small vocabulary; k2's gradient is that of the divergence."""
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.2, 0.1, -0.5, 1.0], dtype=torch.float64).log_softmax(0)
    p = logits.log_softmax(0)
    exact = (p.exp() * (p - q)).sum()
    for estimator in (KlEstimator.k1, KlEstimator.k3):
        found = (p.exp() * divergence(estimator, p, q)).sum().item()
        assert found == pytest.approx(exact.item())
    (wanted,) = torch.autograd.grad(exact, logits, retain_graph=True)
    (gradient,) = torch.autograd.grad((p.detach().exp() * divergence(KlEstimator.k2, p, q)).sum(), logits)
    assert gradient.tolist() == pytest.approx(wanted.tolist())


def test_importance_is_truncated_by_token_and_by_completion() -> None:
    """Ratios 0.5, 3, 1 and 4, capped at 2; the products are 1.5 and 4."""
    old_K = torch.tensor([0.5, 3.0, 1.0, 4.0]).log()
    zero_K = torch.zeros(4)
    assert importance_weights(Importance.token, old_K, zero_K, SEQUENCE_K, 2.0).tolist() == pytest.approx(
        [0.5, 2.0, 1.0, 2.0]
    )
    assert importance_weights(Importance.sequence, old_K, zero_K, SEQUENCE_K, 2.0).tolist() == pytest.approx(
        [1.5, 1.5, 1.5, 2.0]
    )
    assert importance_weights(Importance.off, old_K, zero_K, SEQUENCE_K, 2.0).tolist() == [1.0] * 4


def test_weights_of_tokens() -> None:
    """Completions of 1 and 3 tokens, at most 10 allowed."""
    lengths = np.array([1, 3])

    def weights(variant: Variant) -> list[float]:
        return sequence_weights(variant, lengths, 10).tolist()

    for token in (Variant.dapo, Variant.cispo):
        assert weights(token) == pytest.approx([1 / 4, 1 / 4])
    for sequence in (Variant.grpo, Variant.gspo, Variant.reinforce_pp):
        assert weights(sequence) == pytest.approx([1 / 2, 1 / 6])
    assert weights(Variant.dr_grpo) == pytest.approx([1 / 20, 1 / 20])
    assert weights(Variant.rloo) == pytest.approx([1 / 2, 1 / 2])


@pytest.mark.parametrize("variant", Variant)
def test_a_dropped_completion_counts_nowhere(variant: Variant) -> None:
    found = sequence_weights(variant, np.array([1, 0, 3, 0]), 10)
    assert found[[1, 3]].tolist() == [0, 0]
    assert found[[0, 2]].tolist() == sequence_weights(variant, np.array([1, 3]), 10).tolist()
    assert sequence_weights(variant, np.array([0, 0]), 10).tolist() == [0, 0]
