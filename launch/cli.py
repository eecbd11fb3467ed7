"""The command line: every verb in the order of `--help`, and what becomes of errors.

The verbs are in verbs_runs.py, verbs_models.py, verb_eval.py and verbs_data.py. One imports what it needs inside
its function, so that `--help` answers at once.
"""

import sys
from typing import Any

import typer
from rich.console import Console

from drivetrain.conf.errors import DrivetrainError
from drivetrain.launch import output, verb_eval, verbs_data, verbs_models, verbs_runs

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

OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command(context_settings=OVERRIDES)(verbs_runs.launch)
app.command(context_settings=OVERRIDES)(verbs_runs.resume)
app.command(context_settings=OVERRIDES)(verbs_runs.plan)
app.command()(verbs_models.generate)
app.command("eval")(verb_eval.measure)
app.command()(verbs_models.chat)
app.command()(verbs_models.serve)
app.command("import")(verbs_models.import_)
app.command()(verbs_models.export)
app.command()(verbs_runs.report)
app.command(context_settings={**OVERRIDES, "allow_interspersed_args": False})(verbs_runs.bench)
app.command()(verbs_runs.doctor)
tokenizer_app.command("train")(verbs_data.train_tokenizer)
data_app.command("build")(verbs_data.build)
data_app.command("inspect")(verbs_data.inspect)
data_app.command("verify")(verbs_data.verify)


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
        _complain(output.fault() or f"{type(error).__name__}: {error} (run again with --debug for the trace)")
        sys.exit(1)
    if said := output.fault():
        _complain(said)
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
