"""The sandbox: what hostile code tries fails inside, and the process outside goes on."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drivetrain.conf.errors import ConfigError
from drivetrain.conf.rewards import SandboxConfig, Walls
from drivetrain.train.rl import sandbox
from drivetrain.train.rl.sandbox import Limits, Result, Status, run

MIB = 1 << 20
SMALL = Limits(seconds=20, cpu_seconds=10, memory=256 * MIB, disk=8 * MIB, output=65536)
SYSTEM_PYTHON = Path("/usr/bin/python3").resolve()
SECRET = "the-trainer-s-secret"

Run = Callable[..., Result]


def system_python() -> str | None:
    """One that every user can start, if its version takes -P."""
    if not SYSTEM_PYTHON.is_file():
        return None
    new = subprocess.run(
        [str(SYSTEM_PYTHON), "-c", "import sys; sys.exit(sys.version_info < (3, 11))"], check=False
    )
    return str(SYSTEM_PYTHON) if new.returncode == 0 else None


@pytest.fixture(scope="module", params=["namespaces", "filters", "filters, another user"])
def boxed(request: pytest.FixtureRequest) -> Iterator[Run]:
    """`run` behind each of the walls."""
    name, _, other = request.param.partition(", ")
    walls = Walls[name]
    with pytest.MonkeyPatch.context() as patch:
        if other:
            python = system_python()
            if os.geteuid() != 0 or python is None:
                pytest.skip("needs root and a Python that every user can start")
            patch.setattr(sandbox, "_python", lambda: python)
            patch.setattr(sandbox, "_open_to_all", lambda: True)
        sandbox._choose.cache_clear()
        sandbox._readable.cache_clear()
        try:
            sandbox.describe(walls)
        except ConfigError as error:
            pytest.skip(str(error))

        def boxed_run(code: str, limits: Limits = SMALL, **options: object) -> Result:
            return run(textwrap.dedent(code), limits=limits, walls=walls, **options)  # type: ignore[arg-type]

        yield boxed_run
    sandbox._choose.cache_clear()
    sandbox._readable.cache_clear()


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A directory that every user may enter and write to."""
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o777)
        yield Path(made)


def many(boxed: Run, **changes: object) -> Limits:
    """Limits with several processes, where they are to be had."""
    limits = Limits(**{"seconds": 20, "memory": 1024 * MIB, "processes": 5, "disk": 8 * MIB, **changes})  # type: ignore[arg-type]
    try:
        boxed("pass", limits)
    except ConfigError as error:
        pytest.skip(str(error))
    return limits


def processes_with(mark: str) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            if mark in process.cmdline():
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def test_a_program_runs(boxed: Run) -> None:
    code = """
        import sys, helper
        from deep.down import other
        print(input(), helper.x + other.y, __name__, __file__, sys.argv, flush=True)
        print("a warning", file=sys.stderr)
        open("kept", "w").write("x")
        sys.exit(open("data.bin", "rb").read() != b"\\0\\xff")
    """
    files = {"helper.py": "x = 40", "deep/down/other.py": "y = 2", "data.bin": b"\0\xff"}
    result = boxed(code, stdin="héllo\n", files=files)
    assert (result.status, result.stderr) == (Status.ok, "a warning\n")
    assert result.stdout == "héllo 42 __main__ main.py ['main.py']\n"
    assert 0 < result.seconds < 20


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("exit(3)", Status.failed, ""),
        ("1 / 0", Status.failed, "ZeroDivisionError"),
        ("def f(:", Status.failed, "SyntaxError"),
        ("import ctypes; ctypes.string_at(0)", Status.killed, ""),
        ("import os; os._exit(0)", Status.ok, ""),
        ("def f(): return f()\nf()", Status.failed, "RecursionError"),
    ],
)
def test_how_it_ends(boxed: Run, code: str, status: Status, said: str) -> None:
    result = boxed(code)
    assert result.status is status
    assert said in result.stderr


def test_the_same_hashes_every_time(boxed: Run) -> None:
    assert boxed("print(hash('a'))").stdout == boxed("print(hash('a'))").stdout


def test_threads_and_asyncio(boxed: Run) -> None:
    code = """
        import asyncio
        async def main():
            await asyncio.sleep(0)
            return 5
        print(asyncio.run(main()))
    """
    assert boxed(code).stdout == "5\n"


def test_packages_only_when_asked_for(boxed: Run) -> None:
    assert boxed("import numpy").status is Status.failed
    result = boxed("import numpy; print(numpy.arange(3).sum())", packages=True, limits=Limits())
    if "No module" in result.stderr:
        pytest.skip("this user cannot read the installed packages")
    assert result.stdout == "3\n"


