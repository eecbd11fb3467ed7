"""Initial weights as a function of (seed, name, position): the same on any number of ranks."""

from collections.abc import Callable, Iterator

import torch
import xxhash
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from drivetrain.conf.schema import ModelConfig
from drivetrain.model.transformer import Transformer, unique_parameters

BLOCK = 1 << 18  # elements drawn from one seed; a shard draws only the blocks that it overlaps


def local_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """This rank's part of a parameter and the index of its first row (0 for a plain tensor)."""
    if not isinstance(parameter, DTensor):
        return parameter, 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    local = parameter.to_local()
    if local.shape[1:] != parameter.shape[1:]:
        raise ValueError(f"expected sharding by rows, found {parameter.placements}")
    return local, offset[0]


def _blocks(first: int, last: int) -> Iterator[int]:
    yield from range(first // BLOCK, (last + BLOCK - 1) // BLOCK)


def fill_normal(parameter: Tensor, std: float, seed: int, name: str) -> None:
    """Write N(0, std²) into the local part; element i of the whole parameter depends on (seed, name, i)."""
    _fill(
        parameter, seed, name, lambda drawn, generator: drawn.normal_(0.0, 1.0, generator=generator).mul_(std)
    )


def fill_uniform(parameter: Tensor, bound: float, seed: int, name: str) -> None:
    """Write uniform numbers from ±bound, as `fill_normal` does."""
    _fill(parameter, seed, name, lambda drawn, generator: drawn.uniform_(-bound, bound, generator=generator))


def _fill(parameter: Tensor, seed: int, name: str, draw: Callable[[Tensor, torch.Generator], Tensor]) -> None:
    local, row = local_rows(parameter)
    if local.numel() == 0:
        return
    first = row * (parameter.numel() // parameter.shape[0])
    last = first + local.numel()
    flat = torch.empty(local.numel(), dtype=torch.float32)
    for block in _blocks(first, last):
        key = xxhash.xxh3_64_intdigest(f"{seed}/{name}/{block}".encode()) >> 1
        drawn = draw(torch.empty(BLOCK), torch.Generator().manual_seed(key))
        start, stop = max(first, block * BLOCK), min(last, (block + 1) * BLOCK)
        flat[start - first : stop - first] = drawn[start - block * BLOCK : stop - block * BLOCK]
    local.copy_(flat.view(local.shape))


@torch.no_grad()
def initialize(model: Transformer, cfg: ModelConfig, seed: int) -> None:
    """Fill a materialised model: matrices from N(0, init_std²), those that write into the residual stream
    scaled by 1/sqrt(2·layers) (GPT-2), norms 1, biases 0."""
    for name, parameter in unique_parameters(model):
        if parameter.dim() == 1:
            nn.init.constant_(parameter, 1.0 if name.endswith("norm.weight") else 0.0)
            continue
        writes_residual = name.endswith(("wo.weight", "w_down.weight"))
        std = cfg.init_std / (2 * cfg.layers) ** 0.5 if writes_residual else cfg.init_std
        fill_normal(parameter, std, seed, name)
