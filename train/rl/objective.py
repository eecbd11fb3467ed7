"""The objectives of reinforcement learning, token by token. Pure: nothing here knows ranks, models or batches.

K trained tokens of S completions, each completion's tokens in order.

Every objective is a sum over tokens, weight · loss. The loss says which way a token's probability goes, the weight
how much the token counts in the step: a mean over tokens, over completions, or a constant length.

    token      1 / (all tokens of the step)                       DAPO (arXiv 2503.14476), eq. 12
    sequence   1 / (completions · tokens of this completion)      GRPO (arXiv 2402.03300), eq. 3
    constant   1 / (completions · longest allowed)                Dr. GRPO (arXiv 2503.20783), section 3.2
    sum        1 / completions                                    RLOO (arXiv 2402.14740): a completion is
                                                                  one action, as in REINFORCE (Williams 1992)
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from drivetrain.conf.schema import Importance, KlEstimator, Variant

LOG_LIMIT = 20.0  # log ratios are cut to this before exp: e^20 is beyond any clip, and e^89 is beyond fp32


class Surrogate(NamedTuple):
    """Per token [K]: what to minimise, the ratio to the old policy, and where clipping left no gradient."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


def surrogate(
    variant: Variant,
    logprobs_K: Tensor,
    old_K: Tensor,
    advantages_K: Tensor,
    sequence_K: Tensor,
    clip_low: float,
    clip_high: float,
) -> Surrogate:
    """The loss of each token.

    Args:
        logprobs_K: under the model that is trained. old_K: under the one that the rollout began with; no gradient.
        sequence_K: int64, which completion a token belongs to; numbers from 0, none larger than K.
    """
    difference_K = logprobs_K - old_K
    if variant is Variant.gspo:
        difference_K = sequence_log_ratio(difference_K, sequence_K)
    ratio_K = difference_K.clamp(-LOG_LIMIT, LOG_LIMIT).exp()
    bounded_K = ratio_K.clamp(1 - clip_low, 1 + clip_high)
    if variant is Variant.cispo:
        # MiniMax-M1 (arXiv 2506.13585), eq. 4, 5: the clipped ratio is a weight, and every token keeps a gradient.
        loss_K = -bounded_K.detach() * advantages_K * logprobs_K
        return Surrogate(loss_K, ratio_K.detach(), (ratio_K != bounded_K).detach())
    # PPO's pessimistic bound: GRPO (arXiv 2402.03300), eq. 3; with two bounds DAPO (arXiv 2503.14476), eq. 10.
    plain_K, clipped_K = ratio_K * advantages_K, bounded_K * advantages_K
    return Surrogate(-torch.minimum(plain_K, clipped_K), ratio_K.detach(), (clipped_K < plain_K).detach())


def sequence_log_ratio(difference_K: Tensor, sequence_K: Tensor) -> Tensor:
    """The mean over each completion, at each of its tokens: GSPO (arXiv 2507.18071), eq. 7."""
    totals_S = _sums(difference_K, sequence_K)
    return (totals_S / _sums(torch.ones_like(difference_K), sequence_K).clamp(min=1))[sequence_K]


def _sums(values_K: Tensor, sequence_K: Tensor) -> Tensor:
    return values_K.new_zeros(len(values_K) + 1).index_add(0, sequence_K, values_K)


def divergence(estimator: KlEstimator, logprobs_K: Tensor, reference_K: Tensor) -> Tensor:
    """An estimate of KL(policy || reference) at each token that the policy drew (Schulman 2020, "Approximating KL
    divergence"); k3 is GRPO's (arXiv 2402.03300), eq. 4. As a loss k1 has a gradient that is 0 on average."""
    log_ratio_K = (reference_K - logprobs_K).clamp(-LOG_LIMIT, LOG_LIMIT)
    match estimator:
        case KlEstimator.k1:
            return -log_ratio_K
        case KlEstimator.k2:
            return 0.5 * log_ratio_K.square()
        case KlEstimator.k3:
            return log_ratio_K.exp() - 1 - log_ratio_K


def importance_weights(
    kind: Importance, old_K: Tensor, behaviour_K: Tensor, sequence_K: Tensor, cap: float
) -> Tensor:
    """min(old / behaviour, cap) of each token, or of each completion's product at each of its tokens; no gradient.

    Truncated importance sampling (Ionides, "Truncated importance sampling", J. Comput. Graph. Stat. 17, 2008)
    between what the trainer computes and what the sampler drew from, as in Yao et al. 2025, "Your efficient RL
    framework secretly brings you off-policy RL training".

    Args:
        old_K, behaviour_K: both at the sampler's temperature before its filters, or both over what these kept.
    """
    difference_K = (old_K - behaviour_K).detach()
    match kind:
        case Importance.off:
            return torch.ones_like(difference_K)
        case Importance.token:
            pass
        case Importance.sequence:
            difference_K = _sums(difference_K, sequence_K)[sequence_K]
    return difference_K.clamp(-LOG_LIMIT, LOG_LIMIT).exp().clamp(max=cap)


def sequence_weights(variant: Variant, lengths_S: np.ndarray, max_completion: int) -> np.ndarray:
    """The weight of each token of each completion, fp64 [S], from all completions of a step; see above.

    Args:
        lengths_S: tokens of each; 0 where a completion was dropped: it has no weight and counts neither as a
            completion nor as a token. One that could not be scored counts as both; its advantage is 0.
    """
    kept_S = lengths_S > 0
    completions = max(int(kept_S.sum()), 1)
    match variant:
        case Variant.dapo | Variant.cispo:
            return kept_S / max(int(lengths_S.sum()), 1)
        case Variant.grpo | Variant.gspo | Variant.reinforce_pp:
            return kept_S / (completions * np.maximum(lengths_S, 1))
        case Variant.dr_grpo:
            return kept_S / (completions * max_completion)
        case Variant.rloo:
            return kept_S / completions
