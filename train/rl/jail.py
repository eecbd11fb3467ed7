"""The process between the trainer and code that nobody has read: it builds the walls, runs the code, ends it.

    trainer -> warden (this file) [-> the first process of a namespace] -> the code

A bare interpreter runs `main(fd)`; `fd` is a socket to the trainer. The order comes in by it (by `marshal`, which
costs no import: the sender is trusted, and has the same Python), and one line goes back:
`reason wait_status cpu_seconds wall_seconds text`. When the trainer closes its side, or dies, the code is killed.
The code has neither the socket nor anything else but its three standard streams. Modules that take milliseconds to
import (typing, contextlib, enum, signal) are done without.
"""

from __future__ import annotations

import marshal
import os
import select
import sys
import time

TYPE_CHECKING = False  # what type checkers take for true, without the import
if TYPE_CHECKING:
    from typing import Any

    from drivetrain.train.rl import walls
else:
    import walls

HOME = "/box"  # within a root of its own
_ROOT = "/sys"  # what that is mounted on, unseen by others: a directory that every Linux has, and no Python lies in
_FIRST, _OPEN_FILES = 3, 256
_SIGKILL = 9
# `exit` and `quit` come with the module `site`, which is slow.
_START = """\
import builtins, sys, _sitebuiltins
builtins.exit = builtins.quit = _sitebuiltins.Quitter("exit", "Ctrl-D")
sys.argv, sys.path[:0], __file__ = sys.argv[1:], [{paths}], "main.py"
del builtins, _sitebuiltins
exec(compile(open(__file__, "rb").read(), __file__, "exec"))
"""


def main(control: int) -> None:
    """Take one order, carry it out, answer, end."""
    os.set_inheritable(control, False)
    os.umask(0o022)
    order = _receive(control)
    try:
        answer = _Warden(control, order).run()
    except OSError as error:
        answer = f"walls 0 0 0 {error}"
    try:
        os.write(control, answer.encode())
    except OSError:  # the trainer is gone, and cannot clean up
        if order["walls"] != "namespaces":
            import shutil

            shutil.rmtree(order["box"], ignore_errors=True)


def _receive(control: int) -> dict[str, Any]:
    data = b""
    while len(data) < 8 or len(data) < 8 + int.from_bytes(data[:8], "big"):
        part = os.read(control, 1 << 16)
        if not part:
            sys.exit(0)  # nobody is left to work for
        data += part
    order: dict[str, Any] = marshal.loads(data[8:])
    return order


