"""Wrong words on the command line: a status, one sentence a mistake, no traceback, and nothing on the disk."""

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from drivetrain.conf.errors import DataError
from drivetrain.conf.schema import RunConfig, options
from drivetrain.launch import cli

Run = Callable[..., tuple[int, str, str]]
BUILD = "`drivetrain data build INPUT... --tokenizer DIR --out DIR`"


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(*words)` -> status, standard output, standard error of `drivetrain words...`."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "300")

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["drivetrain", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    return call


def everything(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


GROUPS = ", ".join(field.name for field in fields(RunConfig))
MODELS = " or ".join(", ".join(options("model")).rsplit(", ", 1))
NOT_A_RUN = "error: {here}/nowhere/config.yaml does not exist; is its folder a run directory?"

# Words without {job} or {here} to fill in are split at spaces; the message is the whole of standard error.
USAGE = {
    "nonsense": "error: No such command 'nonsense' (see `drivetrain --help`)",
    "data nonsense": "error: No such command 'nonsense' (see `drivetrain data --help`)",
    "--nonsense": "error: No such option: --nonsense (see `drivetrain --help`)",
    "resume": "error: Missing argument 'RUN_DIR' (see `drivetrain resume --help`)",
    "report": "error: Missing argument 'RUN_DIR...' (see `drivetrain report --help`)",
    "generate x": "error: Missing option '--prompt' (see `drivetrain generate --help`)",
    "generate x --prompt": "error: Option '--prompt' requires an argument (see `drivetrain --help`)",
    "tokenizer train a --out": "error: Option '--out' requires an argument (see `drivetrain --help`)",
    "tokenizer train nothing --out t": "error: the input nothing does not exist; check the path",
    "data build nothing --tokenizer t --out o": "error: the input nothing does not exist; check the path",
    "report nowhere": "error: nowhere is not a run directory; `drivetrain launch` prints the one it made",
    "resume nowhere": NOT_A_RUN,
    "resume nowhere optim.lr=1": NOT_A_RUN,
    "generate nowhere --prompt x": (
        "error: nowhere is no directory; pass a run directory, one of its checkpoints, or a Hugging Face directory"
    ),
    "plan --mfu 0": "error: --mfu 0.0 is out of range; it is a share of the peak, above 0 and at most 1",
    "plan model=tine": f"error: unknown option model=tine; model can be {MODELS}; did you mean model=tiny?",
    "launch nonsense=1": f"error: unknown key nonsense; the keys are {GROUPS}",
    "launch --nonsense": "error: --nonsense is no setting; write key=VALUE",
    "launch": f"error: data.path is missing: build shards with {BUILD} and pass data.path=DIR",
    "launch data.path=nowhere": (
        f"error: data.path={{here}}/nowhere is no directory; build shards with {BUILD}"
    ),
    "launch {job} optim.lr=abc": "error: optim.lr must be a number, not abc",
    "launch {job} optim.lr=1e-3,1e-2": (
        "error: optim.lr=1e-3,1e-2 gives optim.lr several values and this is one run; keep one of them, or add -m "
        "to sweep"
    ),
    "launch {job} model.init_from=nowhere": (
        "error: model.init_from={here}/nowhere is no directory; pass a run or a directory with weights"
    ),
    "launch {job} cluster.device=cuda": (
        "error: cluster.device=cuda, but torch sees no GPU here; use cluster.device=cpu"
    ),
    "launch {job} tracker=wandb tracker.mode=online": (
        "error: tracker.mode=online needs a W&B key and this machine has none; run `wandb login`, set "
        "WANDB_API_KEY, or use tracker.mode=offline"
    ),
    "launch {job} run_dir=file": "error: run_dir={here}/file: {here}/file is a file; choose another run_dir",
    "launch {job} stage.steps=0 seed=-1": (  # every mistake has its line
        f"error: seed=-1 is out of range; it must be between 0 and {2**63 - 1}\n"
        "stage.steps=0 is out of range; it must be at least 1"
    ),
    "launch -m {job} optim.lr=1e-3,abc": "error: optim.lr must be a number, not abc",
    "launch -m {job} tracker=none,nope": (
        "error: unknown option tracker=nope; tracker can be none, tensorboard or wandb; did you mean tracker=none?"
    ),
    "launch -m {job} model=nope,tiny": "error: model is chosen twice, model=tiny and model=nope; keep one",
    "launch -m {job} stage.seq_len=32,48": (
        "error: stage.tokens_per_step=256 is not a multiple of stage.seq_len=48; "
        "use stage.tokens_per_step=192 or 288"
    ),
    "launch -m {job} optim.lrr=1,2": "error: unknown key optim.lrr; did you mean optim.lr?",
    "launch -m {job} model=glob(*)": (
        "error: model=glob(*) does not say what it sweeps over; write model=A,B"
    ),
    "launch -m {job} optim.lr=interval(0.1,1)": (
        "error: the sweep cannot run: BasicSweeper does not support sweep type : INTERVAL_SWEEP"
    ),
    "launch -m {job} seed=1,2 run_dir=file": (
        "error: run_dir={here}/file: {here}/file is a file; choose another run_dir"
    ),
    "launch -m {job} seed=1,2 run_dir=full": (
        "error: {here}/full is not empty; choose another run_dir for the sweep"
    ),
}


@pytest.mark.parametrize("typed", USAGE)
def test_a_wrong_word_is_one_sentence(typed: str, run: Run, folder: Path, words: list[str]) -> None:
    (folder / "file").touch()
    (folder / "full" / "something").mkdir(parents=True)
    before = everything(folder)
    split = [each for word in typed.split(" ") for each in (words if word == "{job}" else [word])]
    status, out, err = run(*split)
    assert (status, out, err) == (2, "", USAGE[typed].replace("{here}", str(folder)) + "\n")
    assert everything(folder) == before


# What Typer says of a value differs with its version: the option, the value's kind and where to read on.
VALUES = {
    "data build a --tokenizer t --out o --workers x": ("workers", "integer", "data build"),
    "tokenizer train a --out t --vocab-size 2k": ("vocab-size", "integer", "tokenizer train"),
    "generate x --prompt y --max-tokens -3": ("max-tokens", "1", "generate"),
    "generate x --prompt y --max-tokens 0": ("max-tokens", "1", "generate"),
    "generate x --prompt y --temperature -1": ("temperature", "0", "generate"),
    "generate x --prompt y --temperature nan": ("temperature", "0", "generate"),
    "generate x --prompt y --temperature inf": ("temperature", "inf", "generate"),
    "generate x --prompt y --seed -1": ("seed", "0", "generate"),
    f"generate x --prompt y --seed {2**63}": ("seed", str(2**63 - 1), "generate"),
    "plan --mfu much": ("mfu", "number", "plan"),
}


@pytest.mark.parametrize("typed", VALUES)
def test_a_wrong_value_of_an_option_names_it(typed: str, run: Run, folder: Path) -> None:
    before = everything(folder)
    status, out, err = run(*typed.split(" "))
    assert (status, out) == (2, "") and err.count("\n") == 1
    option, kind, verb = VALUES[typed]
    sentence, _, where = err.partition(" (see ")
    assert sentence.startswith("error: Invalid value") and option in sentence
    assert re.search(rf"(?<!\d){kind}(?!\d)", sentence.partition(option)[2])
    assert where == f"`drivetrain {verb} --help`)\n"
    assert everything(folder) == before


def test_missing_shards_are_named(run: Run, folder: Path, words: list[str], shards: Path) -> None:
    copy = shutil.copytree(shards, folder / "copy")
    (copy / "train_00000.bin").unlink()
    before = everything(folder)
    status, _, err = run("launch", *words, f"data.path={copy}")
    assert status == 2
    assert err == (
        f"error: data.path={copy} is not what its manifest says: train_00000.bin: No such file or directory; "
        "build or copy the data again\n"
    )
    assert everything(folder) == before


@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_a_failure_is_status_1(verb: str, run: Run) -> None:
    assert run("data", verb, "nowhere") == (
        1,
        "",
        f"error: nowhere is no finished data directory: manifest.json is missing; make one with {BUILD}\n",
    )


def test_a_fault_of_the_program_asks_for_debug(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise ZeroDivisionError("[red]by zero[/red]")

    monkeypatch.setattr("drivetrain.data.inspect.verify", crash)
    status, _, err = run("data", "verify", "x")
    assert status == 1
    assert err == "error: ZeroDivisionError: [red]by zero[/red] (run again with --debug for the trace)\n"
    monkeypatch.setattr(sys, "argv", ["drivetrain", "data", "verify", "x", "--debug"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_debug_raises_known_errors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["drivetrain", "--debug", "data", "verify", "nowhere"])
    with pytest.raises(DataError):
        cli.main()


def test_an_output_that_is_full_is_a_failure(
    run: Run, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    status, _, err = run("plan", *words, "--json")
    assert (status, err) == (1, "error: standard output cannot be written: No space left on device\n")


def test_the_help_needs_no_torch() -> None:
    """Which takes seconds to import."""
    slow = "{'torch', 'hydra', 'transformers', 'pyarrow'}"
    asked = f"import sys, drivetrain.launch.cli; print(*{slow} & set(sys.modules))"
    env = {**os.environ, "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", asked], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_ctrl_c_is_no_error_message(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("drivetrain.data.inspect.verify", interrupt)
    assert run("data", "verify", "x") == (130, "", "")


@pytest.mark.parametrize("group", [(), ("data",), ("tokenizer",)])
def test_without_a_verb_the_help_is_shown(group: tuple[str, ...], run: Run) -> None:
    status, out, err = run(*group)
    assert status == 2 and "Usage: drivetrain" in out and err == ""
    status, asked, err = run(*group, "--help")
    assert (status, asked.strip(), err) == (0, out.strip(), "")


def test_a_dry_run_makes_nothing(run: Run, folder: Path, words: list[str]) -> None:
    before = everything(folder)
    status, out, err = run("launch", *words, "run_dir=r", "cluster.dry_run=true")
    assert (status, err) == (0, "")
    assert out.startswith("plan: a rank needs about ") and "--nproc-per-node=2" in out
    assert everything(folder) == before


def test_json_is_json(run: Run, words: list[str]) -> None:
    status, out, err = run("plan", *words, "--json")
    assert (status, err) == (0, "") and json.loads(out)["ranks"] == 2
