import bisect
import importlib.util
import json
import struct
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drivetrain.conf.errors import DataError
from drivetrain.data.shard_writer import ShardWriter
from drivetrain.data.shards import (
    Manifest,
    ShardInfo,
    dtype_for,
    hash_file,
    map_document_ends,
    map_lengths,
    map_tokens,
)


def write_shard(
    directory: Path, documents: list[list[int]], dtype: str = "uint16", name: str = "train_00000"
) -> ShardInfo:
    with ShardWriter(directory, name, "train", dtype) as writer:
        for document in documents:
            writer.add(np.array(document))
    return writer.info


def manifest_of(*shards: ShardInfo, dtype: str = "uint16") -> Manifest:
    return Manifest(dtype=dtype, vocab_size=300, eos_id=0, tokenizer_hash="ab", shards=list(shards))


def test_the_files_are_megatrons_byte_by_byte(tmp_path: Path) -> None:
    write_shard(tmp_path, [[1, 2, 3], [65535], [7, 8]])
    assert (tmp_path / "train_00000.bin").read_bytes() == struct.pack("<6H", 1, 2, 3, 65535, 7, 8)
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 3, 4)
    expected += struct.pack("<3i", 3, 1, 2) + struct.pack("<3q", 0, 6, 8) + struct.pack("<4q", 0, 1, 2, 3)
    assert (tmp_path / "train_00000.idx").read_bytes() == expected

    write_shard(tmp_path, [[1], [70000, 2]], "int32", "wide")
    assert (tmp_path / "wide.bin").read_bytes() == struct.pack("<3i", 1, 70000, 2)
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ2i2q3q", 1, 4, 2, 3, 1, 2, 0, 4, 0, 1, 2)
    assert (tmp_path / "wide.idx").read_bytes() == expected


MEGATRON = """
import sys
from pathlib import Path
import numpy as np, torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
folder = Path(sys.argv[1])
documents = [[5, 1, 2, 0], [300, 0], [9, 9, 9, 0]]
for name, dtype in (("ours_uint16", np.uint16), ("ours_int32", np.int32)):
    ours = IndexedDataset(str(folder / name))
    assert [ours[i].tolist() for i in range(len(ours))] == documents
    assert ours.document_indices.tolist() == [0, 1, 2, 3] and ours[0].dtype == dtype
    builder = IndexedDatasetBuilder(str(folder / name.replace("ours", "theirs")) + ".bin", dtype=dtype)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(folder / name.replace("ours", "theirs")) + ".idx")
"""


@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed")
def test_megatron_and_drivetrain_read_each_other(tmp_path: Path) -> None:
    documents = [[5, 1, 2, 0], [300, 0], [9, 9, 9, 0]]
    infos = {dtype: write_shard(tmp_path, documents, dtype, f"ours_{dtype}") for dtype in ("uint16", "int32")}
    subprocess.run([sys.executable, "-W", "ignore", "-c", MEGATRON, str(tmp_path)], check=True, timeout=300)
    for dtype, info in infos.items():
        for suffix in ("bin", "idx"):
            theirs = (tmp_path / f"theirs_{dtype}.{suffix}").read_bytes()
            assert theirs == (tmp_path / f"ours_{dtype}.{suffix}").read_bytes()
        copy = ShardInfo(f"theirs_{dtype}", "train", info.tokens, info.documents, {})
        assert map_tokens(tmp_path, copy, dtype).tolist() == [5, 1, 2, 0, 300, 0, 9, 9, 9, 0]
        assert map_lengths(tmp_path, copy).tolist() == [4, 2, 4]


documents_of = st.lists(st.lists(st.integers(0, 65535), min_size=1, max_size=40), min_size=1, max_size=30)


