"""Verbs of runs: planned, started, resumed, reported, and what the machine can do. See cli.py."""

import json
from pathlib import Path
from typing import Annotated

import typer

from drivetrain.launch import output
from drivetrain.launch.words import AsJson, Overrides, RunDir, console


def launch(
    overrides: Overrides = None,
    multirun: Annotated[bool, typer.Option("-m", "--multirun", help="Sweep: run every combination.")] = False,
) -> None:
    """Compose, check, start and follow a job; exits with its status (75: saved and stopped on request)."""
    if multirun:
        from drivetrain.launch.sweep import sweep

        raise typer.Exit(sweep(overrides or [], console).exit_status)
    from drivetrain.launch.job import launch as launch_job

    raise typer.Exit(launch_job(overrides or [], console).exit_status)


def resume(run_dir: RunDir, overrides: Overrides = None) -> None:
    """Go on from the newest whole checkpoint, on other ranks or another engine if asked."""
    from drivetrain.launch.job import resume as resume_job

    raise typer.Exit(resume_job(run_dir, overrides or [], console).exit_status)


def plan(
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="GPU to plan for.")] = "H100 SXM",
    mfu: Annotated[float, typer.Option(help="Share of its peak that is assumed.")] = 0.4,
    as_json: AsJson = False,
) -> None:
    """Memory per rank by part, FLOPs, time and checkpoint size; nothing is started."""
    import dataclasses

    from drivetrain.conf.compose import compose
    from drivetrain.conf.validate import validate
    from drivetrain.launch.plan import make_plan, render

    config = compose(overrides or [])
    validate(config, data=False)
    made = make_plan(config, gpu=gpu, mfu=mfu)
    if as_json:
        output.write(json.dumps(dataclasses.asdict(made), indent=1) + "\n")
    else:
        console.print(render(made))


def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...")],
    out: Annotated[Path | None, typer.Option(help="Default: the first run's report/.")] = None,
) -> None:
    """Draw the curves of one or several runs into one HTML page and PNGs."""
    from drivetrain.launch.report import build_report

    console.print(str(build_report(run_dirs, out)), markup=False, soft_wrap=True)


def bench(
    name: Annotated[str, typer.Argument(metavar="kernels|step|data|rollout", help="What to measure.")],
    options: Annotated[list[str] | None, typer.Argument(metavar="OPTION...", help="Of that script.")] = None,
) -> None:
    """Measure here, beside what else is installed here; `bench NAME --help` says what a benchmark takes."""
    from drivetrain.launch.bench import bench as run

    raise typer.Exit(run(name, options or []))


def doctor(as_json: AsJson = False) -> None:
    """What this machine has, what is missing, and what is used instead."""
    import dataclasses

    from drivetrain.launch.doctor import examine, render

    checks = examine()
    if as_json:
        output.write(json.dumps([dataclasses.asdict(check) for check in checks], indent=1) + "\n")
    else:
        console.print(render(checks))
    raise typer.Exit(1 if any(check.status == "fail" for check in checks) else 0)
