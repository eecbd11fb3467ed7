"""Adapters in PEFT's files: `adapter_model.safetensors` and `adapter_config.json` (docs of
https://github.com/huggingface/peft, "PEFT checkpoint format")."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from drivetrain.conf.errors import CheckpointError
from drivetrain.conf.lora import PEFT_CONFIG, PEFT_WEIGHTS, AdapterSpec, adapters_of, targets_of
from drivetrain.conf.schema import ALL_LINEAR, LoraConfig, ModelConfig
from drivetrain.model.lora import FACTORS


def _theirs(spec: AdapterSpec, factor: str) -> str:
    return f"base_model.model.{spec.theirs}.{factor}.weight"


def write_peft(
    folder: Path,
    adapters: Mapping[str, Tensor],
    model: ModelConfig,
    lora: LoraConfig,
    *,
    base: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write what `peft.PeftModel.from_pretrained` loads.

    Args:
        adapters: whole, by name, as in `adapter_shapes`.
        base: the name or path of the model that they belong to, as transformers finds it.
    """
    specs = adapters_of(model, lora)
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": targets_of(model) if ALL_LINEAR in lora.targets else lora.targets,
        "bias": "none",
        "fan_in_fan_out": any(spec.transposed for spec in specs),
        "inference_mode": True,
    }
    tensors = {
        _theirs(spec, factor): adapters[f"{spec.name}.{factor}"].to(dtype).contiguous()
        for spec in specs
        for factor in FACTORS
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / PEFT_WEIGHTS, metadata={"format": "pt"})
    (folder / PEFT_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def read_peft(folder: Path, model: ModelConfig, lora: LoraConfig) -> dict[str, Tensor]:
    """The adapters in PEFT's files, whole and in fp32, under our names.

    Raises:
        CheckpointError: the file cannot be read, or holds others than `lora` says; tensors are named.
    """
    path = folder / PEFT_WEIGHTS
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors ({error}); copy the adapter again"
        ) from error
    found, wrong = {}, []
    for spec in adapters_of(model, lora):
        shapes = {"lora_A": (lora.rank, spec.columns), "lora_B": (spec.rows, lora.rank)}
        for factor, shape in shapes.items():
            tensor = stored.pop(name := _theirs(spec, factor), None)
            if tensor is None:
                wrong.append(f"{name} is missing")
            elif tensor.shape != shape:
                wrong.append(f"{name} is {tuple(tensor.shape)} and not {shape}")
            else:
                found[f"{spec.name}.{factor}"] = tensor.float()
    wrong += [f"{name} is one too many" for name in stored]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(f"{path} does not fit model={model.name}: {', '.join(wrong[:3])}{more}")
    return found
