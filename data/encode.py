"""Tokenise batches of documents or conversations in several processes, in order."""

import contextlib
import itertools
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
import xxhash
from tokenizers import Tokenizer

from drivetrain.conf.errors import DrivetrainError
from drivetrain.data.chat import Chat
from drivetrain.data.conversations import Conversation
from drivetrain.data.pairs import Pair
from drivetrain.data.readers import Unusable
from drivetrain.data.shards import DTYPES
from drivetrain.data.tokenizer import load_text_tokenizer

BATCH_BYTES = 1 << 19  # of text that one task tokenises
BATCH_DOCUMENTS = 2048

S = TypeVar("S", bound=Sized)
Rendered = tuple[str, np.ndarray, np.ndarray]  # a conversation's text, tokens and weights


@dataclass(slots=True)
class Encoded:
    """A batch's tokens, one document after another, and each document's tokens, split and UTF-8 bytes.

    Conversations have a weight for each token, and `problems`: (where, why) of those left out.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    held_out: np.ndarray
    text_bytes: np.ndarray
    weights: np.ndarray | None = None
    problems: list[tuple[str, str]] = field(default_factory=list)


@dataclass(slots=True, frozen=True)
class Task:
    """What a worker needs to know.

    Attributes:
        held_out: the share of documents. bos_id: what every text begins with, if anything.
    """

    tokenizer: Path
    dtype: str
    eos_id: int
    held_out: float
    chat: bool = False
    pairs: bool = False
    bos_id: int | None = None

    def is_held_out(self, raw: bytes) -> bool:
        return xxhash.xxh3_64_intdigest(raw) < int(self.held_out * 2**64)


def batched(texts: Iterable[S]) -> Iterator[list[S]]:
    """Documents in lists of about BATCH_BYTES."""
    batch: list[S] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode(texts: list[str], tokenizer: Tokenizer, task: Task) -> Encoded:
    """Tokenise a batch; every document ends with the end-of-text token, and begins with the task's `bos_id`."""
    rows = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    raw = [text.encode("utf-8") for text in texts]
    begin = [] if task.bos_id is None else [task.bos_id]
    lengths = np.fromiter((len(begin) + len(row) + 1 for row in rows), dtype=np.int64, count=len(rows))
    tokens = np.empty(int(lengths.sum()), dtype=DTYPES[task.dtype])
    start = 0
    for row, length in zip(rows, lengths.tolist(), strict=True):
        tokens[start : start + len(begin)] = begin
        tokens[start + len(begin) : start + length - 1] = row
        tokens[start + length - 1] = task.eos_id
        start += length
    held_out = np.array([task.is_held_out(text) for text in raw], dtype=bool)
    return Encoded(tokens, lengths, held_out, np.array([len(text) for text in raw], dtype=np.int64))


def encode_chat(conversations: Sequence[Conversation], chat: Chat, task: Task) -> Encoded:
    """Render and tokenise a batch.

    A conversation is held out by the hash of what comes before the first answer, so that all answers to a question
    are on the same side.
    """
    parts: list[Rendered] = []
    held_out: list[bool] = []
    problems: list[tuple[str, str]] = []
    for conversation in conversations:
        try:
            parts.append(chat.encode(conversation))
        except Unusable as error:
            problems.append((conversation.where, str(error)))
            continue
        held_out.append(_is_held_out(conversation, task))
    return _joined(parts, held_out, problems, task)


def encode_pairs(pairs: Sequence[Pair], chat: Chat, task: Task) -> Encoded:
    """Render and tokenise both conversations of each pair, the chosen one first; a pair of which one cannot be used
    is left out. Both are held out by what comes before the chosen one's first answer."""
    parts: list[Rendered] = []
    held_out: list[bool] = []
    problems: list[tuple[str, str]] = []
    for pair in pairs:
        try:
            both = [chat.encode(conversation) for conversation in (pair.chosen, pair.rejected)]
            if np.array_equal(both[0][1], both[1][1]):
                raise Unusable("chosen and rejected are the same to the chat template")
        except Unusable as error:
            problems.append((pair.where, str(error)))
            continue
        parts += both
        held_out += [_is_held_out(pair.chosen, task)] * 2
    return _joined(parts, held_out, problems, task)


