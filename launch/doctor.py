"""`drivetrain doctor`: what this machine has, what is missing, and what will be used instead."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich import box
from rich.table import Table
from rich.text import Text

GIB = 2**30
PROBE_BYTES = 32 * 2**20
NAMED_PACKAGES = ["triton", "deepspeed", "accelerate", "transformers", "wandb"]


class Status(StrEnum):
    ok = "ok"
    warn = "warn"
    fail = "fail"


@dataclass(kw_only=True, slots=True)
class Check:
    """One line: what was looked at, what was found, and what to do if that is not enough."""

    name: str
    status: Status = Status.ok
    found: str
    remedy: str = ""


def examine(run_dir: Path | None = None, data_dir: Path | None = None) -> list[Check]:
    """Look at this machine. Nothing is changed; one file of 32 MiB is written to time the disk, and removed.

    Args:
        run_dir: where runs will be written; by default the current directory.
        data_dir: a directory that `drivetrain data build` made, to be looked at too.
    """
    looks: list[tuple[str, Callable[[], Check | Iterable[Check]]]] = [
        ("Python", _python),
        ("Packages", _packages),
        ("torch", _torch),
        ("flash-attn", _flash_attention),
        ("GPU", _gpus),
        ("bf16", _bf16),
        ("Communication", _communication),
        ("CPU and memory", _processor),
        ("/dev/shm", _shared_memory),
        ("Disk", lambda: _disk(run_dir or Path.cwd())),
        ("Compilers", _compilers),
        ("W&B", _wandb),
        ("git", _git),
    ]
    if data_dir is not None:
        looks.append(("Data", lambda: _data(data_dir)))
    checks: list[Check] = []
    for name, look in looks:
        try:
            seen = look()
            checks.extend([seen] if isinstance(seen, Check) else seen)
        except Exception as error:  # a doctor who faints at the sight of a broken machine is no use
            found = f"could not be examined: {type(error).__name__}: {error}"
            checks.append(Check(name=name, status=Status.fail, found=found, remedy="reinstall what it names"))
    return checks


def render(checks: list[Check]) -> Table:
    """A table for a rich console."""
    colours = {Status.ok: "green", Status.warn: "yellow", Status.fail: "bold red"}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("Looked at", no_wrap=True)
    table.add_column("Found", ratio=3, overflow="fold")
    table.add_column("What to do", ratio=2, overflow="fold")
    for check in checks:
        status = Text(check.status.value, colours[check.status])
        table.add_row(status, Text(check.name), Text(check.found), Text(check.remedy))
    return table


def to_json(checks: list[Check]) -> str:
    """The same, for programs: a list of objects with name, status, found and remedy."""
    return json.dumps([dataclasses.asdict(check) for check in checks], indent=2)


def exit_status(checks: list[Check]) -> int:
    """1 when training cannot work here, else 0."""
    return int(any(check.status is Status.fail for check in checks))


def _python() -> Check:
    found = f"{platform.python_version()} ({sys.executable})"
    wanted = importlib.metadata.metadata("drivetrain")["Requires-Python"]
    if SpecifierSet(wanted).contains(platform.python_version(), prereleases=True):
        return Check(name="Python", found=found)
    remedy = f"drivetrain needs Python {wanted}; make a virtual environment with one"
    return Check(name="Python", status=Status.fail, found=found, remedy=remedy)


def _packages() -> Iterable[Check]:
    """Drivetrain itself and what its own metadata requires: the named ones a line each, the others in one."""
    yield Check(name="drivetrain", found=importlib.metadata.version("drivetrain"))
    others: list[str] = []
    wrong: list[str] = []
    for requirement in _required():
        problem, found = _installed(requirement)
        if requirement.name in NAMED_PACKAGES:
            remedy = f'pip install "{requirement.name}{requirement.specifier}"' if problem else ""
            status = Status.fail if problem else Status.ok
            yield Check(name=requirement.name, status=status, found=problem or found, remedy=remedy)
        elif requirement.name != "torch":
            others.append(requirement.name)
            wrong += [f"{requirement.name} {problem}"] if problem else []
    if wrong:
        remedy = "pip install --upgrade drivetrain"
        yield Check(name="Other packages", status=Status.fail, found="; ".join(wrong), remedy=remedy)
    else:
        yield Check(name="Other packages", found=f"{len(others)} as required")


def _required() -> list[Requirement]:
    """What Drivetrain needs on this system, its extras aside."""
    every = [Requirement(text) for text in importlib.metadata.requires("drivetrain") or []]
    return [one for one in every if one.marker is None or one.marker.evaluate({"extra": ""})]


def _installed(requirement: Requirement) -> tuple[str, str]:
    """(what is wrong or nothing, the version)."""
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed", ""
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{version}, but {requirement.specifier} is required", version
    return "", version


def _torch() -> Check:
    import torch

    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    found = f"{torch.__version__}, {build}"
    problem, _ = _installed(next(requirement for requirement in _required() if requirement.name == "torch"))
    if problem:
        return Check(
            name="torch", status=Status.fail, found=problem, remedy="pip install --upgrade drivetrain"
        )
    if not torch.version.cuda and _driver():
        remedy = "install a CUDA build of torch (pytorch.org/get-started) to train on the GPU"
        return Check(
            name="torch", status=Status.warn, found=f"{found}, but there is an NVIDIA driver", remedy=remedy
        )
    return Check(name="torch", found=found)


def _flash_attention() -> Check:
    try:
        found = f"{importlib.metadata.version('flash-attn')}; used with kernels=flash_attn"
    except importlib.metadata.PackageNotFoundError:
        found = "not installed, not needed: attention is our Triton kernel on a GPU, PyTorch's on a CPU"
    return Check(name="flash-attn", found=found)


def _driver() -> str | None:
    """Version of the NVIDIA driver."""
    versions = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return versions.splitlines()[0] if versions else None


def _output(*command: str) -> str | None:
    """What a program prints, or None where it is missing or fails."""
    program = shutil.which(command[0])
    if program is None:
        return None
    try:
        done = subprocess.run([program, *command[1:]], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _gpus() -> Iterable[Check]:
    import torch

    if not torch.cuda.is_available():
        yield Check(name="GPU", found="none: training runs on the CPU, in fp32 or bf16")
        return
    driver = _driver() or "unknown"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory, capability = f"{device.total_memory / GIB:.0f} GiB", f"{device.major}.{device.minor}"
        found = f"{device.name}, {memory}, compute capability {capability}, driver {driver}"
        yield Check(name=f"GPU {index}", found=found)


def _bf16() -> Check:
    import torch

    slow = "engine.precision=fp32 is likely to be faster here"
    if torch.cuda.is_available():
        old = [i for i in range(torch.cuda.device_count()) if torch.cuda.get_device_capability(i) < (8, 0)]
        if old:
            found = f"emulated on GPU {', '.join(map(str, old))}: needs compute capability 8.0"
            return Check(name="bf16", status=Status.warn, found=found, remedy=slow)
        return Check(name="bf16", found="native on the GPU")
    flags = _cpu_flags()
    native = [flag for flag in ("amx_bf16", "avx512_bf16", "bf16") if flag in flags]  # the last is Arm's
    if native:
        return Check(name="bf16", found=f"native on this CPU ({', '.join(native)})")
    found = "no avx512_bf16 or amx_bf16 on this CPU: emulated"
    return Check(name="bf16", status=Status.warn, found=found, remedy=slow)


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith(("flags", "Features"))), set())


def _communication() -> Check:
    import torch
    from torch import distributed

    if not distributed.is_available():
        remedy = "install an official build of torch"
        return Check(
            name="Communication", status=Status.fail, found="torch.distributed is missing", remedy=remedy
        )
    nccl, gloo = distributed.is_nccl_available(), distributed.is_gloo_available()
    names = [f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"] if nccl else []
    found = ", ".join(names + (["gloo"] if gloo else [])) or "neither NCCL nor gloo"
    if not gloo or (torch.cuda.is_available() and not nccl):
        remedy = "install an official build of torch: ranks talk over NCCL on GPUs and over gloo on CPUs"
        return Check(name="Communication", status=Status.fail, found=found, remedy=remedy)
    return Check(name="Communication", found=found)


def _processor() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    limit = _cgroup_limit()
    inside = ""
    if limit is not None and limit < total:
        total, free, inside = limit, min(free, limit), " (this container's limit)"
    found = f"{cores} cores, {total / GIB:.1f} GiB of memory{inside}, {free / GIB:.1f} GiB free"
    if free < 4 * GIB:
        remedy = "close other programs, or train a small model with a small stage.micro_batch"
        return Check(name="CPU and memory", status=Status.warn, found=found, remedy=remedy)
    return Check(name="CPU and memory", found=found)


def _cgroup_limit() -> int | None:
    """Memory limit of this container in bytes (cgroup v2's memory.max)."""
    try:
        return int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # ValueError: "max", which is none
        return None


def _shared_memory() -> Check:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Check(name="/dev/shm", found="not on this system")
    size = shutil.disk_usage(folder).total
    if size < GIB:
        remedy = "NCCL needs more: docker run --shm-size=8g, or an emptyDir of medium Memory in Kubernetes"
        return Check(name="/dev/shm", status=Status.warn, found=f"{size / 2**20:.0f} MiB", remedy=remedy)
    return Check(name="/dev/shm", found=f"{size / GIB:.1f} GiB")


def _disk(wanted: Path) -> Check:
    folder = wanted.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    block = os.urandom(2**20)  # random, so that a compressing file system is timed honestly
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".drivetrain-doctor-") as file:
            began = time.perf_counter()
            for _ in range(PROBE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - began
    except OSError as error:
        remedy = "choose a writable run_dir with room in it"
        found = f"{folder} cannot be written: {error.strerror}"
        return Check(name="Disk", status=Status.fail, found=found, remedy=remedy)
    found = f"{folder}: {free / GIB:.0f} GiB free, writes {PROBE_BYTES / seconds / 1e6:.0f} MB/s"
    if free < 10 * GIB:
        remedy = "checkpoints take 12 bytes a parameter; free some space or set run_dir elsewhere"
        return Check(name="Disk", status=Status.warn, found=found, remedy=remedy)
    return Check(name="Disk", found=found)


def _compilers() -> Check:
    """What torch.compile, Triton and DeepSpeed's own operations are built with."""
    import torch

    wanted = ["g++", "ninja", *(["nvcc"] if torch.cuda.is_available() else [])]
    missing = [name for name in wanted if shutil.which(name) is None]
    if missing:
        remedy = (
            "engine.offload, engine.compile and GPU kernels build code: install g++, ninja, the CUDA toolkit"
        )
        return Check(
            name="Compilers", status=Status.warn, found=f"missing: {', '.join(missing)}", remedy=remedy
        )
    return Check(name="Compilers", found=", ".join(wanted))


def _wandb() -> Check:
    from drivetrain.train import trackers

    source = trackers.wandb_key_source()
    if source is None:
        found = "no API key: tracker=wandb records offline"
        return Check(
            name="W&B", status=Status.warn, found=found, remedy="`wandb login`, or tracker=tensorboard"
        )
    if not trackers.wandb_answers():
        found = f"key in {source}, but {trackers.wandb_url()} does not answer: tracker=wandb records offline"
        return Check(
            name="W&B", status=Status.warn, found=found, remedy="`wandb sync` from where there is a network"
        )
    return Check(name="W&B", found=f"key in {source}, {trackers.wandb_url()} answers")


def _git() -> Check:
    version = _output("git", "--version")
    if version is None:
        remedy = "install git, and runs record the revision they ran"
        return Check(name="git", status=Status.warn, found="not installed", remedy=remedy)
    return Check(name="git", found=version.removeprefix("git version "))


def _data(folder: Path) -> Check:
    manifest = folder / "manifest.json"
    remedy = f"drivetrain data build INPUT... --tokenizer DIR --out {folder}"
    try:
        json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = "is missing" if isinstance(error, FileNotFoundError) else "cannot be read"
        return Check(name="Data", status=Status.fail, found=f"{manifest} {why}", remedy=remedy)
    size = sum(path.stat().st_size for path in folder.rglob("*.bin"))
    return Check(name="Data", found=f"{folder}: {size / GIB:.2f} GiB of tokens")
