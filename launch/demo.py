"""What the demo learns from, as JSONL: `python -m drivetrain.launch.demo text|chat OUT`.

Text that every machine has, the sources and docstrings of Python's standard library; and conversations that are
made up on the spot, questions of reasoning-gym with their answers.
"""

import json
import sys
import sysconfig
from collections.abc import Iterable, Iterator
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


# What two million parameters can learn: kinds of questions with few words and short answers.
QUESTIONS: dict[str, dict[str, int]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "gcd": {"min_value": 1, "max_value": 20},
    "letter_counting": {"min_words": 1, "max_words": 2},
}


def conversations(each: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """`each` questions of every kind with their answers, as messages."""
    import reasoning_gym

    for name, settings in QUESTIONS.items():
        for item in reasoning_gym.create_dataset(name, size=each, seed=seed, **settings):
            asked = {"role": "user", "content": item["question"]}
            yield {"messages": [asked, {"role": "assistant", "content": item["answer"]}], "source": name}


def main() -> None:
    """Write `OUT`, one record a line."""
    what, out = sys.argv[1], Path(sys.argv[2])
    documents = ({"text": text, "source": name} for name, text in sources())
    records: Iterable[dict[str, Any]] = documents if what == "text" else conversations(4000)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
