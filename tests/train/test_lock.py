"""The lock of a run directory, between real processes."""

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from drivetrain.conf.errors import ConfigError
from drivetrain.train import lock
from drivetrain.train.lock import LOCK, lock_run_dir

Start = Callable[..., subprocess.Popen[str]]
HOST = platform.node()

# A job: says "held" or why not, starts a child of its own if asked, and ends when its standard input does.
JOB = """
import subprocess, sys
from pathlib import Path
from drivetrain.conf.errors import ConfigError
from drivetrain.train.lock import lock_run_dir
try:
    lock_run_dir(Path(sys.argv[1]))
except ConfigError as error:
    print(error, flush=True)
    raise SystemExit(2)
print("held", flush=True)
if sys.argv[2:]:
    child = subprocess.Popen([sys.executable, "-c", *sys.argv[2:3], sys.argv[1], *sys.argv[3:]])
    print(child.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start(code, ...)`: a job, which runs the first code as a child of its own, and so on."""
    jobs = []

    def begin(*children: str) -> subprocess.Popen[str]:
        jobs.append(
            subprocess.Popen(
                [sys.executable, "-c", JOB, str(tmp_path), *children],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONSAFEPATH": "1"},
            )
        )
        return jobs[-1]

    yield begin
    for job in jobs:
        job.kill()
        job.communicate()


def line(job: subprocess.Popen[str]) -> str:
    assert job.stdout is not None
    return job.stdout.readline().rstrip("\n")


def holders(run_dir: Path) -> list[str]:
    return (run_dir / LOCK).read_text().splitlines()


def test_a_second_job_is_refused_and_told_who_is_there(start: Start, tmp_path: Path) -> None:
    first = start()
    assert line(first) == "held"
    assert holders(tmp_path) == [f"{HOST} {first.pid}"]
    sentence = f"{tmp_path} is in use by process {first.pid} on {HOST}; wait for that job or stop it"
    second = start()
    assert line(second) == sentence and second.wait() == 2
    with pytest.raises(ConfigError) as caught:
        lock_run_dir(tmp_path)
    assert str(caught.value) == sentence
    assert holders(tmp_path) == [f"{HOST} {first.pid}"]


@pytest.mark.parametrize("killed", [True, False])
def test_a_holder_that_ends_frees_it(killed: bool, start: Start, tmp_path: Path) -> None:
    first = start()
    assert line(first) == "held"
    if killed:
        first.kill()
    first.communicate()
    assert holders(tmp_path) == [f"{HOST} {first.pid}"]  # stale: the process is gone
    second = start()
    assert line(second) == "held"
    assert holders(tmp_path) == [f"{HOST} {second.pid}"]


def test_closing_the_descriptor_frees_it(start: Start, tmp_path: Path) -> None:
    os.close(lock_run_dir(tmp_path))
    job = start()
    assert line(job) == "held"


def test_a_launcher_shares_it_with_its_ranks_and_they_outlive_it(start: Start, tmp_path: Path) -> None:
    """A launcher, torchrun, which locks nothing, and a rank."""
    torchrun = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[2], sys.argv[1]])"
    launcher = start(torchrun, JOB)
    said = sorted(line(launcher) for _ in range(3))  # the two "held" and the number of torchrun
    assert said[1:] == ["held", "held"]
    between = int(said[0])
    (rank,) = psutil.Process(between).children()
    assert holders(tmp_path) == [f"{HOST} {launcher.pid}", f"{HOST} {rank.pid}"]
    launcher.kill()
    launcher.wait()
    try:
        stranger = start()
        assert line(stranger) == (
            f"{tmp_path} is in use by process {rank.pid} on {HOST}; wait for that job or stop it"
        )
    finally:
        psutil.Process(between).kill()
        rank.kill()
    psutil.wait_procs([rank], timeout=30)
    assert line(start()) == "held"


@pytest.mark.parametrize(
    "stale",
    [
        f"{HOST} {{me}}\n",  # the number of a process that ended has come round again
        "elsewhere 1\n",
        "torn",
        "a b c\n\n",
        "",
    ],
)
def test_a_stale_file_confuses_nobody(stale: str, start: Start, tmp_path: Path) -> None:
    path = tmp_path / LOCK
    path.write_bytes(stale.format(me=os.getpid()).encode())
    job = start()
    assert line(job) == "held"
    assert holders(tmp_path) == [f"{HOST} {job.pid}"]


@pytest.mark.parametrize(
    ("lines", "who"),
    [
        (b"", ""),
        (b"a b c\n\n", ""),
        (b"elsewhere 7\n", " by process 7 on elsewhere"),
        (f"{HOST} {2**22 + 1}\nelsewhere 7\n".encode(), " by process 7 on elsewhere"),
    ],
)
def test_the_one_who_is_named_is_alive_or_elsewhere(
    lines: bytes, who: str, start: Start, tmp_path: Path
) -> None:
    """2^22 is the largest number of a process on Linux."""
    assert line(start()) == "held"
    (tmp_path / LOCK).write_bytes(lines)
    with pytest.raises(ConfigError) as caught:
        lock_run_dir(tmp_path)
    assert str(caught.value) == f"{tmp_path} is in use{who}; wait for that job or stop it"


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.lock cannot be written: No such file or directory"):
        lock_run_dir(tmp_path / "nowhere")


def test_without_locks_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    os.close(lock_run_dir(tmp_path))
    assert f"{tmp_path / LOCK} cannot be locked (Operation not supported)" in capsys.readouterr().err


def test_of_many_at_once_one_gets_it(start: Start) -> None:
    jobs = [start() for _ in range(8)]
    assert sorted(line(job) == "held" for job in jobs) == [False] * 7 + [True]
