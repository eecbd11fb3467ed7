"""`drivetrain generate`: what it writes, and that a fault is one sentence before anything is written."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from drivetrain.launch import cli, output

ENV = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "300"}
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(talker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """`run(*words, source)` -> status, standard output, standard error."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "300")

    def call(*words: str, source: Path = talker) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["drivetrain", "generate", str(source), *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def written(run: Cli) -> Callable[..., str]:
    def call(*words: str) -> str:
        status, out, err = run(*words)
        assert (status, err) == (0, "")
        return out

    return call


def start(talker: Path, *words: str | bytes, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "drivetrain.launch.cli", "generate", str(talker), *words]
    return subprocess.Popen(command, env=ENV, stderr=subprocess.PIPE, text=True, **options)


def test_completions_are_written(written: Callable[..., str]) -> None:
    words = ("--prompt", "the cat", "--max-tokens", "9", "--seed", "3")
    lines = written(*words, "--samples", "3", "--json").splitlines()
    found = [json.loads(line) for line in lines]
    assert len({tuple(each["tokens"]) for each in found}) == 3
    assert all(set(each) == {"text", "tokens", "logprobs", "finish_reason"} for each in found)
    assert written(*words) == f"the cat{found[0]['text']}\n"
    filtered = written(*words, "--top-k", "1", "--top-p", "0.9", "--min-p", "0.1")
    assert filtered == written(*words, "--temperature", "0")
    stop = found[0]["text"][3]
    assert written(*words, "--stop", stop) == f"the cat{found[0]['text'].split(stop)[0]}\n"
    assert not written(*words, "--chat").startswith("the cat")
    assert written(*words, "--samples", "2").count("sample") == 2


LONG = "the prompt is 5000 tokens long and the model takes 4095 (its max_seq_len less one); shorten it"
WRONG: dict[str, tuple[list[str], str]] = {
    "long": (["--prompt", "ü" * 2500], LONG),
    "long json": (["--prompt", "ü" * 2500, "--json"], LONG),
    "bytes": (["--prompt", "caf\udce9"], "--prompt is not UTF-8 (character 4)"),
    "stop bytes": (["--prompt", "a", "--stop", "\udce9"], "--stop is not UTF-8 (character 1)"),
    "control": (
        ["--chat", "--prompt", "a<|im_end|>b"],
        "message 1 spells the control token <|im_end|>; leave it out",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_asked_is_a_wrong_word(case: str, run: Cli) -> None:
    words, said = WRONG[case]
    assert run(*words) == (2, "", f"error: {said}\n")


def test_a_chat_without_a_template_is_refused_before_weights_are_read(
    run: Cli, talker: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(talker, tmp_path / "base")
    (source / "chat_template.jinja").unlink()
    (source / "model.safetensors").unlink()
    status, out, err = run("--chat", "--prompt", "a", source=source)
    assert (status, out) == (2, "") and "has no chat template; add chat_template.jinja" in err


@pytest.mark.parametrize("words", [["--json"], ["--samples", "2"], []])
def test_broken_weights_are_a_failure_before_the_prompt_is_written(
    words: list[str], run: Cli, talker: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(talker, tmp_path / "broken")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], torch.nan)
    save_file(tensors, source / "model.safetensors")
    said = "the model gives logits that are not finite numbers; its weights are broken"
    assert run("--prompt", "the cat", *words, source=source) == (1, "", f"error: {said}\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is the full disk")
def test_a_full_output_is_one_sentence(talker: Path) -> None:
    with Path("/dev/full").open("w") as full:
        process = start(talker, "--prompt", "a", "--max-tokens", "3", stdout=full)
        said = process.communicate(timeout=100)[1]
    assert said == "error: standard output cannot be written: No space left on device\n"
    assert process.returncode == 1


def test_a_reader_that_goes_away_is_one_sentence(talker: Path) -> None:
    process = start(talker, "--prompt", "a", "--max-tokens", "4000", stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(20)
    process.stdout.close()
    assert process.stderr.read() == "error: standard output cannot be written: Broken pipe\n"
    assert process.wait(60) == 1
    process.stderr.close()


def test_bytes_of_another_encoding_are_a_wrong_word(talker: Path) -> None:
    process = start(talker, "--prompt", b"caf\xe9", stdout=subprocess.PIPE)
    assert process.communicate(timeout=100) == ("", "error: --prompt is not UTF-8 (character 4)\n")
    assert process.returncode == 2


@pytest.mark.parametrize("words", [["--json"], ["--samples", "2"], ["--chat"]])
def test_every_form_of_output_may_fail(words: list[str], run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    status, _, err = run("--prompt", "a", "--max-tokens", "3", *words)
    assert (status, err) == (1, "error: standard output cannot be written: No space left on device\n")


def test_an_encoding_that_cannot_spell_the_text_is_named(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ascii:
        encoding = "ascii"

        def write(self, text: str) -> None:
            text.encode("ascii")

        def flush(self) -> None: ...

    monkeypatch.setattr(sys, "stdout", Ascii())
    status, _, err = run("--prompt", "ä")
    assert status == 1
    assert err == ("error: standard output is in ascii, which cannot spell 'ä'; set PYTHONIOENCODING=utf-8\n")


def test_a_closed_output_is_said(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert output.fault() is None
    status, _, err = run("--prompt", "a")
    assert (status, err) == (
        1,
        "error: standard output is closed, so that nobody can read what is written\n",
    )
