"""Runs code that a model wrote where it can do no harm, and says how it ended.

Each run has a process and session of its own (`jail.py`), behind one of two walls:

- namespaces: no network, no other process in sight, a root directory with the Python installation and four devices,
  a throw-away home in memory. A superuser's code runs as a user that nobody else is.
- filters, where containers refuse the former: Landlock opens the Python installation and the throw-away directory
  only; seccomp refuses sockets. As the superuser it is a user that nobody else is; as a plain user it can start
  neither processes nor threads, and signal nobody.

Both have the seccomp filter of `walls.py`, limits, an empty environment, no descriptors but the three streams. When
the code ends, or is ended, everything that it has started is killed.
"""

import contextlib
import functools
import marshal
import math
import os
import random
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any, Self

from drivetrain.conf.errors import ConfigError
from drivetrain.conf.rewards import SandboxConfig, Walls

_MIB = 1 << 20
_THREADS = 32  # of code that may not start processes
_OPEN_FILES = 64
_START_SECONDS = 30.0  # that a loaded machine may take before and after the code's own time
_STRANGERS = range(
    1_900_000_000, 2_100_000_000
)  # user ids beyond those that systemd and its containers give out
_START = "import sys; sys.path.append(sys.argv[1]); import jail; jail.main(int(sys.argv[2]))"
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "MALLOC_ARENA_MAX": "1",  # each arena takes 64 MiB of the address space, and threads have their own
    "PYTHONHASHSEED": "0",  # the same run twice prints the same
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
}


class NoWalls(ConfigError):
    """This machine cannot shut code in; another one may."""


