"""`drivetrain report`: what one or several runs did, as one self-contained HTML page and PNG charts.

The page loads nothing from elsewhere and runs no script. Whatever came out of a model is hostile text: Jinja
escapes it, and the page's content security policy allows nothing but inline styles and embedded pictures.
"""

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from drivetrain.conf.errors import ConfigError, DataError
from drivetrain.launch.charts import CHARTS, DARK, LIGHT, draw, has_data, is_number, svg
from drivetrain.train.progress import duration, short

Row = dict[str, Any]

MAX_SAMPLE_STEPS = 10
MAX_TEXT = 4000  # characters of one environment entry that are shown


@dataclass(kw_only=True, slots=True)
class Run:
    """One run directory, as far as it could be read. `notices` names what could not."""

    name: str
    rows: list[Row] = field(default_factory=list)
    summary: Row = field(default_factory=dict)
    config: Row = field(default_factory=dict)
    environment: Row = field(default_factory=dict)
    samples: list[Row] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def points(self, x: str, y: str) -> tuple[list[float], list[float]]:
        """Where both are finite numbers, in order of steps."""
        pairs = [(row.get(x), row.get(y)) for row in self.rows]
        finite = [(float(a), float(b)) for a, b in pairs if is_number(a) and is_number(b)]
        return [a for a, _ in finite], [b for _, b in finite]


def build_report(run_dirs: list[Path], out: Path | None = None) -> Path:
    """Write `index.html` and one PNG a chart.

    Args:
        run_dirs: run directories; several are drawn over each other and their settings compared.
        out: folder to write to; by default `report/` in the first run.

    Returns:
        The path of `index.html`.

    Raises:
        ConfigError: no directory was given, or one is not there.
        DataError: no run has logged a step yet.
    """
    if not run_dirs:
        raise ConfigError(
            "no run was named; give one or more run directories, such as runs/<experiment>/<time>"
        )
    runs = [load_run(path, name) for path, name in zip(run_dirs, _names(run_dirs), strict=True)]
    if not any(run.rows for run in runs):
        where = ", ".join(str(path / "metrics.jsonl") for path in run_dirs)
        raise DataError(f"nothing to report: {where} holds no logged step yet; train, or name another run")
    folder = out or run_dirs[0] / "report"
    folder.mkdir(parents=True, exist_ok=True)
    charts = []
    for chart in CHARTS:
        if has_data(chart, runs):
            draw(chart, runs, LIGHT, titled=True).savefig(folder / f"{chart.slug}.png", dpi=160)
            pictures = {"light": svg(draw(chart, runs, LIGHT)), "dark": svg(draw(chart, runs, DARK))}
            charts.append({"title": chart.title, "wide": chart.wide, **pictures})
    page = folder / "index.html"
    temporary = page.with_suffix(".tmp")
    # A sample may hold half of a surrogate pair, which UTF-8 has no bytes for.
    temporary.write_bytes(_render(runs, charts).encode("utf-8", errors="replace"))
    temporary.replace(page)
    return page


def load_run(path: Path, name: str) -> Run:
    """Read what a run directory has; what is missing or torn ends up in `notices`.

    Raises:
        ConfigError: `path` is not a directory.
    """
    if not path.is_dir():
        raise ConfigError(f"{path} is not a run directory; `drivetrain launch` prints the one it made")
    run = Run(name=name)
    run.rows = _one_row_a_step(_read_lines(path / "metrics.jsonl", run.notices))
    run.summary = _read_object(path / "summary.json", run.notices)
    run.environment = _read_object(path / "environment.json", run.notices)
    run.config = _read_config(path / "config.yaml", run.notices)
    if (path / "samples.jsonl").exists():
        run.samples = [row for row in _read_lines(path / "samples.jsonl", run.notices) if "completion" in row]
    return run


