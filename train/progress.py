"""What a run shows while it trains: one live line on a terminal, plain lines elsewhere."""

import math
import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

MIN_BAR = 8  # columns
REFRESH_SECONDS = 0.1


class Progress:
    """Rank 0's view of a run.

    Args:
        total_steps: optimizer steps of the whole run.
        start_step: steps already done when this segment began.
        tty: draw a live line; by default, when standard output is a terminal.
        every_seconds: without a live line, the longest silence between two printed lines.
        enabled: False (all ranks but 0) shows nothing.
        console: where to draw; by default standard output.
        clock: seconds, never going backwards.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        tty: bool | None = None,
        *,
        every_seconds: float = 10.0,
        enabled: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total_steps
        self._step = start_step
        self._metrics: dict[str, float] = {}
        self._every = every_seconds
        self._enabled = enabled
        self._clock = clock
        self._recent: deque[tuple[float, int]] = deque(maxlen=50)  # (seconds, step), to tell the time left
        self._shown_at = -math.inf
        self._shown_step = -1
        if tty is None:
            tty = sys.stdout.isatty() and not Console().is_dumb_terminal
        self._console = console or Console(force_terminal=tty)
        self._live: Live | None = None
        if enabled and tty:
            self._live = Live(console=self._console, auto_refresh=False, get_renderable=self._line)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Show `step` steps as done. A metric not given keeps its last value: an evaluation stays in view."""
        if not self._enabled:
            return
        now = self._clock()
        self._step = step
        self._metrics |= metrics
        self._recent.append((now, step))
        evaluated = any(name.startswith("eval/") for name in metrics)
        pause = REFRESH_SECONDS if self._live else self._every
        if evaluated or step >= self._total or now - self._shown_at >= pause:
            self._show(now)

    def note(self, text: str) -> None:
        """Print a line of its own, above the live line."""
        if not self._enabled:
            return
        if self._live:
            if not self._live.is_started:
                self._live.start()
            self._console.print(_printable(text), markup=False, highlight=False)
        else:
            self._print(text)

    def close(self) -> None:
        """Show the last step and let go of the terminal."""
        if not self._enabled:
            return
        if self._metrics and self._shown_step != self._step:
            self._show(self._clock())
        if self._live:
            self._live.stop()

    def _show(self, now: float) -> None:
        self._shown_at, self._shown_step = now, self._step
        if self._live is None:
            self._print("  ".join([f"step {self._step}/{self._total}", *self._parts()]))
            return
        if not self._live.is_started:
            self._live.start()
        self._live.refresh()

    def _print(self, text: str) -> None:
        print(_printable(text), file=self._console.file, flush=True)

    def _parts(self) -> list[str]:
        """The numbers to show, the most wanted first."""
        get = self._metrics.get
        parts = []
        if (loss := get("loss")) is not None:
            parts.append(f"loss {loss:.4f}")
        if (rate := get("tokens_per_second")) is not None:
            parts.append(f"{short(rate)} tok/s")
        if (left := self._seconds_left()) is not None:
            parts.append(f"eta {duration(left)}")
        if (evaluation := get("eval/loss")) is not None:
            parts.append(f"eval {evaluation:.4f}")
        if (mfu := get("mfu")) is not None and mfu == mfu:
            parts.append(f"mfu {mfu:.1%}")
        if (memory := get("memory_bytes")) is not None:
            parts.append(f"{memory / 2**30:.1f} GiB")
        return parts

    def _seconds_left(self) -> float | None:
        if len(self._recent) < 2 or self._recent[-1][1] <= self._recent[0][1]:
            return None
        (began, first), (ended, last) = self._recent[0], self._recent[-1]
        return (ended - began) / (last - first) * max(self._total - last, 0)

    def _line(self) -> Table:
        head = f"step {self._step}/{self._total}"
        parts = self._parts()
        while parts and len("  ".join([head, *parts])) + MIN_BAR + 4 > self._console.width:
            parts.pop()
        line = Table.grid(padding=(0, 2), expand=True)
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True)
        bar = ProgressBar(total=max(self._total, 1), completed=self._step)
        line.add_row(Text(head, "bold"), bar, Text("  ".join(parts)))
        return line


def short(number: float) -> str:
    """Three significant digits and a suffix (k, M, B, T): 12345 -> 12.3k."""
    if not math.isfinite(number):
        return str(number)
    for factor, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * factor:  # what would round up to 1000 takes the next suffix
            return f"{number / factor:.3g}{suffix}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """Two units are enough: 45s, 12m05s, 3h20m, 2d04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def _printable(text: str) -> str:
    """Without control characters: a completion in a note must not move the cursor or change its colours."""
    return "".join(char if char.isprintable() or char in "\n\t" else "�" for char in text)