class _Warden:
    """Runs one piece of code. `order` has the keys that `sandbox._order` writes."""

    def __init__(self, control: int, order: dict[str, Any]) -> None:
        self.control, self.order = control, order
        self.own_root = order["walls"] == "namespaces"
        self.uid: int | None = order["uid"]
        self.home = HOME if self.own_root else order["box"]

    def run(self) -> str:
        order = self.order
        if self.own_root:
            walls.enter_namespaces(own_user=os.getuid() != 0)
            owner = self.uid if self.uid is not None else os.getuid()
            walls.enter_root(_ROOT, order["readable"], HOME, order["disk"], owner)
        else:
            os.chdir(self.home)
            walls.keep_orphans()
        self._write_files()
        report_in, report_out = os.pipe()
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            os.close(report_in)
            if self.own_root:
                self._first_process(report_out)
            self._become_code(report_out)
        os.close(report_out)
        reason = self._wait(child, started + order["seconds"])
        self._end(child)
        seconds = time.monotonic() - started
        said = os.read(report_in, 4096).decode() if self.own_root or reason == "ended" else ""
        if said.startswith("walls"):
            return said
        if reason != "ended":
            return f"{reason} 0 {self._cpu():.3f} {seconds:.3f} "
        status, cpu = said.split() if said else (str(self.status), f"{self._cpu():.3f}")
        return f"ended {status} {cpu} {seconds:.3f} "

    def _write_files(self) -> None:
        for name, content in self.order["files"].items():
            folder = os.path.dirname(name)
            made = ""
            for part in folder.split("/") if folder else ():
                made = f"{made}{part}/"
                if not os.path.isdir(made):
                    os.mkdir(made, 0o700)
                    self._give(made)
            handle = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            self._give(name)

    def _give(self, path: str) -> None:
        if self.uid is not None:
            os.chown(path, self.uid, self.uid)

    def _first_process(self, report: int) -> None:
        """Process 1 of the namespace: when it ends, the kernel kills all the others."""
        walls.die_with_parent()
        child = os.fork()
        if child == 0:
            self._become_code(report)
        while True:
            ended, status, usage = os.wait4(-1, 0)
            if ended == child:
                os.write(report, f"{status} {usage.ru_utime + usage.ru_stime:.3f}".encode())
                os._exit(0)

    def _become_code(self, report: int) -> None:
        """Everything that binds the code is done here, by itself, before it begins."""
        order = self.order
        try:
            os.setsid()  # not in the warden's group, which it could send signals to
            many = order["processes"] > 1
            # A user namespace counts the warden and process 1 too.
            spare = 2 if self.own_root and self.uid is None else 0
            tasks = spare + (order["processes"] if many else order["threads"])
            walled = order["walls"] != "none"
            if walled:
                walls.drop_rights(self.uid)
            walls.limit(order["memory"], order["cpu_seconds"], order["disk"], order["open_files"], tasks)
            if not self.own_root and walled:
                walls.die_with_parent()
                walls.landlock(order["readable"], [self.home])
            if walled:
                alone = not self.own_root and self.uid is None
                # Nothing counts the superuser's tasks, nor in common sight those of this code alone.
                walls.seccomp(fork=many, thread=not alone and os.getuid() != 0, alone=alone)
            paths = ", ".join(map(repr, [self.home, *order["packages"]]))
            python = order["python"]
            arguments = [
                python,
                "-s",
                "-P",
                "-S",
                "-B",
                "-Xutf8",
                "-c",
                _START.format(paths=paths),
                "main.py",
            ]
            environment = {**order["environment"], "HOME": self.home, "TMPDIR": self.home, "PWD": self.home}
            os.set_inheritable(report, False)
            os.closerange(_FIRST, report)
            os.closerange(report + 1, _OPEN_FILES)
            os.execve(python, arguments, environment)
        except OSError as error:
            os.write(report, f"walls 0 0 0 {error}".encode())
        finally:
            os._exit(127)

    def _wait(self, child: int, deadline: float) -> str:
        """`ended`, or why it has to be: `timeout`, `stopped` by the trainer, `disk`."""
        handle = os.pidfd_open(child)
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        poll.register(self.control, select.POLLIN)
        while (left := deadline - time.monotonic()) > 0:
            # A root of its own is bounded by itself; a directory has to be looked at.
            ready = poll.poll(1000 * (left if self.own_root else min(left, 0.1)))
            if any(found == handle for found, _ in ready):
                return "ended"
            if ready:
                return "stopped"
            if not self.own_root and _size(self.home) > self.order["disk"]:
                return "disk"
        return "timeout"

    def _end(self, child: int) -> None:
        """Kill whatever is left, and wait for it."""
        _kill(child)
        if not self.own_root:
            if self.uid is not None:
                _kill_user(self.uid)
            _kill(-child)
        _, self.status = os.waitpid(child, 0)
        while not self.own_root:  # daemons, which this process has inherited
            for pid in _children():
                _kill(pid)
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                break

    @staticmethod
    def _cpu() -> float:
        times = os.times()
        return times.children_user + times.children_system


def _kill(pid: int) -> None:
    """A process, or with a negative number a group of them; it may have ended."""
    try:
        os.kill(pid, _SIGKILL)
    except ProcessLookupError:
        return


def _kill_user(uid: int) -> None:
    """All processes of a user that nobody else is: none can fork away from it."""
    killer = os.fork()
    if killer == 0:
        try:
            os.setresuid(uid, uid, uid)
            os.kill(-1, _SIGKILL)  # spares the sender
        finally:
            os._exit(0)
    os.waitpid(killer, 0)


def _children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(pid) for pid in file.read().split()]


def _size(folder: str) -> int:
    """Bytes that its files take on the disk; each counts as a block at least."""
    total = 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                total += 4096 + 512 * entry.stat(follow_symlinks=False).st_blocks
                if entry.is_dir(follow_symlinks=False):
                    total += _size(entry.path)
    except OSError:  # the code goes on removing files
        return total
    return total
