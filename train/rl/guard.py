"""Work of others that may fail, or never end: it is waited for so long, tried so often, and given up."""

import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch

from drivetrain.conf.errors import DrivetrainError
from drivetrain.train.rl.episodes import Environment, Episode, EpisodeError, Problem, SingleTurn, Step, Turn

T = TypeVar("T")
R = TypeVar("R")


class GivenUp(Exception):
    """Not done in time. What was begun may go on, in a thread that nobody waits for."""


def bounded(function: Callable[[], T], seconds: float) -> T:
    """What `function` returns or raises, in a thread of its own, which the end of the process does not wait for.

    Raises:
        GivenUp: neither happened within `seconds`.
    """
    (found,) = together([function], 1, seconds)
    if isinstance(found, BaseException):
        raise found
    return found


def together(functions: Sequence[Callable[[], T]], workers: int, seconds: float) -> list[T | BaseException]:
    """What each function returns or raises, in threads that the end of the process does not wait for; `GivenUp`
    where neither happened within `seconds` of all.

    So many run at a time. But what holds its place longer than its share of the time, `seconds` over the number of
    rounds that all of them need, goes on beside those that wait: each has its share, however many hang.
    """
    rounds = -(-len(functions) // max(1, workers))
    found: list[T | BaseException] = [GivenUp(f"nothing came within {seconds:g} s") for _ in functions]
    waiting = deque(enumerate(functions))
    done: queue.SimpleQueue[tuple[int, T | BaseException]] = queue.SimpleQueue()
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def work() -> None:
        if device is not None:
            torch.cuda.set_device(device)  # each thread has its own
        while waiting:
            try:
                place, function = waiting.popleft()
            except IndexError:  # another thread has taken the last one
                return
            try:
                done.put((place, function()))
            except BaseException as error:
                done.put((place, error))

    began, due, missing = time.monotonic(), 0, len(functions)
    while missing and (left := began + seconds - time.monotonic()) > 0:
        share = began + (due and due * seconds / rounds) - time.monotonic() if due < rounds else left
        if share <= 0:
            due += 1
            for _ in range(min(len(waiting), due * workers - (len(functions) - len(waiting)))):
                threading.Thread(target=work, name="bounded", daemon=True).start()
            continue
        try:
            place, result = done.get(timeout=min(share, left, threading.TIMEOUT_MAX))
        except queue.Empty:
            continue
        found[place], missing = result, missing - 1
    waiting.clear()
    return found


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
        tries = [partial(judge, [items[place]]) for place in missing]
        # All at the same time, for each may take all of its time.
        for place, result in zip(missing, together(tries, len(tries), seconds), strict=True):
            if isinstance(result, Exception) and not isinstance(result, DrivetrainError):
                warnings.say("a group could not be scored", result)
            elif isinstance(result, BaseException):
                raise result
            else:
                (found[place],) = result
    return found


class GuardedEpisode:
    """An episode that may hang. Nothing is asked of it twice: what a step has done is done. It is ended once, by
    whoever is last: `end`, or the thread in which a step comes back that nobody waits for any more.

    Args:
        make: begins it; called before the first step.
    """

    def __init__(self, make: Callable[[], Episode]) -> None:
        self.make = make
        self.episode: Episode | None = None
        self._lock = threading.Lock()
        self._busy = self._over = False

    def step(self, turn: Turn) -> Step:
        with self._lock:
            self._busy = True
        try:
            return self._ask("step", lambda: self._begun().step(turn))
        finally:
            with self._lock:
                self._busy, late = False, self._over
            if late and self.episode is not None:
                self._ask("end", self.episode.end)

    def end(self) -> Mapping[str, float]:
        with self._lock:
            self._over = True
            if self._busy or self.episode is None:
                return {}
        return self._ask("end", self.episode.end)

    def _begun(self) -> Episode:
        if self.episode is None:
            self.episode = self.make()
        return self.episode

    def _ask(self, what: str, function: Callable[[], T]) -> T:
        try:
            return function()
        except (DrivetrainError, EpisodeError):
            raise
        except Exception as error:
            raise EpisodeError(f"its {what} failed: {type(error).__name__}: {error}") from error


class GuardedEnvironment:
    """An `Environment` whose problems are waited for so long, and with guarded episodes.

    Raises:
        DrivetrainError: it gives no problem.
    """

    def __init__(self, environment: Environment, seconds: float) -> None:
        self.inner, self.seconds = environment, seconds
        self.reward, self.tools, self.stop = environment.reward, environment.tools, environment.stop
        self.parts, self.workers = environment.parts, environment.workers

    def problem(self, number: int) -> Problem:
        return self._given(f"problem {number}", lambda: self.inner.problem(number))

    def held_out(self, count: int) -> list[Problem]:
        return self._given("held-out problems", lambda: self.inner.held_out(count))

    def reset(self, problem: Problem, seed: int) -> Episode:
        if isinstance(self.inner, SingleTurn):
            return self.inner.reset(problem, seed)
        return GuardedEpisode(lambda: self.inner.reset(problem, seed))

    def correct(self, parts: Mapping[str, Sequence[float]]) -> list[bool]:
        return self.inner.correct(parts)

    def close(self) -> None:
        self.inner.close()

    def _given(self, what: str, function: Callable[[], T]) -> T:
        try:
            return bounded(function, self.seconds)
        except DrivetrainError:
            raise
        except Exception as error:
            raise DrivetrainError(
                f"stage.environment gives no {what}: {type(error).__name__}: {error}; mend it, or raise "
                "stage.rollout.timeout_seconds"
            ) from error
