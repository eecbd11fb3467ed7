"""Whether the data is all there and fits the model and the stage, from manifests, the sizes of files, and of
conversations the lengths."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drivetrain.conf.changes import has_checkpoint
from drivetrain.conf.check_rows import IDX_HEADER_BYTES, row_problems
from drivetrain.conf.errors import ConfigError
from drivetrain.conf.schema import DataConfig, DpoConfig, GrpoConfig, RewardModelConfig, RunConfig, SftConfig
from drivetrain.conf.source import tokenizer_of
from drivetrain.conf.tokenizer_file import TOKENIZER, hash_of, size_of, tokenizer_definition

OWN_TOKENIZER = "leave tokenizer out to use the one the data was built with"
ITEM_BYTES = {"uint16": 2, "int32": 4}  # data/shards.py describes the files
BUILD_CHAT = "`drivetrain data build INPUT... --chat --tokenizer DIR --out DIR`"
BUILD_PAIRS = "`drivetrain data build INPUT... --pairs --tokenizer DIR --out DIR`"
BUILD = "`drivetrain data build INPUT... --tokenizer DIR --out DIR`"


def data_problems(config: RunConfig) -> Iterator[str]:
    """One sentence for every problem."""
    if isinstance(config.stage, GrpoConfig):
        return  # conf/grpo.py
    data, vocab_size = config.data, config.model.vocab_size
    if data.path is None and not data.mixture:
        yield f"data.path is missing: build shards with {BUILD} and pass data.path=DIR"
        return
    if data.path is not None and data.mixture:
        yield f"data.path={data.path} and data.mixture are both given; keep one"
        return
    problems: list[str] = []
    manifests = _manifests(data, problems)
    yield from problems
    for key, manifest in manifests.items():
        if (size := manifest["vocab_size"]) > vocab_size:
            yield (
                f"{key} has a vocabulary of {size} tokens and model.vocab_size={vocab_size}; "
                f"use model.vocab_size={math.ceil(size / 64) * 64}"
            )
        wrong = [*_kind(key, manifest, config), *_files(key, manifest)]
        yield from wrong or (row_problems(key, manifest, config) if _weighted(manifest) else ())
    hashes = {key: manifest["tokenizer_hash"] for key, manifest in manifests.items()}
    first = next(iter(hashes), "")
    for key in hashes:
        if hashes[key] != hashes[first]:
            yield f"{key} and {first} were built with different tokenizers; build one of them again"
    yield from _tokenizers(config, manifests)


def _manifests(data: DataConfig, problems: list[str]) -> dict[str, dict[str, Any]]:
    """Manifests by the word that names their directory; what cannot be read goes to `problems`."""
    paths: dict[str, str | None] = {"data.path": data.path}
    if data.mixture:
        paths = {f"data.mixture.{name}.path": source.path for name, source in data.mixture.items()}
    found = {}
    for key, value in paths.items():
        word, directory = f"{key}={value}", Path(str(value))
        if not directory.is_dir():
            problems.append(f"{word} is no directory; build shards with {BUILD}")
        elif not (directory / "manifest.json").is_file():
            problems.append(f"{word} has no manifest.json, so its build did not finish; run {BUILD}")
        else:
            try:
                manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
                _longest(manifest, "train")
                _sizes(manifest)
                if not isinstance(manifest["vocab_size"], int) or not manifest["tokenizer_hash"]:
                    raise ValueError("a manifest without its tokenizer")
                if manifest.get("pairs") and any(int(s["documents"]) % 2 for s in manifest["shards"]):
                    raise ValueError("half a pair")
            except (OSError, ValueError, KeyError, TypeError):
                problems.append(
                    f"{word} has a manifest.json that cannot be read as one; build the data again"
                )
            else:
                found[word] = manifest
    return found


def _kind(key: str, manifest: dict[str, Any], config: RunConfig) -> Iterator[str]:
    """Conversations for fine-tuning, pairs for preferences, documents for pretraining, and enough of them."""
    chat = _weighted(manifest)
    found = "preference pairs" if manifest.get("pairs") else "conversations" if chat else "documents"
    match config.stage:
        case SftConfig():
            needed, build = "conversations", BUILD_CHAT
        case DpoConfig() | RewardModelConfig():
            needed, build = "preference pairs", BUILD_PAIRS
        case _:
            needed, build = "documents", BUILD
    if found != needed:
        yield f"{key} holds {found} and stage={config.stage.name} needs {needed}; build them with {build}"
    elif chat:
        yield from _conversations(key, manifest, config, needed.removesuffix("s"))
    else:
        yield from _windows(key, manifest, config)


def _conversations(key: str, manifest: dict[str, Any], config: RunConfig, one: str) -> Iterator[str]:
    if not _longest(manifest, "train"):
        yield f"{key} has no {one} to train on; build it with a smaller --held-out"
    if config.stage.eval_every and not _longest(manifest, "held_out"):
        yield (
            f"{key} has no held-out {one} and stage.eval_every={config.stage.eval_every}; build it with a "
            "larger --held-out, or use stage.eval_every=0"
        )


def _windows(key: str, manifest: dict[str, Any], config: RunConfig) -> Iterator[str]:
    """A window of seq_len + 1 tokens lies in one shard, so every source needs a shard that is as long."""
    stage = config.stage
    if (found := _longest(manifest, "train")) <= stage.seq_len:
        yield (
            f"{key} has {found} tokens to train on in its longest shard and stage.seq_len={stage.seq_len} needs "
            f"{stage.seq_len + 1}; build more data, or shorten stage.seq_len"
        )
    if stage.eval_every and (found := _longest(manifest, "held_out")) <= stage.seq_len:
        yield (
            f"{key} has {found} held-out tokens in its longest shard and stage.eval_every={stage.eval_every} needs "
            f"{stage.seq_len + 1}; build it with a larger --held-out, or use stage.eval_every=0"
        )


def _weighted(manifest: dict[str, Any]) -> bool:
    """Whether the documents are conversations, whose tokens have weights."""
    return any(shard.get("loss_tokens") is not None for shard in manifest["shards"])


def _longest(manifest: dict[str, Any], split: str) -> int:
    return max((int(shard["tokens"]) for shard in manifest["shards"] if shard["split"] == split), default=0)


def _sizes(manifest: dict[str, Any]) -> dict[str, int]:
    """Bytes of every file, by its name."""
    item, sizes = ITEM_BYTES[manifest["dtype"]], {}
    for shard in manifest["shards"]:
        documents = int(shard["documents"])
        sizes[f"{shard['name']}.bin"] = item * int(shard["tokens"])
        sizes[f"{shard['name']}.idx"] = IDX_HEADER_BYTES + documents * (4 + 8) + (documents + 1) * 8
        if shard.get("loss_tokens") is not None:
            sizes[f"{shard['name']}.weights"] = int(shard["tokens"])
    return sizes


def _files(key: str, manifest: dict[str, Any]) -> Iterator[str]:
    """The first file that is missing or of another size than the manifest's counts make, for all of them."""
    directory, wrong = Path(key.partition("=")[2]), []
    for name, size in _sizes(manifest).items():
        try:
            found = (directory / name).stat().st_size
        except OSError as error:
            wrong.append(f"{name}: {error.strerror}")
            continue
        if found != size:
            wrong.append(f"{name} has {found} bytes and not {size}")
    if wrong:
        others = f", and {len(wrong) - 1} more files are wrong" if len(wrong) > 1 else ""
        yield f"{key} is not what its manifest says: {wrong[0]}{others}; build or copy the data again"


