import dataclasses
import gc
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drivetrain.conf.errors import DataError
from drivetrain.conf.schema import DataConfig, SourceConfig
from drivetrain.data.loader import open_sources
from drivetrain.data.shard_writer import ShardWriter
from drivetrain.data.shards import Manifest, ShardInfo
from drivetrain.data.windows import ShuffledWindows, Windows


def write(directory: Path, lengths: list[int], dtype: str = "uint16", eos: int = 0, first: int = 0) -> Path:
    """Shards of the given numbers of tokens; token i of the whole split is first + i."""
    directory.mkdir(parents=True, exist_ok=True)
    shards = []
    for number, length in enumerate(lengths):
        with ShardWriter(directory, f"train_{number:05}", "train", dtype) as writer:
            writer.add(np.arange(first, first + length))
        shards.append(writer.info)
        first += length
    Manifest(dtype=dtype, vocab_size=60_000, eos_id=eos, tokenizer_hash="ab", shards=shards).write(directory)
    return directory


def test_windows_lie_end_to_end_and_never_cross_shards(tmp_path: Path) -> None:
    windows = Windows(write(tmp_path, [10, 3, 4, 13], dtype="int32"), "train", 3)
    # 10 tokens hold 3 windows of 3 + 1; 3 hold none, 4 hold one; 13 hold four.
    assert len(windows) == 8
    starts = [0, 3, 6, 13, 17, 20, 23, 26]
    found = windows.read(np.arange(8))
    assert found.tolist() == [list(range(start, start + 4)) for start in starts]
    assert found.dtype == np.int32
    assert windows.read(np.array([6, 0, 6])).tolist() == [
        found[6].tolist(),
        found[0].tolist(),
        found[6].tolist(),
    ]


def test_every_token_but_a_shards_tail_is_predicted_once(tmp_path: Path) -> None:
    windows = Windows(write(tmp_path, [50, 7, 101]), "train", 8)
    targets = windows.read(np.arange(len(windows)))[:, 1:].flatten().tolist()
    assert len(set(targets)) == len(targets)
    assert set(targets) == {*range(1, 49), *range(58, 58 + 96)}


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 50), epochs=st.integers(1, 3), seq_len=st.integers(1, 9))
def test_an_epoch_visits_every_window_once_in_an_order_of_its_own(
    tmp_path_factory: pytest.TempPathFactory, seed: int, epochs: int, seq_len: int
) -> None:
    directory = tmp_path_factory.mktemp("shards")
    windows = Windows(write(directory, [400, 9, 231]), "train", seq_len)
    stream = ShuffledWindows(windows, seed, "web")
    count = len(windows)
    found = stream.read(np.arange(epochs * count))[:, 0].reshape(epochs, count)
    expected = np.sort(windows.read(np.arange(count))[:, 0])
    assert (np.sort(found, axis=1) == expected).all()
    for epoch in range(epochs):
        assert (found[epoch] != expected).any()
        assert epoch == 0 or (found[epoch] != found[epoch - 1]).any()


def test_the_stream_depends_on_seed_and_name_and_not_on_how_it_is_read(tmp_path: Path) -> None:
    windows = Windows(write(tmp_path, [1000]), "train", 5)
    count = len(windows)
    whole = ShuffledWindows(windows, 0, "web").read(np.arange(3 * count))
    jumping = ShuffledWindows(windows, 0, "web")
    for first in (2 * count + 5, 0, count - 3, 2 * count - 3):  # across the ends of epochs, back and forth
        assert np.array_equal(jumping.read(np.arange(first, first + 6)), whole[first : first + 6])
    for seed, name in ((1, "web"), (0, "code")):
        assert not np.array_equal(ShuffledWindows(windows, seed, name).read(np.arange(count)), whole[:count])


