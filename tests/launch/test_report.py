import base64
import json
import math
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest

from drivetrain.conf.compose import compose, to_yaml
from drivetrain.conf.errors import ConfigError, DataError
from drivetrain.launch.charts import BUCKETS, CHARTS, DARK, _smooth, _thin, _tick, draw
from drivetrain.launch.report import Run, build_report, load_run

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> \ud800 \x1b[2J"


def write_run(path: Path, overrides: Sequence[str] = (), steps: int = 60, tokens: int = 1024) -> Path:
    path.mkdir(parents=True)
    with (path / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            row = {
                "step": step,
                "tokens": step * tokens,
                "loss": 3 + 4 / step,
                "grad_norm": 1 / step,
                "lr": 1e-3,
            }
            row |= {"step_seconds": 0.5, "tokens_per_second": 2.0 * tokens, "memory_bytes": 2**30 + step}
            if step % 20 == 0:
                row |= {"eval/loss": 3.1 + 4 / step, "eval/bits_per_byte": 1.5 + 1 / step}
            file.write(json.dumps(row) + "\n")
    (path / "config.yaml").write_text(to_yaml(compose([f"stage.steps={steps}", *overrides])))
    summary = {"status": "completed", "wall_seconds": 725, "peak_memory_bytes": 3 * 2**30}
    (path / "summary.json").write_text(json.dumps(summary))
    (path / "environment.json").write_text(json.dumps({"packages": {"torch": "9.9.9"}, "git": HOSTILE}))
    sample = {"step": 20, "prompt": "Once upon", "completion": HOSTILE}
    (path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    return path


class Page(HTMLParser):
    """Tags and text of a page, and every address it names."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(self.source)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not any(name.startswith("on") for name, _ in attributes)
        self.addresses += [
            value or "" for name, value in attributes if name in ("src", "href", "srcset", "data")
        ]

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def test_one_run_is_one_page_with_five_charts_and_loads_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    page = build_report([run], None)
    assert page == run / "report" / "index.html"
    charts = {"loss", "bits_per_byte", "lr", "grad_norm", "throughput"}
    assert {path.name for path in page.parent.iterdir()} == {
        "index.html",
        *(f"{name}.png" for name in charts),
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in page.parent.glob("*.png"))

    parsed = Page(page)
    assert len(parsed.addresses) == 2 * len(charts)  # a light and a dark picture each
    for address in parsed.addresses:
        prefix, _, body = address.partition(",")
        assert prefix == "data:image/svg+xml;base64" and b"<svg" in base64.b64decode(body)
    assert "default-src 'none'" in parsed.source and "@import" not in parsed.source
    assert "url(" not in parsed.source
    for fact in (
        "completed",
        "tiny",
        "pretrain",
        "fsdp, bf16",
        "61.4k",
        "3.0667",
        "3.1667",
        "12m05s",
        "3.0 GiB",
    ):
        assert fact in parsed.text, fact
    assert "prefers-color-scheme: dark" in parsed.source


def test_samples_and_environment_are_text_and_never_markup(tmp_path: Path) -> None:
    parsed = Page(build_report([write_run(tmp_path / "<b>run")], None))
    assert "script" not in parsed.tags and "b" not in parsed.tags and parsed.tags.count("img") == 5
    assert (
        parsed.text.count("<script>alert(1)</script>") == 2
    )  # the sample, and the environment's hostile patch
    assert "<b>run" in parsed.text


def test_accuracy_and_reward_are_shown_where_a_run_has_them(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    rows = [{"step": step, "rl/correct": step / 100, "rl/reward_mean": step / 50} for step in range(1, 61)]
    for row in rows:
        row |= {"eval/accuracy": row["step"] / 80} if row["step"] in (1, 20, 60) else {}
        row |= {"rl/entropy": 1.0, "rl/completion_tokens_mean": 40.0, "rl/kl": 0.1, "rl/staleness": 1.0}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = {"step": 60, "prompt": "2 + 3 =", "completion": "5", "reward": 1.0}
    (run / "samples.jsonl").write_text(json.dumps(shown) + "\n")
    page = build_report([run, write_run(tmp_path / "other")], None)
    charts = ("accuracy", "reward", "entropy", "completion_tokens", "kl", "staleness")
    assert {f"{name}.png" for name in charts} <= {path.name for path in page.parent.iterdir()}
    figure = draw(
        next(chart for chart in CHARTS if chart.slug == "accuracy"), [load_run(run, "a"), Run(name="b")], DARK
    )
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "a, evaluation"]
    text = Page(page).text
    assert "1.2% at first, 75.0% at last" in text and "(reward 1.0)" in text


def test_several_runs_share_charts_and_show_what_differs(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "one" / "run"),
        write_run(tmp_path / "two" / "run", ["engine=zero", "optim.lr=0.5"]),
        write_run(tmp_path / "$three_x", ["optim.lr=0.5"], tokens=4096),
    ]
    page = build_report(runs, tmp_path / "out")
    assert page == tmp_path / "out" / "index.html" and not (runs[0] / "report").exists()
    text = re.sub(r"\s*\n\s*", "\n", Page(page).text)
    assert "one/run" in text and "two/run" in text and "$three_x" in text
    assert re.search(r"optim\.lr\n[\d.e-]+\n0\.5\n0\.5\n", text)
    assert "engine.zero_stage\n–\n2\n–\n" in text
    differing = text[text.index("Settings that differ") : text.index("Curves")]
    assert "seed" not in differing and "stage.steps" not in differing


def test_same_runs_have_no_differences(tmp_path: Path) -> None:
    page = build_report([write_run(tmp_path / "a"), write_run(tmp_path / "b")], None)
    assert "No setting differs" in Page(page).text


def test_torn_line_and_missing_files_are_named_and_not_fatal(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    for name in ("summary.json", "environment.json", "samples.jsonl"):
        (run / name).unlink()
    (run / "config.yaml").write_text("a: [")
    text = Page(build_report([run], None)).text
    assert "metrics.jsonl: 1 unreadable line left out" in text
    assert "summary.json is missing" in text and "config.yaml is unreadable" in text
    assert "environment.json is missing" in text and "running, or cut off" in text
    assert not (run / "report" / "bits_per_byte.png").exists()  # nothing was evaluated


def test_python_objects_in_a_configuration_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=2)
    (run / "config.yaml").write_text("a: !!python/object/apply:os.mkdir ['made']")
    assert "config.yaml is unreadable" in load_run(run, "run").notices


def test_resume_from_an_earlier_step_replaces_what_it_undid(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    rows = [(1, 9.0), (2, 8.0), (3, 7.0), (4, 6.0), (3, 5.0), (3, None)]
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in rows]
    lines.append(json.dumps({"step": 3, "loss": 4.5, "eval/loss": 4.0}))
    (run / "metrics.jsonl").write_text("\n".join(lines))
    loaded = load_run(run, "run")
    assert loaded.points("step", "loss") == ([1.0, 2.0, 3.0], [9.0, 8.0, 4.5])
    assert loaded.points("step", "eval/loss") == ([3.0], [4.0])


def test_null_losses_are_counted_and_drawn_around(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=5)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 6, "loss": None}) + "\n" + json.dumps({"step": 7, "loss": 1.0}) + "\n")
    text = re.sub(r"\s*\n\s*", "\n", Page(build_report([run], None)).text)
    assert "Non-finite losses\n1\n" in text and "Steps\n7 of 5" in text


def test_nothing_to_report_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no logged step yet"):
        build_report([tmp_path], None)
    with pytest.raises(ConfigError, match="is not a run directory"):
        build_report([tmp_path / "typo"], None)
    with pytest.raises(ConfigError, match="no run was named"):
        build_report([], None)
    assert list(tmp_path.iterdir()) == []


def test_thinning_keeps_every_spike_and_both_ends() -> None:
    ys = [math.sin(i / 7) for i in range(50_000)]
    ys[12_345], ys[40_001] = 99.0, -99.0
    xs, thin = _thin([float(i) for i in range(len(ys))], ys)
    assert {99.0, -99.0, ys[0], ys[-1]} <= set(thin) and len(thin) <= 2 * BUCKETS + 2
    assert xs == sorted(xs) and all(ys[int(x)] == y for x, y in zip(xs, thin, strict=True))


def test_smoothing_keeps_a_constant_and_starts_unbiased() -> None:
    assert _smooth([2.0] * 30) == pytest.approx([2.0] * 30)
    assert _smooth([5.0, 1.0])[0] == pytest.approx(5.0)
    assert max(_smooth([0.0, 10.0] * 50)[50:]) < 7.5


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (3e-4, "3e-4"), (2.9999999e-4, "3e-4"), (2.5e-5, "2.5e-5"), (1.2e9, "1.2B")],
)
def test_tick(value: float, text: str) -> None:
    assert _tick(value) == text


@pytest.mark.parametrize(
    ("losses", "scale"), [([12.0, 5.0, 3.3], "log"), ([3.4, 3.3, 3.2], "linear"), ([0.2, -0.1], "linear")]
)
def test_loss_axis_fits_its_range_and_always_has_ticks(losses: list[float], scale: str) -> None:
    run = Run(name="run", rows=[{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)])
    figure = draw(CHARTS[0], [run], DARK)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    assert axes.get_yscale() == scale
    assert sum(low <= tick <= high for tick in axes.get_yticks()) >= 2
