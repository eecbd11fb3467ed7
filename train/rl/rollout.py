"""A rollout: episodes that the weights play which are trained, scored, the same on any number of ranks.

P prompts, one a group · G episodes of each.

Each rank samples and scores its share of the prompts, and then every rank holds all of the rollout.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash
from tokenizers import Tokenizer

from drivetrain.conf.errors import ConfigError
from drivetrain.conf.schema import GrpoConfig
from drivetrain.data.chat import Chat
from drivetrain.model.generate import Request, Sampling
from drivetrain.train.mesh import World
from drivetrain.train.rl.advantage import mixed
from drivetrain.train.rl.episodes import Environment, Played, Trajectory
from drivetrain.train.rl.guard import GuardedEnvironment, Warnings
from drivetrain.train.rl.play import Player, Task
from drivetrain.train.rl.rewards import UNSCORED, Rewards, build_rewards, total
from drivetrain.train.rl.samplers.base import Completer, Completions


@dataclass(slots=True)
class Group:
    """One prompt with what followed it; what a rank sends to the others.

    Attributes:
        number: the prompt's, from 0 for the run's first. prompt: its tokens. completions: G of them.
        parts: the rewards' parts by name, each [G]. rewards: their sum, [G].
            Of a completion that could not be scored it is the mean of the others, and not to be learned from.
        correct: which of them solve the problem, [G].
        judged: whether the environment's own mark of right and wrong is part of the reward.
    """

    number: int
    prompt: list[int]
    completions: list[Trajectory]
    parts: dict[str, list[float]] = field(default_factory=dict)
    rewards: list[float] = field(default_factory=list)
    correct: list[bool] = field(default_factory=list)
    judged: bool = False

    @property
    def scored(self) -> list[bool]:
        """Which completions have a part that could be scored, [G]; those that were dropped have none."""
        alive = [one.finish_reason != "failed" for one in self.completions]
        if not self.parts:
            return alive
        marked = [any(map(math.isfinite, marks)) for marks in zip(*self.parts.values(), strict=True)]
        return [here and mark for here, mark in zip(alive, marked, strict=True)]

    @property
    def whole(self) -> bool:
        """Whether enough of it is left to compare: two completions, or the only one."""
        alive = sum(one.finish_reason != "failed" for one in self.completions)
        return alive >= min(2, len(self.completions))

    @property
    def mixed(self) -> bool:
        """Whether its rewards differ and, where the environment judges, right and wrong are both among them: a
        length or a taste alone is nothing to choose prompts by."""
        scored_1G = np.array([self.scored])
        found = bool(mixed(np.array([self.rewards]), scored_1G)[0])
        if self.judged:
            found = found and bool(mixed(np.array([self.correct], dtype=np.float64), scored_1G)[0])
        return found


@dataclass(slots=True)
class Rollout:
    """`groups` in the order of their prompts; `prompts` were tried, `dropped` groups of them given up. Seconds are
    this rank's; `wait_seconds` are those that training stood still for."""

    groups: list[Group] = field(default_factory=list)
    prompts: int = 0
    dropped: int = 0
    sampled_tokens: int = 0  # those of groups that were left out too
    generate_seconds: float = 0.0
    score_seconds: float = 0.0
    wait_seconds: float = 0.0
    tokens_per_second: float = 0.0
    scored_tokens_per_second: float = 0.0  # 0: scored beside sampling, at its pace

    @property
    def rewards_PG(self) -> np.ndarray:
        return np.array([group.rewards for group in self.groups], dtype=np.float64)

    @property
    def scored_PG(self) -> np.ndarray:
        return np.array([group.scored for group in self.groups], dtype=bool)

    @property
    def lengths_PG(self) -> np.ndarray:
        return np.array([[one.length for one in group.completions] for group in self.groups])


