"""Whether a job can run where it is about to start: GPUs, memory, keys. Asked before anything is made."""

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import psutil

from drivetrain.conf.errors import ConfigError
from drivetrain.conf.schema import Device, RunConfig, WandbConfig, WandbMode
from drivetrain.conf.units import human_bytes
from drivetrain.launch.plan import Plan, duration, make_plan
from drivetrain.model.flops import find_gpu

# Without one of these no GPU can be opened: NVIDIA's, Windows' for Linux guests, AMD's.
GPU_NODES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
ASK_TORCH = """
import json, torch
devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
print(json.dumps([[device.name, device.total_memory] for device in devices]))
"""
STATE = ("weights", "optimizer", "gradients")  # parts of the plan that follow exactly from the parameters
USE_FSDP = "engine=zero builds the whole model on every rank before it divides it: use engine=fsdp"


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    memory: int  # bytes


@cache
def local_gpus() -> tuple[Gpu, ...]:
    """The GPUs that torch sees here, asked in a process of its own, since asking takes memory on them."""
    if not any(Path(node).exists() for node in GPU_NODES):
        return ()
    done = subprocess.run(
        [sys.executable, "-P", "-c", ASK_TORCH], capture_output=True, text=True, check=False
    )
    return tuple(Gpu(*found) for found in json.loads(done.stdout)) if done.returncode == 0 else ()


def check_machine(config: RunConfig) -> None:
    """What every rank on this machine would find out for itself, after the run directory is made.

    Raises:
        ConfigError: too few GPUs, or no key for a tracker that needs one; nothing is asked of other machines.
    """
    cluster, tracker = config.cluster, config.tracker
    if cluster.name != "local":
        return
    gpus = () if cluster.device is Device.cpu else local_gpus()
    if cluster.device is Device.cuda and not gpus:
        raise ConfigError("cluster.device=cuda, but torch sees no GPU here; use cluster.device=cpu")
    if gpus and cluster.nproc > len(gpus):
        raise ConfigError(
            f"cluster.nproc={cluster.nproc} and this machine has {len(gpus)} GPU{'s' * (len(gpus) > 1)}; "
            f"use cluster.nproc={len(gpus)}, or cluster.device=cpu"
        )
    if isinstance(tracker, WandbConfig) and tracker.mode is WandbMode.online:
        from drivetrain.train.trackers import wandb_key_source

        if not wandb_key_source():
            raise ConfigError(
                "tracker.mode=online needs a W&B key and this machine has none; "
                "run `wandb login`, set WANDB_API_KEY, or use tracker.mode=offline"
            )


def plan_here(config: RunConfig) -> tuple[str, bool]:
    """One line about what a rank will need, and whether that is within what it can have.

    Raises:
        ConfigError: weights, moments and gradients alone are larger than the GPU's memory, or with engine=zero the
            whole model is, which each rank begins with.
    """
    cluster = config.cluster
    if cluster.name != "local":
        made = make_plan(config)
        return f"plan: {_need(made)} on GPUs of {_gb(made.gpu_memory)} ({made.gpu})", made.fits
    gpus = () if cluster.device is Device.cpu else local_gpus()
    if not gpus:
        share = psutil.virtual_memory().available // cluster.nproc  # what micro_batch=auto goes by, too
        made = make_plan(replace(config, cluster=replace(cluster, device=Device.cpu)), gpu_memory=share)
        line = f"plan: {_need(made)} of the {human_bytes(share)} that are free for it"
        advice = USE_FSDP if made.start > made.usable_memory else "use a smaller stage.micro_batch or model"
        return (line if made.fits else f"{line}; {advice}"), made.fits
    gpu = min(gpus[: cluster.nproc], key=lambda gpu: gpu.memory)
    known = find_gpu(gpu.name)
    made = make_plan(config, gpu_memory=gpu.memory, gpu=known.name if known else "H100 SXM")
    fix = f"; {' '.join(made.fix.overrides)} makes it fit" if made.fix else ""
    if (start := made.start) > gpu.memory:
        raise ConfigError(
            f"{gpu.name} has {human_bytes(gpu.memory)} and each rank begins with {human_bytes(start)} of weights; "
            f"{USE_FSDP}"
        )
    state = max(sum(parts[name] for name in STATE) for parts in made.memory.values())
    if state > gpu.memory:
        raise ConfigError(
            f"weights, moments and gradients take {human_bytes(state)} on each rank and {gpu.name} has "
            f"{human_bytes(gpu.memory)}{fix or '; use more ranks or a smaller model'}"
        )
    time = f", {duration(made.wall_seconds)} at {made.mfu:.0%} MFU" if known else ""
    return f"plan: {_need(made)} of {human_bytes(gpu.memory)} on {gpu.name}{time}{fix}", made.fits


def _need(plan: Plan) -> str:
    return (
        f"a rank needs about {human_bytes(plan.peak)} at micro-batch {plan.micro_batch} × {plan.seq_len:,},"
    )


def _gb(number: float) -> str:
    return f"{number / 1e9:.0f} GB"