def _tokenizers(config: RunConfig, manifests: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Whether the data was made with the tokenizer that the run will have: the same ids mean the same texts."""
    source, run_dir = config.model.init_from, Path(config.run_dir) if config.run_dir else None
    if config.tokenizer is not None:
        word, directory = f"tokenizer={config.tokenizer}", Path(config.tokenizer)
        yield from _tokenizer(word, directory, OWN_TOKENIZER, manifests)
    elif source is not None and (found := tokenizer_of(Path(source))) is not None:
        remedy = f"build the data with --tokenizer {found}"
        yield from _tokenizer(f"the tokenizer of model.init_from={source}", found, remedy, manifests)
    elif run_dir is not None and has_checkpoint(run_dir) and (found := tokenizer_of(run_dir)) is not None:
        remedy = f"build the data with --tokenizer {found}"
        yield from _tokenizer(f"the tokenizer in {run_dir}", found, remedy, manifests)


def _tokenizer(
    word: str, directory: Path, remedy: str, manifests: dict[str, dict[str, Any]]
) -> Iterator[str]:
    path = directory / TOKENIZER
    if not path.is_file():
        yield f"{word} has no {TOKENIZER}; {remedy}"
        return
    try:
        definition = tokenizer_definition(directory)
        size, digest = size_of(definition), hash_of(definition)
    except (ConfigError, ValueError, KeyError, TypeError, AttributeError):
        yield f"{path} cannot be read as a tokenizer; copy or train it again"
        return
    for key, manifest in manifests.items():
        if manifest["vocab_size"] != size:
            yield f"{word} has {size} tokens and {key} was built with {manifest['vocab_size']}; {remedy}"
        elif manifest["tokenizer_hash"] != digest:
            yield f"{word} is not the one that {key} was built with, though as large; {remedy}"
