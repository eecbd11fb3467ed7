"""The on-disk format: Megatron's `.bin` + `.idx` pairs beside a `manifest.json`.

`NAME.bin` holds the tokens of all documents, one after another, little-endian uint16 or int32. `NAME.idx` is
Megatron's index (megatron/core/datasets/indexed_dataset.py), little-endian and without padding:

    9 bytes   magic "MMIDIDX\\0\\0"
    u64       version, 1
    u8        dtype code: 8 uint16, 4 int32
    u64       n, the number of sequences; here a sequence is a document
    u64       n + 1, the length of the last array
    int32     lengths[n], tokens
    int64     pointers[n], bytes into NAME.bin where each document starts
    int64     document_indices[n + 1], here 0, 1, ..., n

Conversations have a third file, `NAME.weights`: one byte a token, 1 where it is learned, 0 where it is only read.
Preference pairs are conversations of which each even one is the chosen and the next the rejected one of a pair.
"""

import dataclasses
import json
import mmap
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from drivetrain.conf.errors import DataError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TRAIN, HELD_OUT = "train", "held_out"  # the names of the splits
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "int32": np.dtype("<i4")}
DTYPE_CODES = {"uint16": 8, "int32": 4}
IDX_MAGIC = b"MMIDIDX\x00\x00"
IDX_HEADER = struct.Struct("<9sQBQQ")
MAX_DOCUMENT_TOKENS = 2**31 - 1  # lengths are int32
SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def dtype_for(vocab_size: int) -> str:
    """The narrowest dtype that holds every token of a vocabulary: "uint16" or "int32"."""
    return "uint16" if vocab_size < 65536 else "int32"


@dataclass(slots=True)
class ShardInfo:
    """One shard as its manifest records it. `files` maps a file's name to its xxh3_64 hex digest.

    `loss_tokens` counts the tokens that are learned where they have weights; None: the shard has no weights.
    """

    name: str
    split: str
    tokens: int
    documents: int
    files: dict[str, str]
    loss_tokens: int | None = None

    @property
    def bin_name(self) -> str:
        return f"{self.name}.bin"

    @property
    def idx_name(self) -> str:
        return f"{self.name}.idx"

    @property
    def weights_name(self) -> str:
        return f"{self.name}.weights"

    def sizes(self, dtype: str) -> dict[str, int]:
        """Bytes that each file must have, by file name."""
        index = IDX_HEADER.size + self.documents * (4 + 8) + (self.documents + 1) * 8
        sizes = {self.bin_name: self.tokens * DTYPES[dtype].itemsize, self.idx_name: index}
        return sizes if self.loss_tokens is None else {**sizes, self.weights_name: self.tokens}


