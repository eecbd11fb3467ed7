"""From rewards to advantages. P prompts · G completions of each · S = P · G completions. numpy, fp64.

Means, deviations and counts are those of the scored completions alone; the advantage of the others is 0.
"""

import numpy as np

from drivetrain.conf.schema import Variant

EPSILON = 1e-6  # added to a standard deviation; a group of equal rewards has advantages of 0


def advantages(variant: Variant, rewards_PG: np.ndarray, scored_PG: np.ndarray | None = None) -> np.ndarray:
    """The advantage of each completion, [P, G]. Standard deviations are those of a sample, over n - 1.

    Args:
        scored_PG: bool, False where a completion was dropped or no part of its reward could be scored: whatever
            number stands there is not read. None: all are.

    Raises:
        ValueError: leave-one-out of groups of one.
    """
    if scored_PG is None:
        scored_PG = np.ones(rewards_PG.shape, dtype=bool)
    match variant:
        case Variant.grpo | Variant.dapo | Variant.gspo | Variant.cispo:
            return group_relative(rewards_PG, scored_PG, divide=True)
        case Variant.dr_grpo:
            return group_relative(rewards_PG, scored_PG, divide=False)
        case Variant.rloo:
            return leave_one_out(rewards_PG, scored_PG)
        case Variant.reinforce_pp:
            return batch_normalised(rewards_PG, scored_PG)


def group_relative(rewards_PG: np.ndarray, scored_PG: np.ndarray, divide: bool) -> np.ndarray:
    """(r - mean of its group) / standard deviation of its group: GRPO (arXiv 2402.03300), section 4.1.2, "outcome
    supervision"; the equation has no number there.

    Args:
        divide: False leaves the division out, as Dr. GRPO does (arXiv 2503.20783, section 3.2).
    """
    centred_PG, deviation_P1, _ = _about_the_mean(rewards_PG, scored_PG)
    return centred_PG / (deviation_P1 + EPSILON) if divide else centred_PG


def leave_one_out(rewards_PG: np.ndarray, scored_PG: np.ndarray) -> np.ndarray:
    """r_i - 1 / (n - 1) · sum of r_j, j != i, over the n rewards of its group, or n / (n - 1) · (r_i - mean); 0
    where there is no other: RLOO (Kool, van Hoof and Welling 2019, "Buy 4 REINFORCE samples, get a baseline for
    free!"; Ahmadian et al., arXiv 2402.14740)."""
    if rewards_PG.shape[1] < 2:
        raise ValueError("leave-one-out needs at least two completions of each prompt")
    centred_PG, _, n_P1 = _about_the_mean(rewards_PG, scored_PG)
    return n_P1 / np.maximum(n_P1 - 1, 1) * centred_PG


def batch_normalised(rewards_PG: np.ndarray, scored_PG: np.ndarray) -> np.ndarray:
    """(r - mean) / standard deviation over all completions of the rollout: the global advantage normalisation of
    REINFORCE++ (arXiv 2501.03262), without its variant's baseline of the group."""
    centred_1S, deviation_11, _ = _about_the_mean(rewards_PG.reshape(1, -1), scored_PG.reshape(1, -1))
    return (centred_1S / (deviation_11 + EPSILON)).reshape(rewards_PG.shape)


def _about_the_mean(rewards: np.ndarray, scored: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each row: scored rewards less their mean, 0 for the others; standard deviation and count, [rows, 1]."""
    n = scored.sum(axis=1, keepdims=True)
    mean = np.where(scored, rewards, 0).sum(axis=1, keepdims=True) / np.maximum(n, 1)
    centred = np.where(scored, rewards - mean, 0)
    return centred, np.sqrt(np.square(centred).sum(axis=1, keepdims=True) / np.maximum(n - 1, 1)), n


def mixed(values_PG: np.ndarray, scored_PG: np.ndarray) -> np.ndarray:
    """Groups that have something to compare, bool [P]: whose scored completions differ in `values`. DAPO (arXiv
    2503.14476), eq. 11, where these are marks of right and wrong."""
    least_P = np.where(scored_PG, values_PG, np.inf).min(axis=1)
    return np.where(scored_PG, values_PG, -np.inf).max(axis=1) > least_P
