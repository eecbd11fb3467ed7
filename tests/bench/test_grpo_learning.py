"""The benchmark of what GRPO adds: what it makes of finished runs, not the runs."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def bench() -> Iterator[Any]:
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("bench_grpo_learning", BENCH / "grpo_learning.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before
    sys.modules.pop("common", None)


def finished(run_dir: Path, accuracies: dict[int, float]) -> None:
    run_dir.mkdir(parents=True)
    (run_dir / "summary.json").write_text(json.dumps({"status": "completed", "wall_seconds": 61.23}))
    rows = []
    for step in range(1, max(accuracies, default=1) + 1):
        row: dict[str, float] = {"step": step, "rl/staleness": 0.5}
        if step in accuracies:
            row |= {"eval/accuracy": accuracies[step], "eval/completion_tokens_mean": 20.04}
        rows.append(json.dumps(row))
    (run_dir / "metrics.jsonl").write_text("\n".join(rows) + "\n")


def test_finished_runs_become_rows_a_table_and_a_picture(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "begun_with_a_step", lambda run: 0.75)
    finished(tmp_path / "runs" / "sft_0", {})
    finished(tmp_path / "runs" / "grpo_0_0", {1: 0.25, 10: 0.5, 20: 0.875})
    out, picture = tmp_path / "out.json", tmp_path / "new" / "curve.png"
    words = ["--runs", str(tmp_path / "runs"), "--seeds", "0", "--staleness", "0", "--markdown"]
    assert bench.main([*words, "--out", str(out), "--picture", str(picture)]) == 0
    assert "| 0 | 0 | 25.0% | 75.0% | 87.5% | +62.5 | 20 | 61 |" in capsys.readouterr().out
    (row,) = json.loads(out.read_text())["rows"]
    assert row["accuracy"] == [[1, 0.25], [10, 0.5], [20, 0.875]] and row["gain_points"] == 62.5
    assert row["sft_seconds"] == 61.2 and row["staleness_mean"] == 0.5 and row["pass@1"] == []
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_cannot_run_is_a_row_that_says_why(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--demo", str(tmp_path / "nowhere"), "--seeds", "0", "--staleness", "0", "--quick", "--markdown"]
    assert bench.main([*words, "--out", str(tmp_path / "out.json")]) == 0
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert "nowhere" in row["error"] and "not measured: error:" in capsys.readouterr().out
