"""Documents to token shards: `drivetrain data build`.

One process reads and writes, `workers` processes tokenise, and batches come back in the order they went out.
Everything is written to a hidden sibling of the output, which gets its name when it is whole.
"""

import contextlib
import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from drivetrain.conf.errors import ConfigError, DataError
from drivetrain.conf.units import human_bytes
from drivetrain.data import tokenizer as tokenizers_of
from drivetrain.data.conversations import ConversationReader
from drivetrain.data.encode import Encoded, Task, batched, encode_all
from drivetrain.data.pairs import PairReader
from drivetrain.data.readers import Reader, Records
from drivetrain.data.shard_writer import ShardWriter
from drivetrain.data.shards import HELD_OUT, MANIFEST, TRAIN, Manifest, ShardInfo, dtype_for, sync_directory

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

log = logging.getLogger(__name__)


def build(
    inputs: Sequence[Path],
    tokenizer: Path,
    out: Path,
    workers: int = 0,
    held_out: float = 0.005,
    shard_tokens: int = 2**30,
    text_key: str = "text",
    licence: str | None = None,
    overwrite: bool = False,
    strict: bool = False,
    progress: bool = True,
    chat: bool = False,
    pairs: bool = False,
) -> Manifest:
    """Tokenise documents into `out`: shards of at most `shard_tokens` tokens, a manifest, the tokenizer.

    Every document begins with the token that the tokenizer puts before a text, where it puts one, and ends with
    its end-of-text token. Nothing written in a text becomes a control token. A document is held out where the hash
    of its text falls under the share `held_out`, so that equal texts are always on the same side. The bytes are
    the same for any number of workers (0: one a core).

    With `chat` a document is a conversation, rendered with the tokenizer's chat template, ended as that ends it,
    and with a weight for each token; it is held out by what comes before its first answer. With `pairs` a document
    is two of them, the chosen and the rejected one, which lie next to each other in one shard.

    Raises:
        ConfigError: an input, the tokenizer, a number or `out` cannot be used as given.
        DataError: nothing to write, no room on the disk, or (with `strict`) a document that cannot be read.
    """
    if not 0 <= held_out < 1:
        raise ConfigError(f"held_out is a share of the documents and {held_out} is not in [0, 1); use 0.005")
    if workers < 0 or shard_tokens < 1:
        raise ConfigError(f"workers={workers} and shard_tokens={shard_tokens} must be 0 and 1 at least")
    out = out.absolute()
    reader: Records[Any]
    if chat and pairs:
        raise ConfigError(
            "--chat and --pairs are both given; the two of a pair are conversations, so use --pairs"
        )
    if chat or pairs:
        reader = PairReader(inputs, strict) if pairs else ConversationReader(inputs, strict)
        tokenizers_of.require_chat_template(tokenizer)
    else:
        reader = Reader(inputs, text_key=text_key, strict=strict)
    size, eos = tokenizers_of.vocab_size(tokenizer), tokenizers_of.eos_id(tokenizer)
    bos = None if chat or pairs else tokenizers_of.bos_id(tokenizer)  # a chat template writes its own
    bos = None if bos == eos else bos  # documents are cut after it
    manifest = Manifest(
        dtype=dtype_for(size),
        vocab_size=size,
        eos_id=eos,
        bos_id=bos,
        tokenizer_hash=tokenizers_of.tokenizer_hash(tokenizer),
        shards=[],
        source=[str(path) for path in inputs],
        licence=licence,
        held_out=held_out,
        pairs=pairs,
    )
    task = Task(tokenizer.absolute(), manifest.dtype, eos, held_out, chat, pairs, bos)
    with _unfinished(out, overwrite) as directory:
        batches = encode_all(batched(reader), task, workers or _cores())
        with contextlib.closing(batches), _Bar(reader, enabled=progress) as bar:
            _write(batches, manifest, directory, shard_tokens, bar, reader)
        if not manifest.shards:
            first = f" (first: {reader.problems[0]})" if reader.problems else ""
            raise DataError(
                f"nothing to build: every document of {len(reader.files)} files was left out, {reader.empty} "
                f"empty and {reader.broken} broken{first}; check the inputs"
                + ("" if chat or pairs else " and --text-key")
            )
        manifest.skipped = {"empty": reader.empty, "broken": reader.broken}
        manifest.tokenizer_files = tokenizers_of.copy_tokenizer(tokenizer, directory / "tokenizer")
        manifest.write(directory)
        _put_in_place(directory, out)
    _warn(manifest)
    return manifest


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _warn(manifest: Manifest) -> None:
    for split, other in ((HELD_OUT, TRAIN), (TRAIN, HELD_OUT)):
        if manifest.held_out and not manifest.split(split):
            count = sum(shard.documents for shard in manifest.split(other))
            log.warning(
                "all %d documents went to the split %s and none to %s: held_out=%g of so few documents; "
                "give more text or another share",
                count,
                other,
                split,
                manifest.held_out,
            )
    skipped = {reason: count for reason, count in manifest.skipped.items() if count}
    if skipped:
        log.warning(
            "left out: %s", ", ".join(f"{count} {reason} documents" for reason, count in skipped.items())
        )


# --- writing ------------------------------------------------------------------------------------------------


