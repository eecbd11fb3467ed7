"""The command line. A verb imports what it needs inside its function, so that `--help` answers at once."""

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from drivetrain.conf.errors import DrivetrainError

app = typer.Typer(
    help="Train a language model through its whole life: documents, shards, pretraining, a checkpoint that talks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    add_completion=False,
)
data_app = typer.Typer(help="Documents to token shards, and what is in them.", no_args_is_help=True)
tokenizer_app = typer.Typer(help="Train a tokenizer.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(tokenizer_app, name="tokenizer")

# Typer brings a Click of its own or uses the one that is installed, and exports BadParameter, a UsageError, alone.
CLICK_ERROR: Any = typer.BadParameter.__mro__[2]  # ClickException

console = Console()
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
Overrides = Annotated[list[str] | None, typer.Argument(metavar="key=value...", help="Hydra overrides.")]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command(context_settings=OVERRIDES)
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


@app.command(context_settings=OVERRIDES)
def resume(run_dir: RunDir, overrides: Overrides = None) -> None:
    """Go on from the newest whole checkpoint, on other ranks or another engine if asked."""
    from drivetrain.launch.job import resume as resume_job

    raise typer.Exit(resume_job(run_dir, overrides or [], console).exit_status)


@app.command(context_settings=OVERRIDES)
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
        print(json.dumps(dataclasses.asdict(made), indent=1))
    else:
        console.print(render(made))


@tokenizer_app.command("train")
def tokenizer_train(
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...")],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    vocab_size: Annotated[int, typer.Option(help="Tokens, special ones included.")] = 32768,
) -> None:
    """Train a byte-level BPE with the special tokens of chat and tools."""
    from drivetrain.data.tokenizer import train_tokenizer

    train_tokenizer(inputs, vocab_size, out)
    console.print(f"{vocab_size:,} tokens -> {out}", markup=False)


@data_app.command("build")
def data_build(
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...")],
    tokenizer: Annotated[Path, typer.Option(help="Tokenizer directory.")],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    workers: Annotated[int, typer.Option(help="Processes; 0: one a core.")] = 0,
    held_out: Annotated[float, typer.Option(help="Share of documents kept for evaluation.")] = 0.005,
    text_key: Annotated[str, typer.Option(help="Field of the text in JSONL and Parquet.")] = "text",
    licence: Annotated[str | None, typer.Option(help="Recorded in the manifest.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what is in OUT.")] = False,
    strict: Annotated[bool, typer.Option(help="Stop at the first broken line.")] = False,
) -> None:
    """Turn txt, jsonl(.gz/.zst), parquet or folders of them into token shards."""
    from drivetrain.data.build import build

    manifest = build(
        inputs,
        tokenizer,
        out,
        workers=workers,
        held_out=held_out,
        text_key=text_key,
        licence=licence,
        overwrite=overwrite,
        strict=strict,
    )
    for split in ("train", "held_out"):
        documents = sum(shard.documents for shard in manifest.split(split))
        console.print(f"{split}: {documents:,} documents, {manifest.tokens(split):,} tokens", markup=False)


@data_app.command("inspect")
def data_inspect(directory: Annotated[Path, typer.Argument(metavar="DIR")], as_json: AsJson = False) -> None:
    """Counts, lengths and sample text of a directory of shards."""
    from drivetrain.data.inspect import inspect, render

    found = inspect(directory)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        console.print(render(found))


@data_app.command("verify")
def data_verify(directory: Annotated[Path, typer.Argument(metavar="DIR")]) -> None:
    """Compare every file with the checksum in the manifest."""
    from drivetrain.data.inspect import verify

    verify(directory)
    console.print(f"{directory}: every checksum matches", markup=False)


@app.command()
def generate(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A run directory.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest token.")] = 0.8,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt with a run's newest checkpoint."""
    from drivetrain.train.serve import Sampler

    if not math.isfinite(temperature):
        raise typer.BadParameter(f"'--temperature': {temperature} is not a finite number")
    sampler = Sampler(source)
    pieces = sampler.stream(prompt, max_tokens=max_tokens, temperature=temperature, seed=seed)
    if as_json:
        print(json.dumps(sampler.collect(pieces)))
        return
    sys.stdout.write(prompt)
    for piece in pieces:
        sys.stdout.write(piece.text)
        sys.stdout.flush()
    sys.stdout.write("\n")


@app.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...")],
    out: Annotated[Path | None, typer.Option(help="Default: the first run's report/.")] = None,
) -> None:
    """Draw the curves of one or several runs into one HTML page and PNGs."""
    from drivetrain.launch.report import build_report

    console.print(str(build_report(run_dirs, out)), markup=False, soft_wrap=True)


@app.command(context_settings={**OVERRIDES, "allow_interspersed_args": False})
def bench(
    name: Annotated[str, typer.Argument(metavar="kernels|step|data", help="What to measure.")],
    options: Annotated[list[str] | None, typer.Argument(metavar="OPTION...", help="Of that script.")] = None,
) -> None:
    """Measure here, beside what else is installed here; `bench NAME --help` says what a benchmark takes."""
    from drivetrain.launch.bench import bench as run

    raise typer.Exit(run(name, options or []))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """What this machine has, what is missing, and what is used instead."""
    import dataclasses

    from drivetrain.launch.doctor import examine, render

    checks = examine()
    if as_json:
        print(json.dumps([dataclasses.asdict(check) for check in checks], indent=1))
    else:
        console.print(render(checks))
    raise typer.Exit(1 if any(check.status == "fail" for check in checks) else 0)


def main() -> None:
    """Entry point: 0 done, 1 failed, 2 wrong usage, 75 saved and stopped; a traceback only with --debug."""
    arguments: list[str] = sys.argv[1:]
    debug = "--debug" in arguments
    try:
        result: Any = app(
            args=[word for word in arguments if word != "--debug"],
            prog_name="drivetrain",
            standalone_mode=False,
        )
    except DrivetrainError as error:
        if debug:
            raise
        _complain(str(error))
        sys.exit(error.exit_status)
    except CLICK_ERROR as error:
        _complain_of_usage(error)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        _complain(f"{type(error).__name__}: {error} (run again with --debug for the trace)")
        sys.exit(1)
    sys.exit(result if isinstance(result, int) else 0)


def _complain_of_usage(error: Any) -> None:
    """One sentence, and where to read on; nothing where the help was asked for and has been shown."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "drivetrain"
    if sentence := error.format_message().strip().rstrip("."):
        _complain(f"{sentence} (see `{command} --help`)")


def _complain(message: str) -> None:
    Console(stderr=True).print(
        f"[bold red]error:[/bold red] {_escaped(message)}", soft_wrap=True, highlight=False
    )


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


if __name__ == "__main__":
    main()
