import io
import os
import pty
import re
import subprocess
import sys

import pytest
from rich.console import Console

from drivetrain.train.progress import Progress, duration, short


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run_plain(seconds_per_step: float, steps: int, evals: tuple[int, ...] = ()) -> list[str]:
    out = io.StringIO()
    clock = Clock()
    with Progress(steps, tty=False, console=Console(file=out), clock=clock) as progress:
        for step in range(1, steps + 1):
            clock.now += seconds_per_step
            evaluation = {"eval/loss": 3.0} if step in evals else {}
            progress.update(step, {"loss": 4.0, "tokens_per_second": 12345.0, **evaluation})
    return out.getvalue().splitlines()


def test_plain_lines_come_every_ten_seconds_at_each_eval_and_at_the_end() -> None:
    lines = run_plain(seconds_per_step=1.0, steps=35, evals=(17,))
    assert [line.split()[1] for line in lines] == ["1/35", "11/35", "17/35", "27/35", "35/35"]
    assert "eval" not in lines[1] and "eval 3.0000" in lines[2] and "eval 3.0000" in lines[4]


def test_plain_line_names_each_number() -> None:
    assert run_plain(seconds_per_step=11.0, steps=3)[1] == "step 2/3  loss 4.0000  12.3k tok/s  eta 11s"


def test_time_left_counts_only_this_segment() -> None:
    out, clock = io.StringIO(), Clock()
    progress = Progress(1000, 900, tty=False, console=Console(file=out), clock=clock, every_seconds=0)
    for step in (901, 902):
        clock.now += 2.0
        progress.update(step, {"loss": 1.0})
    assert "eta 3m16s" in out.getvalue()


def test_last_step_is_shown_on_close_even_between_two_lines() -> None:
    out, clock = io.StringIO(), Clock()
    with Progress(100, tty=False, console=Console(file=out), clock=clock) as progress:
        progress.update(1, {"loss": 2.0})
        progress.update(2, {"loss": 1.0})
    assert out.getvalue().splitlines()[-1].startswith("step 2/100  loss 1.0000")


def test_hostile_note_cannot_move_the_cursor() -> None:
    out = io.StringIO()
    Progress(1, tty=False, console=Console(file=out)).note("sample \x1b[2J\x1b[31m[bold]evil[/bold]\r end")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", out.getvalue())
    assert "[bold]evil[/bold]" in out.getvalue()


@pytest.mark.parametrize("width", [30, 50, 80, 200])
def test_live_line_fits_the_terminal_and_notes_stay_above_it(width: int) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, color_system=None)
    with Progress(2000, tty=True, console=console) as progress:
        for step in (1, 2):
            metrics = {"loss": 3.25, "tokens_per_second": 9.5e5, "mfu": 0.41, "memory_bytes": 2.0**31}
            progress.update(step, {**metrics, "eval/loss": 3.5})
        progress.note("saved \x1b[2J")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    assert max(map(len, lines)) <= width
    assert lines[-1].startswith("step 2/2000") and any(line.startswith("saved �") for line in lines[:-1])
    assert ("loss 3.2500" in lines[-1]) == (width > 30)
    assert ("2.0 GiB" in lines[-1]) == (width == 200)


SCRIPT = """
from drivetrain.train.progress import Progress
with Progress(3) as progress:
    for step in (1, 2, 3):
        progress.update(step, {"loss": 1.0 / step})
        progress.note(f"done {step}")
"""


def test_real_terminal_gets_a_live_line_and_a_pipe_gets_plain_text() -> None:
    environment = {**os.environ, "TERM": "xterm", "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", SCRIPT]
    piped = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert "\x1b" not in piped.stdout and "step 3/3  loss 0.3333" in piped.stdout
    parent, child = pty.openpty()
    process = subprocess.Popen(command, env=environment, stdout=child, stdin=child)
    os.close(child)
    seen = b""
    while True:
        try:
            chunk = os.read(parent, 65536)
        except OSError:  # Linux: the other end has closed
            break
        if not chunk:
            break
        seen += chunk
    os.close(parent)
    assert process.wait(timeout=60) == 0
    text = seen.decode()
    assert "\x1b[?25l" in text and text.count("\x1b[?25h") >= 1  # the cursor was hidden, and came back
    assert "done 2" in text and "step 3/3" in text


def test_ranks_other_than_zero_show_nothing() -> None:
    out = io.StringIO()
    with Progress(2, enabled=False, tty=True, console=Console(file=out, force_terminal=True)) as progress:
        progress.update(1, {"loss": 1.0})
        progress.note("nothing")
    assert out.getvalue() == ""


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.0, "0"),
        (7.25, "7.25"),
        (999.4, "999"),
        (999.9, "1k"),
        (12345, "12.3k"),
        (9.999e5, "1M"),
        (1.3e9, "1.3B"),
        (3e12, "3T"),
    ],
)
def test_short(number: float, text: str) -> None:
    assert short(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.6, "1m00s"), (725, "12m05s"), (12000, "3h20m"), (187300, "2d04h")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_not_a_number_is_shown_as_such() -> None:
    out = io.StringIO()
    Progress(5, tty=False, console=Console(file=out)).update(1, {"loss": float("nan"), "mfu": float("nan")})
    assert out.getvalue() == "step 1/5  loss nan\n"
