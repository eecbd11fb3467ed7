"""`drivetrain eval`: what is measured, in which order, and how it is shown."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from drivetrain.conf.errors import ConfigError, DrivetrainError
from drivetrain.conf.schema import RunConfig
from drivetrain.conf.source import model_of
from drivetrain.launch.charts import LIGHT
from drivetrain.train.evaluation.loss import (
    SEQ_LEN,
    TOKENS,
    Shards,
    held_out_loss,
    paths_of,
    run_config,
    shards_of,
)
from drivetrain.train.evaluation.memorisation import Probe, memorisation
from drivetrain.train.evaluation.score import DTYPES as DTYPES
from drivetrain.train.evaluation.score import Advance
from drivetrain.train.evaluation.tasks import HARNESS, TaskOptions, load_task, run_task
from drivetrain.train.serve import Sampler, open_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What is to be measured. None stands for the run's own value, or where there is no run for a usual one.

    Attributes:
        data: shards whose loss is measured. If nothing else is wanted, a run's own are.
        tasks: paths of files, reasoning_gym:NAME, lm_eval:NAME,NAME.
        probe: of memorisation, on `data` or on the run's own; None: not wanted.
    """

    source: Path
    data: Path | None = None
    split: str = "held_out"
    tokens: int | None = None
    seq_len: int | None = None
    seed: int | None = None
    tasks: tuple[str, ...] = ()
    options: TaskOptions = field(default_factory=TaskOptions)
    shots: int | None = None
    probe: Probe | None = None
    precision: str | None = None


def evaluate(wanted: Wanted, progress: bool = True) -> tuple[dict[str, Any], Rows]:
    """Measure it.

    Returns:
        `source`, `step` and what was wanted of `data`, `tasks` (by name) and `memorisation`; and a row for every
        question of every task.

    Raises:
        DrivetrainError: what cannot be measured, and why; where it can be known, before the model is opened.
    """
    config = run_config(wanted.source)
    shards = _shards(wanted, config)
    directory = _probed(wanted, config)
    if shards is None and directory is None and not wanted.tasks:
        raise ConfigError(
            f"there is nothing to evaluate {wanted.source} on; name shards with --data DIR or questions with "
            "--tasks FILE"
        )
    harness = [name for word in wanted.tasks if word.startswith(HARNESS) for name in _names(word)]
    tasks = [load_task(word, wanted.options) for word in wanted.tasks if not word.startswith(HARNESS)]
    if harness:
        _require_harness()
    dtype = DTYPES[wanted.precision] if wanted.precision is not None else None
    sampler = Sampler(open_model(wanted.source, dtype=dtype))
    found: dict[str, Any] = {
        "source": str(wanted.source),
        "precision": {value: key for key, value in DTYPES.items()}[sampler.opened.model.embed.weight.dtype],
    }
    rows: Rows = []
    if shards is not None:
        with _bar("loss", progress) as advance:
            numbers = held_out_loss(sampler.opened, shards, advance)
        paths = {name: str(path) for name, path in shards.paths.items()}
        about = {"paths": paths, "split": shards.split, "seq_len": shards.seq_len, "seed": shards.seed}
        found["data"] = {**about, **numbers}
    results: dict[str, Any] = {}
    for task in tasks:
        with _bar(task.name, progress) as advance:
            results[task.name], answered = run_task(sampler, task, wanted.options, advance)
        rows += [{"task": task.name, **row} for row in answered]
    if harness:
        more, answered = _run_harness(sampler, harness, wanted, progress)
        results |= more
        rows += answered
    if results:
        found["tasks"] = results
    if directory is not None and wanted.probe is not None:
        with _bar("memorisation", progress) as advance:
            found["memorisation"] = memorisation(sampler, directory, wanted.probe, advance)
    return found, rows


