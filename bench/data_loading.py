"""Data loaders side by side at 200 million, 20 billion and 15 trillion tokens: start-up, memory, tokens a second.

Windows of 2,048 tokens, uint16, one thread, one fresh process for each loader and size. The 200M tokens are real
bytes; the 20B are 100 hard links to them, so that both are read from a warm page cache; the 15T are sparse files
and show start-up and memory only. Peers run under --peers-python, an environment made from requirements.txt.
"""

import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common
import data_peers
from data_peers import COPIES, EOS, VOCAB, S

SHARD = 200_000_000  # tokens on the disk
SPARSE_SHARD = 1 << 30  # tokens of one sparse shard: the size that `drivetrain data build` makes
SIZES = {"200M": SHARD, "20B": COPIES * SHARD, "15T": 15 * 10**12}
DOCUMENT = 800  # tokens of a document on average

# A loader is a generator: it imports what it needs and yields 0, and from then on yields the tokens of each
# sample or batch that it has in memory. The clock starts at the 0.
Loader = Callable[[Path, int], Iterator[int]]


def ours_windows(root: Path, tokens: int) -> Iterator[int]:
    from drivetrain.data.windows import ShuffledWindows, Windows

    yield 0
    stream = ShuffledWindows(Windows(root / "shards", "train", S), seed=0, name="bench")
    for first in itertools.count(0, 256):
        yield stream.read(np.arange(first, first + 256)).shape[0] * S


def ours_batches(root: Path, tokens: int) -> Iterator[int]:
    from drivetrain.conf.schema import DataConfig
    from drivetrain.data.loader import PretrainSource, share_of

    yield 0
    source = PretrainSource(DataConfig(path=str(root / "shards")), S, share_of(64, 16, 0, 1), seed=0)
    while True:
        yield sum(batch.tokens for batch in source.next_step())


class Maps:
    """Plain numpy maps over the shards, opened when first read."""

    def __init__(self, root: Path, tokens: int) -> None:
        self.paths = sorted((root / "shards").glob("*.bin"))
        per_shard = self.paths[0].stat().st_size // 2
        self.windows = (per_shard - 1) // S
        self.maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.paths) * self.windows

    def __getitem__(self, index: int) -> np.ndarray:
        shard, window = divmod(index, self.windows)
        if shard not in self.maps:
            self.maps[shard] = np.memmap(self.paths[shard], np.uint16, "r").view(np.ndarray)
        return self.maps[shard][window * S : window * S + S + 1].copy()


def memmap_in_order(root: Path, tokens: int) -> Iterator[int]:
    yield 0
    maps = Maps(root, tokens)
    while True:
        for index in range(len(maps)):
            yield maps[index].size - 1


def memmap_random(root: Path, tokens: int) -> Iterator[int]:
    yield 0
    maps, generator = Maps(root, tokens), np.random.default_rng(0)
    while True:
        for index in generator.integers(0, len(maps), 4096).tolist():
            yield maps[index].size - 1


def memmap_randperm(root: Path, tokens: int) -> Iterator[int]:
    import torch
    import torch.utils.data

    yield 0
    maps = Maps(root, tokens)
    for index in data_peers.random_order(maps):
        yield torch.from_numpy(maps[index]).shape[0] - 1


@dataclass(frozen=True, slots=True)
class Entry:
    key: str
    title: str
    loader: Loader
    shuffle: str
    package: str = ""  # the peer whose environment it needs


ENTRIES = [
    Entry("ours-windows", "Drivetrain, windows (uint16)", ours_windows, "global"),
    Entry("ours-batches", "Drivetrain, whole training batches", ours_batches, "global"),
    Entry("memmap-order", "bare numpy.memmap, in order", memmap_in_order, "none"),
    Entry("memmap-random", "bare numpy.memmap, random windows", memmap_random, "draws with repetition"),
    Entry("randperm", "numpy.memmap + torch RandomSampler", memmap_randperm, "global"),
    Entry("datatrove", "datatrove folder + torch RandomSampler", data_peers.datatrove, "global", "datatrove"),
    Entry(
        "mosaic",
        "MosaicML StreamingDataset",
        data_peers.mosaic,
        "shards, then within blocks",
        "mosaicml-streaming",
    ),
    Entry(
        "litdata", "LitData StreamingDataset", data_peers.litdata, "chunks, then within a chunk", "litdata"
    ),
    Entry("megatron", "Megatron GPTDataset", data_peers.megatron, "global within a file", "megatron-core"),
    Entry(
        "megatron-cached",
        "Megatron GPTDataset, index cached",
        data_peers.megatron_cached,
        "global within a file",
        "megatron-core",
    ),
]


