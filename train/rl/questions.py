"""Problems out of a file, each with what its answers are judged by; some of them held out."""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from drivetrain.conf.errors import ConfigError, DataError
from drivetrain.conf.rewards import Extract
from drivetrain.data.conversations import Message
from drivetrain.data.permutation import Permutation
from drivetrain.data.readers import Records, Unusable
from drivetrain.train.rl.checkers import Math
from drivetrain.train.rl.episodes import Problem, SingleTurn
from drivetrain.train.rl.gym_problems import CORRECT, SECONDS
from drivetrain.train.rl.rewards import Exact, Reward, Sample

if TYPE_CHECKING:
    import pyarrow.parquet

Record = tuple[str, dict[str, Any]]  # the place that it comes from, and its keys


class JsonRecords(Records[Record]):
    """The objects of JSON lines and Parquet files; nothing is left out.

    Raises:
        DataError: on reading, what is no object.
    """

    def problem(self, where: str, what: str) -> None:
        raise DataError(f"{where}: {what}; correct it or remove the line")

    def of_text(self, text: str, path: Path) -> Record | None:
        raise ConfigError(f"{path} is a text file and holds no records; give JSON lines or Parquet")

    def of_json(self, record: Any, where: str) -> Record | None:
        if not isinstance(record, dict):
            raise Unusable("not an object with keys")
        json.dumps(record, ensure_ascii=False).encode("utf-8")  # JSON can spell half of a surrogate pair
        return where, record

    def of_parquet(
        self, file: "pyarrow.parquet.ParquetFile", path: Path
    ) -> Iterator[tuple[int, Record | None]]:
        row = 0
        for batch in file.iter_batches():
            for record in batch.to_pylist():
                row += 1
                yield row, (f"{path}, row {row}", record)


class Questions(SingleTurn):
    """Problems of a file, `questions:PATH`: {"question": TEXT, "answer": TEXT} each, or "prompt", a text or a list
    of messages. All other keys are what rewards may read (`Sample.reference`).

    Every epoch goes through all training problems in an order of its own.

    Args:
        path: JSON lines or Parquet.
        held_out_path: a file of held-out problems; None: `held_out` of `path`'s are.
        judge: "exact", or "math" for math-verify.
        unseen: a training problem whose question is held out is left out.

    Raises:
        ConfigError: a file cannot be read, or nothing is left to train on.
        DataError: a record has no question.
    """

    def __init__(
        self, path: Path, held_out_path: Path | None, judge: str, seed: int, held_out: int, unseen: bool
    ) -> None:
        self.path, self.seed = path, seed
        problems = _problems(path)
        if held_out_path is not None:
            self._held_out = _problems(held_out_path)[:held_out]
        else:
            order = Permutation(len(problems), "held_out")(np.arange(len(problems))).tolist()
            self._held_out = [problems[at] for at in order[:held_out]]
            problems = [problems[at] for at in sorted(order[held_out:])]
        if unseen:
            known = {_asked(problem) for problem in self._held_out}
            problems = [problem for problem in problems if _asked(problem) not in known]
        if not problems:
            raise ConfigError(
                f"{path} has nothing to train on beside {len(self._held_out)} held-out problems; give more, "
                "a smaller stage.eval_problems, or held_out=PATH"
            )
        self._problems = problems
        self.reward = Judged(judge)

    def problem(self, number: int) -> Problem:
        epoch, place = divmod(number, len(self._problems))
        order = Permutation(len(self._problems), f"{self.seed}/{epoch}")
        return self._problems[int(order(np.array([place]))[0])]

    def held_out(self, count: int) -> list[Problem]:
        return self._held_out[:count]

    def correct(self, parts: Mapping[str, Sequence[float]]) -> list[bool]:
        return [mark >= 1 for mark in parts[CORRECT]]

    def close(self) -> None:
        self.reward.close()


class Judged:
    """1 where an answer is `reference["answer"]`, or one of that list, else 0; NaN where there is no such key."""

    def __init__(self, judge: str) -> None:
        if judge not in ("exact", "math"):
            raise ConfigError(f"judge={judge} of an environment is not known; use exact or math")
        self.judge = judge
        self._reward: Reward | None = None  # math starts a process
        self._lock = threading.Lock()

    def score(self, samples: Sequence[Sample]) -> Mapping[str, list[float]]:
        with self._lock:
            if self._reward is None:
                self._reward = Exact(Extract.auto) if self.judge == "exact" else Math(SECONDS, 1)
        return {CORRECT: list(self._reward.score(samples)[self.judge])}

    def close(self) -> None:
        if isinstance(self._reward, Math):
            self._reward.close()
        self._reward = None


def _problems(path: Path) -> list[Problem]:
    found = [_problem(record, where) for where, record in JsonRecords([path])]
    if not found:
        raise ConfigError(f"{path} holds no problem; give JSON lines with a question each")
    return found


def _problem(record: dict[str, Any], where: str) -> Problem:
    key = next((key for key in ("question", "prompt", "messages") if record.get(key)), None)
    if key is None:
        raise DataError(f'{where}: no "question" and no "prompt"; add one')
    asked = record[key]
    messages: list[Message] = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    if not isinstance(messages, list) or not all(_is_message(each) for each in messages):
        raise DataError(f'{where}: "{key}" is neither a text nor a list of messages; correct it')
    return Problem(messages, {name: value for name, value in record.items() if name != key})


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def _asked(problem: Problem) -> str:
    return json.dumps([[message["role"], message["content"]] for message in problem.messages])
