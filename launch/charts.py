"""The charts of a report: which there are, and how one is drawn with matplotlib."""

import base64
import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

from drivetrain.train.progress import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from drivetrain.launch.report import Run

BUCKETS = 800  # a curve keeps the least and the greatest value of each; more can't be seen


@dataclass(kw_only=True, slots=True)
class Chart:
    """The logged metric, the evaluations drawn over it, and how."""

    slug: str
    title: str
    unit: str = ""
    metric: str | None = None
    evaluation: str | None = None
    log: bool = False  # where all values are positive and they range widely enough
    from_zero: bool = False
    smooth: bool = False
    wide: bool = False


CHARTS = [
    Chart(
        slug="loss",
        title="Loss",
        unit="nats per token",
        metric="loss",
        evaluation="eval/loss",
        log=True,
        smooth=True,
        wide=True,
    ),
    Chart(
        slug="bits_per_byte", title="Bits per byte, held out", unit="bits", evaluation="eval/bits_per_byte"
    ),
    Chart(
        slug="accuracy",
        title="Right answers",
        unit="share",
        metric="rl/correct",
        evaluation="eval/accuracy",
        from_zero=True,
        smooth=True,
    ),
    Chart(slug="reward", title="Reward", metric="rl/reward_mean", smooth=True),
    Chart(slug="entropy", title="Entropy", unit="nats per token", metric="rl/entropy", smooth=True),
    Chart(
        slug="completion_tokens",
        title="Length of completions",
        unit="tokens, mean",
        metric="rl/completion_tokens_mean",
        from_zero=True,
        smooth=True,
    ),
    Chart(slug="kl", title="KL to the reference", unit="nats per token", metric="rl/kl", smooth=True),
    Chart(
        slug="staleness",
        title="Staleness of rollouts",
        unit="updates, mean",
        metric="rl/staleness",
        from_zero=True,
    ),
    Chart(slug="lr", title="Learning rate", metric="lr", from_zero=True),
    Chart(
        slug="grad_norm", title="Gradient norm", unit="global L2", metric="grad_norm", log=True, smooth=True
    ),
    Chart(
        slug="throughput",
        title="Throughput",
        unit="tokens/s",
        metric="tokens_per_second",
        from_zero=True,
        smooth=True,
    ),
]


@dataclass(kw_only=True, slots=True)
class Theme:
    ink: str
    muted: str
    grid: str
    background: str
    colours: list[str]


# Okabe and Ito's colours, without the yellow that white swallows; on dark the same hues, lighter.
LIGHT = Theme(
    ink="#1c2430",
    muted="#5b6675",
    grid="#e3e7ec",
    background="#ffffff",
    colours=["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"],
)
DARK = Theme(
    ink="#e6eaf0",
    muted="#98a3b3",
    grid="#2b3442",
    background="#161c26",
    colours=["#4ba8e3", "#f5844a", "#2fc79b", "#e0a0c2", "#f2bd4b", "#a5dbff"],
)
DASHES = ["-", "--", ":", "-."]  # a seventh run has the first one's colour


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def has_data(chart: Chart, runs: "list[Run]") -> bool:
    return bool(_values(chart, runs, "step"))


def _values(chart: Chart, runs: "list[Run]", x: str) -> list[float]:
    metrics = [metric for metric in (chart.metric, chart.evaluation) if metric]
    return [value for run in runs for metric in metrics for value in run.points(x, metric)[1]]


