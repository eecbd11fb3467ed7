"""What completions are rewarded for: the parts that need nothing but the text, and the sum of all parts.

A part is NaN, or infinite, where it could not be scored: it is left out of the sum, and counted. docs/rewards.md
says which part reads which key of a sample's reference.
"""

import importlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from drivetrain.conf.errors import ConfigError
from drivetrain.conf.rewards import (
    Extract,
    RewardsConfig,
    overlong_problems,
    pattern_problems,
    target_problems,
)
from drivetrain.train.rl.extract import answer_in

UNSCORED = math.nan


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion.

    Attributes:
        messages: the conversation that it answers.
        completion: its text, without special tokens; of several turns the last one's, the others are in `messages`.
        tokens: that the model wrote, in all turns.
        finish_reason: "stop", or "length" where it was cut; "failed" where it was dropped, and no score counts.
        reference: what it is judged by.
        turns: how often it was the model's turn.
    """

    messages: Sequence[Mapping[str, Any]]
    completion: str
    tokens: int
    finish_reason: str
    reference: dict[str, Any] = field(default_factory=dict)
    turns: int = 1


class Reward(Protocol):
    """Scores a batch of completions."""

    def score(self, samples: Sequence[Sample]) -> Mapping[str, list[float]]:
        """Named parts, each with a number for each sample, which are logged one by one and added up."""


@dataclass(frozen=True, slots=True)
class Total:
    """The sum of the parts of each sample, NaN where all are; and how many samples each part could not score."""

    rewards: list[float]
    unscored: dict[str, int]


def total(parts: Mapping[str, Sequence[float]]) -> Total:
    """Add the parts up. What is not finite, be it NaN or infinite, is unscored."""
    rewards = []
    for row in zip(*parts.values(), strict=True):
        scored = [value for value in row if math.isfinite(value)]
        rewards.append(math.fsum(scored) if scored else UNSCORED)
    missing = {name: sum(not math.isfinite(value) for value in values) for name, values in parts.items()}
    return Total(rewards, missing)


class Rewards:
    """Several rewards under their names, each multiplied by its weight."""

    def __init__(self, weighted: Mapping[str, tuple[float, Reward]]) -> None:
        self.weighted = weighted

    def score(self, samples: Sequence[Sample]) -> dict[str, list[float]]:
        """Parts that a reward calls by its own name carry that name; others `name/part`."""
        parts = {}
        for name, (weight, reward) in self.weighted.items():
            for part, values in reward.score(samples).items():
                if len(values) != len(samples):
                    raise ConfigError(
                        f"reward {name} gave {len(values)} numbers for {len(samples)} samples; return one for each"
                    )
                parts[name if part == name else f"{name}/{part}"] = [weight * value for value in values]
        return parts

    def close(self) -> None:
        """End the processes that rewards have started."""
        for _, reward in self.weighted.values():
            if hasattr(reward, "close"):
                reward.close()


def build_rewards(config: RewardsConfig, max_completion: int) -> Rewards:
    """The parts whose weight is not 0.

    Args:
        max_completion: tokens that a completion has at most.

    Raises:
        ConfigError: a setting is wrong, a library is missing, or code cannot be shut in here.
    """
    chosen: dict[str, tuple[float, Callable[[], Reward]]] = {
        "gym": (config.gym.weight, lambda: _checked("gym", config)),
        "exact": (config.exact.weight, lambda: Exact(config.exact.extract)),
        "regex": (config.regex.weight, lambda: Regex(config.regex.pattern, config.regex.extract)),
        "format": (config.format.weight, lambda: Format(config.format.pattern)),
        "math": (config.math.weight, lambda: _checked("math", config)),
        "overlong": (config.overlong.weight, lambda: Overlong(max_completion, config.overlong.buffer)),
        "code": (config.code.weight, lambda: _code(config)),
        "rubric": (config.rubric.weight, lambda: _rubric(config)),
        "reward_model": (config.reward_model.weight, lambda: _reward_model(config)),
        "custom": (config.custom.weight, lambda: Custom(config.custom.target)),
    }
    for name, (weight, _) in chosen.items():
        if not math.isfinite(weight):
            raise ConfigError(f"stage.rewards.{name}.weight={weight}; use a finite number, 0 for off")
    return Rewards({name: (weight, make()) for name, (weight, make) in chosen.items() if weight})


def _checked(kind: str, config: RewardsConfig) -> Reward:
    from drivetrain.train.rl.checkers import Gym, Math

    if kind == "gym":
        return Gym(config.gym.extract, config.gym.seconds, config.checkers)
    return Math(config.math.seconds, config.checkers)


def _code(config: RewardsConfig) -> Reward:
    from drivetrain.train.rl.programs import Programs

    return Programs(config.code)


def _rubric(config: RewardsConfig) -> Reward:
    from drivetrain.train.rl.judge import Judge

    return Judge(config.rubric)


def _reward_model(config: RewardsConfig) -> Reward:
    from drivetrain.train.rl.reward_model_reward import RewardModelReward

    return RewardModelReward(Path(str(config.reward_model.run)))


class Exact:
    """1 where the answer is `reference["answer"]`, or one of that list, by `drivetrain eval`'s rules, else 0."""

    def __init__(self, extract: Extract) -> None:
        self.extract = extract

    def score(self, samples: Sequence[Sample]) -> dict[str, list[float]]:
        return {"exact": [self._one(sample) for sample in samples]}

    def _one(self, sample: Sample) -> float:
        from drivetrain.train.evaluation.tasks import matches  # it imports the stages, and they this module

        right = answers(sample)
        if not right:
            return UNSCORED
        answer = answer_in(sample.completion, self.extract)
        return float(answer is not None and matches(answer, right))


