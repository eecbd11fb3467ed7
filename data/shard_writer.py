"""Writes shards in the format of data/shards.py."""

import contextlib
from array import array
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
import numpy.typing as npt
import xxhash

from drivetrain.conf.errors import DataError
from drivetrain.data.shards import (
    DTYPE_CODES,
    DTYPES,
    IDX_HEADER,
    IDX_MAGIC,
    MAX_DOCUMENT_TOKENS,
    SHARD_NAME,
    ShardInfo,
    sync_directory,
    sync_file,
)

_INDEX_CHUNK = 1 << 20  # documents whose index entries are in memory at once


class ShardWriter:
    """Writes one shard under temporary names; `close` gives the files their names.

    As a context manager it closes when the block succeeds and removes what it wrote when the block fails.
    Memory: 4 bytes a document.

    Args:
        weighted: whether `add` is given weights.
    """

    def __init__(self, directory: Path, name: str, split: str, dtype: str, weighted: bool = False) -> None:
        if not SHARD_NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot name a shard")
        self.info = ShardInfo(name=name, split=split, tokens=0, documents=0, files={})
        self._directory = directory
        self._dtype = dtype
        self._lengths = array("i")
        self._hash = xxhash.xxh3_64()
        self._bin: BinaryIO = self._temporary(self.info.bin_name).open("wb")
        self._weights: BinaryIO | None = None
        if weighted:
            self.info.loss_tokens = 0
            self._weights_hash = xxhash.xxh3_64()
            self._weights = self._temporary(self.info.weights_name).open("wb")

    def _temporary(self, name: str) -> Path:
        return self._directory / f"{name}.tmp"

    def add(self, tokens: npt.NDArray[np.integer], weights: npt.NDArray[np.uint8] | None = None) -> None:
        """Append one document: integer tokens [length], length at least 1, and where the shard is weighted, their
        weights [length], uint8 of 0 and 1.

        Raises:
            DataError: a token does not fit the shard's dtype, or the document is too long for the format.
        """
        if tokens.ndim != 1 or tokens.size == 0:
            raise ValueError(f"a document is one row of at least one token, this has shape {tokens.shape}")
        if tokens.size > MAX_DOCUMENT_TOKENS:
            raise DataError(
                f"a document has {tokens.size} tokens and the format allows {MAX_DOCUMENT_TOKENS}; split it"
            )
        if (weights is None) != (self._weights is None):
            raise ValueError("a weighted shard needs weights for every document, and another one takes none")
        dtype = DTYPES[self._dtype]
        if tokens.dtype != dtype:
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high > np.iinfo(dtype).max:
                wrong = low if low < 0 else high
                raise DataError(
                    f"shard {self.info.name} stores {self._dtype} and cannot hold token {wrong}; "
                    "check that vocab_size covers the tokenizer's added tokens"
                )
        raw = np.ascontiguousarray(tokens, dtype=dtype).data.cast("B")
        self._bin.write(raw)
        self._hash.update(raw)
        if weights is not None:
            self._add_weights(weights, tokens.size)
        self._lengths.append(tokens.size)
        self.info.tokens += tokens.size
        self.info.documents += 1

    def _add_weights(self, weights: npt.NDArray[np.uint8], count: int) -> None:
        if weights.shape != (count,) or weights.dtype != np.uint8 or weights.max() > 1:
            raise ValueError(f"{count} tokens need as many weights, uint8 of 0 and 1")
        assert self._weights is not None and self.info.loss_tokens is not None
        raw = np.ascontiguousarray(weights).data.cast("B")
        self._weights.write(raw)
        self._weights_hash.update(raw)
        self.info.loss_tokens += int(weights.sum())

    def close(self) -> ShardInfo:
        """Write the index, flush all files to the disk and give them their names."""
        info = self.info
        if not info.documents:
            raise ValueError(f"shard {info.name} has no documents")
        _sync_and_close(self._bin)
        info.files[info.bin_name] = self._hash.hexdigest()
        info.files[info.idx_name] = self._write_index()
        if self._weights is not None:
            _sync_and_close(self._weights)
            info.files[info.weights_name] = self._weights_hash.hexdigest()
        for name in info.files:
            self._temporary(name).replace(self._directory / name)
        sync_directory(self._directory)
        return info

    def abort(self) -> None:
        """Remove what was written so far."""
        for file in (self._bin, self._weights):
            with contextlib.suppress(OSError):  # a full disk refuses the buffer's rest once more
                if file is not None:
                    file.close()
        for name in (self.info.bin_name, self.info.idx_name, self.info.weights_name):
            self._temporary(name).unlink(missing_ok=True)

    def _write_index(self) -> str:
        digest = xxhash.xxh3_64()
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        count = self.info.documents
        itemsize = DTYPES[self._dtype].itemsize
        with self._temporary(self.info.idx_name).open("wb") as file:

            def put(raw: bytes) -> None:
                file.write(raw)
                digest.update(raw)

            put(IDX_HEADER.pack(IDX_MAGIC, 1, DTYPE_CODES[self._dtype], count, count + 1))
            put(lengths.astype("<i4").tobytes())
            start = 0
            for first in range(0, count, _INDEX_CHUNK):
                sizes = lengths[first : first + _INDEX_CHUNK].astype("<i8") * itemsize
                ends = start + np.cumsum(sizes)
                put((ends - sizes).astype("<i8").tobytes())
                start = int(ends[-1])
            for first in range(0, count + 1, _INDEX_CHUNK):
                put(np.arange(first, min(first + _INDEX_CHUNK, count + 1), dtype="<i8").tobytes())
            sync_file(file)
        return digest.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def _sync_and_close(file: BinaryIO) -> None:
    sync_file(file)
    file.close()
