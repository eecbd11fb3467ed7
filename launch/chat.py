"""`drivetrain chat SOURCE`: a conversation in the terminal, whose good ends become training examples.

Answers go to standard output and everything else to standard error. A line that begins with / is a command; one
that ends with \\ goes on in the next.
"""

import contextlib
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from drivetrain.conf.errors import ConfigError
from drivetrain.conf.source import tokenizer_of
from drivetrain.data.readers import Unusable
from drivetrain.data.tokenizer import require_chat_template
from drivetrain.launch import output
from drivetrain.model.draw import Sampling
from drivetrain.model.generate import TooLong
from drivetrain.train.serve import OpenModel, Sampler, open_model

Message = dict[str, Any]

HELP = """\
/system TEXT   set the system text; without TEXT, take it away
/fix           correct the last answer, in $EDITOR or line by line up to a line with a single .
/fix TEXT      the same, in one line
/save FILE     append the conversation to FILE, for `drivetrain data build FILE --chat`
/undo          take back the last message and its answer
/reset         begin again; the system text stays
/help          this
/quit          leave, as Ctrl-D does; Ctrl-C stops an answer
A line that ends with \\ goes on in the next."""
SFT, PAIRS = "sft.jsonl", "pairs.jsonl"  # in the folder of corrections
END = "."
# What a terminal would obey; a model's text is not to be trusted with it.
CONTROLS = {
    code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"
}


def chat(source: Path, sampling: Sampling, system: str | None, fixes: Path) -> None:
    """Talk until the input ends.

    Raises:
        ConfigError: SOURCE cannot be opened, its tokenizer has no chat template, or the system text is no text to
            give it. DrivetrainError: the weights are broken, or standard output cannot be written.
    """
    tokenizer = tokenizer_of(source)
    if tokenizer is not None:
        require_chat_template(tokenizer)  # before the weights are read
    session = Session(open_model(source), sampling, fixes)
    if system:
        try:
            session.command("system", system)
        except Unusable as error:
            raise ConfigError(f"--system: {error}") from error
    session.run()


