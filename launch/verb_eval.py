"""`drivetrain eval`: its many options, as names, and what they come to. See cli.py."""

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from drivetrain.launch import output
from drivetrain.launch.words import AsJson, console

TASKS, PROBE = "Tasks", "Memorisation"  # panels of `drivetrain eval --help`


def _of_tasks(**settings: Any) -> Any:
    return typer.Option(rich_help_panel=TASKS, **settings)


def _of_probe(**settings: Any) -> Any:
    return typer.Option(rich_help_panel=PROBE, **settings)


Source = Annotated[
    Path, typer.Argument(metavar="SOURCE", help="A run, a checkpoint of one, or a Hugging Face directory.")
]
Data = Annotated[Path | None, typer.Option(metavar="DIR", help="Shards to measure the loss on.")]
Split = Annotated[str, typer.Option(metavar="held_out|train")]
Tokens = Annotated[int | None, typer.Option(min=1, help="To read. Default: the run's, or 131072.")]
SeqLen = Annotated[int | None, typer.Option(min=1, help="Default: the run's, or 2048.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Draws sequences, documents and shots.")]
Precision = Annotated[
    str | None, typer.Option(metavar="bf16|fp32", help="Default: bf16 on a GPU, fp32 on a CPU.")
]
Out = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the numbers as JSON.")]
Examples = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write every question and its answer as JSONL.")
]
Plot = Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the tasks.")]

Tasks = Annotated[
    list[str] | None,
    _of_tasks(metavar="FILE|NAME", help="JSONL, reasoning_gym:NAME?size=N or lm_eval:NAME,NAME; repeatable."),
]
AsChat = Annotated[bool, typer.Option("--chat", help="Ask by chat template.", rich_help_panel=TASKS)]
Shots = Annotated[int | None, _of_tasks(min=0, help="Answered questions before each.")]
ShotsFrom = Annotated[Path | None, _of_tasks(metavar="FILE", help="Drawn from these.")]
Limit = Annotated[int | None, _of_tasks(min=1, help="First N questions.")]
MaxTokens = Annotated[int, _of_tasks(min=1, help="Of an answer.")]
Stop = Annotated[list[str] | None, _of_tasks(metavar="TEXT", help="Ends an answer; repeatable.")]
Extract = Annotated[str | None, _of_tasks(metavar="REGEX", help="Its last match is the answer.")]

Memorised = Annotated[
    bool,
    typer.Option("--memorisation", help="What comes back word for word.", rich_help_panel=PROBE),
]
Documents = Annotated[int, _of_probe(min=2, help="Of each split.")]
Prefix = Annotated[int, _of_probe(min=1, help="Tokens given.")]
Suffix = Annotated[int, _of_probe(min=1, help="Tokens compared.")]


def measure(
    source: Source,
    data: Data = None,
    split: Split = "held_out",
    tokens: Tokens = None,
    seq_len: SeqLen = None,
    seed: Seed = None,
    precision: Precision = None,
    tasks: Tasks = None,
    chat: AsChat = False,
    shots: Shots = None,
    shots_from: ShotsFrom = None,
    limit: Limit = None,
    max_tokens: MaxTokens = 256,
    stop: Stop = None,
    extract: Extract = None,
    memorisation: Memorised = False,
    documents: Documents = 200,
    prefix: Prefix = 50,
    suffix: Suffix = 50,
    as_json: AsJson = False,
    out: Out = None,
    examples: Examples = None,
    plot: Plot = None,
) -> None:
    """Held-out loss, tasks and memorisation of a run or a Hugging Face model."""
    from drivetrain.launch.evaluate import Wanted, check_writable, evaluate, render, write
    from drivetrain.train.evaluation.memorisation import Probe
    from drivetrain.train.evaluation.tasks import TaskOptions

    pattern = _checked(split, precision, tasks, plot, extract)
    check_writable([out, examples, plot])
    options = TaskOptions(
        chat=chat,
        shots=shots or 0,
        shots_from=shots_from,
        limit=limit,
        max_tokens=max_tokens,
        stop=tuple(stop) if stop else None,
        extract=pattern,
        seed=seed or 0,
    )
    probe = Probe(documents=documents, prefix=prefix, suffix=suffix, seed=seed or 0)
    wanted = Wanted(
        source=source,
        data=data,
        split=split,
        tokens=tokens,
        seq_len=seq_len,
        seed=seed,
        tasks=tuple(tasks or []),
        options=options,
        shots=shots,
        probe=probe if memorisation else None,
        precision=precision,
    )
    found, rows = evaluate(wanted)
    write(found, rows, out, examples, plot)
    if as_json:
        output.write(json.dumps(found, indent=1) + "\n")
    else:
        console.print(render(found))


def _checked(
    split: str, precision: str | None, tasks: list[str] | None, plot: Path | None, extract: str | None
) -> re.Pattern[str] | None:
    """The pattern of `--extract`; raises BadParameter for what is wrong in itself."""
    from drivetrain.launch.evaluate import DTYPES

    if split not in ("held_out", "train"):
        raise typer.BadParameter(f"'--split': {split} is neither held_out nor train")
    if precision is not None and precision not in DTYPES:
        raise typer.BadParameter(f"'--precision': {precision} is neither bf16 nor fp32")
    if plot is not None and not tasks:
        raise typer.BadParameter("'--plot': it draws tasks; name some with --tasks")
    try:
        return re.compile(extract, re.DOTALL) if extract is not None else None
    except re.error as error:
        raise typer.BadParameter(f"'--extract': {extract} is no regular expression ({error})") from error