def _names(paths: list[Path]) -> list[str]:
    """The shortest tails of the paths that tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{number}: {'/'.join(part[-2:])}" for number, part in enumerate(parts, 1)]


def _read_lines(path: Path, notices: list[str]) -> list[Row]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        notices.append(f"{path.name} is missing")
        return []
    rows, torn = [], 0
    for line in filter(str.strip, lines):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            torn += 1
    if torn:  # a killed run leaves half a line behind
        notices.append(f"{path.name}: {torn} unreadable line{'s' if torn > 1 else ''} left out")
    return rows


def _read_object(path: Path, notices: list[str]) -> Row:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        notices.append(
            f"{path.name} is {'missing' if isinstance(error, FileNotFoundError) else 'unreadable'}"
        )
        return {}
    return value if isinstance(value, dict) else {}


def _read_config(path: Path, notices: list[str]) -> Row:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        notices.append(
            f"{path.name} is {'missing' if isinstance(error, FileNotFoundError) else 'unreadable'}"
        )
        return {}
    return value if isinstance(value, dict) else {}


def _one_row_a_step(rows: list[Row]) -> list[Row]:
    """Rows of one step joined; after a resume from an earlier step, what that step undid is left out."""
    kept: list[Row] = []
    for row in rows:
        if not is_number(row.get("step")):
            continue
        while kept and kept[-1]["step"] > row["step"]:
            kept.pop()
        if kept and kept[-1]["step"] == row["step"]:
            kept[-1] |= row
        else:
            kept.append(row)
    return kept


def _facts(run: Run) -> dict[str, str]:
    """What the head of the page says about a run. A number that is nowhere is a dash, never a guess."""
    _, evaluations = run.points("step", "eval/loss")
    _, accuracies = run.points("step", "eval/accuracy")
    _, losses = run.points("step", "loss")
    _, rates = run.points("step", "tokens_per_second")
    _, seconds = run.points("step", "step_seconds")
    _, memory = run.points("step", "memory_bytes")
    _, tokens = run.points("step", "tokens")
    setting = run.config
    cluster = _part(setting, "cluster")
    ranks = cluster.get("nodes", 1) * cluster.get("nproc", 1) if cluster else None
    engine = _part(setting, "engine")
    zero = f" {engine['zero_stage']}" if "zero_stage" in engine else ""
    broken = sum("loss" in row and not is_number(row["loss"]) for row in run.rows)
    rate = run.summary.get("tokens_per_second_median") or (statistics.median(rates) if rates else None)
    wall = run.summary.get("wall_seconds") or (sum(seconds) if seconds else None)
    peak = run.summary.get("peak_memory_bytes") or max(memory, default=None)
    steps = run.rows[-1]["step"] if run.rows else None
    planned = _part(setting, "stage").get("steps")
    facts = {
        "Status": str(run.summary.get("status", "running, or cut off")),
        "Model": str(_part(setting, "model").get("name", "–")),
        "Stage": str(_part(setting, "stage").get("name", "–")),
        "Engine": f"{engine['name']}{zero}, {engine.get('precision', '')}" if "name" in engine else "–",
        "Ranks": str(ranks or "–"),
        "Steps": _count(steps) if planned in (None, steps) else f"{_count(steps)} of {_count(planned)}",
        "Tokens": short(tokens[-1]) if tokens else "–",
        "Final loss": f"{losses[-1]:.4f}" if losses else "–",
        "Final eval": f"{evaluations[-1]:.4f}" if evaluations else "–",
        "Best eval": f"{min(evaluations):.4f}" if evaluations else "–",
        "Median tok/s": short(rate) if is_number(rate) else "–",
        "Wall time": duration(wall) if is_number(wall) else "–",
        "Peak memory": f"{peak / 2**30:.1f} GiB" if is_number(peak) else "–",
    }
    if accuracies:
        facts["Accuracy, held out"] = f"{accuracies[0]:.1%} at first, {accuracies[-1]:.1%} at last"
    return facts | ({"Non-finite losses": str(broken)} if broken else {})


def _part(config: Row, name: str) -> Row:
    part = config.get(name)
    return part if isinstance(part, dict) else {}


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        more = f"\n… {len(text) - MAX_TEXT:,} more characters" if len(text) > MAX_TEXT else ""
        yield prefix, text[:MAX_TEXT] + more


def _differences(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs; `run_dir` always differs, so it is left out."""
    settings = [dict(_flat(run.config)) for run in runs if run.config]
    keys = dict.fromkeys(key for setting in settings for key in setting if key != "run_dir")
    rows = [(key, [dict(_flat(run.config)).get(key, "–") for run in runs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _samples(run: Run) -> list[tuple[Any, list[Row]]]:
    """(step, its samples), newest first."""
    by_step: dict[Any, list[Row]] = {}
    for sample in run.samples:
        by_step.setdefault(sample.get("step"), []).append(sample)
    return list(reversed(by_step.items()))[:MAX_SAMPLE_STEPS]


def _render(runs: list[Run], charts: list[Row]) -> str:
    import jinja2

    facts = [_facts(run) for run in runs]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        runs=[
            {
                "name": run.name,
                "facts": fact,
                "notices": run.notices,
                "config": list(_flat(run.config)),
                "environment": list(_flat(run.environment)),
                "samples": _samples(run),
            }
            for run, fact in zip(runs, facts, strict=True)
        ],
        fact_names=list(dict.fromkeys(name for fact in facts for name in fact)),
        charts=charts,
        differences=_differences(runs) if len(runs) > 1 else [],
        light=LIGHT,
        dark=DARK,
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )


def _count(number: Any) -> str:
    return f"{number:,}" if is_number(number) else "–"