def _shards(wanted: Wanted, config: RunConfig | None) -> Shards | None:
    """Whose loss to measure: what is named, or if nothing is asked for at all, the run's own."""
    asked = {"tokens": wanted.tokens, "seq_len": wanted.seq_len, "seed": wanted.seed}
    changes: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
    changes["split"] = wanted.split
    trained = config is not None and bool(paths_of(config))
    if wanted.data is not None:
        changes["paths"] = {"data": wanted.data}
    elif wanted.tasks or wanted.probe is not None or not trained:
        return None
    if config is not None and trained:
        return shards_of(config, **changes)
    usual = {"tokens": TOKENS, "seq_len": min(SEQ_LEN, model_of(wanted.source).max_seq_len), "seed": 0}
    return Shards(**usual | changes)


def _probed(wanted: Wanted, config: RunConfig | None) -> Path | None:
    if wanted.probe is None or wanted.data is not None:
        return wanted.data if wanted.probe is not None else None
    paths = list(paths_of(config).values()) if config is not None else []
    if len(paths) != 1:
        what = "does not say what it was trained on" if not paths else "was trained on several directories"
        raise ConfigError(f"{wanted.source} {what}; name the shards to look for with --data DIR")
    return paths[0]


def _names(word: str) -> list[str]:
    return [name for name in word.removeprefix(HARNESS).split(",") if name]


def _require_harness() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "--tasks lm_eval:... needs EleutherAI's harness; run `pip install 'drivetrain[eval]'`"
        ) from error


def _run_harness(
    sampler: Sampler, names: list[str], wanted: Wanted, progress: bool
) -> tuple[dict[str, Any], Rows]:
    from drivetrain.train.evaluation.harness import run_harness

    options = wanted.options
    with _bar("lm_eval", progress) as advance:
        return run_harness(
            sampler,
            names,
            shots=wanted.shots,
            limit=options.limit,
            chat=options.chat,
            seed=options.seed,
            advance=advance,
        )


