"""An engine's weights for samplers of Hugging Face models."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from drivetrain.conf.errors import DrivetrainError
from drivetrain.conf.hf_config import hf_from_model
from drivetrain.conf.hf_tensors import INDEX, SINGLE, layout
from drivetrain.conf.schema import ModelConfig
from drivetrain.conf.source import HF_CONFIG
from drivetrain.model.hf import to_hf
from drivetrain.train.engine.base import Engine

FILE_BYTES = 4 << 30  # of one file, about


def hf_weights(engine: Engine, cfg: ModelConfig, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face's names and whole tensors, on the CPU, layer after layer; adapters are merged. Collective."""
    parts = layout(cfg)
    for name, whole in engine.full_weights():
        yield from to_hf(parts[name], whole.to(dtype))


def describe(folder: Path, cfg: ModelConfig, dtype: torch.dtype) -> None:
    """Write the config.json that goes with the weights.

    Raises:
        ConfigError: transformers has no such model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = hf_from_model(cfg, str(dtype).removeprefix("torch."))
    (folder / HF_CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def write_weights(folder: Path, engine: Engine, cfg: ModelConfig, dtype: torch.dtype, writes: bool) -> None:
    """A new directory of config.json and safetensors, whole once it has this name. Collective.

    Args:
        writes: on one rank; the others take part in gathering.

    Raises:
        DrivetrainError: it cannot be written.
    """
    made = folder.with_name(folder.name + ".tmp")
    try:
        if writes:
            shutil.rmtree(made, ignore_errors=True)
            describe(made, cfg, dtype)
        weight_map: dict[str, str] = {}
        for number, tensors in enumerate(_files(hf_weights(engine, cfg, dtype), writes), 1):
            file = f"model-{number:05}.safetensors"
            save_file(tensors, made / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
        if writes:
            if len(set(weight_map.values())) == 1:
                (made / next(iter(weight_map.values()))).rename(made / SINGLE)
            else:
                (made / INDEX).write_text(json.dumps({"weight_map": weight_map}))
            shutil.rmtree(folder, ignore_errors=True)
            made.replace(folder)
    except OSError as error:
        raise DrivetrainError(
            f"{folder} cannot be written: {error.strerror}; set stage.rollout.server.weights to another directory"
        ) from error


def _files(weights: Iterator[tuple[str, Tensor]], writes: bool) -> Iterator[dict[str, Tensor]]:
    """What goes into each file; nothing where another rank writes, which still takes part in gathering."""
    tensors: dict[str, Tensor] = {}
    filled = 0
    for name, tensor in weights:
        if not writes:
            continue
        size = tensor.numel() * tensor.element_size()
        if tensors and filled + size > FILE_BYTES:
            yield tensors
            tensors, filled = {}, 0
        tensors[name], filled = tensor, filled + size
    if tensors:
        yield tensors
