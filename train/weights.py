"""Whole tensors of a run, a checkpoint or a Hugging Face directory, a few at a time, on the CPU."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from drivetrain.conf.errors import CheckpointError
from drivetrain.conf.hf_tensors import DTYPES, layout, read_headers
from drivetrain.conf.schema import ModelConfig
from drivetrain.conf.source import Kind, kind_of
from drivetrain.model.hf import HfWeights
from drivetrain.model.lora import merged_tensors
from drivetrain.train.adapters import locate, lora_of, read_adapters
from drivetrain.train.build import newest_weights, weights_folder
from drivetrain.train.checkpoint import is_reward_model, load_tensors, no_logits

TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # by safetensors' names


@dataclass(frozen=True, slots=True)
class WholeWeights:
    """All weights of a source, not yet read.

    Attributes:
        dtypes: of each of our parameters, as stored, in safetensors' words.
        read: from names to whole tensors of those dtypes.
    """

    dtypes: dict[str, str]
    read: Callable[[Iterable[str]], dict[str, Tensor]]


def whole_weights(source: Path, cfg: ModelConfig) -> WholeWeights:
    """Open a source; adapters of a LoRA run are added to the weights that they were trained on.

    Raises:
        ConfigError: a run without a whole checkpoint. CheckpointError, also when reading: the weights are damaged,
            not those of this model, or a reward model's.
    """
    if kind_of(source) is Kind.hugging_face:
        weights = HfWeights(source, cfg)
        return WholeWeights(
            {name: weights.dtype_of(name) for name in weights.parts},
            lambda names: {name: weights.whole(name) for name in names},
        )
    folder = weights_folder(source)
    if is_reward_model(folder):
        raise no_logits(folder)
    if (adapted := lora_of(folder)) is not None:
        lora, base = adapted
        below = whole_weights(locate(base, None, newest_weights), cfg)
        adapters = read_adapters(folder, cfg, lora)
        return WholeWeights(
            below.dtypes, lambda names: dict(merged_tensors(below.read(names).items(), adapters, cfg, lora))
        )
    return _of_checkpoint(folder, cfg)


def _of_checkpoint(folder: Path, cfg: ModelConfig) -> WholeWeights:
    stored = read_headers(sorted(folder.glob("*.safetensors")))
    shapes = {
        name: (sum(part.rows for part in parts), *parts[0].columns) for name, parts in layout(cfg).items()
    }
    lacking = [name for name in shapes if f"model.{name}" not in stored]
    if lacking:
        raise CheckpointError(
            f"{folder} has no {lacking[0]}; its weights are not those of the model of its run"
        )
    dtypes = {name: stored[f"model.{name}"].dtype for name in shapes}
    if odd := sorted(set(dtypes.values()) - set(DTYPES)):
        raise CheckpointError(f"{folder} has weights in {', '.join(odd)}; supported are {', '.join(DTYPES)}")

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        found = {f"model.{name}": torch.empty(shapes[name], dtype=TORCH[dtypes[name]]) for name in names}
        load_tensors(folder, found)
        return {key.removeprefix("model."): tensor for key, tensor in found.items()}

    return WholeWeights(dtypes, read)
