"""One `Generator` in a thread of its own, and the clients of an event loop that share it.

The loop puts orders in and takes events out; the thread alone touches the generator. Between two steps, each a
token of every sample that runs, it takes what has come in, so that a new request joins those that run.
"""

import asyncio
import contextlib
import queue
import threading
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from drivetrain.model.generate import Event, Generator, Request

T = TypeVar("T")


class Busy(Exception):
    """As many requests wait as may."""


class StepError(Exception):
    """The generator failed while this order ran."""


class Order:
    """Requests of one client, accepted or refused together. `async for place, event in order`: the events of
    all of them with the request's place in the order; ends after the last, raises StepError."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.waiting = set(range(len(requests)))  # places without an event yet
        self.loop = asyncio.get_running_loop()
        self.accepted: asyncio.Future[None] = self.loop.create_future()
        self._found: asyncio.Queue[list[tuple[int, Event]] | StepError] = asyncio.Queue()
        self.released = False

    def put(self, found: list[tuple[int, Event]] | StepError) -> None:
        if not isinstance(found, StepError):
            self.waiting.difference_update(place for place, _ in found)
        self._found.put_nowait(found)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        left = sum(request.samples for request in self.requests)
        while left:
            found = await self._found.get()
            if isinstance(found, StepError):
                raise found
            for place, event in found:
                left -= event.finish_reason is not None
                yield place, event


class Worker:
    """Runs a generator until `close`.

    Args:
        max_waiting: requests without a first token at one time; more are refused.
    """

    def __init__(self, generator: Generator, max_waiting: int) -> None:
        self.generator, self.max_waiting = generator, max_waiting
        self.orders: set[Order] = set()  # the loop's, as `waiting`
        self.working = 0  # the loop's: calls of `run` that are not done
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        # The thread's: by the generator's number of the request; and what `run` shall do.
        self._places: dict[int, tuple[Order, int]] = {}
        self._work: deque[Callable[[], None]] = deque()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="generator", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        return self.working + sum(len(order.waiting) for order in self.orders)

    async def submit(self, requests: Sequence[Request]) -> Order:
        """Queue requests; what comes back is to be released.

        Raises:
            Busy: too many wait. ValueError: the generator refuses one of them.
        """
        if self.waiting + len(requests) > self.max_waiting:
            raise Busy
        order = Order(requests)
        self.orders.add(order)
        self._inbox.put(partial(self._submit, order))
        try:
            await order.accepted
        except BaseException:
            self.release(order)
            raise
        return order

    async def run(self, work: Callable[[], T]) -> T:
        """What `work` returns, which has the model to itself between two steps.

        Raises:
            Busy: too many wait. StepError: it failed.
        """
        if self.waiting >= self.max_waiting:
            raise Busy
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        self.working += 1
        self._inbox.put(partial(self._work.append, partial(_do, work, done, loop)))
        try:
            return await done
        finally:
            self.working -= 1

    def release(self, order: Order) -> None:
        """Forget an order and free what it still holds."""
        self.orders.discard(order)
        self._inbox.put(partial(self._release, order))

    def close(self, seconds: float) -> None:
        """End the thread after the step that it is in."""
        self._inbox.put(self._close)
        self._thread.join(seconds)

    # --- in the thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing:
            self._obey()
            if self._work and not self._closing:
                self._work.popleft()()
            if self.generator.busy and not self._closing:
                self._step()

    def _obey(self) -> None:
        """Do what has come in; with nothing to run, wait for it."""
        block = not (self.generator.busy or self._work)
        with contextlib.suppress(queue.Empty):
            while True:
                self._inbox.get(block)()
                block = False

    def _close(self) -> None:
        self._closing = True

    def _submit(self, order: Order) -> None:
        if order.released:
            return
        try:
            for place, request in enumerate(order.requests):
                self._places[self.generator.submit(request)] = (order, place)
        except Exception as error:
            self._release(order)
            _tell(order, _fail, order.accepted, error)
        else:
            _tell(order, _settle, order.accepted, None)

    def _release(self, order: Order) -> None:
        order.released = True
        for number in [number for number, (held, _) in self._places.items() if held is order]:
            self.generator.cancel(number)
            del self._places[number]

    def _step(self) -> None:
        try:
            events = self.generator.step()
        except (
            Exception
        ) as error:  # broken weights, or no memory left: those that run are lost, the server is not
            traceback.print_exc()
            for order in {order for order, _ in self._places.values()}:
                self._release(order)
                _tell(order, order.put, StepError(str(error).partition("\n")[0]))
            return
        found: dict[Order, list[tuple[int, Event]]] = {}
        for event in events:
            order, place = self._places[event.request]
            found.setdefault(order, []).append((place, event))
        for order, each in found.items():
            _tell(order, order.put, each)


def _do(work: Callable[[], T], done: "asyncio.Future[T]", loop: asyncio.AbstractEventLoop) -> None:
    if done.cancelled():
        return
    try:
        found = work()
    except Exception as error:
        traceback.print_exc()
        _call_in(loop, _fail, done, StepError(str(error).partition("\n")[0]))
    else:
        _call_in(loop, _settle, done, found)


def _tell(order: Order, call: Callable[..., None], *arguments: Any) -> None:
    _call_in(order.loop, call, *arguments)


def _call_in(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *arguments: Any) -> None:
    """Unless it is closed."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call, *arguments)


def _settle(future: "asyncio.Future[T]", found: T) -> None:
    if not future.done():
        future.set_result(found)


def _fail(future: "asyncio.Future[Any]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
