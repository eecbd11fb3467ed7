"""The run directory: everything that is known about a run before it starts."""

import json
import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from drivetrain.conf.compose import to_yaml
from drivetrain.conf.errors import ConfigError
from drivetrain.conf.schema import RunConfig

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


def make_run_dir(config: RunConfig, overrides: Sequence[str], run_dir: Path) -> None:
    """Freeze the configuration and what surrounds it.

    Raises:
        ConfigError: the folder cannot be made or written.
    """
    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        _write(run_dir / "overrides.txt", "".join(f"{word}\n" for word in overrides))
        _write(run_dir / "environment.json", json.dumps(_environment(), indent=1) + "\n")
        patch = _git("diff", "HEAD", "--binary")
        if patch:
            _write(run_dir / "dirty.patch", patch)
        tokenizer = tokenizer_dir(config)
        if tokenizer is not None and not (run_dir / "tokenizer").exists():
            shutil.copytree(tokenizer, run_dir / "tokenizer")
        _write(run_dir / "config.yaml", to_yaml(config))  # last: a folder with it is a run directory
    except OSError as error:
        raise ConfigError(f"{run_dir} cannot be made: {error.strerror}; choose another run_dir") from error


def tokenizer_dir(config: RunConfig) -> Path | None:
    """The tokenizer that was asked for, or the one that lies beside the first source's shards."""
    if config.tokenizer is not None:
        return Path(config.tokenizer)
    paths = (
        [config.data.path] if config.data.path else [source.path for source in config.data.mixture.values()]
    )
    beside = Path(str(paths[0])) / "tokenizer"
    return beside if beside.is_dir() else None


def _write(path: Path, text: str) -> None:
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
