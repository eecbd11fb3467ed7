"""One job, from overrides to its end: compose, validate, freeze, start, follow."""

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from drivetrain.conf.compose import compose, load
from drivetrain.conf.errors import ConfigError, DrivetrainError
from drivetrain.conf.schema import RunConfig, TorchrunConfig
from drivetrain.conf.validate import check_resume, check_run_dir, validate
from drivetrain.launch import local
from drivetrain.launch.run_dir import default_run_dir, make_run_dir

PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: saved and stopped on request; `drivetrain resume` goes on


class JobFailed(DrivetrainError):
    """A rank failed; `exit_status` is its own."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


@dataclass(frozen=True, slots=True)
class JobResult:
    run_dir: Path
    status: str
    objective: float | None

    @property
    def exit_status(self) -> int:
        return {"failed": 1, "preempted": PREEMPTED}.get(self.status, 0)


def launch(overrides: Sequence[str], console: Console) -> JobResult:
    """Compose, check, make the run directory, start the ranks and follow them.

    Raises:
        ConfigError: nothing was started. JobFailed: a rank failed.
    """
    return start(compose(overrides), overrides, console)


def start(config: RunConfig, overrides: Sequence[str], console: Console) -> JobResult:
    """The same for a configuration that is composed already."""
    validate(config)
    run_dir = (Path(config.run_dir) if config.run_dir else default_run_dir(config)).absolute()
    check_run_dir(config, run_dir)
    config = replace(config, run_dir=str(run_dir))
    if config.cluster.dry_run:
        return _show(config, run_dir, console)
    make_run_dir(config, overrides, run_dir)
    return _begin(config, run_dir, console)


def resume(run_dir: Path, overrides: Sequence[str], console: Console) -> JobResult:
    """Go on from the newest whole checkpoint; `overrides` are put on top of those of the start.

    Raises:
        ConfigError: no run there, nothing to resume from, or a change that would change the data.
    """
    run_dir = run_dir.absolute()
    old = load(run_dir / "config.yaml")
    said = (
        (run_dir / "overrides.txt").read_text().splitlines() if (run_dir / "overrides.txt").is_file() else []
    )
    words = merge_overrides(said, overrides)
    new = replace(compose(words), run_dir=str(run_dir)) if overrides else old
    validate(new)
    check_resume(old, new)
    if not any((run_dir / "checkpoints").glob("step_*/complete.json")):
        raise ConfigError(
            f"{run_dir} has no whole checkpoint to resume from; start again with `drivetrain launch`"
        )
    if new.cluster.dry_run:
        return _show(new, run_dir, console)
    make_run_dir(new, words, run_dir)
    return _begin(new, run_dir, console)


def merge_overrides(old: Sequence[str], new: Sequence[str]) -> list[str]:
    """`new` on top of `old`: the same key is replaced, and another option of a group drops the group's keys."""
    keys = {_key(word) for word in new}
    groups = {key for key in keys if "." not in key}
    kept = [word for word in old if _key(word) not in keys and _key(word).split(".")[0] not in groups]
    return [*kept, *new]


def _key(word: str) -> str:
    return re.split(r"[=@]", word.lstrip("+~"), maxsplit=1)[0]


def command_line(config: RunConfig, run_dir: Path) -> str:
    """What starts the ranks, as a shell takes it."""
    words = [f"{name}={value}" for name, value in local.environment(config.cluster).items()]
    return " ".join([*words, shlex.join(local.command(config.cluster, run_dir))])


def _show(config: RunConfig, run_dir: Path, console: Console) -> JobResult:
    console.print(f"[bold]run directory[/bold]  {escape(str(run_dir))} [dim](not made: dry run)[/dim]")
    console.print(command_line(config, run_dir), soft_wrap=True, markup=False)
    return JobResult(run_dir, "dry run", None)


def _begin(config: RunConfig, run_dir: Path, console: Console) -> JobResult:
    match config.cluster:
        case TorchrunConfig():
            nodes = config.cluster.nodes
            where = "this on each of the nodes, which share this folder" if nodes > 1 else "this"
            console.print(f"[bold]{escape(str(run_dir))}[/bold] is ready. Run {where}:", soft_wrap=True)
            console.print(command_line(config, run_dir), soft_wrap=True, markup=False, highlight=False)
            return JobResult(run_dir, "prepared", None)
        case _:
            return _follow(config, run_dir, console)


def _follow(config: RunConfig, run_dir: Path, console: Console) -> JobResult:
    ranks = config.cluster.nproc
    engine = config.engine.name + (
        f"-{stage}" if (stage := getattr(config.engine, "zero_stage", None)) is not None else ""
    )
    console.print(
        f"[bold]{escape(config.model.name)}[/bold] · {config.stage.name} · {engine} "
        f"{config.engine.precision.value} · {ranks} rank{'s' if ranks > 1 else ''} · "
        f"{config.stage.steps} steps of {config.stage.tokens_per_step:,} tokens"
    )
    console.print(f"[dim]{escape(str(run_dir))}[/dim]", soft_wrap=True)
    summary_path = run_dir / "summary.json"
    failure = local.run(config.cluster, run_dir)
    if failure is not None:
        if failure.exit_status != ConfigError.exit_status:  # a wrong setting leaves what was there as it was
            failed = {"status": "failed", "reason": failure.reason}
            summary_path.write_text(json.dumps(failed, indent=1) + "\n")
        raise JobFailed(_sentence(failure), failure.exit_status)
    summary: dict[str, Any] = json.loads(summary_path.read_text())
    return JobResult(run_dir, summary["status"], summary["objective"])


def _sentence(failure: local.Failure) -> str:
    who = f"rank {failure.rank}" if failure.rank is not None else "the job"
    if failure.exit_status == 2:
        return failure.reason
    lines = "".join(f"\n  {line}" for line in failure.last_lines)
    last = f"\nits last lines:{lines}" if lines else ""
    return f"{who} failed: {failure.reason}{last}\nwhole log: {failure.log}"