def _write(
    batches: Iterable[Encoded],
    manifest: Manifest,
    directory: Path,
    shard_tokens: int,
    bar: "_Bar",
    reader: Records[Any],
) -> None:
    """Distribute documents over the splits' shards, and record these in the manifest."""
    with contextlib.ExitStack() as stack:
        together = 2 if manifest.pairs else 1
        splits = [
            _Split(name, manifest.dtype, directory, shard_tokens, together) for name in (TRAIN, HELD_OUT)
        ]
        for split in splits:
            stack.callback(split.abort)
        for batch in batches:
            for where, what in batch.problems:
                reader.problem(where, what)
            stops = np.cumsum(batch.lengths)
            for stop, length, held_out in zip(stops, batch.lengths, batch.held_out, strict=True):
                weights = None if batch.weights is None else batch.weights[stop - length : stop]
                splits[int(held_out)].add(batch.tokens[stop - length : stop], weights)
            for index, split in enumerate(splits):
                split.text_bytes += int(batch.text_bytes[batch.held_out == bool(index)].sum())
            bar.advance(batch)
        for split in splits:
            split.close()
            manifest.shards += split.shards
            if split.shards:
                manifest.text_bytes[split.name] = split.text_bytes


class _Split:
    """The shards of one split, of which the last is open; each has a multiple of `together` documents."""

    def __init__(self, name: str, dtype: str, directory: Path, shard_tokens: int, together: int = 1) -> None:
        self.name = name
        self.shards: list[ShardInfo] = []
        self.text_bytes = 0
        self._dtype = dtype
        self._directory = directory
        self._shard_tokens = shard_tokens
        self._together = together
        self._writer: ShardWriter | None = None

    def add(self, tokens_T: np.ndarray, weights_T: np.ndarray | None) -> None:
        info = self._writer.info if self._writer else None
        whole = info is not None and info.documents % self._together == 0
        if info is not None and whole and info.tokens + tokens_T.size > self._shard_tokens:
            self.close()
        if not self._writer:
            name = f"{self.name}_{len(self.shards):05d}"
            weighted = weights_T is not None
            self._writer = ShardWriter(self._directory, name, self.name, self._dtype, weighted)
        self._writer.add(tokens_T, weights_T)

    def close(self) -> None:
        if self._writer:
            self.shards.append(self._writer.close())
            self._writer = None

    def abort(self) -> None:
        if self._writer:
            self._writer.abort()


# --- the output directory -----------------------------------------------------------------------------------


def _refuse_to_replace(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise ConfigError(f"{out} is a file; give a directory as --out")
    if not overwrite:
        raise ConfigError(f"{out} is not empty; give another --out, or --overwrite to replace it")
    if not (out / MANIFEST).is_file():
        raise ConfigError(
            f"{out} is not empty and holds no {MANIFEST}, so it is not replaced; give another --out"
        )


@contextlib.contextmanager
def _unfinished(out: Path, overwrite: bool) -> Iterator[Path]:
    """An empty hidden sibling of `out`, locked while it is ours, and removed if it was not put in place."""
    directory = out.with_name(f".{out.name}.building")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"{directory} cannot be made: {error.strerror}; give another --out") from error
    try:
        _lock(handle, directory, out)
        try:
            _restore(out)
            _refuse_to_replace(out, overwrite)
            for left in directory.iterdir():  # of a build that was killed
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield directory
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            written = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
            raise DataError(
                f"no room left for {out} after {human_bytes(written)} ({error.strerror}); free some, or give "
                "an --out on another disk"
            ) from error
        finally:
            shutil.rmtree(directory, ignore_errors=True)
    finally:
        os.close(handle)


def _lock(handle: int, directory: Path, out: Path) -> None:
    busy = ConfigError(f"another build is writing {out}; wait for it or give another --out")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise busy from error
    except OSError:
        log.debug("this file system cannot lock %s", directory)  # some network file systems: do without
    if not directory.exists() or not os.path.samestat(os.fstat(handle), directory.stat()):
        raise busy  # it finished between our opening its directory and locking it


def _replaced(out: Path) -> Path:
    return out.with_name(f".{out.name}.replaced")


def _restore(out: Path) -> None:
    """Undo or finish what a build that was killed between its two renames left."""
    old = _replaced(out)
    if old.exists():
        if out.exists():
            shutil.rmtree(old)
        else:
            old.rename(out)


def _put_in_place(directory: Path, out: Path) -> None:
    old = _replaced(out)
    if out.exists():
        out.rename(old)
    directory.rename(out)
    sync_directory(out.parent)
    shutil.rmtree(old, ignore_errors=True)


class _Bar:
    """Progress on stderr: bytes read of all, documents, MB of text and tokens a second."""

    def __init__(self, reader: Records[Any], enabled: bool) -> None:
        self._reader = reader
        self._documents = self._bytes = self._tokens = 0
        self._progress = Progress(
            TextColumn("tokenising"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[rates]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            disable=not enabled,
        )
        self._task = self._progress.add_task("", total=max(reader.total_bytes, 1), rates="")

    def advance(self, batch: Encoded) -> None:
        self._documents += len(batch.lengths)
        self._bytes += int(batch.text_bytes.sum())
        self._tokens += len(batch.tokens)
        seconds = self._progress.tasks[0].elapsed or 1e-9
        rates = (
            f"{self._documents:,} documents, {self._bytes / seconds / 1e6:.1f} MB/s, "
            f"{self._tokens / seconds:,.0f} tokens/s"
        )
        self._progress.update(self._task, completed=self._reader.consumed_bytes, rates=rates)

    def __enter__(self) -> "_Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