def test_endless_loop(boxed: Run) -> None:
    began = time.monotonic()
    result = boxed("while True: pass", Limits(seconds=1.0))
    assert result.status is Status.timeout
    assert time.monotonic() - began < 15


def test_processor_time(boxed: Run) -> None:
    code = "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert boxed(code, Limits(seconds=60, cpu_seconds=1)).status is Status.timeout


def test_sleep(boxed: Run) -> None:
    result = boxed("print('before', flush=True)\nimport time; time.sleep(600)", Limits(seconds=0.5))
    assert (result.status, result.stdout) == (Status.timeout, "before\n")


@pytest.mark.parametrize("code", ["bytearray(1 << 34)", "x = []\nwhile True: x.append('a' * 1000000)"])
def test_memory_bomb(boxed: Run, code: str) -> None:
    assert boxed(code).status is Status.memory


def test_endless_output(boxed: Run) -> None:
    result = boxed("import sys\nwhile True: print('x' * 1000); print('y' * 1000, file=sys.stderr)")
    assert result.status is Status.output
    assert len(result.stdout) <= SMALL.output
    assert len(result.stderr) <= SMALL.output


def test_huge_file(boxed: Run) -> None:
    result = boxed("open('big', 'wb').write(bytes(100 << 20))")
    assert result.status in (Status.failed, Status.output)


def test_many_files(boxed: Run) -> None:
    result = boxed("for i in range(10**6): open(str(i), 'wb').write(bytes(1 << 20))")
    assert result.status in (Status.failed, Status.output)


def test_hidden_memory(boxed: Run) -> None:
    """Files in memory and shared segments, which no limit on address space counts."""
    code = """
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        print(libc.shmget(0, 1 << 30, 0o1600))
        try:
            os.memfd_create("x")
        except OSError as error:
            print(error.errno)
    """
    assert boxed(code).stdout == "-1\n1\n"


def test_fork_is_refused(boxed: Run) -> None:
    result = boxed("import os\nwhile True: os.fork()")
    assert result.status is Status.failed
    assert "PermissionError" in result.stderr


def test_fork_bomb(boxed: Run) -> None:
    limits = many(boxed, seconds=1.5)
    count = """
        import os, time
        for number in range(1, 50):
            if os.fork() == 0:
                time.sleep(60)
            print(number, flush=True)
    """
    first = boxed(count, limits)  # small and bounded, before the real one
    assert first.status is Status.failed
    assert "BlockingIOError" in first.stderr
    assert len(first.stdout.split()) < limits.processes
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert boxed(bomb, limits).status is Status.timeout


def test_thread_bomb(boxed: Run) -> None:
    code = """
        import threading, time
        n = 0
        try:
            while n < 1000:
                threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
                n += 1
        except RuntimeError:
            print(n)
    """
    assert int(boxed(code).stdout) <= 32


