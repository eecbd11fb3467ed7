"""What shuts a process in, for the rest of its life: namespaces, Landlock, a seccomp filter, resource limits.

Plain system calls by ctypes and nothing but the standard library: `jail.py` loads this into a bare interpreter, in
which every module costs milliseconds. Each function raises OSError where the kernel refuses.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct

TYPE_CHECKING = False  # what type checkers take for true, without the import
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

# Flags of unshare(2) and clone(2).
_NEWNS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
_ANY_NEW = 0x7E020000
_THREAD = 0x10000
# Flags of mount(2) and mount_setattr(2).
_RDONLY, _NOSUID, _NODEV, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_AT_RECURSIVE, _AT_EMPTY_PATH, _MNT_DETACH = 0x8000, 0x1000, 2

_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

# Numbers of system calls (x86_64, aarch64), from the kernel's unistd headers; None: it has none of that name.
_CALLS: dict[str, tuple[int | None, int | None]] = {
    # other processes, and ways around this filter
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "personality": (135, 92),
    # other roots
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    # memory that no limit counts, or that outlives the process
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # network
    "socket": (41, 198),
    "bind": (49, 200),
    "connect": (42, 203),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
}
# Where other processes of the same user are in sight: what acts on them, and on files that may only be read.
_CALLS_ALONE: dict[str, tuple[int | None, int | None]] = {
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "prlimit64": (302, 261),
    "setpriority": (141, 140),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    "ioprio_set": (251, 30),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "truncate": (76, 45),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "setxattrat": (463, 463),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "removexattrat": (466, 466),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "file_setattr": (469, 469),
}
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH_*
_LD, _JEQ, _JGE, _JSET, _AND, _RET = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06  # BPF's instructions
_ALLOW, _KILL, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026


def _check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def _prctl(option: int, value: int, what: str) -> None:
    _check(_libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), what)


def die_with_parent() -> None:
    """SIGKILL when the parent ends. A change of user undoes it."""
    _prctl(1, 9, "prctl(PDEATHSIG)")


def keep_orphans() -> None:
    """Processes below this one whose parents have ended become its children."""
    _prctl(36, 1, "prctl(CHILD_SUBREAPER)")


def _call(name: str, *arguments: int | bytes | ctypes.Array[ctypes.c_char]) -> int:
    numbers = {"pivot_root": (155, 41), "mount_setattr": (442, 442), "capset": (126, 91)}
    numbers |= {"create_ruleset": (444, 444), "add_rule": (445, 445), "restrict_self": (446, 446)}
    numbers |= {"seccomp": (317, 277)}
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    number = numbers[name][_machine()[0]]
    return _check(_libc.syscall(ctypes.c_long(number), *words), name)


def _machine() -> tuple[int, int]:
    try:
        return _MACHINES[os.uname().machine]
    except KeyError:
        raise OSError(38, f"no table of system calls for {os.uname().machine}") from None


# Namespaces


def enter_namespaces(own_user: bool) -> None:
    """Mounts, processes (from the next fork on), network and shared memory of its own.

    Args:
        own_user: make a user namespace as well, which gives a plain user the right to the others.
    """
    uid, gid = os.getuid(), os.getgid()
    _check(_libc.unshare(_NEWNS | _NEWPID | _NEWNET | _NEWIPC | (_NEWUSER if own_user else 0)), "unshare")
    if own_user:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def enter_root(root: str, readable: Sequence[str], home: str, disk: int, owner: int) -> None:
    """A root directory that holds `readable`, four devices and an empty `home` of `disk` bytes in memory.

    Args:
        root: a directory to mount it on.
        readable: absolute paths of files, directories and links, seen under the same names and read-only.
        owner: user and group of `home`.
    """
    _mount(None, "/", None, _REC | _PRIVATE)
    _mount("tmpfs", root, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    for path in (*readable, *_DEVICES):
        _show(root, path, path not in _DEVICES)
    os.mkdir(root + home)
    inodes = max(64, disk // 4096)
    _mount("tmpfs", root + home, "tmpfs", _NOSUID | _NODEV, f"size={disk},nr_inodes={inodes},mode=700")
    os.chown(root + home, owner, owner if os.getuid() == 0 else -1)
    _mount(None, root, None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)
    os.chdir(root)
    _call("pivot_root", b".", b".")
    _check(_libc.umount2(b".", _MNT_DETACH), "umount")
    os.chdir(home)


def _show(root: str, path: str, read_only: bool) -> None:
    target = root + path
    if os.path.lexists(target) or not os.path.lexists(path):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o444))
    _mount(path, target, None, _BIND | _REC)
    if read_only:
        attributes = struct.pack("=4Q", _RDONLY | _NOSUID | _NODEV, 0, 0, 0)
        _call("mount_setattr", -100, target.encode(), _AT_RECURSIVE, attributes, len(attributes))


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    words = [word.encode() if word is not None else None for word in (source, target, kind, data)]
    _check(
        _libc.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3]),
        f"mount {target}",
    )


# Rights


def drop_rights(uid: int | None) -> None:
    """No capability, and none to be had by what is executed; as another user and group if `uid` is given."""
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    _prctl(38, 1, "prctl(NO_NEW_PRIVS)")
    # struct __user_cap_header_struct of version 3, and two empty __user_cap_data_struct.
    _call("capset", struct.pack("=Ii", 0x20080522, 0), bytes(24))


def landlock(readable: Iterable[str], writable: Iterable[str]) -> None:
    """No file but these and what lies below them (Linux 5.13 and newer). `drop_rights` comes first."""
    version = _call("create_ruleset", 0, 0, 1)
    rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)  # bits LANDLOCK_ACCESS_FS_* that a version knows
    every = (1 << rights) - 1
    network = 3 if version >= 4 else 0  # bind and connect TCP
    scoped = 3 if version >= 6 else 0  # abstract sockets, signals
    attributes = struct.pack("=3Q", every, network, scoped)
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = _call("create_ruleset", attributes, size, 0)
    execute, write, read, listing, truncate = 1, 2, 4, 8, every & 1 << 14
    for path, allowed in (
        *((path, execute | read | listing) for path in readable),
        *((path, every) for path in writable),
        *((path, read | write | truncate) for path in _DEVICES),
    ):
        try:
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except (FileNotFoundError, PermissionError):
            continue  # out of reach anyhow
        if not os.path.isdir(path):
            allowed &= execute | write | read | truncate
        _call("add_rule", rules, 1, struct.pack("=Qi", allowed, handle), 0)
        os.close(handle)
    _call("restrict_self", rules, 0)
    os.close(rules)


def seccomp(fork: bool, thread: bool, alone: bool) -> None:
    """No socket, no other root, nothing done to other processes; EPERM to who tries. `drop_rights` comes first.

    Args:
        fork, thread: whether processes and threads may be started.
        alone: other processes and files of this user are in sight, and are to be left alone.
    """
    program = b"".join(_filter(fork, thread, alone))
    buffer = ctypes.create_string_buffer(program, len(program))
    head = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))  # struct sock_fprog
    _call("seccomp", 1, 1, head)  # SET_MODE_FILTER with TSYNC: every thread of this process


def _op(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
    return struct.pack("=HBBI", code, then, otherwise, value)


def _filter(fork: bool, thread: bool, alone: bool) -> list[bytes]:
    """Classic BPF over struct seccomp_data: number at 0, architecture at 4, arguments from 16 on (low halves)."""
    column, architecture = _machine()

    def case(call: tuple[int | None, int | None], *body: bytes) -> list[bytes]:
        number = call[column]
        return [] if number is None else [_op(_JEQ, number, 0, len(body)), *body]

    def only(argument: int, value: int) -> list[bytes]:
        return [_op(_LD, 16 + 8 * argument), _op(_JEQ, value, 0, 1), _op(_RET, _ALLOW), _op(_RET, _EPERM)]

    program = [_op(_LD, 4), _op(_JEQ, architecture, 1, 0), _op(_RET, _KILL), _op(_LD, 0)]
    if column == 0:  # x32's calls have other numbers
        program += [_op(_JGE, 0x40000000, 0, 1), _op(_RET, _KILL)]
    for call in (*_CALLS.values(), *(_CALLS_ALONE.values() if alone else ())):
        program += case(call, _op(_RET, _EPERM))
    # Its arguments lie in memory, out of a filter's sight; without it the C library uses clone.
    program += case((435, 435), _op(_RET, _ENOSYS))
    # A pair of streams reaches nobody else; datagrams can be sent to any address.
    stream = [_op(_LD, 24), _op(_AND, 0xF), _op(_JEQ, 1, 0, 1), _op(_RET, _ALLOW), _op(_RET, _EPERM)]
    program += case((53, 199), *stream)
    program += case(
        (157, 167), _op(_LD, 16), _op(_JEQ, 1, 0, 1), _op(_RET, _EPERM), _op(_RET, _ALLOW)
    )  # PDEATHSIG
    if not fork:
        program += case((57, None), _op(_RET, _EPERM)) + case((58, None), _op(_RET, _EPERM))
    if fork or thread:
        # What must not be set, or what must.
        flags, then, otherwise = (_ANY_NEW, 0, 1) if fork else (_THREAD, 1, 0)
        judged = [_op(_LD, 16), _op(_JSET, flags, then, otherwise), _op(_RET, _EPERM), _op(_RET, _ALLOW)]
    else:
        judged = [_op(_RET, _EPERM)]
    program += case((56, 220), *judged)
    if alone:
        program += case((62, 129), *only(0, os.getpid())) + case((234, 131), *only(0, os.getpid()))
    return [*program, _op(_RET, _ALLOW)]


def limit(memory: int, cpu_seconds: int, file_bytes: int, files: int, tasks: int) -> None:
    """Of each process: address space, processor time, the longest file, open files; of the user: its tasks.

    Memory in bytes. Tasks are processes and threads; their number does not bind the superuser.
    """
    for kind, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, files),
        (resource.RLIMIT_NPROC, tasks),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        hardest = resource.getrlimit(kind)[1]
        most = most if hardest == resource.RLIM_INFINITY else min(most, hardest)
        resource.setrlimit(kind, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))  # SIGXCPU, then SIGKILL