@dataclass(slots=True, kw_only=True)
class Manifest:
    """What a directory of shards holds, and where that came from.

    `text_bytes` counts UTF-8 bytes of the documents by split, `skipped` the documents left out by reason.
    Written last: a directory without it is unfinished.
    """

    format_version: int = FORMAT_VERSION
    dtype: str
    vocab_size: int
    eos_id: int
    tokenizer_hash: str
    shards: list[ShardInfo]
    tokenizer_files: dict[str, str] = field(
        default_factory=dict
    )  # under tokenizer/, with xxh3_64 hex digests
    source: list[str] = field(default_factory=list)
    licence: str | None = None
    filters: list[str] = field(default_factory=list)
    held_out: float = 0.0  # the share of documents that was asked for
    text_bytes: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    bos_id: int | None = None  # what documents begin with; None: nothing, or what a chat template writes
    pairs: bool = False  # conversations come in pairs, the chosen one first

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Read and check `directory/manifest.json`.

        Raises:
            DataError: it is missing, is not a manifest, has another format version, or names files outside
                the directory.
        """
        path = directory / MANIFEST
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(
                f"{directory} is no finished data directory: {MANIFEST} is missing; "
                "make one with `drivetrain data build INPUT... --tokenizer DIR --out DIR`"
            ) from error
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}; check its permissions") from error
        except ValueError as error:
            raise DataError(f"{path} is not JSON ({error}); build the data again") from error
        version = raw.get("format_version") if isinstance(raw, dict) else None
        if version != FORMAT_VERSION:
            raise DataError(
                f"{path} has format version {version!r} and this Drivetrain reads {FORMAT_VERSION}; "
                "build the data again, or use the Drivetrain that built it"
            )
        try:
            shards = [ShardInfo(**shard) for shard in raw.pop("shards")]
            manifest = cls(shards=shards, **raw)
            manifest._check()
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise DataError(f"{path} is not a manifest ({error}); build the data again") from error
        return manifest

    def _check(self) -> None:
        for item in dataclasses.fields(self):
            expected = type(getattr(_EXAMPLE, item.name))
            value = getattr(self, item.name)
            if item.name in ("licence", "bos_id"):
                expected = type(None) if value is None else str if item.name == "licence" else int
            if not isinstance(value, (int, float) if expected is float else expected):
                raise ValueError(f"{item.name} is {value!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}")
        for shard in self.shards:
            if not isinstance(shard.name, str) or not SHARD_NAME.fullmatch(shard.name):
                raise ValueError(f"{shard.name!r} cannot name a shard")
            if not all(isinstance(count, int) and count > 0 for count in (shard.tokens, shard.documents)):
                raise ValueError(
                    f"shard {shard.name} counts {shard.tokens!r} tokens in {shard.documents!r} documents"
                )
            if self.pairs and (shard.documents % 2 or shard.loss_tokens is None):
                raise ValueError(
                    f"shard {shard.name} has {shard.documents} conversations, which are no pairs"
                )
            if set(shard.files) != set(shard.sizes(self.dtype)):
                raise ValueError(f"shard {shard.name} lists the files {sorted(shard.files)}")
        if len({shard.loss_tokens is None for shard in self.shards}) > 1:
            raise ValueError("some shards have weights and some have none")
        for name in self.tokenizer_files:
            if not SHARD_NAME.fullmatch(name):
                raise ValueError(f"{name!r} cannot name a tokenizer file")

    def write(self, directory: Path) -> None:
        """Write `directory/manifest.json` so that it is there whole or not at all."""
        path = directory / MANIFEST
        temporary = path.with_suffix(".json.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(self), file, indent=2, ensure_ascii=False)
            file.write("\n")
            sync_file(file)
        temporary.replace(path)
        sync_directory(directory)

    @property
    def chat(self) -> bool:
        """Whether the documents are conversations, whose tokens have weights."""
        return any(shard.loss_tokens is not None for shard in self.shards)

    def split(self, name: str) -> list[ShardInfo]:
        """The shards of a split, in order; empty where there is no such split."""
        return [shard for shard in self.shards if shard.split == name]

    def tokens(self, split: str) -> int:
        """Tokens of a split, end-of-text tokens included."""
        return sum(shard.tokens for shard in self.split(split))


_EXAMPLE = Manifest(dtype="uint16", vocab_size=0, eos_id=0, tokenizer_hash="", shards=[])


def map_tokens(directory: Path, shard: ShardInfo, dtype: str) -> np.ndarray:
    """The shard's tokens as a read-only memory map [shard.tokens] of uint16 or int32.

    Raises:
        DataError: the file is missing or its size is not what the manifest says. Its content is not read;
            `drivetrain data verify` does that.
    """
    return _map(_sized(directory, shard, shard.bin_name, dtype), DTYPES[dtype])


def map_weights(directory: Path, shard: ShardInfo, dtype: str) -> np.ndarray:
    """The tokens' weights as a read-only memory map, uint8 [shard.tokens] of 0 and 1; raises like the above."""
    return _map(_sized(directory, shard, shard.weights_name, dtype), np.dtype(np.uint8))


def _map(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    # Not np.memmap: it takes three times as long to open, and every slice of one twice.
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=dtype)


def map_document_ends(directory: Path, shard: ShardInfo) -> np.ndarray:
    """The index's pointers as a read-only memory map, int64 [shard.documents].

    Entry i is where document i *starts*, in bytes (divide by the dtype's item size for tokens), so it is also
    where document i - 1 ends; the last document ends at `shard.tokens`. The array is not aligned to 8 bytes
    (the format has no padding), so `np.searchsorted` would copy all of it: look positions up with `bisect`,
    which touches a few pages only.

    Raises:
        DataError: the file is missing, its size is not what the manifest says, or its header is wrong.
    """
    path = _sized(directory, shard, shard.idx_name, "uint16")  # the index has the same size for every dtype
    with path.open("rb") as file:
        magic, version, code, count, indices = IDX_HEADER.unpack(file.read(IDX_HEADER.size))
    found = (magic, version, code in DTYPE_CODES.values(), count, indices)
    if found != (IDX_MAGIC, 1, True, shard.documents, shard.documents + 1):
        raise DataError(f"{path} does not start with its shard's index header; build or copy the data again")
    offset = IDX_HEADER.size + 4 * shard.documents
    return np.memmap(path, dtype="<i8", mode="r", offset=offset, shape=(shard.documents,))


def map_lengths(directory: Path, shard: ShardInfo) -> np.ndarray:
    """Tokens of each document as a read-only memory map, int32 [shard.documents]; raises like the above."""
    path = _sized(directory, shard, shard.idx_name, "uint16")
    return np.memmap(path, dtype="<i4", mode="r", offset=IDX_HEADER.size, shape=(shard.documents,))


def _sized(directory: Path, shard: ShardInfo, name: str, dtype: str) -> Path:
    path = directory / name
    expected = shard.sizes(dtype)[name]
    try:
        found = path.stat().st_size
    except FileNotFoundError as error:
        raise DataError(
            f"{path} is missing, the manifest lists it with {expected} bytes; build or copy the data again"
        ) from error
    if found != expected:
        raise DataError(
            f"{path} has {found} bytes where the manifest says {expected}; build or copy the data again"
        )
    return path


def hash_file(path: Path, advance: Callable[[int], object] = int) -> str:
    """xxh3_64 of a file's bytes as 16 hex digits, read in pieces; `advance` is told each piece's bytes."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
            advance(len(piece))
    return digest.hexdigest()


def sync_directory(directory: Path) -> None:
    """Make renames inside a directory survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(file: Any) -> None:
    """Put what was written to an open file on the disk."""
    file.flush()
    os.fsync(file.fileno())
