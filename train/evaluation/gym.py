"""Tasks that reasoning-gym makes up: questions of a kind, as many as wanted, a function of their seed.

    reasoning_gym:basic_arithmetic?size=200&seed=1&max_terms=3

What follows the question mark are the data set's own settings.
"""

import json
import re
from functools import partial
from typing import Any
from urllib.parse import parse_qsl

from drivetrain.conf.errors import ConfigError
from drivetrain.train.evaluation.items import Item, Judge

GYM = "reasoning_gym:"
SIZE = 100
SEED = 1_000_003  # far from the small ones that people train with
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def gym_items(name: str) -> list[Item]:
    """The questions of a name as above; without `size` and `seed`, `SIZE` of them from `SEED`.

    Raises:
        ConfigError: reasoning-gym is not installed, or has no such data set or setting.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise ConfigError(f"{name} needs reasoning-gym; run `pip install 'drivetrain[rl]'`") from error
    kind, _, query = name.removeprefix(GYM).partition("?")
    try:
        given = {key: value_of(value) for key, value in parse_qsl(query, strict_parsing=bool(query))}
        made = reasoning_gym.create_dataset(kind, **{"size": SIZE, "seed": SEED, **given})
        entries = list(made)
    except (ValueError, TypeError, AssertionError) as error:
        raise ConfigError(f"{name} cannot be made: {error}; see reasoning-gym's data sets") from error
    if not entries:
        raise ConfigError(f"{name} has no question; use a larger size")
    return [
        Item(
            entry["question"],
            f"Question: {entry['question']}\nAnswer:",
            (str(entry["answer"]),),
            judge=_judge(made, entry),
            where=f"{name}, question {number}",
        )
        for number, entry in enumerate(entries)
    ]


def _judge(made: Any, entry: dict[str, Any]) -> Judge:
    return partial(_mark, made, entry)


def _mark(made: Any, entry: dict[str, Any], answer: str) -> float:
    """0 to 1, by the data set's own rules."""
    return float(made.score_answer(answer_in(answer), entry))


def answer_in(text: str) -> str:
    """What stands in the last <answer> tags, or the whole text."""
    found = _TAGGED.findall(text)
    return found[-1].strip() if found else text.strip()


def value_of(text: str) -> Any:
    """A number, a truth value or a list where it is one in JSON, else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