def test_files_and_environment_of_the_trainer(
    boxed: Run, open_to_all: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SANDBOX_TEST_SECRET", SECRET)
    secret = open_to_all / "secret"  # so that it is the walls that are in the way
    secret.write_text(SECRET)
    secret.chmod(0o666)
    code = f"""
        import os
        paths = [{str(secret)!r}, "/etc/shadow", "/etc/passwd", {sandbox.__file__!r}]
        for pid in ("self", "1", str(os.getppid()), "{os.getpid()}", "thread-self"):
            paths += [f"/proc/{{pid}}/environ", f"/proc/{{pid}}/cwd/secret", f"/proc/{{pid}}/root{secret}"]
        paths += ["/proc/self/fd/0/../" + {str(secret)!r}, "../../../../../.." + {str(secret)!r}]
        for path in paths:
            for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_TRUNC):
                try:
                    print("OPENED", path, os.read(os.open(path, flags), 100))
                except OSError:
                    pass
        rename, truncate = lambda path: os.rename(path, path + "2"), lambda path: os.truncate(path, 0)
        for do in (os.listdir, os.unlink, os.rmdir, rename, truncate):
            for path in ({str(secret)!r}, {str(open_to_all)!r}):
                try:
                    do(path)
                    print("DONE", do, path)
                except OSError:
                    pass
        try:
            os.chmod({str(secret)!r}, 0)
            print("DONE chmod")
        except OSError:
            pass
        print(dict(os.environ))
    """
    result = boxed(code)
    assert result.status is Status.ok, result.stderr
    assert SECRET not in result.stdout
    assert "OPENED" not in result.stdout
    assert "DONE" not in result.stdout
    assert "SANDBOX_TEST" not in result.stdout
    assert secret.read_text() == SECRET
    assert secret.stat().st_mode & 0o777 == 0o666


def test_the_installation_is_read_only(boxed: Run) -> None:
    code = """
        import os
        for path in (os.__file__, os.path.dirname(os.__file__) + "/new.py", "/usr/lib/new", "/new"):
            try:
                open(path, "a")
                print("OPENED", path)
            except OSError:
                pass
    """
    assert boxed(code).stdout == ""


def test_no_descriptor_is_inherited(boxed: Run, tmp_path: Path) -> None:
    handle = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(handle, True)
    try:
        code = """
            import os
            for number in range(256):
                try:
                    os.fstat(number)
                    print(number, end=" ")
                except OSError:
                    pass
        """
        assert boxed(code).stdout.split() == ["0", "1", "2"]
    finally:
        os.close(handle)


def test_sockets(boxed: Run, tmp_path: Path) -> None:
    served = []
    path = f"/tmp/sandbox-test-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as inet, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(path)
        unix.listen()
        threading.Thread(target=lambda: served.append(inet.accept()), daemon=True).start()
        threading.Thread(target=lambda: served.append(unix.accept()), daemon=True).start()
        code = f"""
            import ctypes, socket
            for family, kind, address in (
                (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", {inet.getsockname()[1]})),
                (socket.AF_INET6, socket.SOCK_STREAM, ("::1", 80)),
                (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 53)),
                (socket.AF_UNIX, socket.SOCK_STREAM, {path!r}),
                (socket.AF_UNIX, socket.SOCK_STREAM, "\\0abstract"),
                (socket.AF_NETLINK, socket.SOCK_RAW, (0, 0)),
            ):
                try:
                    socket.socket(family, kind).connect(address)
                    print("CONNECTED", family)
                except OSError:
                    pass
            try:
                socket.socketpair(type=socket.SOCK_DGRAM)[0].sendto(b"x", {path!r})
                print("SENT")
            except OSError:
                pass
            print(ctypes.CDLL(None).socket(2, 1, 0))
        """
        try:
            assert boxed(code).stdout == "-1\n"
            assert not served
        finally:
            Path(path).unlink()


def test_killing_the_parent(boxed: Run) -> None:
    code = f"""
        import ctypes, os, signal
        for pid in (os.getppid(), {os.getpid()}, 1, 0, -1):
            for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP):
                if pid == 0 and number != signal.SIGTERM:
                    continue
                try:
                    signal.signal(signal.SIGTERM, signal.SIG_IGN)
                    os.kill(pid, number)
                except OSError:
                    pass
        libc = ctypes.CDLL(None)
        print(libc.ptrace(16, {os.getpid()}, 0, 0), libc.ptrace(16, os.getppid(), 0, 0))
    """
    result = boxed(code)
    assert (result.status, result.stdout) == (Status.ok, "-1 -1\n")
    assert boxed("print(1)").stdout == "1\n"


def test_a_daemon_does_not_stay(boxed: Run) -> None:
    limits = many(boxed)
    mark = f"daemon-{os.getpid()}-{time.monotonic_ns()}"
    code = f"""
        import os, sys
        hear, tell = os.pipe()
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                for number in (0, 1, 2):
                    os.close(number)
                os.set_inheritable(tell, True)
                wait = f"import os, time; os.write({{tell}}, b'x'); time.sleep(300)"
                os.execv(sys.executable, [sys.executable, "-S", "-c", wait, {mark!r}])
            os._exit(0)
        os.read(hear, 1)
        print("left")
    """
    result = boxed(code, limits)
    assert (result.status, result.stdout) == (Status.ok, "left\n")
    assert not processes_with(mark)


def test_other_roots_and_rights(boxed: Run) -> None:
    code = """
        import ctypes, os
        libc = ctypes.CDLL(None)
        print(libc.unshare(0x10000000), libc.unshare(0x40000000), libc.chroot(b"."))
        print(libc.mount(None, b"/", None, 32, None))
        for give in (lambda: os.setuid(0), lambda: os.setgroups([0]), lambda: os.mknod("dev", 0o60600, 0x800)):
            try:
                give()
                print("GIVEN") if os.getuid() else None
            except OSError:
                pass
    """
    result = boxed(code)
    assert result.stdout.startswith("-1 -1 -1\n-1\n")
    assert "GIVEN" not in result.stdout


def test_nothing_is_left_on_the_disk(boxed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o755)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    boxed("import os\nos.makedirs('a/b/c')\nopen('a/b/c/d', 'w')\nos.chmod('a/b/c', 0)")
    boxed("while True: pass", Limits(seconds=0.3))
    assert not list(tmp_path.iterdir())


def test_large_input_and_output(boxed: Run) -> None:
    text = "x" * (4 * MIB)
    result = boxed("import sys; sys.stdout.write(sys.stdin.read())", Limits(output=8 * MIB), stdin=text)
    assert result.stdout == text
    assert boxed("print(1)", stdin=text).stdout == "1\n"  # not read at all


def test_many_at_a_time(boxed: Run) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: boxed(f"print({n} ** 2)").stdout, range(12)))
    assert found == [f"{n**2}\n" for n in range(12)]


