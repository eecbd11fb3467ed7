"""Batches out of rollouts: taken when they are asked for, and so after the last update.

P prompts, one a group · G completions of each · S completions of a step · T packed tokens of a micro-batch.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from drivetrain.conf.schema import GrpoConfig, KlIn
from drivetrain.data.batch import Batch
from drivetrain.train.mesh import World
from drivetrain.train.metrics import Shown
from drivetrain.train.rl.advantage import advantages
from drivetrain.train.rl.alarms import RlAlarms
from drivetrain.train.rl.ledger import Ledger
from drivetrain.train.rl.objective import divergence, sequence_weights
from drivetrain.train.rl.packing import Packed, spread
from drivetrain.train.rl.rollout import Group, Rollout

SHOWN = 8  # completions in a table
Logprobs = Callable[[Batch], Tensor]  # fp32 [T], 0 where nothing is trained; collective


class Rollouts(Protocol):
    """Where groups come from."""

    ledger: Ledger

    def rollout(self, prompts: int, least: int) -> Rollout:
        """So many groups, the same on every rank; fewer where some were of no use, but `least`. Collective."""

    def close(self) -> None: ...


class RolloutSource:
    """`Source` over prompts of an environment; `next_step` may sample, and so comes after the last update.

    A rollout has the prompts of `updates` steps; where a run stops within one, the prompts of the rest are sampled
    again, by newer weights. So are those that were sampled ahead of a run's end.

    Args:
        sync: gives the sampler the weights as they are, which have seen so many updates. Collective.
        pack: makes this rank's micro-batches of a step.
        old: log-probabilities under the weights as they are, computed as in training.
        reference: those under the reference model; None: there is none.
        state: from an earlier `state()`.
        alarms: about the steps, kept with the state. follows: what samples has the weights that are trained.
    """

    def __init__(
        self,
        cfg: GrpoConfig,
        rollouts: Rollouts,
        sync: Callable[[int], None],
        pack: Callable[[list[Group]], Packed],
        world: World,
        old: Logprobs,
        reference: Logprobs | None,
        state: dict[str, Any] | None,
        alarms: RlAlarms,
        follows: bool,
    ) -> None:
        self.cfg, self.rollouts, self.sync = cfg, rollouts, sync
        self.alarms, self.follows = alarms, follows
        self.pack, self.world = pack, world
        self.old, self.reference = old, reference
        self.left = int(state["left"]) if state else cfg.updates  # steps of the current rollout still to come
        self.tokens = int(state["tokens"]) if state else 0
        self._waiting: list[tuple[list[Batch], list[Group]]] = []
        self.groups: list[Group] = []  # of the step handed out last
        self.updates = 0  # that this process has made, as far as batches tell
        self.sampled_at = 0  # of these, when the rollout was taken
        self.handed_out = 0.0  # when, on the clock of time.perf_counter
        self.metrics: dict[str, float] = {}

    def next_step(self) -> list[Batch]:
        if not self._waiting:
            self._roll()
        batches, self.groups = self._waiting.pop(0)
        self.rollouts.ledger.settle(group.number for group in self.groups)
        self.left = self.left - 1 or self.cfg.updates
        if self.follows:
            self.metrics |= self._staleness()
        self.updates += 1
        lengths = [len(group.prompt) + len(one.tokens) for group in self.groups for one in group.completions]
        self.tokens += sum(lengths)
        self.metrics["tokens"] = float(self.tokens)  # packing's empty places are not counted
        self.handed_out = time.perf_counter()
        return batches

    def state(self) -> dict[str, Any]:
        return {
            **self.rollouts.ledger.state(),
            "left": self.left,
            "tokens": self.tokens,
            "alarms": self.alarms.state(),
        }

    def close(self) -> None:
        """End what runs ahead."""
        self.rollouts.close()

    def table(self, decode: Callable[[list[int]], str]) -> list[Shown]:
        """The first completion of each of the step's first prompts, with its reward."""
        rows: list[Shown] = []
        for group in self.groups[:SHOWN]:
            parts = {name: scores[0] for name, scores in group.parts.items()}
            scores = {"reward": group.rewards[0], **(parts if len(parts) > 1 else {})}
            rows.append((decode(group.prompt), decode(group.completions[0].tokens), scores))
        return rows

    def _staleness(self) -> dict[str, float]:
        """Updates between the weights that drew a token and those that it trains."""
        seen = [
            self.updates - version
            for group in self.groups
            for one in group.completions
            for version in (one.versions or [self.sampled_at] * one.length)
        ]
        return {"rl/staleness": float(np.mean(seen or 0)), "rl/staleness_max": float(max(seen, default=0))}

    def _roll(self) -> None:
        """Take what is left of a rollout, and make the batches of its steps."""
        began = time.perf_counter()
        self.sync(self.updates)
        self.sampled_at = self.updates
        self.metrics["rl/seconds_sync"] = time.perf_counter() - began
        rollout = self.rollouts.rollout(self.cfg.prompts_per_step * self.left, self.left)
        began = time.perf_counter()
        failed = sum(one.finish_reason == "failed" for group in rollout.groups for one in group.completions)
        cuts = np.array_split(np.arange(len(rollout.groups)), self.left)
        parts = [[rollout.groups[i] for i in cut] for cut in cuts]
        packed = [self._pack(part) for part in parts]
        rewards_PG = rollout.rewards_PG - self._divergence_in_reward(packed, rollout)
        advantages_PG = advantages(self.cfg.variant, rewards_PG, rollout.scored_PG)
        for part, each, cut in zip(parts, packed, cuts, strict=True):
            self._waiting.append((weighted(each, part, advantages_PG[cut], self.cfg), part))
        self.metrics |= {
            "rl/seconds_generate": rollout.generate_seconds,
            "rl/seconds_score": rollout.score_seconds,
            "rl/seconds_wait": rollout.wait_seconds,
            "rl/seconds_prepare": time.perf_counter() - began,
            "rl/prompts_tried": float(rollout.prompts),
            "rl/dropped": float(rollout.dropped * self.cfg.group_size + failed),
            "rl/generated_tokens_per_second": rollout.tokens_per_second,
        }
        if rollout.scored_tokens_per_second:
            self.metrics["rl/scored_tokens_per_second"] = rollout.scored_tokens_per_second

    def _pack(self, groups: list[Group]) -> Packed:
        packed = self.pack(groups)
        batches = packed.batches
        if self.cfg.updates > 1 or self._in_reward:
            batches = [replace(batch, old_logprobs_T=self.old(batch)) for batch in batches]
        if self.reference is not None:
            batches = [replace(batch, reference_logprobs_T=self.reference(batch)) for batch in batches]
        return replace(packed, batches=batches)

    @property
    def _in_reward(self) -> bool:
        return self.cfg.kl_in is KlIn.reward and self.reference is not None

    def _divergence_in_reward(self, packed: list[Packed], rollout: Rollout) -> np.ndarray:
        """kl_coef times the divergence of each whole completion, [P, G]."""
        shape = rollout.rewards_PG.shape
        if not self._in_reward:
            return np.zeros(shape)
        G, first, sums = shape[1], 0, np.zeros(shape[0] * shape[1])
        for each in packed:
            for batch, spans in zip(each.batches, each.spans, strict=True):
                assert batch.old_logprobs_T is not None and batch.reference_logprobs_T is not None
                kl_T = divergence(self.cfg.kl_estimator, batch.old_logprobs_T, batch.reference_logprobs_T)
                for span in spans:
                    sums[first + span.sequence] = float(kl_T[span.places].double().sum())
            first += each.sequences
        found = np.array(self.world.sum(sums.tolist()))
        return self.cfg.kl_coef * found.reshape(-1, G)


def weighted(packed: Packed, groups: list[Group], advantages_PG: np.ndarray, cfg: GrpoConfig) -> list[Batch]:
    """The batches of one step with advantages and with the weight of every token in the objective."""
    lengths_S = np.array([one.length for group in groups for one in group.completions])
    # The engine divides by the trained tokens of the step, which cancel.
    weights_S = sequence_weights(cfg.variant, lengths_S, cfg.max_completion) * lengths_S.sum()
    advantages_S = advantages_PG.ravel()
    return [
        replace(
            batch,
            token_weights_T=spread(batch.tokens, spans, weights_S),
            advantages_T=spread(batch.tokens, spans, advantages_S),
        )
        for batch, spans in zip(packed.batches, packed.spans, strict=True)
    ]