class Status(Enum):
    """How code ended: with status 0; with another one; it took too long; it wanted too much memory; it printed or
    stored too much; by a signal."""

    ok = "ok"
    failed = "failed"
    timeout = "timeout"
    memory = "memory"
    output = "output"
    killed = "killed"


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes and seconds. `memory` is shared out evenly among `processes`; with one, none can be started."""

    seconds: float = 10.0
    cpu_seconds: int = 10
    memory: int = 512 * _MIB
    disk: int = 64 * _MIB
    output: int = _MIB
    processes: int = 1

    def __post_init__(self) -> None:
        for name in ("seconds", "cpu_seconds", "memory", "disk", "output", "processes"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"a sandbox's {name} is {getattr(self, name)}; use a number above 0")

    @classmethod
    def of(cls, config: SandboxConfig) -> Self:
        return cls(
            config.seconds,
            config.cpu_seconds,
            config.memory * _MIB,
            config.disk * _MIB,
            config.output * _MIB,
            config.processes,
        )


@dataclass(frozen=True, slots=True)
class Result:
    """How it ended, what it printed (cut at `Limits.output`), wall seconds without those that the walls take."""

    status: Status
    stdout: str
    stderr: str
    seconds: float


@dataclass(frozen=True, slots=True)
class _Means:
    walls: Walls
    stranger: bool  # as a user that nobody else is


def run(
    code: str,
    *,
    stdin: str = "",
    files: Mapping[str, str | bytes] | None = None,
    limits: Limits | None = None,
    walls: Walls = Walls.auto,
    packages: bool = False,
) -> Result:
    """Run a Python program. Safe to call from many threads.

    Args:
        stdin: what it can read.
        files: laid into its directory, by relative path.
        packages: let it import what is installed beside drivetrain.

    Raises:
        ConfigError: nothing on this machine can shut it in as asked, or a file's path leaves the directory.
    """
    limits = limits or Limits()
    means = _choose(walls)
    counted = means.stranger or (means.walls is Walls.namespaces and os.geteuid() != 0)
    if limits.processes > 1 and not (counted or means.walls is Walls.none):
        raise ConfigError(
            "code behind filters, or with the superuser's own number, can have one process only: nothing would "
            "count more; use processes=1"
        )
    return _run(code, stdin, files or {}, limits, means, packages)


def describe(walls: Walls = Walls.auto) -> str:
    """What code is shut in by here, in words.

    Raises:
        NoWalls: nothing can.
    """
    means = _choose(walls)
    return f"{means.walls.name}, as {'a user of its own' if means.stranger else 'this user'}"


@functools.lru_cache
def _choose(walls: Walls) -> _Means:
    """The best that works, by trying."""
    root = os.geteuid() == 0
    if walls is Walls.none:
        return _Means(Walls.none, False)
    kinds = (Walls.namespaces, Walls.filters) if walls is Walls.auto else (walls,)
    refused = []
    for kind in kinds:
        for stranger in (True, False) if root else (False,):
            if stranger and (_stranger() is None or (kind is Walls.filters and not _open_to_all())):
                continue
            means = _Means(kind, stranger)
            try:
                result = _run("print(6 * 7)", "", {}, Limits(seconds=60), means, False)
            except ConfigError as error:
                refused.append(f"{kind.name}: {error}")
                continue
            if result.stdout == "42\n":
                return means
            refused.append(f"{kind.name}: {result.status.name}: {result.stderr.strip()[-200:]}")
    raise NoWalls(
        f"code cannot be shut in on this machine ({'; '.join(refused)}); use Linux 5.13 or newer, or walls=none on "
        "a machine that may be lost"
    )


def _run(
    code: str, stdin: str, files: Mapping[str, str | bytes], limits: Limits, means: _Means, packages: bool
) -> Result:
    if means.walls is Walls.namespaces:
        return _jailed(_order("", code, files, limits, means, packages), stdin, limits)
    box = tempfile.mkdtemp(prefix="box-")
    try:
        order = _order(box, code, files, limits, means, packages)
        if order["uid"] is not None:
            os.chown(box, order["uid"], order["uid"])
        return _jailed(order, stdin, limits)
    finally:
        _remove(box)


def _jailed(order: dict[str, Any], stdin: str, limits: Limits) -> Result:
    with _Run(order, _bytes(stdin), limits) as run:
        return run.finish()


def _order(
    box: str, code: str, files: Mapping[str, str | bytes], limits: Limits, means: _Means, packages: bool
) -> dict[str, Any]:
    """What `jail.py` reads."""
    contents = {_inside(name): _bytes(content) for name, content in {**files, "main.py": code}.items()}
    sites = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}) if packages else []
    return {
        "walls": means.walls.name,
        "uid": _stranger() if means.stranger else None,
        "box": box,
        "files": contents,
        "python": _python(),
        "packages": sites,
        "readable": [*_readable(), *sites],
        "environment": _ENVIRONMENT,
        "seconds": float(limits.seconds),
        "cpu_seconds": max(1, math.ceil(limits.cpu_seconds)),
        "memory": limits.memory // limits.processes,
        "disk": limits.disk,
        "processes": limits.processes,
        "threads": _THREADS,
        "open_files": _OPEN_FILES,
    }


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
        raise ConfigError(f"{name!r} is no path within the sandbox; use a relative one without ..")
    return str(path)


def _bytes(content: str | bytes) -> bytes:
    return content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content


class _Run:
    """One jail, and the talk with it."""

    def __init__(self, order: dict[str, Any], stdin: bytes, limits: Limits) -> None:
        self.limits, self.stdin = limits, memoryview(stdin)
        self.deadline = time.monotonic() + limits.seconds + _START_SECONDS
        self.printed = {"stdout": bytearray(), "stderr": bytearray()}
        self.answer = bytearray()
        self.too_much = False
        data = marshal.dumps(order)
        self.ours, theirs = socket.socketpair()
        with theirs:
            self.jail = subprocess.Popen(
                [_python(), "-I", "-S", "-c", _START, str(Path(__file__).parent), str(theirs.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={},
                cwd="/",
            )
        with contextlib.suppress(BrokenPipeError):
            self.ours.sendall(len(data).to_bytes(8, "big") + data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.ours.close()
        if self.jail.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.jail.wait(_START_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.jail.pid, signal.SIGKILL)
            self.jail.wait()
        for stream in (self.jail.stdin, self.jail.stdout, self.jail.stderr):
            with contextlib.suppress(BrokenPipeError):
                stream.close()  # type: ignore[union-attr]

    def finish(self) -> Result:
        self._talk()
        stdout, stderr = (
            bytes(text)[: self.limits.output].decode("utf-8", "replace") for text in self.printed.values()
        )
        reason, *rest = self.answer.decode().split(" ", 4) if self.answer else ("timeout", "0", "0", "0", "")
        if reason == "walls":
            raise ConfigError(rest[3])
        if not self.answer and time.monotonic() < self.deadline:
            raise ConfigError(f"the sandbox itself failed: {stderr.strip()[-500:]}")
        status, cpu, seconds = int(rest[0]), float(rest[1]), float(rest[2])
        return Result(self._status(reason, status, cpu, stderr), stdout, stderr, seconds)

    def _status(self, reason: str, wait_status: int, cpu: float, stderr: str) -> Status:
        if self.too_much or reason == "disk":
            return Status.output
        if reason != "ended":
            return Status.timeout
        code = os.waitstatus_to_exitcode(wait_status)
        if code == 0:
            return Status.ok
        if code == -signal.SIGXCPU or (code == -signal.SIGKILL and cpu >= self.limits.cpu_seconds):
            return Status.timeout
        last = stderr.rstrip().rpartition("\n")[2].partition(":")[0]
        if code > 0 and last.endswith("MemoryError"):
            return Status.memory
        return Status.failed if code > 0 else Status.killed

    def _talk(self) -> None:
        """Feed it, listen to it, stop it when it says too much; until it is done or the deadline has passed."""
        with selectors.DefaultSelector() as selector:
            assert self.jail.stdin and self.jail.stdout and self.jail.stderr
            os.set_blocking(self.jail.stdin.fileno(), False)
            selector.register(self.jail.stdin, selectors.EVENT_WRITE, "stdin")
            for stream, name in (
                (self.jail.stdout, "stdout"),
                (self.jail.stderr, "stderr"),
                (self.ours, "answer"),
            ):
                selector.register(stream, selectors.EVENT_READ, name)
            open_streams = 3
            while open_streams and (left := self.deadline - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    if key.data == "stdin":
                        if not self._feed():
                            selector.unregister(key.fileobj)
                            self.jail.stdin.close()
                        continue
                    part = os.read(key.fd, 1 << 16)
                    if not part:
                        selector.unregister(key.fileobj)
                        open_streams -= 1
                    self._take(key.data, part)

    def _feed(self) -> bool:
        """Whether there is more to come."""
        try:
            self.stdin = self.stdin[os.write(self.jail.stdin.fileno(), self.stdin[: 1 << 16]) :]  # type: ignore[union-attr]
        except BlockingIOError:
            return True
        except BrokenPipeError:
            return False
        return len(self.stdin) > 0

    def _take(self, name: str, part: bytes) -> None:
        if name == "answer":
            self.answer += part
            return
        if not self.too_much:
            self.printed[name] += part
        if not self.too_much and sum(map(len, self.printed.values())) > self.limits.output:
            self.too_much = True
            with contextlib.suppress(OSError):
                self.ours.shutdown(socket.SHUT_WR)  # the warden ends the code when nobody speaks to it


def _remove(box: str) -> None:
    """Also directories that were made unreadable."""

    def unlock(remove: Any, path: str, error: Any) -> None:
        with contextlib.suppress(OSError):
            Path(path).parent.chmod(0o700)
            Path(path).chmod(0o700)
            remove(path) if remove is not os.scandir else shutil.rmtree(path)

    shutil.rmtree(box, onerror=unlock)


@functools.cache
def _python() -> str:
    """The interpreter itself, not a virtual environment's link to it."""
    return str(Path(getattr(sys, "_base_executable", sys.executable)).resolve())


