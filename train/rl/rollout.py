"""A rollout: completions of prompts by the weights that are trained, scored, the same on any number of ranks.

P prompts, one a group · G completions of each.

Each rank samples and scores its share of the prompts, and then every rank holds all of the rollout.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch.distributed as dist
import xxhash
from tokenizers import Tokenizer
from torch import nn

from drivetrain.conf.errors import ConfigError
from drivetrain.conf.schema import GrpoConfig, ModelConfig
from drivetrain.data.chat import Chat
from drivetrain.model.generate import Completion, Generator, Request, Sampling
from drivetrain.train.mesh import World
from drivetrain.train.rl.advantage import mixed
from drivetrain.train.rl.environments import Environment, Problem
from drivetrain.train.rl.rewards import Rewards, Sample, build_rewards, total


@dataclass(slots=True)
class Group:
    """One prompt with its completions; what a rank sends to the others.

    Attributes:
        number: the prompt's, from 0 for the run's first. prompt: its tokens. completions: G of them.
        parts: the rewards' parts by name, each [G]. rewards: their sum, [G].
        correct: which of them solve the problem, [G].
    """

    number: int
    prompt: list[int]
    completions: list[Completion]
    parts: dict[str, list[float]] = field(default_factory=dict)
    rewards: list[float] = field(default_factory=list)
    correct: list[bool] = field(default_factory=list)


@dataclass(slots=True)
class Rollout:
    """`groups` in the order of their prompts; `prompts` were tried. Seconds are this rank's."""

    groups: list[Group]
    prompts: int
    sampled_tokens: int = 0  # those of groups that were left out too
    generate_seconds: float = 0.0
    score_seconds: float = 0.0

    @property
    def rewards_PG(self) -> np.ndarray:
        return np.array([group.rewards for group in self.groups], dtype=np.float64)

    @property
    def lengths_PG(self) -> np.ndarray:
        return np.array([[len(one.tokens) for one in group.completions] for group in self.groups])


class Sampler:
    """Draws and scores completions with the model that is trained. All ranks call it together.

    Args:
        model: the engine's; a sharded one meets the other ranks in every pass.
    """

    def __init__(
        self,
        cfg: GrpoConfig,
        model: nn.Module,
        model_cfg: ModelConfig,
        environment: Environment,
        chat: Chat,
        eos_ids: Sequence[int],
        world: World,
        backend: str,
        seed: int,
    ) -> None:
        self.cfg, self.model, self.model_cfg, self.backend = cfg, model, model_cfg, backend
        self.environment, self.chat, self.world, self.seed = environment, chat, world, seed
        self.eos_ids = tuple(eos_ids)
        self.tokenizer: Tokenizer = chat.tokenizer
        self.rewards: Rewards = build_rewards(cfg.rewards, cfg.max_completion)

    def rollout(self, first: int, prompts: int, least: int) -> Rollout:
        """Completions of the prompts from number `first` on. Collective.

        With dynamic sampling a group of equal rewards gives its place to the next prompt's, for `max_tries` rounds;
        what is missing then stays away, but for `least` groups.
        """
        found = Rollout([], 0)
        spare: list[Group] = []
        rounds = self.cfg.max_tries if self.cfg.dynamic_sampling else 1
        for _ in range(rounds):
            missing = prompts - len(found.groups)
            if not missing:
                break
            groups = self._groups(range(first + found.prompts, first + found.prompts + missing), found)
            found.prompts += missing
            if self.cfg.dynamic_sampling:
                keep = mixed(np.array([group.rewards for group in groups]))
                spare += [group for group, use in zip(groups, keep, strict=True) if not use]
                groups = [group for group, use in zip(groups, keep, strict=True) if use]
            found.groups += groups
        found.groups += spare[: max(0, least - len(found.groups))]
        found.groups.sort(key=lambda group: group.number)
        return found

    def _groups(self, numbers: range, timed: Rollout) -> list[Group]:
        """The groups of these prompts, all of them on every rank."""
        cfg, began = self.cfg, time.perf_counter()
        mine = list(numbers[self.world.rank :: self.world.size])
        problems = [self.environment.problem(number) for number in mine]
        requests = [
            Request(self.prompt(problem), self._sampling(number), cfg.group_size)
            for number, problem in zip(mine, problems, strict=True)
        ]
        completions = self.generate(requests)
        timed.generate_seconds += time.perf_counter() - began
        began = time.perf_counter()
        groups = [
            Group(number, list(request.prompt), group)
            for number, request, group in zip(mine, requests, completions, strict=True)
        ]
        self._score(groups, problems)
        everyone: list[list[Group]] = [[] for _ in range(self.world.size)]
        dist.all_gather_object(everyone, groups)
        timed.score_seconds += time.perf_counter() - began
        found = sorted((group for part in everyone for group in part), key=lambda group: group.number)
        timed.sampled_tokens += sum(len(one.tokens) for group in found for one in group.completions)
        return found

    def prompt(self, problem: Problem) -> list[int]:
        return self.chat.prompt(problem.messages)

    def _sampling(self, number: int) -> Sampling:
        cfg = self.cfg
        seed = xxhash.xxh3_64_intdigest(f"{self.seed}/rollout/{number}".encode()) >> 1
        return Sampling(
            max_tokens=cfg.max_completion,
            temperature=cfg.temperature,
            top_p=cfg.top_p,
            top_k=cfg.top_k,
            seed=seed,
        )

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """Completions of this rank's requests; each rank may have others, or none. Collective."""
        for request in requests:
            if (length := len(request.prompt)) > (room := self.cfg.seq_len - self.cfg.max_completion):
                raise ConfigError(
                    f"a prompt has {length} tokens, and stage.seq_len={self.cfg.seq_len} with "
                    f"stage.max_completion={self.cfg.max_completion} leaves room for {room}; raise stage.seq_len"
                )
        generator = Generator(
            self.model,
            self.model_cfg,
            self.world.device,
            backend=self.backend,
            eos_ids=self.eos_ids,
            vocab_size=min(self.tokenizer.get_vocab_size(), self.model_cfg.vocab_size),
            max_batch=max(256, self.cfg.group_size),
            any_rank=self.world.any,
        )
        return generator.generate(requests)

    def sample(self, problem: Problem, completion: Completion) -> Sample:
        return Sample(
            messages=problem.messages,
            completion=self.tokenizer.decode(completion.tokens),
            tokens=len(completion.tokens),
            finish_reason=completion.finish_reason,
            reference=problem.reference,
        )

    def _score(self, groups: list[Group], problems: list[Problem]) -> None:
        G = self.cfg.group_size
        samples = [
            self.sample(problem, completion)
            for group, problem in zip(groups, problems, strict=True)
            for completion in group.completions
        ]
        own = self.environment.reward.score(samples)
        correct = self.environment.correct(own)
        weight = self.cfg.environment_weight
        parts = {name: [weight * score for score in scores] for name, scores in own.items()}
        parts |= self.rewards.score(samples)
        rewards = total(parts).rewards
        for place, group in enumerate(groups):
            mine = slice(place * G, (place + 1) * G)
            group.parts = {name: scores[mine] for name, scores in parts.items()}
            group.correct = correct[mine]
            group.rewards = filled(rewards[mine])


def filled(rewards: list[float]) -> list[float]:
    """A group's rewards, the mean of the others in place of those that could not be scored: no advantage."""
    scored = [reward for reward in rewards if not math.isnan(reward)]
    mean = math.fsum(scored) / len(scored) if scored else 0.0
    return [mean if math.isnan(reward) else reward for reward in rewards]
