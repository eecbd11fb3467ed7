"""Questions put to a model: multiple choice by log-likelihood, free answers by greedy generation."""

import math
import random
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from drivetrain.conf.errors import ConfigError, DataError
from drivetrain.data.chat import Chat
from drivetrain.data.conversations import Message
from drivetrain.data.readers import Unusable
from drivetrain.model.generate import Completion, Request, Sampling
from drivetrain.train.evaluation.gym import GYM, gym_items
from drivetrain.train.evaluation.items import Item, read_items
from drivetrain.train.evaluation.score import Advance, Pair, Scorer, Texts, silent
from drivetrain.train.serve import OpenModel, Sampler

HARNESS = "lm_eval:"  # what the names of EleutherAI's tasks begin with
BETWEEN = "\n\n"  # examples of a prompt; where a model without a chat template would begin another one
THOUGHT = "</think>"
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(\D|$))")
_AROUND = " \t\n.,;:!?\"'`*"


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskOptions:
    """How questions are asked and answers read.

    Attributes:
        chat: ask by the tokenizer's chat template; conversations always are.
        shots: answered questions before each one, drawn by `seed` from `shots_from`, or from the task's others.
        limit: only so many of the first questions.
        max_tokens: of a free answer. stop: texts that end it; None: an empty line, or in a chat the turn's end.
        extract: its last match in the text is the answer, or what its first group matched.
    """

    chat: bool = False
    shots: int = 0
    shots_from: Path | None = None
    limit: int | None = None
    max_tokens: int = 256
    stop: tuple[str, ...] | None = None
    extract: re.Pattern[str] | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Task:
    """Items of one kind. `pool`: what shots are drawn from, if not from `items` themselves."""

    name: str
    items: list[Item]
    pool: list[Item] | None = None


def load_task(name: str, options: TaskOptions) -> Task:
    """A task by the path of its file, or as reasoning_gym:NAME?size=200&seed=1.

    Raises:
        ConfigError: there is none, or it has not as many shots as are asked for. DataError: a line is broken.
    """
    items = gym_items(name) if name.startswith(GYM) else read_items(Path(name))
    pool = read_items(options.shots_from) if options.shots_from is not None else None
    available = len(items) - 1 if pool is None else len(pool)
    if options.shots > available:
        where = name if pool is None else options.shots_from
        raise ConfigError(
            f"--shots {options.shots} is more than the {available} other questions of {where}; use fewer"
        )
    if pool is not None and bool(pool[0].choices) != bool(items[0].choices):
        raise ConfigError(f"{options.shots_from} is of another kind than {name}: one has choices")
    return Task(name, items, pool)


