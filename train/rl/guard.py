"""Work of others that may fail, or never end: it is waited for so long, tried so often, and given up."""

import queue
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch

from drivetrain.conf.errors import DrivetrainError
from drivetrain.train.rl.episodes import Environment, Episode, EpisodeError, Problem, Step, Turn

T = TypeVar("T")
R = TypeVar("R")


class GivenUp(Exception):
    """Not done in time. What was begun may go on, in a thread that nobody waits for."""


def bounded(function: Callable[[], T], seconds: float) -> T:
    """What `function` returns or raises, in a thread of its own, which the end of the process does not wait for.

    Raises:
        GivenUp: neither happened within `seconds`.
    """
    done: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)  # each thread has its own
            done.put((function(), None))
        except BaseException as error:
            done.put((None, error))

    threading.Thread(target=run, name="bounded", daemon=True).start()
    try:
        value, error = done.get(timeout=seconds)
    except queue.Empty:
        raise GivenUp(f"nothing came within {seconds:g} s") from None
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


class Warnings:
    """Says on this rank's log what went wrong, each kind once; how often, is among the metrics."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def say(self, what: str, error: BaseException) -> None:
        kind = f"{what}: {type(error).__name__}"
        if kind not in self._said:
            self._said.add(kind)
            print(f"warning: {kind}: {error}", file=sys.stderr)


def each_or_none(
    judge: Callable[[Sequence[T]], list[R]],
    items: Sequence[T],
    seconds: float,
    retries: int,
    warnings: Warnings,
) -> list[R | None]:
    """What `judge` makes of the items: of all together, and should that fail, `retries` times of each by itself.

    Args:
        judge: one result for each item. It may be running still when it is called again.
        seconds: for one call.

    Returns:
        None in the place of an item that was given up.

    Raises:
        DrivetrainError: what a user has to mend, which no second try would.
    """
    if not items:
        return []
    try:
        return list(bounded(lambda: judge(items), seconds))
    except DrivetrainError:
        raise
    except Exception as error:
        warnings.say("completions could not be scored", error)
    found: list[R | None] = [None] * len(items)
    for _ in range(retries):
        missing = [place for place, result in enumerate(found) if result is None]
        for place, result in _apart(judge, items, missing, seconds):
            if isinstance(result, DrivetrainError):
                raise result
            if isinstance(result, Exception):
                warnings.say("a group could not be scored", result)
            else:
                found[place] = result
    return found


def _apart(
    judge: Callable[[Sequence[T]], list[R]], items: Sequence[T], places: Sequence[int], seconds: float
) -> Iterator[tuple[int, R | Exception]]:
    """What becomes of these items, as it comes; all at the same time, for each may take all of its time."""
    done: queue.SimpleQueue[tuple[int, R | Exception]] = queue.SimpleQueue()

    def one(place: int) -> None:
        try:
            done.put((place, bounded(lambda: judge([items[place]]), seconds)[0]))
        except Exception as error:
            done.put((place, error))

    for place in places:
        threading.Thread(target=one, args=(place,), daemon=True).start()
    for _ in places:
        yield done.get()


class GuardedEpisode:
    """An episode whose answers are waited for so long. None is asked for twice: what a step has done is done.

    Args:
        make: begins it; called before the first step.
    """

    def __init__(self, make: Callable[[], Episode], seconds: float) -> None:
        self.make, self.seconds = make, seconds
        self.episode: Episode | None = None

    def step(self, turn: Turn) -> Step:
        return self._ask("step", lambda: self._begun().step(turn))

    def end(self) -> Mapping[str, float]:
        return self._ask("end", lambda: self._begun().end())

    def _begun(self) -> Episode:
        if self.episode is None:
            self.episode = self.make()
        return self.episode

    def _ask(self, what: str, function: Callable[[], T]) -> T:
        try:
            return bounded(function, self.seconds)
        except (DrivetrainError, EpisodeError):
            raise
        except Exception as error:
            raise EpisodeError(f"its {what} failed: {type(error).__name__}: {error}") from error


class GuardedEnvironment:
    """An `Environment` with guarded episodes.

    Args:
        seconds: for one answer.
    """

    def __init__(self, environment: Environment, seconds: float) -> None:
        self.inner, self.seconds = environment, seconds
        self.reward, self.tools, self.stop = environment.reward, environment.tools, environment.stop
        self.parts, self.workers = environment.parts, environment.workers

    def problem(self, number: int) -> Problem:
        return self.inner.problem(number)

    def held_out(self, count: int) -> list[Problem]:
        return self.inner.held_out(count)

    def reset(self, problem: Problem, seed: int) -> Episode:
        return GuardedEpisode(lambda: self.inner.reset(problem, seed), self.seconds)

    def correct(self, parts: Mapping[str, Sequence[float]]) -> list[bool]:
        return self.inner.correct(parts)

    def close(self) -> None:
        self.inner.close()
