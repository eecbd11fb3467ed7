"""`make demo`, whole: the first thing that anybody runs."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(2000)
def test_make_demo_learns_and_leaves_its_traces(
    tmp_path: Path, wandb_history: Callable[[Path, str], list[tuple[int, float]]]
) -> None:
    if Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("`make demo` would set up .venv; the tests run from another environment")
    demo = tmp_path / "demo"
    done = subprocess.run(
        ["make", "demo", f"DEMO={demo}"],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"},
        capture_output=True,
        text=True,
        timeout=1900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((demo / "run" / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert summary["final"]["eval/bits_per_byte"] < 1.8
    rows = [json.loads(line) for line in (demo / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert len(list((demo / "run" / "wandb").glob("offline-run-*/run-*.wandb"))) == 1
    assert dict(wandb_history(demo / "run", "loss")) == {
        row["step"]: pytest.approx(row["loss"]) for row in rows
    }
    assert (demo / "run" / "report" / "index.html").is_file()
    tuned = json.loads((demo / "sft" / "summary.json").read_text())
    assert tuned["status"] == "completed" and tuned["final"]["eval/loss"] < 0.8
    assert tuned["final"]["data/utilisation"] > 0.9
    practised = json.loads((demo / "grpo" / "summary.json").read_text())
    lines = (demo / "grpo" / "metrics.jsonl").read_text().splitlines()
    accuracy = [row["eval/accuracy"] for row in map(json.loads, lines) if "eval/accuracy" in row]
    assert practised["status"] == "completed" and accuracy[-1] > accuracy[0] + 0.2
    assert "held-out sums the fine-tuned model solves" in done.stdout
    assert "def read_" in done.stdout and str(demo / "run" / "report" / "index.html") in done.stdout
