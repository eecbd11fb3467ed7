"""One training at a time in a run directory: flock(2) on `RUN_DIR/.lock`.

The launcher takes it, and so does rank 0, which may have been started without one, and which outlives a launcher
that is killed. Whoever has taken it shares it with the processes that it started, so the two of one job agree.
"""

import contextlib
import fcntl
import os
import platform
import sys
from pathlib import Path

import psutil

from drivetrain.conf.errors import ConfigError

LOCK = ".lock"  # one line for each process that holds it: its host and its number


def lock_run_dir(run_dir: Path) -> int:
    """Hold a run directory until this process ends or closes the descriptor that is returned.

    Raises:
        ConfigError: another job is at work there, or the file cannot be written.
    """
    path = run_dir / LOCK
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}; choose another run_dir") from error
    me = f"{platform.node()} {os.getpid()}\n"
    try:
        if _try(handle, fcntl.LOCK_EX):
            os.ftruncate(handle, 0)
            os.write(handle, me.encode())
            fcntl.flock(handle, fcntl.LOCK_SH)  # not one motion: another job may come between
            if path.read_text().startswith(me):
                return handle
        holders = path.read_text().splitlines()
        if _mine(holders) and _try(handle, fcntl.LOCK_SH):
            os.write(handle, me.encode())
            return handle
    except OSError as error:  # a file system without locks, or a full one
        print(
            f"warning: {path} cannot be locked ({error.strerror}): start no second job there", file=sys.stderr
        )
        return handle
    os.close(handle)
    raise ConfigError(f"{run_dir} is in use{_by(holders)}; wait for that job or stop it")


def _try(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _mine(holders: list[str]) -> bool:
    """Whether this process, or one that started it, directly or not, is among them."""
    this = psutil.Process()
    family = {f"{platform.node()} {process.pid}" for process in (this, *this.parents())}
    return not family.isdisjoint(holders)


def _by(holders: list[str]) -> str:
    """The holder that a person can look for."""
    living = []
    for holder in holders:
        with contextlib.suppress(ValueError):
            host, number = holder.split()
            if host != platform.node() or psutil.pid_exists(int(number)):
                living.append(f"process {number} on {host}")
    return f" by {living[0]}" if living else ""
