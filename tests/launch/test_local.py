"""What `local.run` says of an end, with a stand-in for torchrun; tests/e2e has the real one."""

import json
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from threading import Timer

import pytest

from drivetrain.conf.schema import ClusterConfig
from drivetrain.launch import local
from drivetrain.launch.local import Failure, Stopped

Run = Callable[..., Failure | Stopped | None]
LOCAL = ClusterConfig(name="local", nproc=2)

# As torchrun ends its log.
REPORT = """
[{number}]:
  time      : 2000-01-01_00:00:00
  host      : somewhere
  rank      : {rank} (local_rank: {rank})
  exitcode  : {code} (pid: 7)
  error_file: <N/A>
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run(code)`: the end of a job whose torchrun is this Python code, with `LOGS` its folder of logs."""
    logs = tmp_path / "logs"
    logs.mkdir()

    def call(code: str) -> Failure | Stopped | None:
        whole = (
            f"import json, os, signal, subprocess, sys, time\nLOGS = {str(logs)!r}\n{textwrap.dedent(code)}"
        )
        monkeypatch.setattr(local, "command", lambda *_: [sys.executable, "-c", whole])
        return local.run(LOCAL, tmp_path)

    return call


def report(*failed: tuple[int, int], status: int = 1) -> str:
    text = "".join(REPORT.format(number=i, rank=rank, code=code) for i, (rank, code) in enumerate(failed))
    return f"sys.stderr.write({text!r}); sys.exit({status})"


def leave(logs: Path, rank: int, message: str, status: int = 1, trace: bool = True) -> str:
    """Code that leaves a rank's own reason; a later one has a later time."""
    record = {"rank": rank, "time": time.time(), "status": status, "message": message, "trace": trace}
    path = str(logs / f"rank_{rank}.error.json")
    return f"open({path!r}, 'w').write({json.dumps(record)!r})\n"


def test_a_good_end_is_none(run: Run) -> None:
    assert run("") is None


def test_ranks_know_where_they_are(run: Run) -> None:
    assert (
        run("sys.exit(os.environ['PYTHONSAFEPATH'] != '1' or not int(os.environ['OMP_NUM_THREADS']))") is None
    )


def test_a_rank_killed_by_a_signal_is_the_reason(run: Run, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    (logs / "rank_1.log").write_text("\n".join(map(str, range(100))))
    lost = leave(logs, 0, "RuntimeError: Connection closed by peer")
    end = run(lost + report((0, 1), (1, -signal.SIGKILL)))
    assert isinstance(end, Failure)
    assert (end.rank, end.exit_status) == (1, 1)
    assert end.reason == "killed by SIGKILL (out of memory? see dmesg)"
    assert end.log == logs / "rank_1.log" and end.last_lines == [str(number) for number in range(85, 100)]


def test_the_first_reason_that_is_no_consequence(run: Run, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    records = leave(logs, 2, "RuntimeError: Connection reset") + leave(logs, 1, "the disk is full", 1, False)
    records += leave(logs, 0, "ValueError: later")
    assert run(records + report((0, 1), (1, 1), (2, 1))) == Failure(
        1, 1, "the disk is full", logs / "rank_1.log", []
    )
    assert run(leave(logs, 0, "a wrong setting", 2, False) + report((0, 2))) == Failure(
        0, 2, "a wrong setting", logs / "rank_0.log", []
    )


def test_reasons_and_reports_of_an_earlier_start_are_forgotten(run: Run, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    run(leave(logs, 0, "ValueError: old") + report((0, 1)))
    end = run("sys.exit(3)")
    assert isinstance(end, Failure)
    assert (end.rank, end.reason) == (None, "torchrun ended with status 3")
    (logs / "rank_0.error.json").write_text("")
    torn = f"open({str(logs / 'rank_1.error.json')!r}, 'w').write('{{')\n"
    end = run(torn + report((1, 1)))  # a full disk cut the record short
    assert isinstance(end, Failure) and (end.rank, end.reason) == (1, "torchrun ended with status 1")


def signalled(*delays: float) -> None:
    for delay in delays:
        Timer(delay, os.kill, (os.getpid(), signal.SIGTERM)).start()


RANKS = """
ranks = [subprocess.Popen([sys.executable, "-c", {code!r}], start_new_session=True) for _ in range(2)]
codes = [rank.wait() for rank in ranks]
"""


def test_ranks_that_save_when_they_are_asked_end_well(run: Run, tmp_path: Path) -> None:
    saves = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(0)); time.sleep(60)"
    before = signal.getsignal(signal.SIGTERM)
    signalled(1)
    assert run(RANKS.format(code=saves) + "sys.exit(any(codes))") is None
    assert signal.getsignal(signal.SIGTERM) is before


def test_ranks_that_cannot_listen_yet_are_stopped_and_no_failure(run: Run, tmp_path: Path) -> None:
    signalled(1)
    ranks = RANKS.format(code="import time; time.sleep(60)")
    said = report((0, -signal.SIGTERM), (1, -signal.SIGTERM))
    assert run(f"{ranks}assert codes == [-15, -15]\n{said}") == Stopped(before_training=True)


def test_before_there_are_ranks_torchrun_is_asked(run: Run) -> None:
    signalled(0.5)
    assert run("time.sleep(60)") == Stopped(before_training=True)


def test_a_failure_of_its_own_is_one_although_somebody_asked(run: Run, tmp_path: Path) -> None:
    signalled(1)
    ranks = RANKS.format(code="import time; time.sleep(60)")
    end = run(
        ranks + leave(tmp_path / "logs", 0, "OSError: disk full") + report((0, 1), (1, -signal.SIGTERM))
    )
    assert isinstance(end, Failure) and end.reason == "OSError: disk full"


def test_a_second_request_ends_ranks_that_do_not_listen(run: Run) -> None:
    """With all that torchrun has started, in whatever session."""
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
    signalled(1, 1.5)
    began = time.monotonic()
    assert run(RANKS.format(code=deaf)) == Stopped(before_training=False)
    assert time.monotonic() - began < 30