@functools.cache
def _readable() -> tuple[str, ...]:
    """The interpreter, its library, and the libraries that it is linked with; nothing else of /usr or a home."""
    prefixes = {Path(sys.base_prefix), Path(sys.base_exec_prefix), Path(_python()).parent.parent}
    found = [f"/usr/{name}" for name in ("lib", "lib32", "lib64", "libx32", "share/zoneinfo")]
    found += ["/lib", "/lib32", "/lib64", "/libx32", "/etc/ld.so.cache", "/usr/bin", "/bin"]
    found += [str(prefix.resolve() / name) for prefix in sorted(prefixes) for name in ("bin", "lib", "lib64")]
    return tuple(path for path in dict.fromkeys(found) if os.path.lexists(path))


def _open_to_all() -> bool:
    """Whether another user can reach Python and its packages where they lie."""
    ends = (Path(_python()), Path(sysconfig.get_path("purelib")).resolve())
    return all(each.stat().st_mode & 1 for end in ends for each in (end, *end.parents))


def _stranger() -> int | None:
    """A user id for one run, if this process can become another user."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/uid_map").read_text().splitlines():
            inside, _, count = map(int, line.split())
            first = max(inside, _STRANGERS.start)
            if first + 1000 < min(inside + count, _STRANGERS.stop):
                return random.SystemRandom().randrange(first, min(inside + count, _STRANGERS.stop))
            if count >= 60000:  # the range that containers are usually given
                return inside + random.SystemRandom().randrange(count // 2, count - 100)
    return None
