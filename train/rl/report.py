"""What a step of reinforcement learning says of itself. P prompts · G completions · K trained tokens."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from drivetrain.train.mesh import World
from drivetrain.train.rl.rollout import Group


@dataclass(slots=True)
class Gap:
    """How far the trainer's log-probabilities are from the sampler's, over one step, and what alarms look at."""

    sums: list[float] = field(default_factory=lambda: [0.0] * 4)
    largest: float = 0.0

    def add(self, gap_K: Tensor, entropy_K: Tensor, mask_K: Tensor) -> None:
        """A micro-batch: trainer less sampler, 0 where `mask_K` is."""
        ratio_K = gap_K.clamp(-20, 20).exp() * mask_K
        parts = [ratio_K, ratio_K.square(), mask_K, entropy_K * mask_K]
        found = torch.stack([part.double().sum() for part in parts]).tolist()
        self.sums = [before + now for before, now in zip(self.sums, found, strict=True)]
        self.largest = max(self.largest, float(gap_K.abs().max()))

    def take(self, world: World) -> dict[str, float]:
        """The step's numbers over all ranks, and a new beginning. Collective.

        `rl/effective_samples` is Kish's share, (sum of w)^2 / (tokens · sum of w^2), with w = trainer / sampler.
        """
        ratios, squares, tokens, entropy = world.sum(self.sums)
        largest = torch.tensor([self.largest], dtype=torch.float64, device=world.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        self.sums, self.largest = [0.0] * 4, 0.0
        tokens = max(tokens, 1.0)
        return {
            "rl/gap_max": float(largest),
            "rl/effective_samples": ratios**2 / (tokens * squares) if squares else 0.0,
            "rl/entropy": entropy / tokens,
        }


def unscored(groups: list[Group]) -> dict[str, int]:
    """Completions that a part of the reward could not score, by part; those that were dropped have no parts."""
    names = dict.fromkeys(name for group in groups for name in group.parts)
    return {
        name: sum(
            math.isnan(mark)
            for group in groups
            for mark, one in zip(group.parts.get(name, []), group.completions, strict=False)
            if one.finish_reason != "failed"
        )
        for name in names
    }


def rollout_metrics(groups: list[Group]) -> dict[str, float]:
    """Rewards, lengths, and how many prompts are worth comparing on, of the groups of one step."""
    rewards_PG = np.array([group.rewards for group in groups])
    correct_PG = np.array([group.correct for group in groups])
    every = [one for group in groups for one in group.completions]
    lengths = np.array([one.length for one in every])
    missing = unscored(groups)
    # A rubric may be one prompt's own, so that not all groups have a part.
    parts = {
        name: np.array([mark for group in groups for mark in group.parts.get(name, [])], dtype=np.float64)
        for name in missing
    }
    scored = {name: values for name, values in parts.items() if not np.isnan(values).all()}
    found = {
        "rl/reward_mean": rewards_PG.mean(),
        "rl/reward_std": rewards_PG.std(),
        **{f"rl/reward/{name}": np.nanmean(values) for name, values in scored.items()},
        **{f"rl/reward/{name}_std": np.nanstd(values) for name, values in scored.items()},
        "rl/unscored": sum(missing.values()),
        **{f"rl/unscored/{name}": many for name, many in missing.items() if many},
        "rl/correct": correct_PG.mean(),
        "rl/groups_solved": correct_PG.all(axis=1).mean(),
        "rl/groups_unsolved": (~correct_PG).all(axis=1).mean(),
        "rl/groups_equal": (rewards_PG.max(axis=1) == rewards_PG.min(axis=1)).mean(),
        "rl/completion_tokens_mean": lengths.mean(),
        "rl/completion_tokens_max": lengths.max(),
        "rl/truncated": np.mean([one.finish_reason == "length" for one in every]),
        "rl/failed": sum(one.finish_reason == "failed" for one in every),
        "rl/turns_mean": np.mean([one.turns for one in every]),
        "rl/observation_tokens_mean": np.mean([len(one.tokens) - one.length for one in every]),
        "rl/tokens": lengths.sum(),
    }
    found["rl/groups_mixed"] = 1 - found["rl/groups_solved"] - found["rl/groups_unsolved"]
    return {name: float(value) for name, value in found.items()}