def answers(sample: Sample) -> list[str]:
    """The right ones; none where the sample has no such reference."""
    answer = sample.reference.get("answer")
    if answer is None:
        return []
    return [str(each) for each in (answer if isinstance(answer, list | tuple) else [answer])]


class Regex:
    """1 where the pattern, else `reference["pattern"]`, is found in what `extract` takes out, else 0."""

    def __init__(self, pattern: str | None, extract: Extract) -> None:
        self.pattern = None if pattern is None else compiled(pattern, "stage.rewards.regex.pattern")
        self.extract = extract

    def score(self, samples: Sequence[Sample]) -> dict[str, list[float]]:
        return {"regex": [self._one(sample) for sample in samples]}

    def _one(self, sample: Sample) -> float:
        pattern = self.pattern
        if pattern is None:
            if "pattern" not in sample.reference:
                return UNSCORED
            pattern = compiled(str(sample.reference["pattern"]), "a sample's pattern")
        answer = answer_in(sample.completion, self.extract)
        return float(answer is not None and pattern.search(answer) is not None)


class Format:
    """1 where the whole completion, white space around it aside, has the form of the pattern, else 0."""

    def __init__(self, pattern: str) -> None:
        self.pattern = compiled(pattern, "stage.rewards.format.pattern")

    def score(self, samples: Sequence[Sample]) -> dict[str, list[float]]:
        found = (self.pattern.fullmatch(sample.completion.strip()) for sample in samples)
        return {"format": [float(match is not None) for match in found]}


def compiled(pattern: str, where: str) -> re.Pattern[str]:
    """A regular expression in which a dot matches line ends too."""
    for problem in pattern_problems(pattern, where):
        raise ConfigError(problem)
    return re.compile(pattern, re.DOTALL)


class Overlong:
    """DAPO's soft overlong punishment: by the length alone, from 0 down to -1."""

    def __init__(self, max_completion: int, buffer: int) -> None:
        self.longest, self.buffer = max_completion, buffer or max(1, max_completion // 4)
        for problem in overlong_problems(buffer, max_completion):
            raise ConfigError(problem)

    def score(self, samples: Sequence[Sample]) -> dict[str, list[float]]:
        return {"overlong": [overlong(sample.tokens, self.longest, self.buffer) for sample in samples]}


def overlong(tokens: int, longest: int, buffer: int) -> float:
    """0 up to longest - buffer tokens, then ((longest - buffer) - tokens) / buffer, -1 beyond longest.

    DAPO (arXiv 2503.14476), eq. 13, with L_max = longest and L_cache = buffer.
    """
    return min(0.0, max(-1.0, (longest - buffer - tokens) / buffer))


class Custom:
    """A user's function; a number that it cannot give is None or NaN."""

    def __init__(self, target: str) -> None:
        for problem in target_problems(target):
            raise ConfigError(problem)
        where = f"stage.rewards.custom.target={target!r}"
        module, _, name = target.partition(":")
        try:
            self.function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"{where} cannot be imported: {error}; install it or set PYTHONPATH to its folder"
            ) from error

    def score(self, samples: Sequence[Sample]) -> dict[str, list[float]]:
        found = self.function(list(samples))
        return {"custom": [UNSCORED if value is None else float(value) for value in found]}
