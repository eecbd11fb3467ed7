"""Questions with answers, out of files: what a task is made of.

{"question" or "context": text, "choices": [text, ...], "answer": index from 0, or the text}
{"prompt" or "question": text, "answer": text, number or a list of them}
{"messages": [{"role", "content"}, ...], "answer": ...}, also with choices
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drivetrain.conf.errors import ConfigError, DataError
from drivetrain.data.conversations import ROLES, Message
from drivetrain.data.readers import PARQUET_ROWS, Records, Unusable

if TYPE_CHECKING:
    import pyarrow.parquet

Judge = Callable[[str], float]
_TEXTS = ("question", "context", "prompt")
_EXPECTED = 'a record has "answer" (and "choices") beside one of question, context, prompt, messages'


@dataclass(frozen=True, slots=True)
class Item:
    """One question.

    Attributes:
        question: a text, or a conversation that the assistant goes on with.
        bare: what a model without a chat template continues; empty for a conversation.
        answers: those that are right; of a choice the one.
        choices: empty where the answer is written freely. right: its index in them.
        judge: marks an answer from 0 to 1 in place of comparing texts.
        where: file and line.
    """

    question: str | list[Message]
    bare: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    right: int = 0
    judge: Judge | None = None
    where: str = ""


def item_of(record: Any, where: str = "") -> Item:
    """A record of any of the shapes above.

    Raises:
        Unusable: it has none of them; the text says why.
    """
    if not isinstance(record, dict):
        raise Unusable("not an object with keys")
    question, bare = _question(record)
    if "answer" not in record:
        raise Unusable(f"no answer; {_EXPECTED}")
    answer = record["answer"]
    if record.get("choices") is None:
        return Item(question, bare, _answers(answer), where=where)
    choices = record["choices"]
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(c, str) and c for c in choices)
    ):
        raise Unusable("choices must be a list of two or more texts")
    right = _right(answer, choices)
    return Item(question, bare, (choices[right],), tuple(choices), right, where=where)


def _question(record: dict[str, Any]) -> tuple[str | list[Message], str]:
    given = [key for key in ("messages", *_TEXTS) if record.get(key) is not None]
    if len(given) != 1:
        raise Unusable(f"{' and '.join(given) or 'no question'}; {_EXPECTED}")
    value = record[given[0]]
    if given[0] == "messages":
        return _messages(value), ""
    if not isinstance(value, str) or not value.strip():
        raise Unusable(f"{given[0]} must be a text")
    return value, f"Question: {value}\nAnswer:" if given[0] == "question" else value


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise Unusable("messages must be a list")
    found = []
    for number, message in enumerate(value, 1):
        role = ROLES.get(str(message.get("role"))) if isinstance(message, dict) else None
        if role is None or not isinstance(message.get("content"), str):
            raise Unusable(f"message {number} has no known role or no text as its content")
        found.append({**message, "role": role})
    if found[-1]["role"] == "assistant":
        raise Unusable("the last message is the assistant's, so there is nothing to answer")
    return found


def _answers(answer: Any) -> tuple[str, ...]:
    answers = answer if isinstance(answer, list) else [answer]
    if not answers or not all(
        isinstance(each, str | int | float) and not isinstance(each, bool) for each in answers
    ):
        raise Unusable("answer must be a text, a number, or a list of them")
    return tuple(str(each) for each in answers)


def _right(answer: Any, choices: list[str]) -> int:
    if isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer < len(choices):
            raise Unusable(f"answer {answer} is no index of {len(choices)} choices, which are counted from 0")
        return answer
    if choices.count(answer) != 1:
        raise Unusable(f"answer {answer!r} is not one of the choices, nor an index of one")
    return choices.index(answer)


class ItemReader(Records[Item]):
    """The items of JSON lines and Parquet files; the first broken one raises DataError with its file and line."""

    def problem(self, where: str, what: str) -> None:
        raise DataError(f"{where}: {what}; correct it")

    def of_text(self, text: str, path: Path) -> Item | None:
        raise ConfigError(f"{path} is a text file and no task; give JSON lines or Parquet")

    def of_json(self, record: Any, where: str) -> Item | None:
        json.dumps(record, ensure_ascii=False).encode("utf-8")  # JSON can spell half of a surrogate pair
        return item_of(record, where)

    def of_parquet(
        self, file: "pyarrow.parquet.ParquetFile", path: Path
    ) -> Iterator[tuple[int, Item | None]]:
        row = 0
        for batch in file.iter_batches(PARQUET_ROWS):
            for record in batch.to_pylist():
                row += 1
                where = f"{path}, row {row}"
                try:
                    yield row, item_of(record, where)
                except Unusable as error:
                    self.problem(where, str(error))


def read_items(path: Path) -> list[Item]:
    """A task's items, all of one kind.

    Raises:
        ConfigError: there is no such file, or it is no task. DataError: a line is broken or of another kind than
            the first one, or there is none.
    """
    items = list(ItemReader([path]))
    if not items:
        raise DataError(f"{path} holds no question; {_EXPECTED}")
    for item in items:
        if bool(item.choices) != bool(items[0].choices):
            raise DataError(
                f"{item.where}: {'has' if item.choices else 'lacks'} choices, unlike {items[0].where}; "
                "a task is all multiple choice or all free answers: make two files of it"
            )
    return items
