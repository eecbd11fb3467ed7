"""`drivetrain import` and `drivetrain export`: Hugging Face directories in and out.

What `import` writes is a run directory, so everything that takes a run takes it: its checkpoint is step 0, in the
dtype of the source, and `hf/` has the source's own config.json and generation_config.json.
"""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from drivetrain.conf.compose import compose, to_yaml
from drivetrain.conf.errors import ConfigError, DrivetrainError
from drivetrain.conf.hf_config import differences, hf_from_model, model_from_hf
from drivetrain.conf.hf_tensors import DTYPES, INDEX, SINGLE, layout, read_headers
from drivetrain.conf.hf_values import GENERATION, generation_ends
from drivetrain.conf.schema import ModelConfig
from drivetrain.conf.source import (
    HF,
    HF_CONFIG,
    MARKER,
    RUN_CONFIG,
    STATE,
    Kind,
    hf_folder,
    kind_of,
    model_of,
    tokenizer_of,
)
from drivetrain.conf.units import human_bytes
from drivetrain.data.shards import hash_file, sync_directory
from drivetrain.data.tokenizer import (
    chat_templates,
    copy_tokenizer,
    eos_id,
    load_tokenizer,
    special_tokens,
)
from drivetrain.model.hf import to_hf
from drivetrain.model.peft_format import write_peft
from drivetrain.train.adapters import lora_of, read_adapters
from drivetrain.train.build import weights_folder
from drivetrain.train.checkpoint import checkpoint_name, origin
from drivetrain.train.weights import TORCH, whole_weights

WORDS = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}  # --dtype, and safetensors' names
# Tokens that end a turn of a chat, where the tokenizer has them and its template writes them.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>")


@dataclass(frozen=True, slots=True)
class Written:
    """Tensors, bytes of their numbers, and the files that hold them."""

    tensors: int
    bytes: int
    files: int

    def said(self, out: Path) -> str:
        files = "1 file" if self.files == 1 else f"{self.files} files"
        return f"{self.tensors} tensors, {human_bytes(self.bytes)} in {files} -> {out}"


def import_hf(source: Path, out: Path, max_shard_bytes: int) -> Written:
    """Check a Hugging Face directory and write it as a run directory of step 0.

    Raises:
        ConfigError: the architecture is not supported, or `out` cannot be taken. CheckpointError: tensors are
            missing, extra or misshapen. DrivetrainError: `out` cannot be written.
    """
    if kind_of(source) is not Kind.hugging_face:
        what = "is a run already" if kind_of(source) else "has no config.json"
        raise ConfigError(f"{source} {what}; import takes a Hugging Face directory")
    model = model_from_hf(source)
    weights = whole_weights(source, model)
    sizes = _sizes(model, weights.dtypes)
    with _made(out, sum(sizes.values())) as made:
        folder = made / "checkpoints" / checkpoint_name(0)
        folder.mkdir(parents=True)
        groups = list(_groups(sizes, max_shard_bytes))
        for number, names in enumerate(groups, 1):
            tensors = {f"model.{name}": whole for name, whole in weights.read(names).items()}
            save_file(tensors, folder / f"model-{number:05}.safetensors")
        config = dataclasses.replace(compose([]), model=model)
        _write(folder / STATE, {"step": 0, "imported_from": str(source), **origin(config)})
        _write(folder / MARKER, {"files": {file.name: hash_file(file) for file in sorted(folder.iterdir())}})
        (made / HF).mkdir()
        for name in (HF_CONFIG, GENERATION):
            if (source / name).is_file():
                shutil.copyfile(source / name, made / HF / name)
        _import_tokenizer(source, made / "tokenizer")
        (made / RUN_CONFIG).write_text(to_yaml(config))
        return Written(len(sizes), sum(sizes.values()), len(groups))


def _import_tokenizer(source: Path, out: Path) -> None:
    """A copy; a tokenizer in an older format becomes a tokenizer.json. Nothing where there is none."""
    if (source / "tokenizer.json").is_file():
        copy_tokenizer(source, out)
    elif any((source / name).is_file() for name in ("tokenizer.model", "vocab.json")):
        from transformers import AutoTokenizer

        try:
            AutoTokenizer.from_pretrained(str(source), local_files_only=True).save_pretrained(str(out))
        except Exception as error:  # the library raises whatever its parts raise
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(
                f"the tokenizer in {source} cannot be converted to tokenizer.json: {reason}"
            ) from error


def export_hf(source: Path, out: Path, dtype: str | None, max_shard_bytes: int) -> Written:
    """Write the weights of a source for transformers and vLLM; a LoRA run's adapters are merged.

    Args:
        source: a run, an imported directory, a checkpoint, or a Hugging Face directory.
        dtype: fp32, bf16 or fp16. By default imported weights keep theirs, and trained ones, which are fp32,
            become bf16.

    Raises:
        ConfigError: no whole checkpoint there, transformers has no such model, or `out` cannot be taken.
        CheckpointError: the weights are damaged, or not of this model. DrivetrainError: `out` cannot be written.
    """
    model, described = model_of(source), _described(source)
    hf_from_model(model, "")  # refuses a model that transformers has not, before anything is read
    weights = whole_weights(source, model)
    dtypes = dict(weights.dtypes)
    if dtype is not None or described is None:
        dtypes = dict.fromkeys(dtypes, WORDS[dtype or "bf16"])
    sizes, parts = _sizes(model, dtypes), layout(model)
    with _made(out, sum(sizes.values())) as made:
        groups = list(_groups(sizes, max_shard_bytes))
        for number, names in enumerate(groups, 1):
            file = SINGLE if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
            tensors: dict[str, Tensor] = {}
            for name, whole in weights.read(names).items():
                tensors.update(to_hf(parts[name], whole.to(TORCH[dtypes[name]])))
            save_file(tensors, made / file, metadata={"format": "pt"})
        if len(groups) > 1:
            _write_index(made, sum(sizes.values()))
        tokenizer = tokenizer_of(source)
        if tokenizer is not None:
            copy_tokenizer(tokenizer, made / "tokenizer")
            for path in sorted((made / "tokenizer").iterdir()):
                path.rename(made / path.name)
            (made / "tokenizer").rmdir()
        ends = generation_ends(hf_folder(source), model.vocab_size)
        _describe(made, model, described, tokenizer, ends, max(dtypes.values(), key=DTYPES.__getitem__))
        return Written(sum(map(len, parts.values())), sum(sizes.values()), len(groups))


