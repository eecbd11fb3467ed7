import gc
import io
import json
import resource
from pathlib import Path

import pytest
from rich.console import Console

from drivetrain.conf.errors import DataError
from drivetrain.data.build import build
from drivetrain.data.inspect import inspect, render, verify
from drivetrain.data.shards import Manifest
from drivetrain.data.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "a.jsonl"
    texts = [f"document [bold]{'x' * (i % 7)} number {i}" for i in range(200)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def tokenizer(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_tokenizer([source], 266, out)  # no merges: one token a byte
    return out


@pytest.fixture
def data(source: Path, tokenizer: Path, tmp_path: Path) -> Path:
    build([source], tokenizer, tmp_path / "data", 1, held_out=0.2, shard_tokens=2000, progress=False)
    return tmp_path / "data"


def test_the_numbers_are_those_of_the_text(data: Path, source: Path) -> None:
    report = inspect(data)
    texts = [json.loads(line)["text"] for line in source.read_text().splitlines()]
    splits = report["splits"]
    assert list(splits) == ["train", "held_out"]
    assert sum(split["documents"] for split in splits.values()) == 200
    assert sum(split["text_bytes"] for split in splits.values()) == sum(map(len, texts))
    assert sum(split["tokens"] for split in splits.values()) == sum(map(len, texts)) + 200
    lengths = splits["train"]["lengths"]
    assert list(lengths) == ["mean", "min", "p10", "p50", "p90", "p99", "max"]
    assert min(map(len, texts)) < lengths["min"] <= lengths["p10"] <= lengths["p50"] <= lengths["p90"]
    assert lengths["p99"] <= lengths["max"] <= max(map(len, texts)) + 1
    for split in splits.values():
        assert split["bytes_per_token"] == split["text_bytes"] / split["tokens"]
        assert len(split["samples"]) == 2 and set(split["samples"]) <= set(texts)
    assert json.loads(json.dumps(report)) == report


def test_more_shards_than_files_that_may_be_open(source: Path, tokenizer: Path, tmp_path: Path) -> None:
    build([source], tokenizer, tmp_path / "data", 1, held_out=0.2, shard_tokens=60, progress=False)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    gc.collect()  # what earlier tests left behind holds files
    largest = max(int(file.name) for file in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (largest + 30, before[1]))
    try:
        report = inspect(tmp_path / "data")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert report["splits"]["train"]["shards"] > 60


def test_the_report_renders_and_text_is_not_markup(data: Path) -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render(inspect(data)))
    shown = console.export_text()
    for expected in ("held_out", "bytes a token", "p99", "document [bold]", "not stated", "nothing"):
        assert expected in shown


def test_what_is_learned_of_a_conversation_is_told_apart(tokenizer: Path, tmp_path: Path) -> None:
    """The question is read, the answer and the end of its turn are learned."""
    asked = [{"role": "user", "content": "öne?"}, {"role": "assistant", "content": "twö."}]
    asked += [{"role": "user", "content": "three"}, {"role": "assistant", "content": "x" * 600}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": asked}) + "\n")
    build([tmp_path / "chat.jsonl"], tokenizer, tmp_path / "chat", 1, held_out=0, progress=False, chat=True)
    report = inspect(tmp_path / "chat")
    (pieces,), (sample,) = (report["splits"]["train"][key] for key in ("sample_pieces", "samples"))
    assert [learned for _, learned in pieces] == [False, True, False, True]
    assert pieces[0][0].endswith("assistant\n") and "öne?" in pieces[0][0]
    assert pieces[1] == ["twö.<|im_end|>", True] and set(pieces[3][0]) == {"x"}
    assert sample == "".join(text for text, _ in pieces) and "three" in pieces[2][0]
    assert json.loads(json.dumps(report)) == report
    console = Console(
        width=200, record=True, file=io.StringIO(), force_terminal=True, color_system="standard"
    )
    console.print(render(report))
    shown = console.export_text(styles=True)
    assert "not learned" in shown
    dim = [
        line.split("\x1b[2m", 1)[1].split("\x1b[0m")[0] for line in shown.splitlines() if "\x1b[2m" in line
    ]
    assert any("öne?" in text for text in dim) and not any("twö." in text for text in dim)


def test_whole_data_verifies(data: Path) -> None:
    verify(data, progress=False)


def test_every_corrupt_file_is_named(data: Path) -> None:
    shards = Manifest.read(data).split("train")
    assert len(shards) > 2
    flipped = bytearray((data / shards[0].bin_name).read_bytes())
    flipped[7] ^= 1
    (data / shards[0].bin_name).write_bytes(flipped)
    short = data / shards[1].idx_name
    size = short.stat().st_size
    short.write_bytes(short.read_bytes()[:-8])
    (data / shards[2].bin_name).unlink()
    with (data / "tokenizer" / "tokenizer.json").open("a") as file:
        file.write(" ")
    with pytest.raises(DataError) as caught:
        verify(data, progress=False)
    message = str(caught.value)
    assert "4 of " in message
    assert f"{shards[0].bin_name} has checksum " in message
    assert f"{short.name} has {size - 8} bytes instead of {size}" in message
    assert f"{shards[2].bin_name} is missing" in message
    assert "tokenizer/tokenizer.json has checksum" in message


def test_no_data_directory(tmp_path: Path) -> None:
    for read in (inspect, verify):
        with pytest.raises(
            DataError, match=r"manifest\.json is missing; make one with `drivetrain data build"
        ):
            read(tmp_path)
