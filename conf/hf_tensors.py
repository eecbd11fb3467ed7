"""Which tensors a Hugging Face directory holds, and which of them make up each of ours. No torch, no weights read.

A safetensors file is 8 bytes of length, little-endian, a JSON header of that length, and the numbers
(https://github.com/huggingface/safetensors).
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drivetrain.conf.errors import CheckpointError
from drivetrain.conf.schema import ModelConfig, Positions

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F32": 4, "BF16": 2, "F16": 2}  # and their bytes
# Causal masks and rotary angles, which old versions of transformers stored: they follow from config.json.
DERIVED = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
NAMED = 4  # tensors that a message names before it counts the others


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file, by the name that it has there; `dtype` is safetensors' word."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of theirs whose rows (columns, if `transposed`) are rows of one of ours.

    Attributes:
        shape: in their file.
        twin: a second tensor of the same shape that has to be equal, if it is there: a tied head.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool = False
    twin: str | None = None

    @property
    def rows(self) -> int:
        return self.shape[1] if self.transposed else self.shape[0]

    @property
    def columns(self) -> tuple[int, ...]:
        """The other dimension as a shape; none for a vector."""
        return self.shape[:1] if self.transposed else self.shape[1:]


def layout(model: ModelConfig) -> dict[str, list[Part]]:
    """Our parameters by name, in the model's order, and the parts that lie one above the other in each."""
    return _gpt2(model) if model.positions is Positions.learned else _llama_like(model)


def _llama_like(model: ModelConfig) -> dict[str, list[Part]]:
    dim, ffn, head_dim = model.dim, model.ffn_dim, model.head_dim
    q, kv = model.heads * head_dim, model.kv_heads * head_dim
    table = (model.vocab_size, dim)
    tied = model.tie_embeddings
    found = {
        "embed.weight": [Part("model.embed_tokens.weight", table, twin="lm_head.weight" if tied else None)]
    }

    def linear(mine: str, bias: bool, columns: int, theirs: dict[str, int]) -> None:
        found[f"{mine}.weight"] = [Part(f"{name}.weight", (rows, columns)) for name, rows in theirs.items()]
        if bias:
            found[f"{mine}.bias"] = [Part(f"{name}.bias", (rows,)) for name, rows in theirs.items()]

    for layer in range(model.layers):
        mine, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        found[f"{mine}.attn_norm.weight"] = [Part(f"{theirs}.input_layernorm.weight", (dim,))]
        projections = {f"{attention}.q_proj": q, f"{attention}.k_proj": kv, f"{attention}.v_proj": kv}
        linear(f"{mine}.attn.wqkv", model.qkv_bias, dim, projections)
        linear(f"{mine}.attn.wo", model.out_bias, q, {f"{attention}.o_proj": dim})
        if model.qk_norm:
            for norm in ("q_norm", "k_norm"):
                found[f"{mine}.attn.{norm}.weight"] = [Part(f"{attention}.{norm}.weight", (head_dim,))]
        found[f"{mine}.mlp_norm.weight"] = [Part(f"{theirs}.post_attention_layernorm.weight", (dim,))]
        linear(f"{mine}.mlp.w_gate_up", model.mlp_bias, dim, {f"{mlp}.gate_proj": ffn, f"{mlp}.up_proj": ffn})
        linear(f"{mine}.mlp.w_down", model.mlp_bias, ffn, {f"{mlp}.down_proj": dim})
    found["norm.weight"] = [Part("model.norm.weight", (dim,))]
    if not tied:
        found["head.weight"] = [Part("lm_head.weight", table)]
    return found


def _gpt2(model: ModelConfig) -> dict[str, list[Part]]:
    """GPT-2's linear maps are stored [columns, rows] (transformers' Conv1D)."""
    dim, ffn = model.dim, model.ffn_dim
    table = (model.vocab_size, dim)
    tied = model.tie_embeddings
    found = {
        "embed.weight": [Part("transformer.wte.weight", table, twin="lm_head.weight" if tied else None)],
        "position_embed.weight": [Part("transformer.wpe.weight", (model.max_seq_len, dim))],
    }

    def norm(mine: str, theirs: str) -> None:
        for kind in ("weight", "bias"):
            found[f"{mine}.{kind}"] = [Part(f"{theirs}.{kind}", (dim,))]

    def linear(mine: str, theirs: str, rows: int, columns: int) -> None:
        found[f"{mine}.weight"] = [Part(f"{theirs}.weight", (columns, rows), transposed=True)]
        found[f"{mine}.bias"] = [Part(f"{theirs}.bias", (rows,))]

    for layer in range(model.layers):
        mine, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
        norm(f"{mine}.attn_norm", f"{theirs}.ln_1")
        linear(f"{mine}.attn.wqkv", f"{theirs}.attn.c_attn", 3 * dim, dim)
        linear(f"{mine}.attn.wo", f"{theirs}.attn.c_proj", dim, dim)
        norm(f"{mine}.mlp_norm", f"{theirs}.ln_2")
        linear(f"{mine}.mlp.w_up", f"{theirs}.mlp.c_fc", ffn, dim)
        linear(f"{mine}.mlp.w_down", f"{theirs}.mlp.c_proj", dim, ffn)
    norm("norm", "transformer.ln_f")
    if not tied:
        found["head.weight"] = [Part("lm_head.weight", table)]
    return found