def work(key: str, root: Path, tokens: int, seconds: float) -> common.Row:
    """One measurement, in this process. The rate is that of the best fifth of `seconds`, after as much warm-up."""
    entry = next(entry for entry in ENTRIES if entry.key == key)
    running = entry.loader(root, tokens)
    row: common.Row = {}
    try:
        next(running)
        before, began = common.anonymous_bytes(), time.perf_counter()
        next(running)
        row["startup_ms"] = round(1e3 * (time.perf_counter() - began), 2)
    except data_peers.NotPossible as reason:
        return {"not_possible": str(reason)}
    except data_peers.NotMeasured as reason:
        return {"not_measured": str(reason)}
    if tokens < SIZES["15T"]:
        rates = [_rate(running, seconds / 5) for _ in range(6)]
        row["tokens_per_second"] = round(max(rates[1:]))
    row["anonymous_mb"] = round((common.anonymous_bytes() - before) / 1e6, 1)
    row["page_tables_mb"] = round(common.status_kb("VmPTE") / 1e3, 1)
    row["versions"] = common.versions("numpy", "torch", *filter(None, [entry.package]))
    return row


def _rate(running: Iterator[int], seconds: float) -> float:
    began = time.perf_counter()
    limit, tokens = began + seconds, 0
    while time.perf_counter() < limit:
        for count in itertools.islice(running, 16):
            tokens += count
    return tokens / (time.perf_counter() - began)


