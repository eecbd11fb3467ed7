import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from drivetrain.train.stop import SAME_REQUEST, Stop


@pytest.fixture
def stop() -> Iterator[Stop]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    listening = Stop()
    listening.listen()
    yield listening
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_request(stop: Stop, number: signal.Signals) -> None:
    assert not stop.requested
    signal.raise_signal(number)
    assert stop.requested


def test_repeats_are_the_same_request_and_a_later_one_ends_the_rank(
    stop: Stop, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        signal.raise_signal(number)
        now += 0.4 * SAME_REQUEST
    assert stop.requested
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)


def test_a_rank_listens_before_it_imports_anything_slow(tmp_path: Path) -> None:
    """Nothing that takes a noticeable time is imported by the module itself."""
    code = "import sys, drivetrain.train.__main__; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "hydra", "omegaconf", "deepspeed"} & set(done.stdout.split())


def test_as_many_files_as_the_system_allows() -> None:
    code = (
        "import resource; from drivetrain.train.process import allow_many_files; allow_many_files();"
        "print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 512)),
    )
    assert done.stdout.split() == ["512", "512"]
