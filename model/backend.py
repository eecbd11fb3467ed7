"""Which implementation of the operations a device runs."""

import importlib.util

import torch

from drivetrain.conf.errors import ConfigError
from drivetrain.conf.schema import Kernels
from drivetrain.kernels.op import INTERPRETED

CAPABILITY = (8, 0)  # Ampere: the first with bf16 matrix units


def backend_of(kernels: Kernels, device: torch.device) -> str:
    """The name under which `Op.implementation` finds it: "triton", "sdpa", "flash_attn" or "reference".

    `auto` is triton on a GPU of capability 8.0 or newer, and torch's own operations elsewhere.

    Raises:
        ConfigError: the device cannot run what is asked for, or flash-attn is not installed.
    """
    match kernels:
        case Kernels.auto:
            return "triton" if _obstacle(device) is None else "sdpa"
        case Kernels.triton | Kernels.flash_attn:
            obstacle = _obstacle(device)
            if obstacle is not None and not (INTERPRETED and kernels is Kernels.triton):
                raise ConfigError(f"kernels={kernels.name} {obstacle}; use kernels=sdpa")
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
