"""Low-rank adapters: W + alpha / rank · B A, with W frozen (Hu et al. 2021, arXiv 2106.09685).

T tokens · D columns of a matrix · O its rows · R rank. The base's parameters keep their names; an adapter's are
`<module>.<target>.lora_A` [R, D] and `.lora_B` [O, R], as `blocks.0.attn.wqkv.q_proj.lora_A`.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drivetrain.conf.lora import AdapterSpec, adapters_of
from drivetrain.conf.schema import LoraConfig, ModelConfig
from drivetrain.model.initialize import fill_uniform, local_rows
from drivetrain.model.transformer import Block, Transformer, unique_parameters

FACTORS = ("lora_A", "lora_B")


class Adapter(nn.Module):
    """x Aᵀ Bᵀ for the rows of one matrix. A module, so that engines which gather weights on use see this use."""

    def __init__(self, rank: int, spec: AdapterSpec) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(rank, spec.columns))
        self.lora_B = nn.Parameter(torch.empty(spec.rows, rank))

    def forward(self, x_TD: Tensor, scale: float) -> Tensor:
        return F.linear(F.linear(x_TD, self.lora_A) * scale, self.lora_B)


class LoraLinear(nn.Linear):
    """A frozen linear map with adapters on some of the matrices that lie one above the other in it.

    The matrices share one draw of dropout, as they share their input. Nothing is dropped where no gradient is
    recorded.
    """

    def __init__(
        self,
        base: nn.Linear,
        lora: LoraConfig,
        rows: list[tuple[int, AdapterSpec | None]],
        dtype: torch.dtype,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.scale, self.dropout = lora.alpha / lora.rank, lora.dropout
        self.rows = [(count, spec.target if spec else None) for count, spec in rows]
        for _, spec in rows:
            if spec is not None:
                self.add_module(spec.target, Adapter(lora.rank, spec).to(dtype))

    def forward(self, x_TD: Tensor) -> Tensor:
        out_TO = F.linear(x_TD, self.weight, self.bias)
        if self.dropout and torch.is_grad_enabled():
            x_TD = F.dropout(x_TD, self.dropout)
        parts = []
        for part_TO, (_, target) in zip(out_TO.split([n for n, _ in self.rows], -1), self.rows, strict=True):
            if target is not None:
                part_TO = part_TO + self.get_submodule(target)(x_TD, self.scale)
            parts.append(part_TO)
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]


def inject(model: Transformer, lora: LoraConfig, frozen_dtype: torch.dtype = torch.float32) -> None:
    """Freeze a model that has no weights yet, in `frozen_dtype`, and add adapters in fp32; nothing at rank 0."""
    specs = adapters_of(model.cfg, lora)
    if not specs:
        return
    model.lora = lora
    model.requires_grad_(False)
    model.to(frozen_dtype)
    by_module: dict[str, list[AdapterSpec]] = {}
    for spec in specs:
        by_module.setdefault(spec.module, []).append(spec)
    for name, group in by_module.items():
        base = cast(nn.Linear, model.get_submodule(name))
        parent, _, child = name.rpartition(".")
        with base.weight.device:
            wrapped = LoraLinear(base, lora, _cut(base.out_features, group), torch.float32)
        setattr(model.get_submodule(parent), child, wrapped)
    if lora.dropout:
        for block in model.blocks:
            cast(Block, block).draws = True


def _cut(rows: int, specs: list[AdapterSpec]) -> list[tuple[int, AdapterSpec | None]]:
    """Row counts from top to bottom, with the adapter of those that have one."""
    cut: list[tuple[int, AdapterSpec | None]] = []
    at = 0
    for spec in specs:
        if spec.first > at:
            cut.append((spec.first - at, None))
        cut.append((spec.rows, spec))
        at = spec.first + spec.rows
    return [*cut, (rows - at, None)] if at < rows else cut


def is_adapter(name: str) -> bool:
    return name.endswith(FACTORS)


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """`unique_parameters` without the adapters."""
    return ((name, parameter) for name, parameter in unique_parameters(model) if not is_adapter(name))


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in unique_parameters(model) if is_adapter(name))


@torch.no_grad()
def initialize_adapters(model: nn.Module, seed: int) -> None:
    """A uniform in ±1/√D, which is PEFT's kaiming_uniform(a=√5), a function of (seed, name, position), B zero."""
    for name, parameter in adapter_parameters(model):
        if name.endswith("lora_A"):
            fill_uniform(parameter, parameter.shape[1] ** -0.5, seed, name)
        else:
            parameter.zero_()


def adapter_shapes(model: ModelConfig, lora: LoraConfig) -> dict[str, tuple[int, int]]:
    """The adapters' parameters by name."""
    shapes = {}
    for spec in adapters_of(model, lora):
        shapes[f"{spec.name}.lora_A"] = (lora.rank, spec.columns)
        shapes[f"{spec.name}.lora_B"] = (spec.rows, lora.rank)
    return shapes


@torch.no_grad()
def add_adapters(
    model: nn.Module, adapters: Mapping[str, Tensor], cfg: ModelConfig, lora: LoraConfig
) -> None:
    """Merge into a model's own weights, whole ones or a rank's rows of them, in place.

    Args:
        adapters: whole, by name, as in `adapter_shapes`.
    """
    weights = dict(base_parameters(model))
    for spec in adapters_of(cfg, lora):
        local, row = local_rows(weights[f"{spec.module}.weight"])
        begin, end = max(row, spec.first), min(row + len(local), spec.first + spec.rows)
        if begin < end:
            delta = _delta(spec, adapters, lora, slice(begin - spec.first, end - spec.first)).to(local.device)
            part = local[begin - row : end - row]
            part.copy_(part.float() + delta)


@torch.no_grad()
def merged_tensors(
    weights: Iterable[tuple[str, Tensor]], adapters: Mapping[str, Tensor], cfg: ModelConfig, lora: LoraConfig
) -> Iterator[tuple[str, Tensor]]:
    """The base's whole tensors one by one, with the adapters' products added: those are fp32, since a narrower base
    would round small products away; the others keep their dtype.

    Args:
        adapters: whole, by name, as in `adapter_shapes`.
    """
    by_weight: dict[str, list[AdapterSpec]] = {}
    for spec in adapters_of(cfg, lora):
        by_weight.setdefault(f"{spec.module}.weight", []).append(spec)
    for name, whole in weights:
        if name not in by_weight:
            yield name, whole
            continue
        merged = whole.float().clone()
        for spec in by_weight[name]:
            delta = _delta(spec, adapters, lora, slice(None)).to(merged.device)
            merged[spec.first : spec.first + spec.rows] += delta
        yield name, merged


def _delta(spec: AdapterSpec, adapters: Mapping[str, Tensor], lora: LoraConfig, rows: slice) -> Tensor:
    """alpha / rank · B A, of some rows, fp32."""
    a_RD, b_OR = (adapters[f"{spec.name}.{factor}"].float() for factor in FACTORS)
    return b_OR[rows] @ a_RD * (lora.alpha / lora.rank)
