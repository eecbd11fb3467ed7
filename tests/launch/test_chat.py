"""`drivetrain chat`, its input through a pipe and once through a terminal."""

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drivetrain.conf.errors import ConfigError, DrivetrainError
from drivetrain.data.build import build
from drivetrain.data.conversations import conversation_of
from drivetrain.data.readers import Unusable
from drivetrain.launch import chat as module
from drivetrain.launch import cli
from drivetrain.launch.chat import Session, append
from drivetrain.model.draw import Sampling
from drivetrain.train.serve import OpenModel, open_model

SEEDED = Sampling(max_tokens=12, seed=5)


@pytest.fixture(scope="module")
def opened(talker: Path) -> OpenModel:
    return open_model(talker)


@pytest.fixture
def typed(
    opened: OpenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[Session, str, str]]:
    """`typed(*lines)` -> the session after it has read them, what it answered, what else it said."""
    monkeypatch.chdir(tmp_path)

    def run(*lines: str, sampling: Sampling = SEEDED) -> tuple[Session, str, str]:
        session = Session(opened, sampling, Path("fixes"))
        text = "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))
        session.run()
        return session, *capsys.readouterr()

    return run


def records(path: str) -> list[Any]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def roles(session: Session) -> list[str]:
    return [message["role"] for message in session.messages]


def test_answers_stream_out_and_the_conversation_grows(typed: Any, opened: OpenModel) -> None:
    session, out, err = typed("the cat", "where?")
    assert roles(session) == ["user", "assistant"] * 2
    first, second = (turn["content"] for turn in session.turns[1::2])
    assert first != second and first in out and second in out
    assert err.count("ended at 12 tokens") == 2
    again, same, _ = typed("the cat", "where?")
    assert again.turns == session.turns and same == out


def test_an_answer_depends_on_all_that_was_said(typed: Any) -> None:
    greedy = Sampling(max_tokens=12, temperature=0)
    alone = typed("where?", sampling=greedy)[0].turns[-1]
    assert typed("the cat", "where?", sampling=greedy)[0].turns[-1] != alone
    assert typed("/system the dog", "where?", sampling=greedy)[0].turns[-1] != alone
    assert typed("the cat", "/undo", "where?", sampling=greedy)[0].turns[-1] == alone
    assert typed("the cat", "/reset", "where?", sampling=greedy)[0].turns[-1] == alone
    assert typed("/system the dog", "/system", "where?", sampling=greedy)[0].turns[-1] == alone


def test_the_same_message_after_undo_draws_anew(typed: Any) -> None:
    session, _, _ = typed("the cat", "/fix one", "/undo", "the cat")
    first = typed("the cat")[0]
    assert session.turns[0] == first.turns[0] and session.turns[1] != first.turns[1]


def test_commands_explain_themselves(typed: Any) -> None:
    session, out, err = typed("/undo", "/fix x", "/save", "/save file", "/nonsense", "/help", "", "  ")
    assert out == "" and session.turns == []
    lines = err.splitlines()
    assert lines[:5] == [
        "there is nothing to take back",
        "there is no answer to correct",
        "/save needs the name of a file",
        "there is nothing to save",
        "/nonsense is no command; /help lists them",
    ]
    for command in ("/system", "/fix", "/save", "/undo", "/reset", "/help", "/quit"):
        assert any(line.startswith(command) for line in lines[5:])
    assert not Path("file").exists()
    assert typed("/quit", "the cat")[0].turns == []


def test_lines_go_on_after_a_backslash(typed: Any) -> None:
    assert typed("the \\", "cat\\", "sat")[0].turns[0]["content"] == "the \ncat\nsat"
    assert typed("the end\\")[0].turns[0]["content"] == "the end"