def run_task(
    sampler: Sampler, task: Task, options: TaskOptions, advance: Advance = silent
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a model makes of a task.

    Returns:
        Its numbers: `kind`, `questions`, `shots`, `chat`, `cut` (questions of which a part did not fit the model)
        and `metrics`, each with `value` and `stderr`. And a row for every question with what was answered.

    Raises:
        ConfigError: a chat is asked for and the tokenizer has no template. DataError: the template refuses a
            question, or a choice is longer than the model's context.
    """
    asker = _Asker(sampler.opened, task, options)
    items = task.items[: options.limit]
    if items[0].choices:
        return _choose(sampler.opened, asker, items, advance)
    return _answer(sampler, asker, items, advance)


def mean_and_error(values: Sequence[float]) -> dict[str, float]:
    """The mean, and the standard error of it from the sample's deviation; 0 for a single value."""
    n = len(values)
    mean = math.fsum(values) / n
    variance = math.fsum((value - mean) ** 2 for value in values) / max(1, n - 1)
    return {"value": mean, "stderr": math.sqrt(variance / n)}


# --- what is asked ------------------------------------------------------------------------------------------


class _Asker:
    def __init__(self, opened: OpenModel, task: Task, options: TaskOptions) -> None:
        self.opened, self.task, self.options = opened, task, options
        needed = options.chat or any(
            isinstance(item.question, list) for item in [*task.items, *(task.pool or [])]
        )
        self.chat = Chat(opened.tokenizer_dir) if needed else None
        self.texts = Texts(opened)

    def shots(self, number: int) -> list[Item]:
        """For the question with this number, never itself."""
        pool = self.task.items if self.task.pool is None else self.task.pool
        drawn = random.Random(f"{self.options.seed}/{number}").sample(
            range(len(pool)), min(len(pool), self.options.shots + 1)
        )
        own = self.task.pool is None
        return [pool[i] for i in drawn if not (own and i == number)][: self.options.shots]

    def text(self, number: int, item: Item) -> str:
        asked = [
            f"{shot.bare}{gap(shot.bare, shot.answers[0])}{shot.answers[0]}" for shot in self.shots(number)
        ]
        return BETWEEN.join([*asked, item.bare])

    def prompt(self, number: int, item: Item) -> list[int]:
        """The same as a chat, as tokens."""
        assert self.chat is not None
        turns = []
        for shot in self.shots(number):
            turns += [*_turns(shot), {"role": "assistant", "content": shot.answers[0]}]
        own = _turns(item)
        system = [turn for turn in own[:1] if turn["role"] == "system"]
        turns = [turn for turn in turns if turn["role"] != "system"]
        try:
            return self.chat.prompt([*system, *turns, *own[len(system) :]])
        except Unusable as error:
            raise DataError(f"{item.where}: {error}") from error


def _turns(item: Item) -> list[Message]:
    return item.question if isinstance(item.question, list) else [{"role": "user", "content": item.question}]


def gap(text: str, following: str) -> str:
    """What stands between a text and its continuation: a space, where neither brings its own."""
    return "" if not text or text[-1].isspace() or following[:1].isspace() else " "


# --- multiple choice ----------------------------------------------------------------------------------------


def _choose(
    opened: OpenModel, asker: _Asker, items: list[Item], advance: Advance
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    pairs = [pair for number, item in enumerate(items) for pair in _pairs(opened, asker, number, item)]
    scores = iter(Scorer(opened).score(pairs, advance))
    rows = []
    for item in items:
        found = [next(scores) for _ in item.choices]
        likelihoods = [score.logprob for score in found]
        # A character's, as the harness has it: long choices are unlikely for their length alone.
        by_length = [each / len(choice) for each, choice in zip(likelihoods, item.choices, strict=True)]
        chosen, chosen_norm = (each.index(max(each)) for each in (likelihoods, by_length))
        rows.append(
            {
                "where": item.where,
                "question": item.question,
                "choices": list(item.choices),
                "right": item.right,
                "logprobs": likelihoods,
                "chosen": chosen,
                "chosen_norm": chosen_norm,
                "cut": max(score.cut for score in found),
            }
        )
    metrics = {
        "accuracy": mean_and_error([row["chosen"] == row["right"] for row in rows]),
        "accuracy_norm": mean_and_error([row["chosen_norm"] == row["right"] for row in rows]),
    }
    chance = math.fsum(1 / len(item.choices) for item in items) / len(items)
    return {**_summary("multiple_choice", asker, rows, metrics), "chance": chance}, rows


def _pairs(opened: OpenModel, asker: _Asker, number: int, item: Item) -> list[Pair]:
    """One for each choice."""
    if asker.chat is not None:
        prompt, encode = tuple(asker.prompt(number, item)), asker.chat.tokenizer.encode
        pairs = [Pair(prompt, tuple(encode(each, add_special_tokens=False).ids)) for each in item.choices]
    else:
        text = asker.text(number, item)
        pairs = [asker.texts.pair(text, gap(text, each) + each) for each in item.choices]
    longest = max(len(pair.continuation) for pair in pairs)
    if longest > opened.cfg.max_seq_len:
        raise DataError(
            f"{item.where}: a choice has {longest} tokens and the model's max_seq_len is {opened.cfg.max_seq_len}; "
            "shorten it"
        )
    return pairs


# --- free answers -------------------------------------------------------------------------------------------


def _answer(
    sampler: Sampler, asker: _Asker, items: list[Item], advance: Advance
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    requests, cuts = [], []
    for number, item in enumerate(items):
        request, cut = _request(sampler, asker, number, item)
        requests.append(request)
        cuts.append(cut)
    rows: list[dict[str, Any]] = []
    for item, request, cut, completion in zip(
        items, requests, cuts, complete(sampler, requests, advance), strict=True
    ):
        text = sampler.text(completion, request.sampling, request.prompt)
        answer = answer_of(text, asker.options.extract)
        mark = item.judge(answer) if item.judge is not None else float(matches(answer, item.answers))
        rows.append(
            {
                "where": item.where,
                "question": item.question,
                "answers": list(item.answers),
                "completion": text,
                "answer": answer,
                "mark": mark,
                "finish_reason": completion.finish_reason,
                "cut": cut,
            }
        )
    metrics = {"exact_match": mean_and_error([row["mark"] == 1 for row in rows])}
    if items[0].judge is not None:
        metrics["mark"] = mean_and_error([row["mark"] for row in rows])
    unfinished = sum(row["finish_reason"] == "length" for row in rows)
    return {**_summary("free_answer", asker, rows, metrics), "unfinished": unfinished}, rows


def _summary(
    kind: str, asker: _Asker, rows: list[dict[str, Any]], metrics: dict[str, dict[str, float]]
) -> dict[str, Any]:
    return {
        "kind": kind,
        "questions": len(rows),
        "shots": asker.options.shots,
        "chat": asker.chat is not None,
        "cut": sum(row["cut"] > 0 for row in rows),
        "metrics": metrics,
    }


def _request(sampler: Sampler, asker: _Asker, number: int, item: Item) -> tuple[Request, int]:
    """A request, and how many tokens of its prompt were left out on the left so that the answer has room."""
    options, most = asker.options, asker.opened.cfg.max_seq_len
    in_chat = asker.chat is not None
    stop = options.stop if options.stop is not None else () if in_chat else (BETWEEN,)
    sampling = Sampling(max_tokens=options.max_tokens, temperature=0, stop=stop)
    if asker.chat is not None:
        end = asker.chat.stop_id()
        stop_tokens = () if end is None else (end,)
        request = Request(asker.prompt(number, item), replace(sampling, stop_tokens=stop_tokens))
    else:
        request = sampler.prompts.continued(asker.texts.tokens(asker.text(number, item)), sampling)
    return cut_to_fit(request, most)


def cut_to_fit(request: Request, max_seq_len: int) -> tuple[Request, int]:
    """The end of a prompt that leaves its answer room, at most half of the context; and how much is left out."""
    room = max(max_seq_len - request.sampling.max_tokens, max_seq_len // 2)
    cut = max(0, len(request.prompt) - room)
    return replace(request, prompt=request.prompt[cut:]), cut


def complete(sampler: Sampler, requests: list[Request], advance: Advance = silent) -> list[Completion]:
    """A completion of each request, which is for one sample."""
    generator = sampler.generator
    found = {generator.submit(request): Completion() for request in requests}
    while generator.busy:
        for event in generator.step():
            found[event.request].add(event)
            if event.finish_reason is not None:
                advance(1, len(requests))
    return list(found.values())


def answer_of(text: str, extract: re.Pattern[str] | None) -> str:
    """The answer in a completion: what follows the reasoning, and of it what `extract` matches last, or ""."""
    said = text.rpartition(THOUGHT)[2].strip()
    if extract is None:
        return said
    found = list(extract.finditer(said))
    if not found:
        return ""
    return (found[-1][1] or "") if extract.groups else found[-1][0]


def matches(answer: str, accepted: Sequence[str]) -> bool:
    """Whether an answer is one of those but for case, white space, commas of thousands and punctuation around."""
    return normalised(answer) in {normalised(each) for each in accepted}


def normalised(text: str) -> str:
    plain = " ".join(_THOUSANDS.sub("", unicodedata.normalize("NFKC", text)).casefold().split())
    return plain.strip(_AROUND) or plain
