"""Rollouts that run ahead of training: threads on all ranks make groups, and the ranks agree on which to train.

v updates that the weights have seen · k = max_staleness · n prompts of a step.

At most n (k + 1) prompts are begun and not settled, and a step takes n of those that were begun under the oldest
weights, the first finished ones; so what is begun under v is trained on by the update after v + k. With k = 0 a
step begins n prompts and waits for them.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from drivetrain.train.rl.background import Background
from drivetrain.train.rl.episodes import Played
from drivetrain.train.rl.exchange import share
from drivetrain.train.rl.ledger import Ledger
from drivetrain.train.rl.lockstep import too_few
from drivetrain.train.rl.play import Task
from drivetrain.train.rl.rollout import Group, Rollout, Sampler

PENDING, MIXED, EQUAL, LOST = range(4)  # what has become of a prompt
POLL = 0.02  # seconds


@dataclass(slots=True)
class _Step:
    """What a step has found so far, alike on every rank. `useless`: groups without advantages, and lost ones."""

    ready: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    useless: int = 0
    lost: int = 0
    equal: list[int] = field(default_factory=list)


class Ahead:
    """`rollout` is collective; between two calls this rank's threads go on.

    Args:
        version: updates that the weights have seen which are sampled from.
    """

    def __init__(self, sampler: Sampler, ledger: Ledger, version: Callable[[], int]) -> None:
        self.cfg, self.world = sampler.cfg, sampler.world
        self.sampler, self.ledger, self.version = sampler, ledger, version
        rollout = self.cfg.rollout
        self.background: Background[Task, list[Played], Group] = Background(
            lambda task: sampler.play([task])[0],
            sampler.scored,
            rollout.timeout_seconds,
            rollout.retries,
            sampler.warnings,
        )
        self.begun: dict[
            int, int
        ] = {}  # by prompt that is not settled: the version then; alike on every rank
        self._last = time.perf_counter()

    def rollout(self, prompts: int, least: int) -> Rollout:
        """As many groups; where too many were of no use, fewer, but `least`.

        Raises:
            DrivetrainError: not even those could be made.
        """
        began, step = time.perf_counter(), _Step()
        while True:
            tries_left = step.useless < self.cfg.max_tries * prompts
            if tries_left:
                self._begin(prompts)
            self._look(step)
            chosen = self._oldest(step, prompts)
            if not set(chosen) & set(step.pending) and (len(chosen) >= prompts or not tries_left):
                break
            time.sleep(POLL)
        chosen += step.equal[: max(0, least - len(chosen))]
        if len(chosen) < least:
            raise too_few(len(chosen), least, step.useless + len(step.ready))
        return self._taken(sorted(chosen), step, began)

    def _taken(self, chosen: list[int], step: _Step, began: float) -> Rollout:
        groups = [self.background.take(number) for number in chosen if self._mine(number)]
        for number in step.equal:
            if number not in chosen and self._mine(number):
                self.background.take(number)
        found = Rollout(share([group for group in groups if group is not None], self.world))
        self._settle(chosen)
        found.prompts, found.dropped = len({*chosen, *step.equal}) + step.lost, step.lost
        found.sampled_tokens = sum(one.length for group in found.groups for one in group.completions)
        found.generate_seconds, found.score_seconds = self.background.times()
        now = time.perf_counter()
        found.wait_seconds = now - began
        found.tokens_per_second = found.sampled_tokens / (now - self._last)
        self._last = now
        return found

    def _begin(self, prompts: int) -> None:
        """Have as many prompts under way as may be."""
        room = prompts * (self.cfg.rollout.max_staleness + 1) - len(self.begun)
        for number in self.ledger.upcoming(max(0, room), besides=self.begun):
            self.begun[number] = self.version()
            if self._mine(number):
                self.background.start(number, self.sampler.task(number))

    def _look(self, step: _Step) -> None:
        """What has become of the prompts that are under way; settle those that are of no use. Collective."""
        numbers, found = sorted(self.begun), self.background.found()
        state = torch.tensor([self._state(number, found) for number in numbers], dtype=torch.int32)
        dist.all_reduce(state)
        by_state: dict[int, list[int]] = {kind: [] for kind in (PENDING, MIXED, EQUAL, LOST)}
        for number, kind in zip(numbers, state.tolist(), strict=True):
            by_state[kind].append(number)
        step.ready, step.pending = by_state[MIXED], by_state[PENDING]
        step.equal += by_state[EQUAL]
        step.lost += len(by_state[LOST])
        step.useless = len(step.equal) + step.lost
        for number in by_state[LOST]:
            if self._mine(number):
                self.background.take(number)
        self._settle(by_state[EQUAL] + by_state[LOST])

    def _state(self, number: int, found: dict[int, Group | None]) -> int:
        if not self._mine(number) or number not in found:
            return PENDING
        group = found[number]
        if group is None or not group.whole:
            return LOST
        return EQUAL if self.cfg.dynamic_sampling and not group.mixed else MIXED

    def _settle(self, numbers: list[int]) -> None:
        self.ledger.settle(numbers)
        for number in numbers:
            self.begun.pop(number, None)

    def _oldest(self, step: _Step, prompts: int) -> list[int]:
        """Prompts to train on, some of them perhaps not done yet; more than asked for where this step is the last
        that may."""
        pending, oldest = set(step.pending), self.version() - self.cfg.rollout.max_staleness
        order = sorted(
            [*step.ready, *step.pending], key=lambda number: (self.begun[number], number in pending, number)
        )
        due = sum(self.begun[number] <= oldest for number in order)
        return order[: max(prompts, due)]

    def _mine(self, number: int) -> bool:
        return number % self.world.size == self.world.rank

    def close(self) -> None:
        self.background.close()