class Sampler:
    """Prompts, episodes and scores of one rank, by whoever completes.

    Args:
        completer: of the prompts that are trained on. evaluator: of held-out ones, by the weights that are trained.
    """

    def __init__(
        self,
        cfg: GrpoConfig,
        environment: Environment,
        chat: Chat,
        eos_ids: Sequence[int],
        world: World,
        seed: int,
        completer: Completer,
        evaluator: Completer,
    ) -> None:
        self.cfg, self.chat, self.world, self.seed = cfg, chat, world, seed
        self.completer, self.evaluator, seconds = completer, evaluator, cfg.rollout.timeout_seconds
        self.tokenizer: Tokenizer = chat.tokenizer
        self.environment: Environment = GuardedEnvironment(environment, seconds)
        self.player = Player(self.environment, chat, eos_ids, cfg.seq_len, seconds)
        self.rewards: Rewards = build_rewards(cfg.rewards, cfg.max_completion)
        joined({name: [] for name in environment.parts}, {name: [] for name in self.rewards.weighted})
        self.warnings = Warnings()

    def task(self, number: int) -> Task:
        """What a prompt to train on asks."""
        return Task(self.environment.problem(number), self.sampling(f"rollout/{number}"), self.cfg.group_size)

    def play(self, tasks: Sequence[Task]) -> list[list[Played]]:
        """Episodes of tasks to train on, as collective as the completer is."""
        any_rank = self.world.any if self.completer.collective else None
        return self.player.play(tasks, self.completer.generate, any_rank)

    def sampling(self, name: str) -> Sampling:
        """As in training; what is drawn follows from the run's seed and the name."""
        cfg = self.cfg
        return Sampling(
            max_tokens=cfg.max_completion,
            temperature=cfg.temperature,
            top_p=cfg.top_p,
            top_k=cfg.top_k,
            seed=xxhash.xxh3_64_intdigest(f"{self.seed}/{name}".encode()) >> 1,
        )

    def generate(self, requests: Sequence[Request]) -> Completions:
        """By the weights that are trained; each rank may have other requests, or none. Collective."""
        return self.evaluator.generate(requests)

    def scored(self, items: Sequence[tuple[int, Task, list[Played]]]) -> list[Group]:
        """Groups of these prompts. Not collective."""
        every = [one for _, _, group in items for one in group]
        samples = [one.sample for one in every]
        own, correct = judged(self.environment, every)
        parts = {
            name: [self.cfg.environment_weight * score for score in scores] for name, scores in own.items()
        }
        parts = joined(parts, self.rewards.score(samples))
        alive = [one.trajectory.finish_reason != "failed" for one in every]
        parts = {
            name: [
                score if here and math.isfinite(score) else UNSCORED
                for score, here in zip(scores, alive, strict=True)
            ]
            for name, scores in parts.items()
        }
        groups, first = [], 0
        for number, task, group in items:
            mine = slice(first, first := first + len(group))
            marks = {name: scores[mine] for name, scores in parts.items()}
            groups.append(
                Group(
                    number,
                    self.player.prompt(task.problem),
                    [one.trajectory for one in group],
                    marks,
                    total({name: filled(scores) for name, scores in marks.items()}).rewards,
                    correct[mine],
                    self.cfg.environment_weight != 0
                    and any(math.isfinite(score) for name in own for score in marks[name]),
                )
            )
        return groups

    def close(self) -> None:
        """End what rewards, environment and samplers have started."""
        self.completer.close()
        self.evaluator.close()
        self.rewards.close()
        self.environment.close()


def judged(environment: Environment, played: Sequence[Played]) -> tuple[dict[str, list[float]], list[bool]]:
    """The parts of the environment's own reward, and which episodes solve their problem; a failed one does not."""
    parts = {
        name: list(marks) for name, marks in environment.reward.score([one.sample for one in played]).items()
    }
    parts = joined(parts, {name: [one.rewards[name] for one in played] for name in environment.parts})
    correct = environment.correct(parts)
    alive = [one.trajectory.finish_reason != "failed" for one in played]
    return parts, [right and here for right, here in zip(correct, alive, strict=True)]


def joined(parts: dict[str, list[float]], more: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """Parts of a reward under their names.

    Raises:
        ConfigError: two have the same one.
    """
    if twice := parts.keys() & more.keys():
        raise ConfigError(
            f"two parts of the reward have the name {min(twice)!r}; rename the environment's, or turn "
            f"stage.rewards.{min(twice).partition('/')[0]} off"
        )
    return parts | dict(more)


def filled(scores: list[float]) -> list[float]:
    """A group's scores in one part, the mean of the others in place of those that could not be made, so that who
    lacks a part is neither better nor worse for it; 0 where there are none."""
    scored = [score for score in scores if math.isfinite(score)]
    mean = math.fsum(scored) / len(scored) if scored else 0.0
    return [score if math.isfinite(score) else mean for score in scores]
