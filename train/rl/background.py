"""Groups that threads of this rank make, while it does something else. Nothing here meets another rank."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from drivetrain.conf.errors import DrivetrainError
from drivetrain.train.rl.guard import Warnings, each_or_none

A = TypeVar("A")  # what is asked
B = TypeVar("B")  # what was answered
C = TypeVar("C")  # with its score


class Background(Generic[A, B, C]):
    """Each number that is started has a thread in which it is answered; one more scores what waits, together.

    What fails, or takes too long, is tried again, and then is None.

    Args:
        answer: may wait long, but not for ever. score: as many results as it is given.
        seconds: for one scoring. retries: of an answer, and of a scoring.
    """

    def __init__(
        self,
        answer: Callable[[A], B],
        score: Callable[[Sequence[tuple[int, A, B]]], list[C]],
        seconds: float,
        retries: int,
        warnings: Warnings,
    ) -> None:
        self.answer, self.score, self.warnings = answer, score, warnings
        self.seconds, self.retries = seconds, retries
        self.answer_seconds = self.score_seconds = 0.0  # since they were taken last; of answers the sum
        self.answers = 0
        self._found: dict[int, C | None] = {}
        self._waiting: queue.SimpleQueue[tuple[int, A, B] | None] = queue.SimpleQueue()
        self._error: DrivetrainError | None = None
        self._closed = False
        threading.Thread(target=self._score, name="scorer", daemon=True).start()

    def start(self, number: int, asked: A) -> None:
        threading.Thread(target=self._one, args=(number, asked), name=f"group {number}", daemon=True).start()

    def found(self) -> dict[int, C | None]:
        """What is done.

        Raises:
            DrivetrainError: what a user has to mend.
        """
        if self._error is not None:
            raise self._error
        return dict(self._found)

    def take(self, number: int) -> C | None:
        """Let go of what is done."""
        return self._found.pop(number)

    def times(self) -> tuple[float, float]:
        """Seconds that an answer took, on average, and that scoring took in all, since the last call."""
        found = self.answer_seconds / max(1, self.answers), self.score_seconds
        self.answer_seconds = self.score_seconds = 0.0
        self.answers = 0
        return found

    def close(self) -> None:
        self._closed = True
        self._waiting.put(None)

    def _one(self, number: int, asked: A) -> None:
        began = time.perf_counter()
        for _ in range(1 + self.retries):
            if self._closed:
                return
            try:
                answered = self.answer(asked)
            except DrivetrainError as error:
                self._error = error
                return
            except Exception as error:
                self.warnings.say("a prompt was not completed", error)
            else:
                self.answer_seconds += time.perf_counter() - began
                self.answers += 1
                self._waiting.put((number, asked, answered))
                return
        self._found[number] = None

    def _score(self) -> None:
        while (first := self._waiting.get()) is not None:
            items = [first]
            while not self._waiting.empty():
                if (more := self._waiting.get()) is None:
                    return
                items.append(more)
            began = time.perf_counter()
            try:
                scored = each_or_none(self.score, items, self.seconds, self.retries, self.warnings)
            except DrivetrainError as error:
                self._error = error
                return
            self.score_seconds += time.perf_counter() - began
            self._found.update({number: one for (number, _, _), one in zip(items, scored, strict=True)})