def draw(chart: Chart, runs: "list[Run]", theme: Theme, titled: bool = False) -> "Figure":
    """Draw over steps, with tokens along the top; over both, side by side, if the runs' steps differ.

    Run names are drawn as they are, and `titled` adds the chart's own name, for a picture that stands alone.
    """
    from matplotlib.figure import Figure

    sizes = {size for run in runs if (size := _tokens_a_step(run))}
    axes_by = ["step", "tokens"] if len(sizes) > 1 else ["step"]
    figure = Figure(
        figsize=(13.2 if chart.wide else 6.5, 3.6), layout="constrained", facecolor=theme.background
    )
    panels = figure.subplots(1, len(axes_by), squeeze=False, sharey=True)[0]
    for axes, x in zip(panels, axes_by, strict=True):
        _style(axes, theme)
        for number, run in enumerate(runs):
            _curve(axes, chart, run, x, number, theme, alone=len(runs) == 1)
        _scale(axes, chart, runs, x, theme)
    log = ", log scale" if panels[0].get_yscale() == "log" else ""
    panels[0].set_ylabel(chart.unit + log, color=theme.muted)
    if len(sizes) == 1:
        _tokens_on_top(panels[0], sizes.pop(), theme)
    handles, labels = panels[0].get_legend_handles_labels()
    legend = figure.legend(
        handles,
        labels,
        title=chart.title if titled else None,
        title_fontproperties={"weight": "bold", "size": 12},
        alignment="left",
        loc="outside upper left",
        ncols=3,
        frameon=False,
        labelcolor=theme.ink,
        fontsize=9.5,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a run's name may hold a dollar sign
    return figure


def svg(figure: "Figure") -> str:
    """The figure as a data URI. Letters become outlines, so that it looks the same wherever it is opened."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "drivetrain"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _tokens_a_step(run: "Run") -> float | None:
    steps, tokens = run.points("step", "tokens")
    return tokens[-1] / steps[-1] if steps and steps[-1] and tokens[-1] else None


def _style(axes: "Axes", theme: Theme) -> None:
    axes.set_facecolor(theme.background)
    axes.grid(True, color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.015)
    axes.tick_params(colors=theme.muted, which="both", length=0, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme.grid)


def _curve(axes: "Axes", chart: Chart, run: "Run", x: str, number: int, theme: Theme, alone: bool) -> None:
    colour = theme.colours[number % len(theme.colours)]
    dash = DASHES[number // len(theme.colours) % len(DASHES)]
    name = (chart.metric or "evaluation").replace("_", " ") if alone else run.name
    if chart.metric:
        xs, ys = run.points(x, chart.metric)
        smooth = chart.smooth and len(xs) >= 20
        if smooth:
            axes.plot(*_thin(xs, ys), color=colour, alpha=0.28 if alone else 0.15, linewidth=0.8)
            ys, name = _smooth(ys), f"{name}, smoothed" if alone else name
        marker = "o" if len(xs) == 1 else ""
        if xs:  # else the legend would name a curve that is not there
            axes.plot(*_thin(xs, ys), dash, marker=marker, color=colour, linewidth=1.8, label=name)
    if chart.evaluation and run.points(x, chart.evaluation)[0]:
        over = chart.metric is not None
        label = ("evaluation" if alone else f"{run.name}, evaluation") if over else name
        axes.plot(
            *_thin(*run.points(x, chart.evaluation)),
            linestyle="" if over else dash,
            marker="o",
            markersize=5.5,
            markeredgecolor=theme.background,
            color=theme.colours[1] if over and alone else colour,
            linewidth=1.8,
            label=label,
            zorder=3,
        )


def _scale(axes: "Axes", chart: Chart, runs: "list[Run]", x: str, theme: Theme) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    values = _values(chart, runs, x)
    if chart.log and values and 0 < 3 * min(values) <= max(values):
        axes.set_yscale("log")
        narrow = max(values) < 10 * min(values)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8) if narrow else (1, 2, 5)))
        axes.yaxis.set_minor_locator(LogLocator(subs=()))
    elif chart.from_zero and values and min(values) >= 0:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(_tick))
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    axes.set_xlabel(x, color=theme.muted)


def _tokens_on_top(axes: "Axes", tokens_a_step: float, theme: Theme) -> None:
    from matplotlib.ticker import FuncFormatter

    def from_steps(steps: Any) -> Any:
        return steps * tokens_a_step

    def to_steps(tokens: Any) -> Any:
        return tokens / tokens_a_step

    top = axes.secondary_xaxis("top", functions=(from_steps, to_steps))
    top.xaxis.set_major_formatter(FuncFormatter(_tick))
    top.tick_params(colors=theme.muted, length=0, labelsize=9)
    top.spines["top"].set_visible(False)
    top.set_xlabel("tokens", color=theme.muted)


def _tick(value: float, _: int | None = None) -> str:
    if value == 0 or abs(value) >= 0.01:
        return short(value)
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _thin(xs: list[float], ys: list[float]) -> tuple[list[float], list[float]]:
    """At most two points a bucket: the extremes, so that no spike is lost."""
    size = math.ceil(len(ys) / BUCKETS)
    if size <= 2:
        return xs, ys
    keep = {0, len(ys) - 1}
    for start in range(0, len(ys), size):
        bucket = range(start, min(start + size, len(ys)))
        keep |= {min(bucket, key=ys.__getitem__), max(bucket, key=ys.__getitem__)}
    return [xs[i] for i in sorted(keep)], [ys[i] for i in sorted(keep)]


def _smooth(values: list[float]) -> list[float]:
    """An exponential mean over a hundredth of the points, corrected for its start like Adam's moments."""
    decay = 1 - 2 / (max(len(values) / 100, 5) + 1)
    mean, weight, smoothed = 0.0, 0.0, []
    for value in values:
        mean = decay * mean + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        smoothed.append(mean / weight)
    return smoothed