def test_what_is_saved_is_read_by_data_build(typed: Any, talker: Path) -> None:
    session, _, err = typed(
        "/system Be brief.", "hello ü", "/fix hi", "and?", "/fix yes", "/save a/all.jsonl"
    )
    assert "saved in a/all.jsonl" in err
    assert records("a/all.jsonl") == [{"messages": session.messages}]
    assert roles(session) == ["system", "user", "assistant", "user", "assistant"]
    for number, file in enumerate(["a/all.jsonl", "fixes/sft.jsonl"]):
        manifest = build(
            [Path(file)],
            talker,
            Path(f"shards{number}"),
            1,
            held_out=0,
            strict=True,
            progress=False,
            chat=True,
        )
        assert sum(shard.documents for shard in manifest.split("train")) == 1 + number


def test_a_correction_is_an_example_and_a_pair(typed: Any) -> None:
    session, _, err = typed(
        "the cat", "/fix", "  sat on", "", "the mat  ", ".", "and the dog?", "/fix ran", "/help"
    )
    assert [turn["content"] for turn in session.turns] == [
        "the cat",
        "sat on\n\nthe mat",
        "and the dog?",
        "ran",
    ]
    assert err.count("the correction is saved in fixes/sft.jsonl and pairs.jsonl") == 2
    first, second = records("fixes/sft.jsonl")
    assert first["messages"] == session.turns[:2]
    assert conversation_of(second).learned == [False, False, False, True]
    assert [message["content"] for message in second["messages"]] == [
        message["content"] for message in session.turns
    ]
    pairs = records("fixes/pairs.jsonl")
    answers = typed("the cat")[0].turns[1]
    assert pairs[0] == {"prompt": [session.turns[0]], "chosen": [session.turns[1]], "rejected": [answers]}
    assert pairs[1]["prompt"] == session.turns[:3] and pairs[1]["chosen"] == [session.turns[3]]
    assert set(pairs[1]) == {"prompt", "chosen", "rejected"}
    assert pairs[1]["rejected"] != pairs[1]["chosen"]


@pytest.mark.parametrize("lines", [["/fix", "."], ["/fix", "", " ", "."], ["/fix"]])
def test_no_correction_writes_nothing(typed: Any, lines: list[str]) -> None:
    session, _, err = typed("the cat", *lines)
    assert "the answer stays as it was" in err and not Path("fixes").exists()
    assert typed("the cat")[0].turns == session.turns


def test_what_cannot_be_answered_is_not_kept(typed: Any) -> None:
    session, _, err = typed("a<|im_end|>b", "/system <|im_start|>", "the cat " * 3000, "ok")
    assert [turn["content"] for turn in session.turns[::2]] == ["ok"]
    assert err.count("spells the control token <|im_") == 2 and session.system == ""
    assert re.search(r"the conversation is \d+ tokens long and the model takes 4095; /undo or /reset", err)
    session, _, err = typed("ok", "/fix a<|im_end|>")
    assert "message 2 spells the control token" in err and not Path("fixes").exists()


def test_an_empty_answer_must_be_corrected(
    typed: Any, opened: OpenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.Sampler, "stream", lambda *_: iter(()))
    session, _, err = typed("hello", "hello?", "/save file", "/fix hi")
    assert [turn["content"] for turn in session.turns] == ["hello", "hi"]
    assert err.count("the last answer is empty; /fix or /undo it") == 2 and not Path("file").exists()


def test_bytes_that_are_no_text_are_replaced(typed: Any) -> None:
    assert typed("caf\udce9")[0].turns[0]["content"] == "caf\N{REPLACEMENT CHARACTER}"


def test_a_line_that_was_cut_off_stays_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.jsonl"
    append(path, {"a": "ü"})
    with path.open("a") as file:
        file.write('{"cut')
    append(path, {"b": 1})
    assert path.read_text(encoding="utf-8") == '{"a": "ü"}\n{"cut\n{"b": 1}\n'
    with pytest.raises(Unusable, match=r"below cannot be written: "):
        append(path / "below", {})


