"""Rollouts in turn with training: the ranks sample together, from the weights that they share."""

import time

from drivetrain.conf.errors import DrivetrainError
from drivetrain.train.rl.exchange import share
from drivetrain.train.rl.guard import each_or_none
from drivetrain.train.rl.ledger import Ledger
from drivetrain.train.rl.rollout import Group, Rollout, Sampler


class Lockstep:
    """A rollout is a function of the prompts that are settled and of the weights."""

    def __init__(self, sampler: Sampler, ledger: Ledger) -> None:
        self.cfg, self.world = sampler.cfg, sampler.world
        self.sampler, self.ledger = sampler, ledger

    def rollout(self, prompts: int, least: int) -> Rollout:
        """Groups of the next prompts. Collective. What is given up is settled, what is returned is not: that is for
        the step which trains on it.

        With dynamic sampling a group of equal rewards gives its place to the next prompt's, for `max_tries` rounds;
        what is missing then stays away, but for `least` groups.

        Raises:
            DrivetrainError: not even those could be made.
        """
        found, spare = Rollout(), list[Group]()
        for _ in range(self.cfg.max_tries if self.cfg.dynamic_sampling else 1):
            missing = prompts - len(found.groups)
            if not missing:
                break
            numbers = self.ledger.upcoming(missing, besides=[group.number for group in found.groups])
            groups = self._groups(numbers, found)
            found.prompts += missing
            found.dropped += missing - len(groups)
            if self.cfg.dynamic_sampling:
                spare += [group for group in groups if not group.mixed]
                groups = [group for group in groups if group.mixed]
            self.ledger.settle(set(numbers) - {group.number for group in groups})
            found.groups += groups
        found.groups += spare[: max(0, least - len(found.groups))]
        if len(found.groups) < least:
            raise too_few(len(found.groups), least, found.prompts)
        found.groups.sort(key=lambda group: group.number)
        found.wait_seconds = found.generate_seconds + found.score_seconds
        found.tokens_per_second = found.sampled_tokens / max(found.generate_seconds, 1e-9)
        found.scored_tokens_per_second = found.sampled_tokens / max(found.score_seconds, 1e-9)
        return found

    def _groups(self, numbers: list[int], timed: Rollout) -> list[Group]:
        """The groups of these prompts, all of them on every rank; those given up are left out."""
        sampler, rollout = self.sampler, self.cfg.rollout
        began, aside = time.perf_counter(), sampler.player.seconds
        mine = numbers[self.world.rank :: self.world.size]
        tasks = [sampler.task(number) for number in mine]
        items = list(zip(mine, tasks, sampler.play(tasks), strict=True))
        # Scoring has the ranks' patience to itself, however long the last turns took.
        self.world.barrier()
        aside = sampler.player.seconds - aside
        timed.generate_seconds += time.perf_counter() - began - aside
        timed.score_seconds += aside
        began = time.perf_counter()
        scored = each_or_none(
            sampler.scored, items, rollout.timeout_seconds, rollout.retries, sampler.warnings
        )
        found = share([group for group in scored if group is not None and group.whole], self.world)
        timed.score_seconds += time.perf_counter() - began
        timed.sampled_tokens += sum(one.length for group in found for one in group.completions)
        return found

    def close(self) -> None:
        """Nothing goes on between two rollouts."""


def too_few(groups: int, least: int, prompts: int) -> DrivetrainError:
    return DrivetrainError(
        f"of {prompts} prompts {groups} could be completed and scored, and {least} are needed to go on; the log of "
        "each rank says what failed"
    )