@contextmanager
def _bar(name: str, progress: bool) -> Iterator[Advance]:
    """A line on standard error, gone when the work is done; nothing where that is no terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not (progress and console.is_terminal)
    ) as bar:
        task = bar.add_task(name, total=None)
        done = 0

        def advance(more: int, total: int) -> None:
            nonlocal done
            done += more
            bar.update(task, completed=done, total=max(total, done))

        yield advance


# --- what is shown ------------------------------------------------------------------------------------------


def render(found: dict[str, Any]) -> RenderableType:
    """What `evaluate` found as tables for a rich console."""
    parts: list[RenderableType] = []
    if "data" in found:
        parts.append(_loss_table(found["data"]))
    if "tasks" in found:
        parts += [_task_table(found["tasks"]), *_remarks(found["tasks"])]
    if "memorisation" in found:
        parts += _memorisation(found["memorisation"])
    return Group(*parts)


def _loss_table(data: dict[str, Any]) -> Table:
    table = Table(
        title=f"{data['split']}, {data['tokens']:,} tokens predicted in sequences of {data['seq_len']:,}"
    )
    for column in ("data", "loss", "perplexity", "bits a byte"):
        table.add_column(column, justify="left" if column == "data" else "right", overflow="fold")
    rows = [("all" if "sources" in data else next(iter(data["paths"].values())), data)]
    rows += [(data["paths"][name], {**each}) for name, each in data.get("sources", {}).items()]
    for name, each in rows:
        perplexity = ""
        if "perplexity" in each:
            perplexity = f"{math.inf if each['perplexity'] is None else each['perplexity']:,.2f}"
        table.add_row(Text(name), f"{each['loss']:.4f}", perplexity, f"{each['bits_per_byte']:.4f}")
    return table


def _task_table(tasks: dict[str, Any]) -> Table:
    table = Table(title="tasks")
    for column in ("task", "questions", "shots", "metric", "value", "±", "chance"):
        left = column in ("task", "metric")
        table.add_column(column, justify="left" if left else "right", overflow="fold" if left else "ellipsis")
    for name, task in tasks.items():
        first = True
        for metric, number in task["metrics"].items():
            about = (Text(name), _count(task["questions"]), _count(task["shots"])) if first else ("", "", "")
            error = "" if number["stderr"] is None else f"{number['stderr']:.4f}"
            chance = f"{task['chance']:.3f}" if "chance" in task else ""
            table.add_row(*about, metric.replace("_", " "), f"{number['value']:.4f}", error, chance)
            first = False
    return table


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else ""


def _remarks(tasks: dict[str, Any]) -> list[Text]:
    found = []
    for name, task in tasks.items():
        if task.get("cut"):
            found.append(Text(f"{name}: {task['cut']:,} questions were too long and lost their beginning"))
        if task.get("unfinished"):
            found.append(Text(f"{name}: {task['unfinished']:,} answers ended at --max-tokens"))
    return found


def _memorisation(found: dict[str, Any]) -> list[RenderableType]:
    k, n = found["prefix"], found["suffix"]
    table = Table(title=f"memorisation: given {k} tokens, the next {n} by greedy decoding")
    for column in ("documents", "number", "all come back", f"first of {n} that do", "loss"):
        table.add_column(column, justify="left" if column == "documents" else "right")
    for split, title in (("train", "train"), ("held_out", "held out"), ("difference", "difference")):
        part = found[split]
        numbers = [
            f"{part[name]['value']:.{digits}f} ± {part[name]['stderr']:.{digits}f}"
            for name, digits in (("extractable", 4), ("matched", 2), ("loss", 3))
        ]
        table.add_row(title, _count(part.get("documents")), *numbers)
    examples = [
        Panel(
            Text.assemble(
                (example["prefix"], "dim"), example["suffix"], "\n\n", (example["generated"], "cyan")
            ),
            title=f"{example['matched']} of {n} tokens: the document, and what the model gave",
        )
        for example in found["examples"]
        if example["matched"]
    ]
    return [table, *examples]


def draw(tasks: dict[str, Any]) -> "Figure":
    """A bar for every metric of a task that lies between 0 and 1, with its standard error, and chance as a line."""
    from matplotlib.figure import Figure

    bars = [
        (f"{name}\n{metric.replace('_', ' ')}", number, task.get("chance"))
        for name, task in tasks.items()
        for metric, number in task["metrics"].items()
        if 0 <= number["value"] <= 1
    ]
    figure = Figure(figsize=(8, 1 + 0.6 * len(bars)), layout="constrained", facecolor=LIGHT.background)
    axes = figure.subplots()
    places = list(range(len(bars)))[::-1]
    axes.barh(
        places,
        [number["value"] for _, number, _ in bars],
        xerr=[number["stderr"] or 0 for _, number, _ in bars],
        color=LIGHT.colours[0],
        ecolor=LIGHT.ink,
        height=0.6,
    )
    for place, (_, _, chance) in zip(places, bars, strict=True):
        if chance is not None:
            axes.plot([chance, chance], [place - 0.4, place + 0.4], color=LIGHT.colours[1], linewidth=2)
    axes.set_yticks(places, [title for title, _, _ in bars], parse_math=False)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of questions, with its standard error; orange: chance", color=LIGHT.muted)
    axes.tick_params(colors=LIGHT.ink, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    return figure


def check_writable(paths: list[Path | None]) -> None:
    """Before hours of work, not after.

    Raises:
        ConfigError: a file's folder does not exist.
    """
    for path in paths:
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ConfigError(f"{path} cannot be written: its folder does not exist, or it is one itself")


def write(
    found: dict[str, Any], rows: Rows, out: Path | None, examples: Path | None, plot: Path | None
) -> None:
    """The numbers as JSON, every question as a line of JSON, and a picture of the tasks; None: not wanted.

    Raises:
        DrivetrainError: a file cannot be written.
    """
    try:
        if out is not None:
            out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if examples is not None:
            lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
            examples.write_text("".join(lines), encoding="utf-8")
        if plot is not None:
            draw(found.get("tasks", {})).savefig(plot, dpi=150)
    except (OSError, ValueError) as error:  # ValueError: a picture's suffix that matplotlib does not know
        raise DrivetrainError(f"the results cannot be written: {error}") from error
