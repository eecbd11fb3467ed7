"""One job, from overrides to its end: compose, validate, freeze, start, follow."""

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from drivetrain.conf.changes import changes, check_resume, check_run_dir, has_checkpoint, show
from drivetrain.conf.compose import compose, flatten, load
from drivetrain.conf.errors import ConfigError, DrivetrainError
from drivetrain.conf.paths import absolute_paths, paths_at_resume
from drivetrain.conf.schema import SCHEMAS, ModelConfig, RunConfig, TorchrunConfig
from drivetrain.conf.validate import validate
from drivetrain.launch import local
from drivetrain.launch.fit import check_machine, plan_here
from drivetrain.launch.practice import check_practice
from drivetrain.launch.run_dir import default_run_dir, hold, make_run_dir, read_overrides, write_text

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
    config = absolute_paths(config)
    plan = check(config)
    run_dir = (Path(config.run_dir) if config.run_dir else default_run_dir(config)).absolute()
    check_run_dir(config, run_dir)
    config = replace(config, run_dir=str(run_dir))
    console.print(plan, markup=False, highlight=False, soft_wrap=True)
    return _begin(config, overrides, run_dir, console)


def check(config: RunConfig) -> str:
    """Everything that can be known before a run directory is made.

    Returns:
        The plan in one line, and warnings in others.

    Raises:
        ConfigError: one sentence a line.
    """
    validate(config)
    check_machine(config)
    line, fits = plan_here(config)
    warnings = [f"warning: {sentence}" for sentence in check_practice(config)]
    return "\n".join([*warnings, line if fits else f"warning: {line}"])


def resume(run_dir: Path, overrides: Sequence[str], console: Console) -> JobResult:
    """Go on from the newest whole checkpoint; `overrides` are put on top of those of the start.

    Raises:
        ConfigError: no run there, or a change that would change the data. JobFailed: a rank failed.
    """
    run_dir = run_dir.absolute()
    old = load(run_dir / "config.yaml")
    said = read_overrides(run_dir)
    words = merge_overrides(said, overrides, old.model)
    new = old
    if overrides:
        anew = map(key_of, overrides)
        new = paths_at_resume(
            compose(words, old.model), flatten(compose(said, old.model)), flatten(old), anew
        )
    new = replace(new, run_dir=str(run_dir))
    saved = has_checkpoint(run_dir)
    # The run has a copy of its tokenizer, and once something is saved it starts from that, but for LoRA's base.
    begun = replace(new, tokenizer=None, lora=replace(new.lora, init_from=None))
    if not new.lora.rank:
        begun = replace(begun, model=replace(new.model, init_from=None))
    plan = check(begun if saved else new)
    check_resume(old, new)
    for key, (was, now) in changes(old, new).items():
        console.print(f"{key}: {show(was)} -> {show(now)}", markup=False, highlight=False, soft_wrap=True)
    if not saved:
        console.print("nothing was saved yet: starting at step 0")
    console.print(plan, markup=False, highlight=False, soft_wrap=True)
    return _begin(new, words, run_dir, console)


def merge_overrides(old: Sequence[str], new: Sequence[str], source: ModelConfig | None = None) -> list[str]:
    """`new` on top of `old`: the same key is replaced, and another option of a group keeps the keys that it has.

    Args:
        source: what `model=auto` stands for.
    """
    keys = {key_of(word) for word in new}
    groups = keys & set(SCHEMAS)
    kept = [word for word in old if key_of(word) not in keys]
    if groups:
        others = [word for word in kept if key_of(word).split(".")[0] not in groups]
        chosen = compose([*others, *new], source)
        have = {f"{group}.{item.name}" for group in groups for item in fields(getattr(chosen, group))}
        kept = [word for word in kept if word in others or ".".join(key_of(word).split(".")[:2]) in have]
    return [*kept, *new]


def key_of(word: str) -> str:
    """The key or group that an override sets."""
    return re.split(r"[=@]", word.lstrip("+~"), maxsplit=1)[0]


def command_line(config: RunConfig, run_dir: Path) -> str:
    """What starts the ranks, as a shell takes it."""
    words = [f"{name}={value}" for name, value in local.environment(config.cluster).items()]
    return " ".join([*words, shlex.join(local.command(config.cluster, run_dir))])


def _show(config: RunConfig, run_dir: Path, console: Console) -> JobResult:
    console.print(f"[bold]run directory[/bold]  {escape(str(run_dir))} [dim](not made: dry run)[/dim]")
    console.print(command_line(config, run_dir), soft_wrap=True, markup=False)
    return JobResult(run_dir, "dry run", None)


def _begin(config: RunConfig, overrides: Sequence[str], run_dir: Path, console: Console) -> JobResult:
    if config.cluster.dry_run:
        return _show(config, run_dir, console)
    with hold(run_dir):
        make_run_dir(config, overrides, run_dir)
        match config.cluster:
            case TorchrunConfig():
                nodes = config.cluster.nodes
                where = "this on each of the nodes, which share this folder" if nodes > 1 else "this"
                console.print(f"[bold]{escape(str(run_dir))}[/bold] is ready. Run {where}:", soft_wrap=True)
                line = command_line(config, run_dir)
                console.print(line, soft_wrap=True, markup=False, highlight=False)
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
    before = _summary(run_dir)
    match local.run(config.cluster, run_dir):
        case local.Failure() as failure:
            unwritten = ""
            if (
                failure.exit_status != ConfigError.exit_status
            ):  # a wrong setting leaves what was there as it was
                unwritten = _write_summary(run_dir, {"status": "failed", "reason": failure.reason})
            raise JobFailed(_sentence(failure) + unwritten, failure.exit_status)
        case local.Stopped() as stopped:
            if (written := _summary(run_dir)) != before:  # rank 0 had time to save after all
                return JobResult(run_dir, "preempted", written.get("objective"))
            kept = before if stopped.before_training else {}
            summary = {**kept, "status": "preempted", "reason": stopped.reason}
            said = f"{stopped.reason}; `drivetrain resume {run_dir}` goes on"
            console.print(said + _write_summary(run_dir, summary), markup=False, soft_wrap=True)
            return JobResult(run_dir, "preempted", kept.get("objective"))
    summary = _summary(run_dir)
    if not summary:
        raise JobFailed(f"the ranks ended well, and {run_dir / 'summary.json'} cannot be read", 1)
    return JobResult(run_dir, summary["status"], summary.get("objective"))


def _summary(run_dir: Path) -> dict[str, Any]:
    """What `summary.json` says; nothing where it is missing or torn."""
    try:
        found: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    except (OSError, ValueError):
        return {}
    return found


def _write_summary(run_dir: Path, summary: dict[str, Any]) -> str:
    """Returns what to add to a message where it cannot be written: the run's end has a reason of its own."""
    path = run_dir / "summary.json"
    try:
        write_text(path, json.dumps(summary, indent=1) + "\n")
    except OSError as error:
        return f"\n{path} cannot be written: {error.strerror}"
    return ""


def _sentence(failure: local.Failure) -> str:
    who = f"rank {failure.rank}" if failure.rank is not None else "the job"
    if failure.exit_status == 2:
        return failure.reason
    lines = "".join(f"\n  {line}" for line in failure.last_lines)
    last = f"\nits last lines:{lines}" if lines else ""
    return f"{who} failed: {failure.reason}{last}\nwhole log: {failure.log}"