def read_headers(files: Iterable[Path]) -> dict[str, Stored]:
    """The tensors of safetensors files, by name.

    Raises:
        CheckpointError: a file is missing, cut short, or no safetensors; or a tensor has no dtype or no shape.
    """
    found = {}
    for file in files:
        for name, entry in _header(file).items():
            if name != "__metadata__":
                found[name] = _stored(file, name, entry)
    return found


def _stored(file: Path, name: str, entry: dict[str, Any]) -> Stored:
    dtype, shape = entry.get("dtype"), entry.get("shape")
    sizes: list[Any] = shape if isinstance(shape, list) else [None]
    if not isinstance(dtype, str) or not all(type(size) is int and size >= 0 for size in sizes):
        raise CheckpointError(
            f"{file} says of the tensor {name} dtype={dtype!r} and shape={shape!r}, and they are a word and a list "
            "of sizes; copy it again"
        )
    return Stored(file, name, dtype, tuple(sizes))


def _header(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= LONGEST_HEADER:
                raise ValueError("no length of a header")
            header = json.loads(stream.read(length))
        ends = (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        whole = 8 + length + max(ends, default=0)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing; copy the model again") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is no safetensors file ({error}); copy it again") from error
    if (size := file.stat().st_size) != whole:
        raise CheckpointError(f"{file} has {size} bytes and not {whole}; copy it again")
    assert isinstance(header, dict)
    return header


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a Hugging Face directory.

    Raises:
        CheckpointError: there are none, or the index cannot be read.
    """
    index = directory / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            return [directory / name for name in names]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is no index of weights ({error}); copy it again") from error
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    pickled = next(directory.glob("pytorch_model*.bin"), None)
    if pickled is not None:
        raise CheckpointError(
            f"{pickled} is a pickle, which is never opened here since it can run code; save the model as "
            "safetensors (save_pretrained of transformers does)"
        )
    raise CheckpointError(f"{directory} has no {SINGLE} and no {INDEX}; copy the model again")


def tensors_of(directory: Path, model: ModelConfig) -> tuple[dict[str, list[Part]], dict[str, Stored]]:
    """Our parameters' parts under the names that they have in a directory, and where each of them is.

    A model without its head (`LlamaModel`, `GPT2Model`) names its tensors without the first word.

    Raises:
        CheckpointError: tensors are missing, extra, misshapen or of another dtype; the sentence names them.
    """
    stored = read_headers(weight_files(directory))
    parts = layout(model)
    prefix = parts["norm.weight"][0].name.partition(".")[0] + "."
    if not any(name.startswith(prefix) for name in stored):
        stored = {name if name.startswith("lm_head.") else prefix + name: at for name, at in stored.items()}
    wanted = {part.name: part for group in parts.values() for part in group}
    twins = {part.twin for part in wanted.values() if part.twin}
    faults = {
        "lacks": [name for name in wanted if name not in stored],
        "has, and the model of its config.json has not,": [
            name for name in stored if name not in wanted and name not in twins and not name.endswith(DERIVED)
        ],
        "has in another shape": [
            f"{name} ({_shape(stored[name].shape)}, not {_shape(part.shape)})"
            for name, part in wanted.items()
            if name in stored and stored[name].shape != part.shape
        ],
        f"has in another dtype than {', '.join(DTYPES)}": [
            f"{name} ({stored[name].dtype})"
            for name in wanted
            if name in stored and stored[name].dtype not in DTYPES
        ],
    }
    said = [f"{what} {_some(names)}" for what, names in faults.items() if names]
    if said:
        raise CheckpointError(f"{directory} {'; it '.join(said)}")
    return parts, stored


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one number"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