@settings(max_examples=10, deadline=None)
@given(text=st.text(st.characters(exclude_characters="\r", exclude_categories=["Cs"]), max_size=50))
def test_any_text_comes_back(text: str) -> None:
    try:
        code = f"import sys; sys.stdout.write(sys.stdin.read() + {text!r})"
        assert run(code, stdin=text).stdout == text + text
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "", "."])
def test_a_file_outside_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="no path within the sandbox"):
        run("pass", files={name: "x"})


@pytest.mark.parametrize(
    "wrong", [{"seconds": 0}, {"memory": -1}, {"processes": 0}, {"seconds": float("inf")}]
)
def test_wrong_limits(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"sandbox's {next(iter(wrong))}"):
        Limits(**wrong)  # type: ignore[arg-type]


def test_limits_of_a_config() -> None:
    limits = Limits.of(SandboxConfig(seconds=3, memory=100, output=2))
    assert (limits.seconds, limits.memory, limits.output) == (3, 100 * MIB, 2 * MIB)


def test_without_walls_nothing_runs_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    real = sandbox._order

    def broken(*args: object) -> dict[str, object]:
        order = real(*args)  # type: ignore[arg-type]
        return order if order["walls"] == "none" else {**order, "readable": ["/nowhere\0"]}

    monkeypatch.setattr(sandbox, "_order", broken)
    sandbox._choose.cache_clear()
    try:
        with pytest.raises(ConfigError, match="code cannot be shut in on this machine"):
            run("print(1)")
        assert run("print(1)", walls=Walls.none).stdout == "1\n"
        assert run("while True: pass", walls=Walls.none, limits=Limits(seconds=0.3)).status is Status.timeout
    finally:
        sandbox._choose.cache_clear()


@pytest.mark.parametrize("walls", ["namespaces", "filters"])
def test_code_ends_with_the_trainer(walls: str, tmp_path: Path) -> None:
    try:
        sandbox.describe(Walls[walls])
    except ConfigError as error:
        pytest.skip(str(error))
    mark = f"orphan-{os.getpid()}-{time.monotonic_ns()}"
    sleep = "import time; time.sleep(300)"
    code = f"import os, sys\nos.execv(sys.executable, [sys.executable, '-S', '-c', {sleep!r}, {mark!r}])"
    script = "from drivetrain.train.rl.sandbox import *\n"
    script += f"run({code!r}, limits=Limits(seconds=200), walls=Walls.{walls})"
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "TMPDIR": str(tmp_path)}
    trainer = subprocess.Popen([sys.executable, "-c", script], env=environment)
    try:
        until = time.monotonic() + 60
        while not processes_with(mark) and time.monotonic() < until:
            time.sleep(0.1)
        assert processes_with(mark)
    finally:
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
    until = time.monotonic() + 30
    while (processes_with(mark) or list(tmp_path.iterdir())) and time.monotonic() < until:
        time.sleep(0.1)
    assert not processes_with(mark)
    assert not list(tmp_path.iterdir())


def test_a_plain_user_is_walled_too() -> None:
    """The same walls for a trainer that is not root."""
    python = system_python()
    if os.geteuid() != 0 or python is None:
        pytest.skip("needs root, to become a plain user, and a Python that such a one can start")
    code = """
        import os, socket
        def tried(what):
            try:
                what()
                return "done"
            except OSError as error:
                return "refused"
        print(tried(socket.socket), tried(os.fork), tried(lambda: os.kill(PARENT, 0)))
        print(tried(lambda: open("/etc/passwd")), tried(lambda: open("/proc/PARENT/environ")))
        print(tried(lambda: open("mine", "w")))
    """
    script = f"""
        import os, sys
        from drivetrain.conf.errors import ConfigError
        from drivetrain.train.rl import sandbox
        from drivetrain.train.rl.sandbox import Limits, Walls, run
        sandbox._python = lambda: {python!r}
        sandbox._readable.cache_clear()
        os.setgroups([])
        os.setgid(54321)
        os.setuid(54321)
        code = sys.argv[1].replace("PARENT", str(os.getpid()))
        for walls in (Walls.namespaces, Walls.filters):
            try:
                print(sandbox.describe(walls), *run(code, walls=walls).stdout.split())
            except ConfigError as error:
                print("unavailable", error)
    """
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), textwrap.dedent(code)],
        env={"PYTHONSAFEPATH": "1", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    for line, walls in zip(lines, ("namespaces", "filters"), strict=True):
        if not line.startswith("unavailable"):
            assert line == f"{walls}, as this user refused refused refused refused refused done"