def prepare(root: Path) -> None:
    """Shards of every size under `root`; what is already there stays."""
    from drivetrain.data.shard_writer import ShardWriter
    from drivetrain.data.shards import Manifest, ShardInfo

    def manifest(folder: Path, shards: list[ShardInfo]) -> None:
        made = Manifest(dtype="uint16", vocab_size=VOCAB, eos_id=EOS, tokenizer_hash="bench", shards=shards)
        made.write(folder)

    def linked(info: ShardInfo, name: str, tokens: int) -> ShardInfo:
        files = {f"{name}.bin": "0" * 16, f"{name}.idx": "0" * 16}
        return ShardInfo(name=name, split="train", tokens=tokens, documents=info.documents, files=files)

    small, middle, huge = (root / size / "shards" for size in SIZES)
    if not (small / "manifest.json").is_file():
        small.mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng(0)
        with ShardWriter(small, "train_00000", "train", "uint16") as writer:
            while left := SHARD - writer.info.tokens:
                document = generator.integers(1, VOCAB, min(left, int(generator.exponential(DOCUMENT)) + 1))
                document[-1] = EOS
                writer.add(document)
        manifest(small, [writer.info])
    info = Manifest.read(small).shards[0]
    if not (middle / "manifest.json").is_file():
        middle.mkdir(parents=True, exist_ok=True)
        names = [f"train_{number:05}" for number in range(COPIES)]
        for name, suffix in itertools.product(names, (".bin", ".idx")):
            (middle / f"{name}{suffix}").hardlink_to(small / f"{info.name}{suffix}")
        manifest(middle, [linked(info, name, SHARD) for name in names])
    if not (huge / "manifest.json").is_file():
        huge.mkdir(parents=True, exist_ok=True)
        names = [f"train_{number:05}" for number in range(-(-SIZES["15T"] // SPARSE_SHARD))]
        for name in names:
            with (huge / f"{name}.bin").open("wb") as file:
                file.truncate(2 * SPARSE_SHARD)
        manifest(huge, [linked(info, name, SPARSE_SHARD) for name in names])


def best_of(runs: list[common.Row]) -> common.Row:
    """The fastest start, the highest rate and the largest memory of several processes."""
    done = [run for run in runs if "startup_ms" in run]
    if not done:
        return runs[0]
    row = {**done[0], "startup_ms": min(run["startup_ms"] for run in done)}
    for name in ("tokens_per_second", "anonymous_mb", "page_tables_mb"):
        if name in row:
            row[name] = max(run[name] for run in done)
    return row


def main(arguments: list[str] | None = None) -> int:
    made = common.parser(__doc__ or "", "data_loading")
    made.add_argument("--data", type=Path, default=Path(tempfile.gettempdir()) / "drivetrain-bench-data")
    made.add_argument(
        "--peers-python", default="", help="Python of the environment made from requirements.txt"
    )
    made.add_argument("--seconds", type=float, default=2.0, help="to read for, after the first batch")
    made.add_argument("--sizes", default=",".join(SIZES))
    made.add_argument("--worker", nargs=3, metavar=("KEY", "ROOT", "TOKENS"))
    made.add_argument("--prepare", nargs=2, metavar=("KEY", "ROOT"))
    made.add_argument("--to", type=Path)
    options = made.parse_args(arguments)
    if options.worker:
        key, root, tokens = options.worker
        options.to.write_text(json.dumps(work(key, Path(root), int(tokens), options.seconds)))
        return 0
    if options.prepare:
        options.to.write_text(
            json.dumps(data_peers.prepare_peer(options.prepare[0], Path(options.prepare[1])))
        )
        return 0

    found_on = common.device()
    prepare(options.data)
    with next((options.data / "200M" / "shards").glob("*.bin")).open("rb") as file:
        # A freshly written file lies in the cache in small pages; read back, it lies there as it does later on.
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while file.read(1 << 24):  # warm the page cache
            pass
    rows = [
        measure(entry, size, options)
        for entry in ENTRIES
        if common.wanted(entry.key, options.only)
        for size in options.sizes.split(",")
    ]
    header = ["loader", "tokens", "start-up ms", "memory MB", "page tables MB", "M tokens/s", "shuffle"]
    common.show("Data loading", header, [line_of(row) for row in rows], options.markdown)
    if options.out or not options.quick:
        seen = common.versions("drivetrain", "numpy", "torch")
        common.write_result(options.out or common.RESULTS / "data_loading.json", found_on, seen, rows)
    return 0


def measure(entry: Entry, size: str, options: Any) -> common.Row:
    head = {"loader": entry.key, "title": entry.title, "size": size, "shuffle": entry.shuffle}
    python = options.peers_python if entry.package else sys.executable
    if not python:
        return {**head, "not_measured": f"give --peers-python an environment with {entry.package}"}
    script, root = str(Path(__file__).resolve()), options.data
    if (
        entry.key in ("mosaic", "litdata")
        and not (root / "20B" / {"mosaic": "mds"}.get(entry.key, "lit")).is_dir()
    ):
        made = common.run_worker([script, "--prepare", entry.key, str(root)], python)
        if "error" in made:
            return {**head, **made}
    worker = [
        script,
        "--worker",
        entry.key,
        str(root / size),
        str(SIZES[size]),
        "--seconds",
        str(options.seconds),
    ]
    if entry.key == "megatron-cached":  # fill the cache
        common.run_worker([*worker, "--seconds", "0.1"], python)
    runs = []
    for _ in range(1 if options.quick else options.repeats):
        runs.append(common.run_worker(worker, python, timeout_s=300))
        if "startup_ms" not in runs[-1]:
            break
    return {**head, **best_of(runs)}


def line_of(row: common.Row) -> list[str]:
    def number(name: str, scale: float = 1) -> str:
        return f"{row[name] * scale:,.1f}" if name in row else "-"

    if "startup_ms" not in row:
        why = next(
            (
                f"{key.replace('_', ' ')}: {row[key]}"
                for key in ("not_possible", "not_measured")
                if key in row
            ),
            "",
        )
        return [row["title"], row["size"], why or f"failed: {row.get('error')}", "", "", "", ""]
    return [
        row["title"],
        row["size"],
        number("startup_ms"),
        number("anonymous_mb"),
        number("page_tables_mb"),
        f"{row['tokens_per_second'] / 1e6:,.0f}" if "tokens_per_second" in row else "-",
        row["shuffle"],
    ]


if __name__ == "__main__":
    sys.exit(main())
