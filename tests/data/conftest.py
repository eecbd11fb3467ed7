"""Made-up documents and a tokenizer of theirs, and waiting."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from drivetrain.data.tokenizer import train_tokenizer

WORDS = re.findall(
    r"\S+", "the cat sat on a mat while seven naïve dogs ran over 1234 green hills and 日本語 was"
)


def text_of(index: int) -> str:
    return (
        " ".join(WORDS[(index * 7 + j * (index % 5 + 1)) % len(WORDS)] for j in range(3 + index % 40))
        + f" {index}"
    )


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """6,000 documents: several batches."""
    return [text_of(i) for i in range(6000)]


@pytest.fixture(scope="session")
def many(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of them in one file."""
    path = tmp_path_factory.mktemp("many") / "many.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def tokenizer(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "a.txt").write_text(" ".join(texts[:200]), encoding="utf-8")
    train_tokenizer([folder], 340, folder / "bpe")
    return folder / "bpe"


@pytest.fixture(scope="session")
def wait_until() -> Callable[[Callable[[], object]], None]:
    """`wait_until(condition)`: for a minute at the most."""

    def wait(condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    return wait