def _is_held_out(conversation: Conversation, task: Task) -> bool:
    asked = itertools.takewhile(lambda message: message["role"] != "assistant", conversation.messages)
    return task.is_held_out("\0".join(message["content"] for message in asked).encode())


def _joined(
    parts: list[Rendered], held_out: list[bool], problems: list[tuple[str, str]], task: Task
) -> Encoded:
    none = np.zeros(0, dtype=np.uint8)
    return Encoded(
        tokens=np.concatenate([none, *(tokens for _, tokens, _ in parts)]).astype(DTYPES[task.dtype]),
        lengths=np.array([len(tokens) for _, tokens, _ in parts], dtype=np.int64),
        held_out=np.array(held_out, dtype=bool),
        text_bytes=np.array([len(text.encode()) for text, _, _ in parts], dtype=np.int64),
        weights=np.concatenate([none, *(weights for _, _, weights in parts)]),
        problems=problems,
    )


def encoder_of(task: Task) -> Callable[[Any], Encoded]:
    """What turns a batch of texts, of conversations, or of pairs of them, into tokens."""
    if task.pairs:
        both = Chat(task.tokenizer)
        return lambda pairs: encode_pairs(pairs, both, task)
    if task.chat:
        chat = Chat(task.tokenizer)
        return lambda conversations: encode_chat(conversations, chat, task)
    tokenizer = load_text_tokenizer(task.tokenizer)
    return lambda texts: encode(texts, tokenizer, task)


def _work(connection: Connection, task: Task) -> None:
    """A worker process: batches in, encoded batches out."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    encoder = encoder_of(task)
    with contextlib.suppress(EOFError, ConnectionError):  # the parent closed its end, or died
        while True:
            connection.send(encoder(connection.recv()))


class _Workers:
    """Processes with a pipe each, and a thread for each that waits for its answers.

    The standard library's pools share queues and locks between their processes, and can hang when these are
    killed; here killing one ends its pipe, which its thread sees.
    """

    def __init__(self, task: Task, count: int) -> None:
        self.count = count
        self._task = task
        self._context = multiprocessing.get_context("spawn")  # a fork copies locks that threads hold
        self._threads = ThreadPoolExecutor(count)
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []
        self._free: SimpleQueue[Connection] = SimpleQueue()
        resource_tracker.ensure_running()  # or the first start would do it, and unblock SIGINT on the way

    def submit(self, texts: list[Any]) -> Future[Encoded]:
        if len(self._processes) < self.count:
            self._start()
        return self._threads.submit(self._ask, texts)

    def _start(self) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, self._task), daemon=True)
        # The process inherits the mask: Ctrl-C is the parent's to answer, which sees it after the block.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
            self._processes.append(process)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self._connections.append(ours)
        self._free.put(ours)

    def _ask(self, texts: list[Any]) -> Encoded:
        connection = self._free.get()
        try:
            connection.send(texts)
            return connection.recv()
        except (EOFError, ConnectionError) as error:
            raise DrivetrainError(
                "a tokenising process died; if nothing above says why, memory ran out: use fewer --workers "
                "or split the largest documents"
            ) from error
        finally:
            self._free.put(connection)

    def close(self, kill: bool) -> None:
        if kill:
            for process in self._processes:
                process.kill()
        self._threads.shutdown(cancel_futures=True)
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join()


def encode_all(batches: Iterable[list[Any]], task: Task, count: int) -> Generator[Encoded, None, None]:
    """Tokenise batches in `count` processes and give the results in the order of the batches.

    Processes start as batches come, and end with the generator: at once when it is closed or fails.

    Raises:
        DrivetrainError: a process died.
    """
    workers = _Workers(task, count)
    pending: deque[Future[Encoded]] = deque()
    try:
        for batch in batches:
            pending.append(workers.submit(batch))
            if len(pending) > 2 * count:  # bounds memory, and keeps a batch ready for each worker
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BaseException:
        workers.close(kill=True)
        raise
    workers.close(kill=False)
