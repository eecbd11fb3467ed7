"""The run directory: everything that is known about a run before it starts."""

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from drivetrain.conf.compose import to_yaml
from drivetrain.conf.errors import ConfigError
from drivetrain.conf.hf_values import GENERATION
from drivetrain.conf.schema import RunConfig
from drivetrain.conf.source import HF, hf_folder, tokenizer_of
from drivetrain.conf.tokenizer_file import tokenizer_hash
from drivetrain.train.lock import lock_run_dir

OVERRIDES = "overrides.txt"
PACKAGES = (
    "drivetrain",
    "torch",
    "triton",
    "deepspeed",
    "accelerate",
    "transformers",
    "tokenizers",
    "numpy",
    "wandb",
)


def default_run_dir(config: RunConfig) -> Path:
    """runs/<experiment>/<time>; a number is added when two runs start in the same second."""
    base = Path("runs") / (config.experiment or "default") / time.strftime("%Y-%m-%d_%H-%M-%S")
    run_dir, count = base, 1
    while run_dir.exists():
        count += 1
        run_dir = base.with_name(f"{base.name}_{count}")
    return run_dir


@contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Make the folder where it is missing, and keep other jobs out of it.

    Raises:
        ConfigError: it cannot be made, or another job is at work there.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{run_dir} cannot be made: {error.strerror}; choose another run_dir") from error
    handle = lock_run_dir(run_dir)
    try:
        yield
    finally:
        os.close(handle)


def make_run_dir(config: RunConfig, overrides: Sequence[str], run_dir: Path) -> None:
    """Freeze the configuration and what surrounds it.

    Raises:
        ConfigError: the folder cannot be made or written.
    """
    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        write_text(run_dir / OVERRIDES, "".join(f"{_as_line(word)}\n" for word in overrides))
        write_text(run_dir / "environment.json", json.dumps(_environment(), indent=1) + "\n")
        patch = _git("diff", "HEAD", "--binary")
        if patch:
            write_text(run_dir / "dirty.patch", patch)
        tokenizer = tokenizer_dir(config)
        if tokenizer is not None and not (run_dir / "tokenizer").exists():
            from drivetrain.data.tokenizer import copy_tokenizer

            shutil.rmtree(run_dir / "tokenizer.tmp", ignore_errors=True)
            copy_tokenizer(tokenizer, run_dir / "tokenizer.tmp")  # and no weights that lie beside it
            (run_dir / "tokenizer.tmp").rename(run_dir / "tokenizer")
        _keep_ends(config, run_dir)
        write_text(run_dir / "config.yaml", to_yaml(config))  # last: a folder with it is a run directory
    except OSError as error:
        raise ConfigError(f"{run_dir} cannot be made: {error.strerror}; choose another run_dir") from error


def _keep_ends(config: RunConfig, run_dir: Path) -> None:
    """Copy generation_config.json of the weights to start from, whose end tokens go into the run's export; ids of
    another tokenizer than the run's mean nothing there."""
    if config.model.init_from is None or (run_dir / HF).exists():
        return
    source = Path(config.model.init_from)
    theirs, mine = tokenizer_of(source), run_dir / "tokenizer"
    if theirs is not None and mine.is_dir() and tokenizer_hash(theirs) != tokenizer_hash(mine):
        return
    if (said := hf_folder(source) / GENERATION).is_file():
        (run_dir / HF).mkdir()
        write_text(run_dir / HF / GENERATION, said.read_text(encoding="utf-8"))


def read_overrides(run_dir: Path) -> list[str]:
    """The words that a run was made from.

    Raises:
        ConfigError: they cannot be read.
    """
    path = run_dir / OVERRIDES
    try:
        lines = path.read_text().splitlines()
        return [json.loads(line) if line.startswith('"') else line for line in lines]
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"{path} cannot be read: {reason}; it holds the settings of the start, one a line"
        ) from error


def _as_line(word: str) -> str:
    """A prompt may have line breaks. No override begins with the quote of a JSON text."""
    return word if word.splitlines() == [word] else json.dumps(word)


def tokenizer_dir(config: RunConfig) -> Path | None:
    """The tokenizer that was asked for, or that of the weights to start from, or the one that lies beside the first
    source's shards."""
    if config.tokenizer is not None:
        return Path(config.tokenizer)
    if (
        config.model.init_from is not None
        and (found := tokenizer_of(Path(config.model.init_from))) is not None
    ):
        return found
    paths = (
        [config.data.path] if config.data.path else [source.path for source in config.data.mixture.values()]
    )
    beside = Path(str(paths[0])) / "tokenizer"
    return beside if beside.is_dir() else None


def write_text(path: Path, text: str) -> None:
    """Replace a file in one motion."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _environment() -> dict[str, object]:
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {name: _version(name) for name in PACKAGES},
        "git": {
            "revision": _git("rev-parse", "HEAD").strip() or None,
            "dirty": bool(_git("status", "--porcelain")),
        },
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*words: str) -> str:
    """Output of a git command on the code that runs; empty where there is no repository."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
