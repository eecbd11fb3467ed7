"""What the demo learns from, as JSONL, and what it gained: `python -m drivetrain.launch.demo VERB ...`.

    text OUT                    Python's standard library, which every machine has, and sums worked out step by step
    chat OUT                    questions of reasoning-gym with their answers, as conversations
    gain FINE_TUNED PRACTISED   held-out sums, answered before reinforcement learning and after

The sums that experiment=demo_grpo holds out are in neither.
"""

import json
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

# Installed packages are not the standard library; its test data is mostly generated tables and byte soup.
LEFT_OUT = {
    "site-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "lib2to3",
    "pydoc_data",
    "encodings",
}

# What GRPO practises. 80,000 questions: too many to learn by heart, and each is four terms of one digit.
SUMS = "reasoning_gym:chain_sum?min_terms=4&max_terms=4&min_digits=1&max_digits=1"
HELD_OUT = 128  # of its questions, for evaluation
TEXT_SEED, CHAT_SEED = 1000, 1001  # far from those of people's runs
LINES, LINES_A_DOCUMENT = 24_000, 50  # a seventh of the text
CHAT_SUMS, CHAT_GCDS = 9_600, 800
GCD = {"min_value": 1, "max_value": 20}
SHOWN = 5  # answers


def sources() -> Iterator[tuple[str, str]]:
    """(path inside the library, text), in sorted order; files that are not UTF-8 are left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if LEFT_OUT.isdisjoint(inside.parts):
            try:
                yield str(inside), path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue


@dataclass(frozen=True, slots=True)
class Sum:
    """A question, its steps such as `4+9=13, 13-1=12`, and the result."""

    question: str
    steps: str
    result: int


def worked(question: str) -> Sum:
    """`...: 4 + 9 - 1 =`, worked out from left to right."""
    first, *rest = question.rpartition(":")[2].rstrip(" =").split()
    total, steps = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        after = total + int(term) if sign == "+" else total - int(term)
        steps.append(f"{total}{sign}{term}={after}")
        total = after
    return Sum(question, ", ".join(steps), total)


def sums(seed: int, count: int) -> Iterator[Sum]:
    """`count` sums, none of which is held out."""
    from drivetrain.train.rl.environments import build_environment

    environment = build_environment(SUMS, seed, HELD_OUT, unseen=True)
    for number in range(count):
        yield worked(environment.problem(number).messages[-1]["content"])


def held_out_sums(count: int) -> list[Sum]:
    from drivetrain.train.rl.environments import build_environment

    problems = build_environment(SUMS, 0, HELD_OUT, unseen=True).held_out(count)
    return [worked(problem.messages[-1]["content"]) for problem in problems]


def texts(lines: int) -> Iterator[dict[str, Any]]:
    """The standard library, and `lines` sums with their steps."""
    for name, text in sources():
        yield {"text": text, "source": name}
    left = sums(TEXT_SEED, lines)
    while part := list(islice(left, LINES_A_DOCUMENT)):
        yield {"text": "".join(f"{each.steps}\n" for each in part), "source": "sums"}


def conversations(count_sums: int, count_gcds: int) -> Iterator[dict[str, Any]]:
    """Of five sums two are answered with their steps and three without: which is better is left to GRPO to find."""
    import reasoning_gym

    for number, each in enumerate(sums(CHAT_SEED, count_sums)):
        steps = f"{each.steps} " if number % 5 >= 3 else ""
        yield _conversation("chain_sum", each.question, f"{steps}<answer>{each.result}</answer>")
    for item in reasoning_gym.create_dataset("gcd", size=count_gcds, seed=0, **GCD):
        yield _conversation("gcd", item["question"], f"<answer>{item['answer']}</answer>")


def _conversation(source: str, question: str, answer: str) -> dict[str, Any]:
    asked = {"role": "user", "content": question}
    return {"messages": [asked, {"role": "assistant", "content": answer}], "source": source}


def answers(run: Path, questions: list[str], max_tokens: int = 48) -> list[str]:
    """The run's greedy answers."""
    from drivetrain.data.chat import Chat
    from drivetrain.model.generate import Request, Sampling
    from drivetrain.train.serve import open_model

    opened = open_model(run)
    chat = Chat(opened.tokenizer_dir)
    stop = chat.stop_id()
    greedy = Sampling(max_tokens=max_tokens, temperature=0, stop_tokens=() if stop is None else (stop,))
    asked = [Request(chat.prompt([{"role": "user", "content": text}]), greedy) for text in questions]
    found = opened.generator(max_batch=len(asked)).generate(asked)
    return [opened.tokenizer.decode(completions[0].tokens) for completions in found]


def accuracies(run: Path) -> list[tuple[int, float]]:
    """(step, share of held-out problems solved); step 1's is that of the model that the run began with."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(row["step"], row["eval/accuracy"]) for row in rows if "eval/accuracy" in row]


def gain(before: Path, after: Path) -> None:
    """Print what GRPO changed."""
    from rich.console import Console
    from rich.table import Table

    (_, first), *_, (_, last) = accuracies(after)
    shown = held_out_sums(SHOWN)
    table = Table(title="Answers to held-out sums")
    for header in ("question", "before", "", "after", ""):
        table.add_column(header)
    both = [answers(run, [each.question for each in shown]) for run in (before, after)]
    for each, old, new in zip(shown, *both, strict=True):
        marked = [part for answer in (old, new) for part in (answer, mark(answer, each.result))]
        table.add_row(each.question.rpartition(": ")[2], *marked)
    console = Console(markup=False, highlight=False, width=140)
    console.print(table)
    console.print(
        f"Of {HELD_OUT} held-out sums the fine-tuned model solves {first:.1%}, after practice {last:.1%} "
        f"({100 * (last - first):+.1f} points)."
    )


def mark(answer: str, result: int) -> str:
    from drivetrain.train.evaluation.gym import answer_in

    return "right" if answer_in(answer) == str(result) else "wrong"


def write(records: Iterable[dict[str, Any]], out: Path) -> None:
    """One record a line."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def main() -> None:
    verb, *paths = sys.argv[1], *map(Path, sys.argv[2:])
    match verb:
        case "text":
            write(texts(LINES), *paths)
        case "chat":
            write(conversations(CHAT_SUMS, CHAT_GCDS), *paths)
        case "gain":
            gain(*paths)
        case _:
            sys.exit(f"{verb} is not a verb of the demo; use text, chat or gain")


if __name__ == "__main__":
    main()
