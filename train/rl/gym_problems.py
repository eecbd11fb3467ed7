"""Problems that reasoning-gym makes up, as many as wanted, some of them held out."""

import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl

import xxhash

from drivetrain.conf.errors import ConfigError
from drivetrain.train.evaluation.gym import GYM, answer_in, value_of
from drivetrain.train.rl.checkers import Checkers
from drivetrain.train.rl.episodes import Problem, SingleTurn
from drivetrain.train.rl.rewards import Sample

BLOCK = (
    256  # problems of one data set object: some of reasoning-gym's take memory for each that they could make
)
HELD_OUT_SEED = 1 << 30  # reasoning-gym's seed of the first held-out problem; training's lie below
CORRECT = "correct"  # the part of the reward that says whether the answer is right
PROBE = 64  # numbers tried for one training problem before its kind is too small to hold any out
SECONDS = 5.0  # that judging one answer may take


class GymEnvironment(SingleTurn):
    """Problems that reasoning-gym makes up: `reasoning_gym:chain_sum?min_terms=2&max_terms=3`.

    Held-out problems have seeds from `HELD_OUT_SEED` on and training problems smaller ones; a training problem
    whose question is also held out is made again, if `unseen`.

    Args:
        held_out: how many problems are held out.
        unseen: False lets a held-out question come up in training too, for kinds with few questions.

    Raises:
        ConfigError: reasoning-gym is not installed, or has no such data set or setting; or the kind has so few
            questions that nothing is left to train on.
    """

    def __init__(self, name: str, seed: int, held_out: int, unseen: bool = True) -> None:
        self.name = name
        self.kind, _, query = name.removeprefix(GYM).partition("?")
        self._first = xxhash.xxh3_64_intdigest(f"{seed}/{name}".encode()) % (HELD_OUT_SEED // 2)
        try:
            self._settings = {
                key: value_of(text) for key, text in parse_qsl(query, strict_parsing=bool(query))
            }
            if {"seed", "size"} & set(self._settings):
                raise ValueError("seed and size follow from the run's seed")
            self._entry(HELD_OUT_SEED)
        except ImportError as error:
            raise ConfigError(f"{name} needs reasoning-gym; run `pip install 'drivetrain[rl]'`") from error
        except (ValueError, TypeError, AssertionError) as error:
            raise ConfigError(
                f"stage.environment={name} cannot be made: {error}; see reasoning-gym's data sets"
            ) from error
        self._held_out = [self._entry(HELD_OUT_SEED + number) for number in range(held_out)]
        self._questions = {entry["question"] for entry in self._held_out} if unseen else set()
        self.reward = GymReward(self.kind, self._settings)
        self.problem(0)

    @lru_cache(maxsize=8)  # noqa: B019  an environment lives as long as its run
    def _block(self, seed: int) -> Any:
        import reasoning_gym

        return reasoning_gym.create_dataset(self.kind, size=BLOCK, seed=seed, **self._settings)

    def _entry(self, seed: int) -> dict[str, Any]:
        entry: dict[str, Any] = self._block(seed - seed % BLOCK)[seed % BLOCK]
        return entry

    def problem(self, number: int) -> Problem:
        for attempt in range(PROBE):
            entry = self._entry((self._first + number + attempt * 1_000_003) % HELD_OUT_SEED)
            if entry["question"] not in self._questions:
                return _problem(entry)
        raise ConfigError(
            f"stage.environment={self.name} has so few questions that {PROBE} in a row are held out; use settings "
            "with more questions, a smaller stage.eval_problems, or stage.eval_unseen=false"
        )

    def held_out(self, count: int) -> list[Problem]:
        return [_problem(entry) for entry in self._held_out[:count]]

    def correct(self, parts: Mapping[str, Sequence[float]]) -> list[bool]:
        return [mark >= 1 for mark in parts[CORRECT]]

    def close(self) -> None:
        self.reward.close()


def _problem(entry: dict[str, Any]) -> Problem:
    return Problem([{"role": "user", "content": entry["question"]}], entry)


class GymReward:
    """A data set's own mark of an answer, 0 to 1; what stands in <answer> tags is taken out of them. Answers are
    judged in a process behind walls, and one that takes longer than `SECONDS` is wrong."""

    def __init__(self, kind: str, settings: Mapping[str, Any]) -> None:
        self.kind, self.settings = kind, dict(settings)
        self._checkers: Checkers | None = None
        self._lock = threading.Lock()

    def score(self, samples: Sequence[Sample]) -> Mapping[str, list[float]]:
        with self._lock:
            if self._checkers is None and samples:
                self._checkers = Checkers("gym", 1)
        requests = [self._request(sample) for sample in samples]
        return {CORRECT: self._checkers.check(requests) if self._checkers else []}

    def _request(self, sample: Sample) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "entry": sample.reference,
            "settings": self.settings,
            "answer": answer_in(sample.completion),
            "seconds": SECONDS,
        }

    def close(self) -> None:
        if self._checkers:
            self._checkers.close()
            self._checkers = None
