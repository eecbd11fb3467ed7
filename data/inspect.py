"""What a data directory holds (`drivetrain data inspect`) and whether it is whole (`data verify`)."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer

from drivetrain.conf.errors import DataError
from drivetrain.conf.units import human_bytes
from drivetrain.data.shards import Manifest, ShardInfo, hash_file, map_lengths, map_tokens, map_weights
from drivetrain.data.tokenizer import load_tokenizer

QUANTILES = {"min": 0.0, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
_SAMPLED_LENGTHS = 1 << 20  # documents a split whose lengths are read
_SAMPLE_TOKENS = 64
_CHAT_TOKENS = 512  # the first answer comes after a system's text and a question

Sample = list[list[Any]]  # a text in pieces: [text, whether it is learned]


def inspect(directory: Path) -> dict[str, Any]:
    """Counts, document lengths in tokens, bytes per token and the beginnings of two documents of each split.

    Lengths are of every document, or of 2^20 at equal distances where there are more. The end-of-text token
    counts as a token. `loss_tokens` counts those that are learned in conversations, and `sample_pieces` has each
    sample as [text, whether it is learned], one after another; both None for documents.

    Raises:
        DataError: the manifest or a shard is missing or not what it should be.
        ConfigError: `directory/tokenizer` cannot be read.
    """
    manifest = Manifest.read(directory)
    names = dict.fromkeys(shard.split for shard in manifest.shards)
    return {
        "directory": str(directory),
        "dtype": manifest.dtype,
        "vocab_size": manifest.vocab_size,
        "bos_id": manifest.bos_id,
        "eos_id": manifest.eos_id,
        "tokenizer_hash": manifest.tokenizer_hash,
        "licence": manifest.licence,
        "source": manifest.source,
        "filters": manifest.filters,
        "skipped": manifest.skipped,
        "splits": {name: _split(directory, manifest, name) for name in names},
    }


def _split(directory: Path, manifest: Manifest, name: str) -> dict[str, Any]:
    shards = manifest.split(name)
    tokens, documents = manifest.tokens(name), sum(shard.documents for shard in shards)
    text_bytes = manifest.text_bytes.get(name, 0)
    every = -(-documents // _SAMPLED_LENGTHS)
    # Copies: every map that is held holds a descriptor.
    lengths = np.concatenate([map_lengths(directory, shard)[::every].copy() for shard in shards])
    quantiles = np.quantile(lengths, list(QUANTILES.values()), method="nearest")
    samples = list(_samples(directory, manifest, shards))
    return {
        "shards": len(shards),
        "documents": documents,
        "tokens": tokens,
        "loss_tokens": sum(shard.loss_tokens or 0 for shard in shards) if manifest.chat else None,
        "text_bytes": text_bytes,
        "bytes_per_token": text_bytes / tokens,
        "lengths": {
            "mean": tokens / documents,
            **{key: int(q) for key, q in zip(QUANTILES, quantiles, strict=True)},
        },
        "samples": ["".join(text for text, _ in pieces) for pieces in samples],
        "sample_pieces": samples if manifest.chat else None,
    }


def _samples(directory: Path, manifest: Manifest, shards: list[ShardInfo]) -> Iterator[Sample]:
    """The beginnings of the first document and, if it is another one, of the last shard's first but one."""
    tokenizer = load_tokenizer(directory / "tokenizer")
    first, last = shards[0], shards[-1]
    starts = [(first, 0, int(map_lengths(directory, first)[0]))]
    if last.documents > 1:
        start, length = map_lengths(directory, last)[:2].tolist()
        starts.append((last, start, length))
    for shard, start, length in starts:
        stop = start + min(length, _CHAT_TOKENS if manifest.chat else _SAMPLE_TOKENS)
        tokens = map_tokens(directory, shard, manifest.dtype)[start:stop].tolist()
        if manifest.chat:
            learned = map_weights(directory, shard, manifest.dtype)[start:stop] > 0
            yield _pieces(tokenizer, tokens, learned)
            continue
        if manifest.eos_id in tokens:
            tokens = tokens[: tokens.index(manifest.eos_id)]
        yield [[tokenizer.decode(tokens, skip_special_tokens=False), True]]


