"""Preference pairs out of files: two answers to one question, of which one was chosen.

    prompt, chosen, rejected      texts, or lists of messages; a text is one message
    chosen, rejected              two whole conversations, or two texts, with what they share as the prompt

These are TRL's preference formats. Beside them: "system", a text, and "tools", a list of function
schemas.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drivetrain.conf.errors import ConfigError
from drivetrain.data.conversations import (
    Conversation,
    Message,
    conversation_of,
    messages_in,
    role_of,
    turns,
    without_nulls,
)
from drivetrain.data.readers import PARQUET_ROWS, Records, Unusable

if TYPE_CHECKING:
    import pyarrow.parquet

SIDES = ("chosen", "rejected")
BESIDE = ("system", "tools")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two conversations with one beginning, whose answers alone are learned, and the place they come from."""

    chosen: Conversation
    rejected: Conversation
    where: str = ""

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected)


def pair_of(record: Any, where: str = "") -> Pair:
    """A record of any of the shapes above.

    A `prompt` beside lists that begin with a system's or a user's message is not read: these lists are whole
    conversations (as in UltraFeedback's). What two texts without a prompt share ends with a word.

    Raises:
        Unusable: it is none of them, the two are the same, or they share no beginning.
    """
    if not isinstance(record, dict):
        raise Unusable("not an object with keys")
    for side in SIDES:
        if not record.get(side):
            raise Unusable(f"no {side} answer; a record has {' and '.join(SIDES)}, and most often prompt")
    texts = [messages_in(record[side]) for side in SIDES]
    prompt = record.get("prompt")
    if all(isinstance(text, str) for text in texts) and prompt is None:
        prompt, *texts = _split_texts(*texts)
    answers = [turns(text, "assistant", side) for text, side in zip(texts, SIDES, strict=True)]
    if prompt is None or any(role_of(answer[0]) in ("system", "user") for answer in answers):
        before, *answers = _split_messages(*answers)
    else:
        before = turns(prompt, "user", "prompt")
    if answers[0] == answers[1]:
        raise Unusable("chosen and rejected are the same")
    chosen, rejected = (
        _conversation(before, answer, record, where, side)
        for answer, side in zip(answers, SIDES, strict=True)
    )
    return Pair(chosen, rejected, where)


def _conversation(
    before: list[Message], answer: list[Message], record: dict[str, Any], where: str, side: str
) -> Conversation:
    beside = {key: record.get(key) for key in BESIDE}
    try:
        return conversation_of({"prompt": before, "completion": answer, **beside}, where)
    except Unusable as error:
        raise Unusable(f"{side}: {error}") from error


def _split_messages(
    chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """The messages that both begin with, and what each goes on with."""
    shared = _shared(chosen, rejected)
    if not shared:
        raise Unusable("chosen and rejected share no first message, and there is no prompt")
    if shared == len(chosen) == len(rejected):
        raise Unusable("chosen and rejected are the same")
    if shared == min(len(chosen), len(rejected)):
        raise Unusable("one of chosen and rejected is the beginning of the other")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The whole words that both begin with, and what each goes on with."""
    shared = _shared(chosen, rejected)
    while shared and not chosen[shared - 1].isspace():
        shared -= 1
    prompt, one, other = chosen[:shared].strip(), chosen[shared:].strip(), rejected[shared:].strip()
    if not prompt:
        raise Unusable("chosen and rejected share no first word, and there is no prompt")
    if not one or not other:
        raise Unusable("one of chosen and rejected is the beginning of the other")
    return prompt, one, other


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Items that both begin with."""
    least = min(len(one), len(other))
    return next((at for at in range(least) if one[at] != other[at]), least)


class PairReader(Records[Pair]):
    """The pairs of JSON lines and Parquet files; see `pair_of`."""

    def of_text(self, text: str, path: Path) -> Pair | None:
        raise ConfigError(f"{path} is a text file and holds no preference pairs; give JSON lines or Parquet")

    def of_json(self, record: Any, where: str) -> Pair | None:
        json.dumps(record, ensure_ascii=False).encode("utf-8")  # JSON can spell half of a surrogate pair
        return pair_of(record, where)

    def of_parquet(
        self, file: "pyarrow.parquet.ParquetFile", path: Path
    ) -> Iterator[tuple[int, Pair | None]]:
        columns = file.schema_arrow.names
        if not set(SIDES) <= set(columns):
            raise ConfigError(
                f"{path} holds no preference pairs: its columns are {', '.join(columns)}, and "
                f"{' and '.join(SIDES)} are needed"
            )
        read = [name for name in (*SIDES, "prompt", *BESIDE) if name in columns]
        row = 0
        for batch in file.iter_batches(PARQUET_ROWS, columns=read):
            for index in range(batch.num_rows):
                row += 1
                where = f"{path}, row {row}"
                try:
                    given = {name: batch.column(name)[index].as_py() for name in read}
                    found = pair_of(without_nulls(given), where)
                except UnicodeDecodeError as error:
                    self.problem(where, f"not UTF-8 ({error.reason})")
                except Unusable as error:
                    self.problem(where, str(error))
                else:
                    yield row, found
