"""The loaders that Drivetrain's is measured beside, and their own copies of the data.

They run under the Python of an environment made from requirements.txt; nothing here imports Drivetrain.
"""

import functools
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

S = 2048  # tokens of a window, its last target not counted
VOCAB, EOS = 50_000, 0
COPIES = 100  # hard links to the 200M tokens that make 20B


class NotPossible(Exception):
    """Why a loader cannot do a size on this machine."""


class NotMeasured(Exception):
    """Why a loader was not tried at a size."""


def needs_memory(count: int, bytes_each: int, what: str) -> None:
    """Raises NotPossible where an index takes more than the machine's memory."""
    if count * bytes_each > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise NotPossible(f"{what} for {count:,} windows take {count * bytes_each / 1e9:.0f} GB")


def random_order(dataset: Any) -> Iterator[int]:
    """What torch.utils.data.DataLoader(shuffle=True) walks: RandomSampler, which is torch.randperm as a list."""
    import torch
    from torch.utils.data import RandomSampler

    needs_memory(len(dataset), 8, "the indices of torch.randperm")
    while True:
        yield from RandomSampler(dataset, generator=torch.Generator().manual_seed(0))


def datatrove(root: Path, tokens: int) -> Iterator[int]:
    from datatrove.utils.dataset import DatatroveFolderDataset

    yield 0
    dataset = DatatroveFolderDataset(str(root / "shards"), S, filename_pattern="*.bin", token_size=2)
    for index in random_order(dataset):
        yield dataset[index]["input_ids"].shape[0] - 1


def mosaic(root: Path, tokens: int) -> Iterator[int]:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    needs_memory(tokens // S, 8, "the int64 indices of an epoch's order")
    yield 0
    dataset = StreamingDataset(local=str(root / "mds"), shuffle=True, batch_size=64)
    while True:
        for sample in dataset:
            yield sample["tokens"].size - 1


def litdata(root: Path, tokens: int) -> Iterator[int]:
    from litdata import StreamingDataset
    from litdata.streaming.item_loader import TokensLoader

    if not (root / "lit").is_dir():
        raise NotMeasured(f"it reads data in its own format only, here {2 * tokens / 1e12:.0f} TB of it")
    yield 0
    loader = TokensLoader(block_size=S + 1)
    dataset = StreamingDataset(str(root / "lit"), item_loader=loader, shuffle=True, drop_last=True, seed=0)
    while True:
        for sample in dataset:
            yield sample.shape[0] - 1


def megatron(root: Path, tokens: int) -> Iterator[int]:
    yield from _megatron(root, tokens, None)


def megatron_cached(root: Path, tokens: int) -> Iterator[int]:
    """With the index arrays that an earlier start left on the disk."""
    yield from _megatron(root, tokens, str(root / "megatron_cache"))


def _megatron(root: Path, tokens: int, cache: str | None) -> Iterator[int]:
    import torch.distributed
    from megatron.core.datasets.blended_dataset import BlendedDataset
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    class Tokenizer:
        vocab_size, eod, pad = VOCAB, EOS, VOCAB
        unique_identifiers = {"class": "bench"}  # noqa: RUF012

    # The cache asks which rank it is; the sample and shuffle indices take 8 and 4 bytes a window.
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    needs_memory(tokens // S, 12, "the sample and shuffle indices")
    prefixes = sorted(path.with_suffix("") for path in (root / "shards").glob("*.idx"))
    yield 0
    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=S,
        split="1,0,0",
        path_to_cache=cache,
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    parts = []
    for prefix in prefixes:
        indexed = IndexedDataset(str(prefix), multimodal=False, mmap=True)
        documents = np.arange(indexed.sequence_lengths.shape[0], dtype=np.int32)
        parts.append(GPTDataset(indexed, str(prefix), documents, None, Split.train, config))
    size = sum(len(part) for part in parts)
    whole = BlendedDataset(parts, [1.0] * len(parts), size, config) if len(parts) > 1 else parts[0]
    while True:
        for index in range(size):
            yield whole[index]["tokens"].shape[0]


PIECE = 1000 * (S + 1)


def _windows_of(first: int, source: Path) -> Iterator[Any]:
    """A piece of the shard for LitData's own format; at the top level, since its workers are spawned."""
    import torch

    yield torch.from_numpy(np.array(np.memmap(source, np.uint16, "r")[first : first + PIECE]))


def prepare_peer(key: str, root: Path) -> dict[str, Any]:
    """The peer's own copy of the 200M tokens, and hard links to it for 20B."""
    folder = {"mosaic": "mds", "litdata": "lit"}[key]
    small, middle = root / "200M" / folder, root / "20B" / folder
    source = next((root / "200M" / "shards").glob("*.bin"))
    if not (small / "index.json").is_file():
        if key == "mosaic":
            from streaming import MDSWriter

            tokens = np.memmap(source, np.uint16, "r")
            with MDSWriter(out=str(small), columns={"tokens": f"ndarray:uint16:{S + 1}"}) as writer:
                for start in range(0, len(tokens) - S, S):
                    writer.write({"tokens": np.array(tokens[start : start + S + 1])})
        else:
            from litdata import optimize
            from litdata.streaming.item_loader import TokensLoader

            pieces = list(range(0, source.stat().st_size // 2 - PIECE, PIECE))
            item_loader: Any = TokensLoader(block_size=S + 1)
            write = functools.partial(_windows_of, source=source)
            optimize(
                write,
                pieces,
                output_dir=str(small),
                chunk_bytes="64MB",
                item_loader=item_loader,
                num_workers=1,
            )
    if not (middle / "index.json").is_file():
        middle.mkdir(parents=True, exist_ok=True)
        index = json.loads((small / "index.json").read_text())
        listed = "shards" if key == "mosaic" else "chunks"
        copies = []
        for copy, part in itertools.product(range(COPIES), index[listed]):
            held = part["raw_data"] if key == "mosaic" else part
            field = "basename" if key == "mosaic" else "filename"
            renamed = {**held, field: f"{copy:03}-{held[field]}"}
            (middle / renamed[field]).hardlink_to(small / held[field])
            copies.append({**part, "raw_data": renamed} if key == "mosaic" else renamed)
        (middle / "index.json").write_text(json.dumps({**index, listed: copies}))
    return {"prepared": str(small)}
