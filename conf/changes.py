"""A run directory that is used again: whether it may be, and what is different then."""

import os
import re
from enum import Enum
from pathlib import Path
from typing import Any

from drivetrain.conf.compose import flatten, load
from drivetrain.conf.errors import ConfigError
from drivetrain.conf.schema import RunConfig
from drivetrain.conf.source import MARKER as MARKER

_CHECKPOINT = re.compile(r"step_\d{8,}")
NOT_THE_RUN = ("run_dir", "cluster.dry_run")  # neither says what a run is


def has_checkpoint(run_dir: Path) -> bool:
    """Whether a run has saved anything that was finished; the content is not read."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        return False
    return any(_CHECKPOINT.fullmatch(entry.name) and (entry / MARKER).is_file() for entry in folder.iterdir())


def check_run_dir(config: RunConfig, run_dir: Path) -> None:
    """Whether `launch` may write to a directory: to a new one, or to this run's own while it has saved nothing.

    Raises:
        ConfigError: it holds another run or a checkpoint of this one, is a file, or cannot be written to.
    """
    if (run_dir / "config.yaml").is_file():
        differences = _differences(load(run_dir / "config.yaml"), config)
        if differences:
            raise ConfigError(
                f"{run_dir} holds another run: {'; '.join(differences[:3])}"
                + (f"; and {len(differences) - 3} more" if len(differences) > 3 else "")
                + "; choose another run_dir"
            )
        if has_checkpoint(run_dir):
            raise ConfigError(
                f"{run_dir} holds this run already; continue it with `drivetrain resume {run_dir}`"
            )
    existing = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(f"run_dir={run_dir}: {existing} is a file; choose another run_dir")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"run_dir={run_dir}: {existing} cannot be written to; choose another run_dir")


def _differences(old: RunConfig, new: RunConfig) -> list[str]:
    return [
        f"{key} is {show(was)} there and {show(now)} here" for key, (was, now) in changes(old, new).items()
    ]


def changes(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Keys that say what a run is and whose values differ; one that a side lacks counts as null there."""
    before, after = flatten(old), flatten(new)
    keys = [key for key in dict.fromkeys([*before, *after]) if key not in NOT_THE_RUN]
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def show(value: object) -> str:
    """A value as it is typed."""
    if isinstance(value, Enum):
        return str(value.name)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


# Keys that a resume may change, and why it may not change the others.
MAY_CHANGE = re.compile(
    r"kernels|objective|experiment|lora\.dropout|(engine|cluster|tracker|checkpoint|alarms)\..*|optim\.(?!name$).*"
    r"|stage\.(steps|micro_batch|eval_(?!problems|unseen).*|save_every|log_every|sample_.*|rollout\..*)"
    r"|data\.(path|prefetch|mixture\..*)"
)
BATCH = "the batch of a step is a function of (seed, step) and would be another one"
WHY_NOT = {
    "model": "the checkpoint holds the weights of this model",
    "lora": "the checkpoint holds adapters of the old settings",
    "tokenizer": "the checkpoint has learned the token ids of the old one",
    "optim": "the checkpoint holds the moments of the old optimizer",
    "stage.name": "the checkpoint holds the state of the old stage",
    "data": BATCH,
    "seed": BATCH,
    "stage.seq_len": BATCH,
    "stage.tokens_per_step": BATCH,
    "stage.too_long": BATCH,
    "stage.eval_problems": "problems that are held out are never trained on, and would be others",
    "stage.eval_unseen": BATCH,
}


def check_resume(old: RunConfig, new: RunConfig) -> None:
    """Whether a run may go on with changed settings: another engine or learning rate, but the same batches.

    Raises:
        ConfigError: one sentence a line, for every key that may not change.
    """
    problems = []
    if (names := set(old.data.mixture)) != set(new.data.mixture):
        was, now = (", ".join(sorted(group)) or "none" for group in (names, set(new.data.mixture)))
        problems.append(f"the sources of data.mixture cannot change at a resume ({was}; now {now}): {BATCH}")
    for key, (was, now) in changes(old, new).items():
        if key == "model.init_from" and new.lora.rank:
            continue  # the frozen weights may lie elsewhere: the checkpoint knows them by their digest
        if not MAY_CHANGE.fullmatch(key) and key != "data.mixture":
            why = WHY_NOT.get(key) or WHY_NOT.get(key.partition(".")[0]) or "the loss would be another one"
            problems.append(f"{key} cannot change at a resume ({show(was)}; now {show(now)}): {why}")
    if problems:
        raise ConfigError("\n".join(f"{problem}; keep it, or start a new run" for problem in problems))