class Session:
    """A conversation.

    Args:
        sampling: of every answer; the n-th of the session is drawn with seed + n.
        fixes: folder that corrections are written to: SFT examples and preference pairs.
    """

    def __init__(self, opened: OpenModel, sampling: Sampling, fixes: Path) -> None:
        self.sampler, self.prompts = Sampler(opened, max_batch=1), opened.prompts()
        self.sampling, self.fixes = sampling, fixes
        self.system = ""
        self.turns: list[Message] = []  # of the person and the model, in turn
        self.answers = 0

    @property
    def messages(self) -> list[Message]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + self.turns

    def run(self) -> None:
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (input() edits lines and remembers them)
            say("/help lists the commands, Ctrl-D leaves")
        else:
            sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        while True:
            try:
                text = read_message()
                if text is None:
                    return
                if text.startswith("/"):
                    name, _, rest = text[1:].partition(" ")
                    if name in ("quit", "exit"):
                        return
                    self.command(name, rest.strip())
                elif text.strip():
                    self.ask(text)
            except KeyboardInterrupt:
                say("\n(Ctrl-D or /quit leaves)")
            except (Unusable, ValueError) as error:
                say(str(error))

    def command(self, name: str, rest: str) -> None:
        match name:
            case "system":
                self.prompts.checked([{"role": "system", "content": rest}])
                self.system = rest
                say("the system text is set" if rest else "there is no system text")
            case "fix":
                self.fix(rest)
            case "save":
                self.save(rest)
            case "undo":
                say("taken back" if self.turns else "there is nothing to take back")
                del self.turns[-2:]
            case "reset":
                self.turns.clear()
                say("a new conversation")
            case "help":
                say(HELP)
            case _:
                say(f"/{name} is no command; /help lists them")

    def ask(self, text: str) -> None:
        """One message and its answer, as far as it comes; where it cannot be answered it is not kept.

        Raises:
            Unusable, ValueError: it cannot be answered; the text says why.
        """
        self._require_answers("before you go on")
        question = {"role": "user", "content": text}
        sampling = dataclasses.replace(self.sampling, seed=(self.sampling.seed + self.answers) % (1 << 63))
        request = self.prompts.answered([*self.messages, question], sampling)
        try:
            self.sampler.generator.check(request)
        except TooLong as error:
            raise Unusable(
                f"the conversation is {error.length} tokens long and the model takes {error.most}; /undo or /reset"
            ) from error
        self.answers += 1
        parts: list[str] = []
        reason = None
        with _stoppable() as stopped:
            try:
                for piece in self.sampler.stream(request):
                    parts.append(piece.text)
                    write(piece.text)
                    reason = piece.finish_reason
                    if stopped:
                        break
            finally:
                write("\n")
        answer = "".join(parts).strip()
        self.turns += [question, {"role": "assistant", "content": answer}]
        if not answer:
            say("(the answer is empty; /fix or /undo it)")
        elif reason is None:
            say("(stopped; what there is of the answer is kept)")
        elif reason == "length":
            say(f"(ended at {len(parts)} tokens, the most that --max-tokens or the context allows)")

    def _require_answers(self, when: str) -> None:
        if self.turns and not self.turns[-1]["content"]:
            raise Unusable(f"the last answer is empty; /fix or /undo it {when}")

    def save(self, file: str) -> None:
        if not file:
            raise Unusable("/save needs the name of a file")
        if not self.turns:
            raise Unusable("there is nothing to save")
        self._require_answers("before you save")
        append(Path(file).expanduser(), {"messages": self.messages})
        say(f"the conversation is saved in {file}")

    def fix(self, corrected: str) -> None:
        """The last answer as it should have been: for SFT (only it is learned), as a pair, and to go on with."""
        if not self.turns:
            raise Unusable("there is no answer to correct")
        *prompt, answer = self.messages
        corrected = (corrected or read_correction(answer["content"])).strip()
        if not corrected or corrected == answer["content"]:
            say("the answer stays as it was")
            return
        better = {"role": "assistant", "content": corrected}
        self.prompts.checked([*prompt, better])
        before = [each | {"weight": 0} if each["role"] == "assistant" else each for each in prompt]
        append(self.fixes / SFT, {"messages": [*before, better]})
        append(self.fixes / PAIRS, {"prompt": prompt, "chosen": [better], "rejected": [answer]})
        self.turns[-1] = better
        say(f"the correction is saved in {self.fixes}/{SFT} and {PAIRS}; the conversation goes on with it")


# --- the terminal -------------------------------------------------------------------------------------------


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def write(text: str) -> None:
    output.write(text.translate(CONTROLS) if sys.stdout.isatty() else text)


def read_message() -> str | None:
    """Lines up to one that does not end with a backslash; None at the end of the input."""
    on_terminal = sys.stdin.isatty()
    lines: list[str] = []
    while True:
        try:
            line = input(("... " if lines else "> ") if on_terminal else "")
        except EOFError:
            return "\n".join(lines) or None
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])


def read_correction(answer: str) -> str:
    """In the person's editor where there is one, else line by line."""
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    if sys.stdin.isatty():
        if editor:
            return edit(answer, editor)
        say(f"the answer as it should be, up to a line with a single {END}")
    lines: list[str] = []
    with contextlib.suppress(EOFError):
        while (line := input()) != END:
            lines.append(line)
    return "\n".join(lines)


def edit(text: str, editor: str) -> str:
    """What the person makes of it.

    Raises:
        Unusable: the editor does not run, or fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answer.txt"
        path.write_text(text, encoding="utf-8")
        try:
            subprocess.run([*shlex.split(editor), str(path)], check=True)
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            raise Unusable(f"the editor failed ({error}); use /fix TEXT, or set EDITOR to another") from error


@contextlib.contextmanager
def _stoppable() -> Iterator[list[int]]:
    """Gets an entry at Ctrl-C, so that a token is never half computed; the second one breaks in."""
    pressed: list[int] = []

    def press(number: int, _: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def append(path: Path, record: dict[str, Any]) -> None:
    """A line of JSON at the end of a file, on the disk when this returns; after a line that was cut off, a new one.

    Raises:
        Unusable: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise Unusable(f"{path} cannot be written: {error.strerror}") from error