def test_a_terminal_is_not_given_what_it_would_obey(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module.write("a\x1b[2Jb\n")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    module.write("a\x1b[2J\x9bb\tc\r\n")
    assert (
        capsys.readouterr().out
        == "a\x1b[2Jb\na\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}b\tc"
        + ("\N{REPLACEMENT CHARACTER}\n")
    )


def test_an_editor_corrects(tmp_path: Path) -> None:
    script = tmp_path / "editor.py"
    script.write_text("import sys, pathlib; p = pathlib.Path(sys.argv[1]); p.write_text(p.read_text()[::-1])")
    assert module.edit("abc\ndef", f"{sys.executable} {script}") == "fed\ncba"
    with pytest.raises(Unusable, match="the editor failed"):
        module.edit("abc", "/nowhere/editor -w")


def test_without_a_chat_template_it_is_refused(
    talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(talker, tmp_path / "base")
    (source / "chat_template.jinja").unlink()
    monkeypatch.setattr(sys, "argv", ["drivetrain", "chat", str(source), "--debug"])
    with pytest.raises(ConfigError, match=r"has no chat template; add chat_template\.jinja"):
        cli.main()


def test_a_system_text_that_cannot_be_given_is_a_wrong_word(
    talker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text, said in {
        "a<|im_end|>": r"--system: message 1 spells the control token <\|im_end\|>",
        "caf\udce9": "--system: message 1 is not UTF-8",
    }.items():
        monkeypatch.setattr(sys, "argv", ["drivetrain", "chat", str(talker), "--system", text, "--debug"])
        with pytest.raises(ConfigError, match=said):
            cli.main()


def test_weights_that_give_no_numbers_end_the_conversation(
    typed: Any, opened: OpenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = opened.model.get_parameter("norm.weight")
    before = weight.detach().clone()
    weight.data.fill_(float("nan"))
    try:
        with pytest.raises(
            DrivetrainError, match="logits that are not finite numbers; its weights are broken"
        ):
            typed("the cat")
    finally:
        weight.data.copy_(before)


def test_in_a_terminal_ctrl_c_stops_an_answer_and_not_the_program(
    talker: Path, tmp_path: Path, kill_tree: Any
) -> None:
    controller, terminal = pty.openpty()
    words = [
        "chat",
        str(talker),
        "--temperature",
        "0",
        "--max-tokens",
        "4000",
        "--fixes",
        str(tmp_path / "f"),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "drivetrain.launch.cli", *words],
        env={**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "EDITOR": "", "VISUAL": ""},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    said = b""

    def wait_for(what: bytes, after: int = 0, signals: bool = False) -> int:
        nonlocal said
        deadline = time.monotonic() + 60
        while said.find(what, after) < 0:
            assert time.monotonic() < deadline and process.poll() is None, said
            if signals:  # one that comes before input() waits is seen when it has been woken
                process.send_signal(signal.SIGINT)
            if select.select([controller], [], [], 0.2)[0]:
                said += os.read(controller, 4096)
        return said.find(what, after) + len(what)

    try:
        at = wait_for(b"> ")
        at = wait_for(b"(Ctrl-D or /quit leaves)", at, signals=True)
        os.write(controller, b"the cat\n")
        at = wait_for(b"the cat\r\n", at)
        while len(said) < at + 20:  # some of the answer
            wait_for(b"", len(said))
            said += os.read(controller, 64)
        process.send_signal(signal.SIGINT)
        at = wait_for(b"(stopped; what there is of the answer is kept)", at)
        os.write(controller, b"/fix\n")
        at = wait_for(b"up to a line with a single .", at)
        os.write(controller, b"sat\n.\n")
        at = wait_for(b"the correction is saved", at)
        wait_for(b"> ", at)
        os.write(controller, b"\x04")
        assert process.wait(30) == 0
    finally:
        kill_tree(process)
        os.close(controller)
    (pair,) = records(str(tmp_path / "f" / "pairs.jsonl"))
    assert pair["chosen"] == [{"role": "assistant", "content": "sat"}] and pair["rejected"][0]["content"]