@settings(max_examples=40, deadline=None)
@given(documents=documents_of, dtype=st.sampled_from(["uint16", "int32"]))
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], dtype: str
) -> None:
    directory = tmp_path_factory.mktemp("shard")
    info = write_shard(directory, documents, dtype)
    assert (info.tokens, info.documents) == (sum(map(len, documents)), len(documents))
    assert info.files == {name: hash_file(directory / name) for name in (info.bin_name, info.idx_name)}
    assert {path.name for path in directory.iterdir()} == set(info.files)
    tokens = map_tokens(directory, info, dtype)
    starts = map_document_ends(directory, info)
    itemsize = tokens.dtype.itemsize
    bounds = [*(int(start) // itemsize for start in starts), info.tokens]
    assert [tokens[a:b].tolist() for a, b in pairwise(bounds)] == documents
    assert map_lengths(directory, info).tolist() == [len(document) for document in documents]
    for position in range(info.tokens):
        found = bisect.bisect_right(starts, position * itemsize) - 1
        assert bounds[found] <= position < bounds[found + 1]


def test_the_index_is_right_beyond_one_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    documents = [[1] * (1 + i % 5) for i in range(23)]
    write_shard(whole, documents)
    monkeypatch.setattr("drivetrain.data.shard_writer._INDEX_CHUNK", 4)
    write_shard(parts, documents)
    assert (whole / "train_00000.idx").read_bytes() == (parts / "train_00000.idx").read_bytes()


@pytest.mark.parametrize(
    ("dtype", "tokens", "wrong"),
    [("uint16", [3, 65536], 65536), ("uint16", [-1, 3], -1), ("int32", [2**31], 2**31)],
)
def test_a_token_that_does_not_fit_is_refused(
    tmp_path: Path, dtype: str, tokens: list[int], wrong: int
) -> None:
    with (
        pytest.raises(DataError, match=f"cannot hold token {wrong}"),
        ShardWriter(tmp_path, "a", "train", dtype) as writer,
    ):
        writer.add(np.array(tokens))
    assert not list(tmp_path.iterdir())


def test_a_document_longer_than_its_length_field_is_refused(tmp_path: Path) -> None:
    huge = np.broadcast_to(np.uint16(1), 2**31)  # takes no memory
    with (
        pytest.raises(DataError, match="2147483648 tokens"),
        ShardWriter(tmp_path, "a", "train", "uint16") as writer,
    ):
        writer.add(huge)


def test_dtype_by_vocabulary() -> None:
    assert (dtype_for(65535), dtype_for(65536)) == ("uint16", "int32")


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_file_of_another_size_is_refused(tmp_path: Path, suffix: str) -> None:
    info = write_shard(tmp_path, [[1, 2, 3], [4]])
    path = tmp_path / f"train_00000.{suffix}"
    size = path.stat().st_size

    def read() -> None:
        map_tokens(tmp_path, info, "uint16")
        map_document_ends(tmp_path, info)

    read()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"train_00000.{suffix} has {size - 1} bytes .* says {size}"):
        read()
    path.unlink()
    with pytest.raises(DataError, match=f"train_00000.{suffix} is missing"):
        read()


def test_an_index_with_another_header_is_refused(tmp_path: Path) -> None:
    info = write_shard(tmp_path, [[1, 2, 3], [4]])
    path = tmp_path / info.idx_name
    raw = bytearray(path.read_bytes())
    raw[0] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match="index header"):
        map_document_ends(tmp_path, info)


def test_manifest_round_trip_and_counts(tmp_path: Path) -> None:
    first = write_shard(tmp_path, [[1, 2], [3]])
    second = write_shard(tmp_path, [[4]], name="train_00001")
    manifest = manifest_of(first, second)
    manifest.write(tmp_path)
    read = Manifest.read(tmp_path)
    assert read == manifest
    assert [shard.name for shard in read.split("train")] == ["train_00000", "train_00001"]
    assert (read.tokens("train"), read.tokens("held_out"), read.split("held_out")) == (4, 0, [])
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(format_version=2), "format version 2 and this Drivetrain reads 1"),
        (lambda raw: raw.pop("format_version"), "format version None"),
        (lambda raw: raw.pop("dtype"), "dtype"),
        (lambda raw: raw.update(dtype="float32"), "float32"),
        (lambda raw: raw.update(eos_id="0"), "eos_id"),
        (lambda raw: raw.update(shards=[1]), "is not a manifest"),
        (lambda raw: raw.update(unheard_of=1), "unheard_of"),
        (lambda raw: raw["shards"][0].update(name="../etc"), r"'\.\./etc' cannot name a shard"),
        (lambda raw: raw["shards"][0].update(files={"../a": "00"}), "lists the files"),
        (lambda raw: raw["shards"][0].update(tokens=-1), "-1 tokens"),
        (lambda raw: raw.update(tokenizer_files={"../../a": "00"}), "cannot name a tokenizer file"),
    ],
)
def test_a_wrong_manifest_is_refused(tmp_path: Path, change: object, message: str) -> None:
    manifest_of(write_shard(tmp_path, [[1]])).write(tmp_path)
    raw = json.loads((tmp_path / "manifest.json").read_text())
    change(raw)  # type: ignore[operator]
    (tmp_path / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(DataError, match=message):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "null"])
def test_a_missing_or_garbled_manifest_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match="data build" if content is None else "manifest.json"):
        Manifest.read(tmp_path)