def export_adapter(source: Path, out: Path) -> Written:
    """Write the adapters of a LoRA run in PEFT's format, fp32.

    Raises:
        ConfigError: no whole checkpoint there, or one without adapters, or `out` cannot be taken. CheckpointError:
            the adapters are damaged. DrivetrainError: `out` cannot be written.
    """
    model = model_of(source)
    adapted = lora_of(folder) if (folder := _checkpoint_of(source)) is not None else None
    if folder is None or adapted is None:
        raise ConfigError(f"{source} has whole weights and no adapter; leave --adapter out")
    lora, base = adapted
    adapters = read_adapters(folder, model, lora)
    size = sum(4 * tensor.numel() for tensor in adapters.values())
    known = base.path if kind_of(Path(base.path)) is Kind.hugging_face else None
    with _made(out, size) as made:
        write_peft(made, adapters, model, lora, base=known)
    return Written(len(adapters), size, 1)


def _checkpoint_of(source: Path) -> Path | None:
    return None if kind_of(source) is Kind.hugging_face else weights_folder(source)


def _described(source: Path) -> Path | None:
    """The folder with what a Hugging Face source said of itself; None for weights that were trained here."""
    found = hf_folder(source)
    return found if (found / HF_CONFIG).is_file() else None


def _sizes(model: ModelConfig, dtypes: dict[str, str]) -> dict[str, int]:
    """Bytes of each of our parameters, by name."""
    return {
        name: DTYPES[dtypes[name]] * sum(math.prod(part.shape) for part in parts)
        for name, parts in layout(model).items()
    }


def _groups(sizes: dict[str, int], most: int) -> Iterator[list[str]]:
    """Names in order, as many to a file as fit; one that is larger than `most` bytes gets a file of its own."""
    group: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if group and filled + size > most:
            yield group
            group, filled = [], 0
        group.append(name)
        filled += size
    yield group


def _write_index(made: Path, size: int) -> None:
    headers = read_headers(sorted(made.glob("*.safetensors")))
    weight_map = {name: at.file.name for name, at in headers.items()}
    _write(made / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _describe(
    made: Path,
    model: ModelConfig,
    source: Path | None,
    tokenizer: Path | None,
    ends: list[int],
    dtype: str,
) -> None:
    """config.json and generation_config.json: the source's own where there are such, and they still fit.

    Args:
        ends: that the source has, or the weights that it began from.
    """
    name = str(TORCH[dtype]).removeprefix("torch.")
    ids = _special_ids(tokenizer, ends) if tokenizer is not None else {}
    config = hf_from_model(model, name) | ids
    generation: dict[str, Any] = ids
    if source is not None:
        theirs = model_from_hf(source)
        if (
            not differences(model, dataclasses.replace(theirs, name=""))
            and model.max_seq_len == theirs.max_seq_len
        ):
            config = json.loads((source / HF_CONFIG).read_text(encoding="utf-8"))
            config["dtype" if "dtype" in config else "torch_dtype"] = name
        if (source / GENERATION).is_file():
            generation = json.loads((source / GENERATION).read_text(encoding="utf-8"))
    _write(made / HF_CONFIG, config)
    _write(made / GENERATION, generation)


def _special_ids(directory: Path, more: list[int]) -> dict[str, Any]:
    """bos, eos and pad, as far as the tokenizer names them; a chat model also stops at the end of a turn, and every
    model at the tokens in `more`."""
    tokenizer, named = load_tokenizer(directory), special_tokens(directory)
    ids: dict[str, Any] = {}
    for key in ("bos_token", "pad_token"):
        if (found := tokenizer.token_to_id(named.get(key, ""))) is not None:
            ids[f"{key}_id"] = found
    template = chat_templates(directory).get("default", "")
    ends = [tokenizer.token_to_id(token) for token in TURN_ENDS if token in template]
    stops = list(dict.fromkeys([eos_id(directory), *(token for token in ends if token is not None), *more]))
    ids["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    return ids


@contextmanager
def _made(out: Path, size: int) -> Iterator[Path]:
    """A new directory under a temporary name; what it holds is synced and it gets its own when the block is done.

    Raises:
        ConfigError: there is something already, or less room than `size` bytes. DrivetrainError: a write failed.
    """
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty directory; give another OUT or remove it")
    temporary = out.with_name(out.name + ".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        if (free := shutil.disk_usage(temporary).free) < size:
            raise ConfigError(
                f"{out} needs {human_bytes(size)}, of which its disk lacks {human_bytes(size - free)}; "
                "give another OUT"
            )
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            if path.is_dir():
                sync_directory(path)
            else:
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        if out.is_dir():
            out.rmdir()
        temporary.rename(out)
        sync_directory(out.parent)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DrivetrainError(f"{out} cannot be written: {reason}; nothing of it was kept") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
