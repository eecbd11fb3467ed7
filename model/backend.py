"""Which implementation of the operations a device runs."""

import importlib.util

import torch

from drivetrain.conf.errors import ConfigError
from drivetrain.conf.head_dim import head_dim_problem
from drivetrain.conf.schema import Kernels, Precision, RunConfig
from drivetrain.kernels.op import INTERPRETED

CAPABILITY = (8, 0)  # Ampere: the first with bf16 matrix units


def backend_for(config: RunConfig, device: torch.device) -> str:
    """`backend_of` a run."""
    return backend_of(config.kernels, device, config.model.head_dim, config.engine.precision)


def backend_of(
    kernels: Kernels,
    device: torch.device,
    head_dim: int | None = None,
    precision: Precision = Precision.bf16,
) -> str:
    """The name under which `Op.implementation` finds it: "triton", "sdpa", "flash_attn" or "reference".

    `auto` is triton on a GPU of capability 8.0 or newer for heads as wide as its kernels take, and torch's own
    operations elsewhere.

    Args:
        head_dim: of the model; None: one that the kernels take.
        precision: of the forward pass.

    Raises:
        ConfigError: the device cannot run what is asked for, heads are too wide for it, or flash-attn is not
            installed.
    """
    too_wide = head_dim_problem(head_dim, precision) if head_dim is not None else None
    match kernels:
        case Kernels.auto:
            return "triton" if _obstacle(device) is None and too_wide is None else "sdpa"
        case Kernels.triton | Kernels.flash_attn:
            obstacle = _obstacle(device)
            if obstacle is not None and not (INTERPRETED and kernels is Kernels.triton):
                raise ConfigError(f"kernels={kernels.name} {obstacle}; use kernels=sdpa")
            if too_wide is not None:
                raise ConfigError(f"kernels={kernels.name} {too_wide}")
            if kernels is Kernels.flash_attn and importlib.util.find_spec("flash_attn") is None:
                raise ConfigError(
                    "kernels=flash_attn needs the package flash-attn, which is not installed here; "
                    "pip install flash-attn, or use kernels=triton"
                )
    return kernels.name


def _obstacle(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run there."""
    if device.type != "cuda":
        return f"needs a GPU, and the ranks run on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which is not installed here"
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        return f"needs sm80 or newer, this is sm{found[0]}{found[1]}"
    return None
