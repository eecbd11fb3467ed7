"""The ranks: who this process is, and the meshes that the engines shard over."""

import ctypes
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from drivetrain.conf.errors import ConfigError
from drivetrain.conf.schema import Device


@dataclass(frozen=True, slots=True)
class World:
    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise fp64 sum over all ranks."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def sum_u64(self, value: int) -> int:
        """Sum modulo 2^64 over all ranks."""
        signed = value - (1 << 64) if value >= 1 << 63 else value
        total = torch.tensor([signed], dtype=torch.int64, device=self.device)
        dist.all_reduce(total)
        return int(total.item()) % (1 << 64)

    def any(self, flag: bool) -> bool:
        """True on every rank when any rank says so."""
        return self.sum([float(flag)])[0] > 0

    def min(self, value: int) -> int:
        """The smallest rank's value."""
        least = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        return int(least.item())

    def from_main(self, values: Tensor) -> Tensor:
        """Rank 0's values, on every rank; all ranks give one shape and dtype."""
        shared = values.to(self.device, copy=True)
        dist.broadcast(shared, src=0)
        return shared

    def all_equal(self, text: str) -> bool:
        """True on every rank when all ranks hold the same text."""
        texts: list[str | None] = [None] * self.size
        dist.all_gather_object(texts, text)
        return len(set(texts)) == 1

    def barrier(self) -> None:
        self.sum([0.0])


def _place() -> tuple[int, int, int]:
    """(rank, world size, local rank) from torchrun, accelerate, deepspeed, or srun; one process otherwise."""
    env = os.environ
    if "RANK" not in env and int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env:
        env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_NTASKS"]
        env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
        env.setdefault("MASTER_ADDR", env.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"))
        env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000))
    try:
        return int(env.get("RANK", "0")), int(env.get("WORLD_SIZE", "1")), int(env.get("LOCAL_RANK", "0"))
    except ValueError as error:
        raise ConfigError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers: {error}") from error


def _keep_freed_memory() -> None:
    """Have glibc keep freed blocks of up to 32 MiB: every step takes the same ones again, and on the CPU a page
    fault for each 4 KiB of them is a twentieth of a step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # macOS and musl have none
    if mallopt is not None:
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its largest
        mallopt(-1, (2 << 30) - 1)  # M_TRIM_THRESHOLD


def init_world(device: Device, timeout_s: float = 1800) -> World:
    """Join the process group: NCCL and gloo with GPUs, gloo alone on CPUs.

    Raises:
        ConfigError: cluster.device=cuda without a GPU, or more local ranks than GPUs.
    """
    rank, size, local_rank = _place()
    use_cuda = device is Device.cuda or (device is Device.auto and torch.cuda.is_available())
    if use_cuda and not torch.cuda.is_available():
        raise ConfigError("cluster.device=cuda, but torch sees no GPU here; use cluster.device=cpu")
    if use_cuda and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU: this node has {torch.cuda.device_count()}; lower cluster.nproc"
        )
    where = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(where)
    else:
        _keep_freed_memory()
    backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
    limit = timedelta(seconds=timeout_s)
    if size == 1:
        alone = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=alone, rank=0, world_size=1, timeout=limit)
    else:
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=limit)
    return World(rank, size, local_rank, where)


def shard_mesh(world: World, replicas: int) -> DeviceMesh:
    """A 1-D mesh of all ranks, or for HSDP `replicas` groups that each hold one sharded copy."""
    if replicas == 1:
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    return init_device_mesh(
        world.device.type, (replicas, world.size // replicas), mesh_dim_names=("replicate", "shard")
    )


def leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
