"""A sampler with a thread of its own that runs the requests of many other threads in one batch."""

import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from drivetrain.conf.errors import ConfigError, DrivetrainError
from drivetrain.model.generate import Completion, Request
from drivetrain.train.engine.base import Engine
from drivetrain.train.rl.guard import GivenUp
from drivetrain.train.rl.samplers.base import Completions


@dataclass(slots=True)
class _Call:
    """One call of `generate`. `places`: by request id, where its completions belong."""

    requests: Sequence[Request]
    found: Completions
    places: dict[int, int] = field(default_factory=dict)
    done: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None


class Batching(ABC):
    """A `Completer` for calls from many threads; everything below `generate` and `sync` happens in its own thread.

    Args:
        seconds: that one step may take, of all that is under way.
    """

    collective, follows = False, True

    def __init__(self, seconds: float) -> None:
        self.seconds, self.version = seconds, 0
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._calls: list[_Call] = []
        self._stepped = 0.0  # when a step last came to its end
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    # --- what an engine does, in the sampler's thread -------------------------------------------------------

    @abstractmethod
    def _submit(self, request: Request) -> int:
        """Queue a request; its id. ValueError: it cannot be done at all."""

    @abstractmethod
    def _step(self) -> list[tuple[int, list[Completion]]]:
        """Take every running sample a token further; the requests that are finished by it."""

    @abstractmethod
    def _cancel(self, request: int) -> None: ...

    @abstractmethod
    def _take_weights(self, engine: Engine, version: int) -> None:
        """In the caller's thread, while the sampler's waits."""

    @abstractmethod
    def _enter(self) -> None:
        """Once, before anything else in the sampler's thread."""

    # --- what others call -----------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def generate(self, requests: Sequence[Request]) -> Completions:
        if not requests:
            return []
        if self._closed:
            raise _closed()
        call = _Call(requests, [[] for _ in requests])
        self._inbox.put(lambda: self._begin(call))
        began = time.monotonic()
        while not call.done.wait(timeout=self.seconds):
            if time.monotonic() - max(began, self._stepped) >= self.seconds:
                self._inbox.put(lambda: self._drop(call, None))
                raise GivenUp(f"the sampler stands still since {self.seconds:g} s")
        if call.error is not None:
            raise call.error
        return call.found

    def sync(self, engine: Engine, version: int) -> None:
        with self._held():
            self._take_weights(engine, version)
            self.version = version

    def close(self) -> None:
        self._closed = True
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    @contextmanager
    def _held(self) -> Iterator[None]:
        """The sampler's thread waits, between two steps."""
        held, release = threading.Event(), threading.Event()

        def hold() -> None:
            held.set()
            release.wait()

        self._inbox.put(hold)
        while not held.wait(timeout=1):
            if not self._thread.is_alive():
                raise DrivetrainError("the sampler's thread has ended; the log says why")
        try:
            yield
        finally:
            release.set()

    # --- its thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._enter()
            while not self._closed:
                while not self._calls or not self._inbox.empty():
                    said = self._inbox.get()
                    if said is None:
                        return
                    said()
                self._advance()
        finally:
            self._closed = True
            for call in list(self._calls):
                self._drop(call, _closed())
            while not self._inbox.empty():  # calls that came too late
                if (said := self._inbox.get()) is not None:
                    said()

    def _begin(self, call: _Call) -> None:
        self._calls.append(call)
        if self._closed:
            return self._drop(call, _closed())
        try:
            for place, request in enumerate(call.requests):
                call.places[self._submit(request)] = place
        except ValueError as error:
            self._drop(call, ConfigError(str(error)))
        return None

    def _advance(self) -> None:
        try:
            finished = self._step()
        except Exception as error:  # nothing that runs can be trusted to go on
            for call in list(self._calls):
                self._drop(call, error)
            return
        finally:
            self._stepped = time.monotonic()
        for request, completions in finished:
            for call in self._calls:
                if (place := call.places.pop(request, None)) is not None:
                    call.found[place] = [*completions]
                    if not call.places:
                        self._calls.remove(call)
                        call.done.set()
                    break

    def _drop(self, call: _Call, error: Exception | None) -> None:
        if call in self._calls:
            self._calls.remove(call)
            for request in call.places:
                self._cancel(request)
            call.error = error
            call.done.set()


def _closed() -> DrivetrainError:
    return DrivetrainError("the sampler has been closed")
