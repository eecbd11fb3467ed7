"""A build that is interrupted, loses a process or the room on its disk leaves nothing half-written."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from drivetrain.conf.errors import ConfigError
from drivetrain.data.build import build

WaitUntil = Callable[[Callable[[], object]], None]

SCRIPT = """
import resource, sys
from pathlib import Path
from drivetrain.conf.errors import DrivetrainError
from drivetrain.data.build import build
source, tokenizer, out, room = sys.argv[1:]
if int(room):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(room), int(room)))
try:
    build([Path(source)], Path(tokenizer), Path(out), workers=2, progress=False)
except DrivetrainError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def start(source: Path, tokenizer: Path, out: Path, room: int = 0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(source), str(tokenizer), str(out), str(room)],
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a process group of its own, as a terminal makes
        # A shell starts background jobs, these tests too, with SIGINT ignored; a build at a terminal has it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def running(group: int) -> list[int]:
    """The processes of a group that run; one that ended and awaits its parent does not count."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, process_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(process_group) == group and state != "Z":
                found.append(int(entry.name))
    return found


def is_worker(process: int) -> bool:
    return b"spawn_main" in Path(f"/proc/{process}/cmdline").read_bytes()


@pytest.fixture(scope="module")
def large(many: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 60 MB, which takes much longer to tokenise than a test lasts."""
    path = tmp_path_factory.mktemp("large") / "large.jsonl"
    lines = many.read_bytes()
    path.write_bytes(lines * (60_000_000 // len(lines)))
    return path


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")


@needs_proc
def test_interrupted_or_killed_builds_leave_no_output_and_no_process(
    large: Path, many: Path, tokenizer: Path, tmp_path: Path, wait_until: WaitUntil
) -> None:
    out = tmp_path / "out"
    unfinished = tmp_path / ".out.building"

    interrupted = start(large, tokenizer, out)
    wait_until(lambda: list(unfinished.glob("*.bin.tmp")))
    with pytest.raises(ConfigError, match="another build is writing"):
        build([many], tokenizer, out, 1, progress=False)
    os.killpg(interrupted.pid, signal.SIGINT)  # what Ctrl-C sends
    _, stderr = interrupted.communicate(timeout=30)
    assert interrupted.returncode == -signal.SIGINT
    assert stderr.count("Traceback") == 1 and "Process Spawn" not in stderr
    wait_until(lambda: not running(interrupted.pid))
    assert not list(tmp_path.iterdir())

    killed = start(large, tokenizer, out)
    wait_until(lambda: list(unfinished.glob("*.bin.tmp")))
    killed.kill()
    killed.communicate(timeout=30)
    wait_until(lambda: not running(killed.pid))
    assert not out.exists() and unfinished.exists()

    build([many], tokenizer, out, 1, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert not list(out.rglob("*.tmp"))


@needs_proc
def test_a_killed_worker_is_one_sentence_and_leaves_nothing(
    large: Path, tokenizer: Path, tmp_path: Path, wait_until: WaitUntil
) -> None:
    build_process = start(large, tokenizer, tmp_path / "out")
    wait_until(lambda: list((tmp_path / ".out.building").glob("*.bin.tmp")))
    os.kill(next(filter(is_worker, running(build_process.pid))), signal.SIGKILL)
    _, stderr = build_process.communicate(timeout=60)
    assert build_process.returncode == 1
    assert stderr.startswith("DrivetrainError: a tokenising process died; ") and stderr.count("\n") == 1
    wait_until(lambda: not running(build_process.pid))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_sentence_and_leaves_nothing(many: Path, tokenizer: Path, tmp_path: Path) -> None:
    full = start(many, tokenizer, tmp_path / "out", room=200_000)
    _, stderr = full.communicate(timeout=60)
    assert full.returncode == 1
    assert (
        stderr.startswith(f"DataError: no room left for {tmp_path / 'out'} after ")
        and stderr.count("\n") == 1
    )
    assert not list(tmp_path.iterdir())