def _pieces(tokenizer: Tokenizer, tokens: list[int], learned: np.ndarray) -> Sample:
    """A conversation's text in pieces, and whether each one is learned."""
    ends = [*(np.flatnonzero(np.diff(learned.astype(np.int8))) + 1).tolist(), len(tokens)]
    pieces: Sample = []
    told = 0
    for end in ends:
        # Of the whole beginning: a token's text may depend on those before it.
        text = tokenizer.decode(tokens[:end], skip_special_tokens=False)
        pieces.append([text[told:], bool(learned[end - 1])])
        told = len(text)
    return pieces


def render(report: dict[str, Any]) -> RenderableType:
    """What `inspect` found as tables for a rich console."""
    facts = Table(show_header=False, box=None)
    for key in ("directory", "dtype", "vocab_size", "bos_id", "eos_id", "tokenizer_hash", "licence"):
        absent = "none" if key == "bos_id" else "not stated"
        facts.add_row(key.replace("_", " "), Text(str(report[key] if report[key] is not None else absent)))
    facts.add_row("source", Text("\n".join(report["source"])))
    facts.add_row("filters", Text(", ".join(report["filters"]) or "none"))
    facts.add_row(
        "left out", ", ".join(f"{n:,} {why}" for why, n in report["skipped"].items() if n) or "nothing"
    )
    counts = Table(title="splits")
    lengths = Table(title="tokens a document")
    for column in ("split", "shards", "documents", "tokens", "learned", "text", "bytes a token"):
        counts.add_column(column, justify="left" if column == "split" else "right")
    for column in ("split", "mean", *QUANTILES):
        lengths.add_column(column, justify="left" if column == "split" else "right")
    samples = []
    for name, split in report["splits"].items():
        counts.add_row(
            name,
            f"{split['shards']:,}",
            f"{split['documents']:,}",
            f"{split['tokens']:,}",
            "all" if split["loss_tokens"] is None else f"{split['loss_tokens']:,}",
            human_bytes(split["text_bytes"]),
            f"{split['bytes_per_token']:.2f}",
        )
        lengths.add_row(
            name, f"{split['lengths']['mean']:,.1f}", *(f"{split['lengths'][key]:,}" for key in QUANTILES)
        )
        samples += _panels(name, split)
    return Group(facts, counts, lengths, *samples)


def _panels(name: str, split: dict[str, Any]) -> list[Panel]:
    if split["sample_pieces"] is None:
        return [Panel(Text(sample), title=f"{name}: a document's beginning") for sample in split["samples"]]
    title = f"{name}: a conversation's beginning; what is dim is read and not learned"
    return [
        Panel(Text.assemble(*((text, "" if learned else "dim") for text, learned in pieces)), title=title)
        for pieces in split["sample_pieces"]
    ]


def verify(directory: Path, progress: bool = True) -> None:
    """Read every file of a data directory and compare it with the manifest.

    Raises:
        DataError: names every file that is missing, has another size or another checksum.
    """
    manifest = Manifest.read(directory)
    files: dict[str, tuple[str, int | None]] = {}  # path below directory -> digest, size where it is known
    for shard in manifest.shards:
        sizes = shard.sizes(manifest.dtype)
        files |= {name: (digest, sizes[name]) for name, digest in shard.files.items()}
    files |= {f"tokenizer/{name}": (digest, None) for name, digest in manifest.tokenizer_files.items()}
    columns = [
        TextColumn("verifying"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
    ]
    wrong: list[str] = []
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("", total=sum(size or 0 for _, size in files.values()))
        for name, (digest, size) in files.items():
            path = directory / name
            if not path.is_file():
                wrong.append(f"{name} is missing")
            elif size is not None and path.stat().st_size != size:
                wrong.append(f"{name} has {path.stat().st_size} bytes instead of {size}")
            else:
                found = hash_file(path, partial(bar.advance, task))
                if found != digest:
                    wrong.append(f"{name} has checksum {found} instead of {digest}")
    if wrong:
        raise DataError(
            f"{directory}: {len(wrong)} of {len(files)} files are not what the manifest says "
            f"({'; '.join(wrong)}); copy or build them again"
        )
