"""From rewards to advantages. P prompts · G completions of each · S = P · G completions. numpy, fp64."""

import numpy as np

from drivetrain.conf.schema import Variant

EPSILON = 1e-6  # added to a standard deviation; a group of equal rewards has advantages of 0


def advantages(variant: Variant, rewards_PG: np.ndarray) -> np.ndarray:
    """The advantage of each completion, [P, G]. Standard deviations are those of a sample, over n - 1.

    Raises:
        ValueError: leave-one-out of groups of one.
    """
    match variant:
        case Variant.grpo | Variant.dapo | Variant.gspo | Variant.cispo:
            return group_relative(rewards_PG, divide=True)
        case Variant.dr_grpo:
            return group_relative(rewards_PG, divide=False)
        case Variant.rloo:
            return leave_one_out(rewards_PG)
        case Variant.reinforce_pp:
            return batch_normalised(rewards_PG)


def group_relative(rewards_PG: np.ndarray, divide: bool) -> np.ndarray:
    """(r - mean of its group) / standard deviation of its group: GRPO (arXiv 2402.03300), section 4.1.2.

    Args:
        divide: False leaves the division out, as Dr. GRPO does (arXiv 2503.20783, section 3.2).
    """
    centred_PG = rewards_PG - rewards_PG.mean(axis=1, keepdims=True)
    return centred_PG / (_deviation(rewards_PG, axis=1) + EPSILON) if divide else centred_PG


def leave_one_out(rewards_PG: np.ndarray) -> np.ndarray:
    """r - mean of the other rewards of its group: RLOO (Kool et al. 2019; Ahmadian et al., arXiv 2402.14740)."""
    G = rewards_PG.shape[1]
    if G < 2:
        raise ValueError("leave-one-out needs at least two completions of each prompt")
    return G / (G - 1) * (rewards_PG - rewards_PG.mean(axis=1, keepdims=True))


def batch_normalised(rewards_PG: np.ndarray) -> np.ndarray:
    """(r - mean) / standard deviation over all completions of the step: REINFORCE++ (arXiv 2501.03262)."""
    return (rewards_PG - rewards_PG.mean()) / (_deviation(rewards_PG.reshape(1, -1), axis=1) + EPSILON)


def _deviation(rewards: np.ndarray, axis: int) -> np.ndarray:
    if rewards.shape[axis] < 2:
        return np.zeros_like(rewards[:, :1])
    return np.asarray(rewards.std(axis=axis, ddof=1, keepdims=True))


def mixed(rewards_PG: np.ndarray) -> np.ndarray:
    """Groups that have something to compare, bool [P]: DAPO (arXiv 2503.14476), eq. 11, for any rewards."""
    return rewards_PG.max(axis=1) > rewards_PG.min(axis=1)
