"""Which matrices of a model a LoRA run adapts, and whether its settings fit. No torch.

A fused matrix of ours (`wqkv`, `w_gate_up`) is several matrices of transformers, one above the other: each has an
adapter of its own, so that adapters are PEFT's (https://github.com/huggingface/peft).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from drivetrain.conf.errors import ConfigError
from drivetrain.conf.hf_tensors import layout
from drivetrain.conf.schema import ALL_LINEAR, LoraConfig, ModelConfig, MuonConfig, RunConfig

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What PEFT's adapter may say beyond plain LoRA, and the value that leaves it plain.
PLAIN = {
    "bias": "none",
    "use_dora": False,
    "use_rslora": False,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "layers_to_transform": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSpec:
    """One adapter: of `rows` rows of our matrix `module`, from row `first` on.

    Attributes:
        module: our linear map, `blocks.0.attn.wqkv`. theirs: its name in transformers.
        transposed: transformers stores it [columns, rows] (GPT-2).
    """

    module: str
    theirs: str
    first: int
    rows: int
    columns: int
    transposed: bool

    @property
    def target(self) -> str:
        return self.theirs.rpartition(".")[2]

    @property
    def name(self) -> str:
        """The prefix of its parameters, `.lora_A` [rank, columns] and `.lora_B` [rows, rank]."""
        return f"{self.module}.{self.target}"


def linear_maps(model: ModelConfig) -> Iterator[AdapterSpec]:
    """Every matrix inside the blocks, in the model's order."""
    for name, parts in layout(model).items():
        first = 0
        for part in parts:
            if not name.startswith("blocks.") or len(part.shape) != 2:
                continue
            rows, columns = reversed(part.shape) if part.transposed else part.shape
            yield AdapterSpec(
                module=name.removesuffix(".weight"),
                theirs=part.name.removesuffix(".weight"),
                first=first,
                rows=rows,
                columns=columns,
                transposed=part.transposed,
            )
            first += rows


def targets_of(model: ModelConfig) -> list[str]:
    """The names of a model's matrices."""
    return list(dict.fromkeys(spec.target for spec in linear_maps(model)))


def adapters_of(model: ModelConfig, lora: LoraConfig) -> list[AdapterSpec]:
    """The adapters of a run; none where `lora.rank` is 0. A target is the end of a matrix's name, as in PEFT:
    `c_proj` is both of GPT-2's, `attn.c_proj` the one."""
    if not lora.rank:
        return []
    return [spec for spec in linear_maps(model) if any(_is(spec, target) for target in lora.targets)]


def _is(spec: AdapterSpec, target: str) -> bool:
    return target == ALL_LINEAR or f".{spec.theirs}".endswith(f".{target}")


def lora_problems(config: RunConfig) -> Iterator[str]:
    """One sentence for every setting that does not fit the others."""
    lora, model = config.lora, config.model
    if not lora.rank:
        if lora.init_from is not None:
            yield f"lora.init_from={lora.init_from} needs adapters and lora.rank=0 has none; set lora.rank"
        return
    if model.init_from is None:
        yield f"lora.rank={lora.rank} adapts weights that exist already; pass them with model.init_from=DIR"
    if isinstance(config.optim, MuonConfig):
        yield "optim=muon is for whole matrices and not for LoRA's factors of them; use optim=adamw"
    allowed, maps = targets_of(model), list(linear_maps(model))
    if not lora.targets:
        yield f"lora.targets is empty; use {ALL_LINEAR} or some of {', '.join(allowed)}"
    for target in lora.targets:
        if not any(_is(spec, target) for spec in maps):
            yield (
                f"lora.targets has {target}, which model={model.name} has not; "
                f"use {ALL_LINEAR} or some of {', '.join(allowed)}"
            )
    if lora.init_from is not None:
        yield from _init_from(Path(lora.init_from), model, lora)


def _init_from(folder: Path, model: ModelConfig, lora: LoraConfig) -> Iterator[str]:
    try:
        found = read_peft_config(folder, model)
    except ConfigError as error:
        yield f"lora.init_from: {error}"
        return
    for key in ("rank", "alpha"):
        if (theirs := getattr(found, key)) != (ours := getattr(lora, key)):
            yield f"lora.{key}={ours} and the adapter in {folder} has {theirs}; use lora.{key}={theirs}"
    if adapters_of(model, found) != adapters_of(model, lora):
        yield (
            f"lora.targets is not what the adapter in {folder} has; "
            f"use lora.targets=[{','.join(found.targets)}]"
        )


def read_peft_config(folder: Path, model: ModelConfig) -> LoraConfig:
    """What `adapter_config.json` says.

    Raises:
        ConfigError: it is missing, cannot be read, or is another adapter than plain LoRA.
    """
    path = folder / PEFT_CONFIG
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        other = [
            f"{key}={raw[key]}" for key, plain in PLAIN.items() if raw.get(key, plain) not in (plain, None)
        ]
        if raw.get("peft_type") != "LORA":
            other.insert(0, f"peft_type={raw.get('peft_type')}")
        targets = raw["target_modules"]
        targets = [targets] if targets == ALL_LINEAR else targets
        if not isinstance(targets, list):
            other.append(f"target_modules={targets}")
            targets = []
        maps = list(linear_maps(model))
        if unknown := [str(target) for target in targets if not any(_is(spec, target) for spec in maps)]:
            other.append(f"target_modules with {', '.join(sorted(unknown))}")
        rank, alpha = int(raw["r"]), float(raw["lora_alpha"])
        dropout = float(raw.get("lora_dropout", 0.0))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} cannot be read as PEFT's settings ({type(error).__name__}: {error})"
        ) from error
    if other:
        raise ConfigError(f"{path} has {', '.join(other)}, which only PEFT knows; use plain LoRA")
    found = LoraConfig(rank=rank, alpha=alpha, dropout=dropout, targets=targets)
    # PEFT may name every layer's matrices; the short names say the same where no layer is left out.
    chosen = adapters_of(model, found)
    short = replace(found, targets=list(dict.fromkeys(spec.target for spec in chosen)))
    return short if adapters_of(model, short) == chosen else found