@pytest.mark.parametrize(
    ("split", "seq_len", "message"),
    [("train", 10, "no train shard with 11 tokens"), ("held_out", 2, "no held_out shard with 3 tokens")],
)
def test_a_split_without_one_window_is_refused(
    tmp_path: Path, split: str, seq_len: int, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        Windows(write(tmp_path, [10]), split, seq_len)


def test_a_missing_shard_is_named_when_it_is_needed(tmp_path: Path) -> None:
    windows = Windows(write(tmp_path, [10, 10]), "train", 3)
    (tmp_path / "train_00001.bin").unlink()
    assert windows.read(np.array([0])).tolist() == [[0, 1, 2, 3]]
    with pytest.raises(DataError, match=r"train_00001\.bin is missing"):
        windows.read(np.array([5]))


def test_a_shard_cut_short_is_named(tmp_path: Path) -> None:
    windows = Windows(write(tmp_path, [9]), "train", 4)
    with (tmp_path / "train_00000.bin").open("r+b") as file:
        file.truncate(12)
    with pytest.raises(DataError, match=r"train_00000\.bin .* 12 bytes"):
        windows.read(np.array([1]))


@pytest.fixture
def few_files() -> Iterator[None]:
    """This process may open 40 files more than it has, and half as many again: more than a quarter of all."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    gc.collect()  # what earlier tests left behind holds files
    largest = max(int(file.name) for file in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (largest + largest // 2 + 40, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("few_files")
def test_more_shards_than_files_that_may_be_open(tmp_path: Path) -> None:
    windows = Windows(write(tmp_path, [9] * 150), "train", 4)
    for _ in range(2):
        order = np.random.default_rng(0).permutation(300)
        assert windows.read(order)[:, 0].tolist() == [9 * (n // 2) + 4 * (n % 2) for n in order.tolist()]


@pytest.mark.usefixtures("few_files")
def test_the_sources_of_a_mixture_share_out_the_files_that_may_be_open(tmp_path: Path) -> None:
    names = [f"source{number}" for number in range(12)]
    mixture = {name: SourceConfig(path=str(write(tmp_path / name, [9] * 10))) for name in names}
    for windows in open_sources(DataConfig(mixture=mixture), "train", 4).values():
        assert windows.read(np.arange(20)).shape == (20, 5)


HUGE = """
import json, sys, time
from pathlib import Path
import psutil
from drivetrain.conf.schema import DataConfig
from drivetrain.data.loader import PretrainSource, share_of

process = psutil.Process()
before, began = process.memory_info().rss, time.perf_counter()
share = share_of(1024, 8, 3, 64)
source = PretrainSource(DataConfig(path=sys.argv[1]), 4096, share, seed=0)
opened = time.perf_counter() - began
shapes = set()
for _ in range(4):
    shapes |= {tuple(batch.tokens_T.shape) for batch in source.next_step()}
grown = process.memory_info().rss - before
windows = len(source._streams["data"].windows)
print(json.dumps([opened, grown, sorted(shapes), windows, source.state()["sample"]]))
"""


def test_fifteen_trillion_tokens_open_at_once(tmp_path: Path) -> None:
    """15 sparse files of 10^12 tokens each; windows need no index."""
    shards = []
    for number in range(15):
        shard = ShardInfo(name=f"train_{number:05}", split="train", tokens=10**12, documents=10**9, files={})
        shard.files = {shard.bin_name: "0" * 16, shard.idx_name: "0" * 16}
        with (tmp_path / shard.bin_name).open("wb") as file:
            file.truncate(shard.sizes("int32")[shard.bin_name])
        shards.append(shard)
    Manifest(dtype="int32", vocab_size=128_256, eos_id=7, tokenizer_hash="ab", shards=shards).write(tmp_path)
    command = [sys.executable, "-c", HUGE, str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    opened, grown, shapes, windows, sample = json.loads(done.stdout)
    assert opened < 1.0  # seconds; about 0.01 on one core
    assert grown < 50e6  # bytes, the pages that were read among them
    assert shapes == [[8 * 4096]] and sample == 4 * 1024
    assert windows == 15 * ((10**12 - 1) // 4096)


def test_a_manifest_lists_what_windows_read(tmp_path: Path) -> None:
    """The manifest alone decides: a file that it does not list is not read, whatever its name."""
    write(tmp_path, [10, 10])
    manifest: dict[str, Any] = dataclasses.asdict(Manifest.read(tmp_path))
    Manifest.read(tmp_path)
    shards = [ShardInfo(**shard) for shard in manifest.pop("shards")[:1]]
    Manifest(shards=shards, **manifest).write(tmp_path)
    assert len(Windows(tmp_path, "train", 3)) == 3
