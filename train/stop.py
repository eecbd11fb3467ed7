"""A request to stop, by signal. Standard library only, so that a rank listens before it imports anything slow."""

import signal
import time
from types import FrameType

SAME_REQUEST = 5.0  # seconds


class Stop:
    """Notes SIGTERM and SIGINT; the loop looks at `requested` between two steps.

    One request often comes as several signals: a scheduler signals every process, and torchrun, signalled itself,
    its ranks. What comes within 5 s of the first is the same request. Whoever asks after that wants the rank to end
    at once: KeyboardInterrupt is raised wherever it is.
    """

    def __init__(self) -> None:
        self._asked: float | None = None

    @property
    def requested(self) -> bool:
        return self._asked is not None

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked is None:
            self._asked = now
        elif now - self._asked > SAME_REQUEST:
            raise KeyboardInterrupt
