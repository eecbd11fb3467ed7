"""Sweeps, without ranks: `local.run` is replaced where they would start."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drivetrain.conf.compose import load
from drivetrain.conf.errors import ConfigError
from drivetrain.launch import local
from drivetrain.launch import sweep as sweep_module
from drivetrain.launch.job import PREEMPTED, JobFailed, JobResult
from drivetrain.launch.sweep import sweep

Said = Any  # the console of conftest.py
Point = Callable[[Path], local.Failure | local.Stopped | None]
Points = Callable[[Point], list[Path]]


@pytest.fixture
def points(monkeypatch: pytest.MonkeyPatch) -> Points:
    """`points(end)`: from now on each point's ranks end as `end(run_dir)` says. Returns a list of those started."""

    def replace(end: Point) -> list[Path]:
        started = []

        def run(cluster: object, run_dir: Path) -> local.Failure | local.Stopped | None:
            started.append(run_dir)
            return end(run_dir)

        monkeypatch.setattr(local, "run", run)
        return started

    return replace


def completed(run_dir: Path) -> None:
    objective = load(run_dir / "config.yaml").optim.lr
    (run_dir / "summary.json").write_text(json.dumps({"status": "completed", "objective": objective}))


def rows(console: Said) -> list[list[str]]:
    """Cells of the table at the end."""
    lines = [line for line in str(console).splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_every_point_runs_in_a_directory_of_its_own(
    folder: Path, words: list[str], console: Said, points: Points
) -> None:
    started = points(completed)
    found = sweep([*words, "optim.lr=1e-3,1e-2", "seed=1,2", "run_dir=s"], console)
    assert started == [folder / "s" / str(number) for number in range(4)]
    configs = [load(run_dir / "config.yaml") for run_dir in started]
    assert [(config.optim.lr, config.seed) for config in configs] == [
        (1e-3, 1),
        (1e-3, 2),
        (1e-2, 1),
        (1e-2, 2),
    ]
    assert all(config.run_dir == str(run_dir) for config, run_dir in zip(configs, started, strict=True))
    assert found.exit_status == 0
    assert rows(console)[0] == ["0", "optim.lr=0.001, seed=1", "completed", "0.0010"]
    with pytest.raises(ConfigError, match=f"^{folder}/s is not empty; choose another run_dir for the sweep$"):
        sweep([*words, "run_dir=s"], console)


def test_a_failed_point_is_recorded_and_the_others_run(
    folder: Path, words: list[str], console: Said, points: Points
) -> None:
    def end(run_dir: Path) -> local.Failure | None:
        if run_dir.name == "0":
            return local.Failure(0, 1, "no memory", run_dir / "x", [])
        return completed(run_dir)

    started = points(end)
    found = sweep([*words, "seed=1,2", "run_dir=s"], console)
    assert len(started) == 2 and found.exit_status == 1
    assert [row[1:3] for row in rows(console)] == [
        ["seed=1", "failed"],
        ["seed=2", "completed"],
    ]
    assert isinstance(found.results[0], JobFailed) and "rank 0 failed: no memory" in str(console)


@pytest.mark.parametrize(
    ("words_of_sweep", "sentence"),
    [
        (["optim.lr=1e-3,abc"], "optim.lr must be a number, not abc"),
        (["seed=1,2", "tracker=none,nope"], "unknown option tracker=nope"),
        (["cluster.nproc=2,3"], "which 3 ranks"),
        (["cluster.device=cpu,cuda"], "torch sees no GPU here"),
        (["data.path=nowhere"], "nowhere is no directory"),
        (["seed=choice(1,-1)"], "seed=-1 is out of range"),
        (["stage.steps=range(8,-1,-8)"], "stage.steps=0 is out of range"),
        (["optim.lr=interval(0,1)"], "optim.lr=0.0 is out of range"),
        (["model=glob(*)"], "does not say what it sweeps over"),
        (["hydra/sweeper=nope", "seed=1,2"], "the sweep cannot run"),
        (["seed=1,2", "run_dir=a,b"], "run_dir several values"),
    ],
)
def test_a_wrong_point_starts_nothing(
    words_of_sweep: list[str], sentence: str, folder: Path, words: list[str], console: Said, points: Points
) -> None:
    started = points(completed)
    with pytest.raises(ConfigError, match=sentence.replace("(", r"\(")):
        sweep([*words, "run_dir=s", *words_of_sweep], console)
    assert not started and not list(folder.iterdir())  # or the same run_dir would be refused


def test_a_sweep_directory_may_have_any_name(
    folder: Path, words: list[str], console: Said, points: Points
) -> None:
    started = points(completed)
    sweep([*words, r"run_dir='a, it\'s x=y'"], console)
    assert started == [folder / "a, it's x=y" / "0"]


def test_a_dry_run_of_a_sweep_shows_every_point_and_makes_nothing(
    folder: Path, words: list[str], console: Said, points: Points
) -> None:
    started = points(completed)
    found = sweep([*words, "seed=1,2", "run_dir=s", "cluster.dry_run=true"], console)
    assert found.exit_status == 0 and not started and not list(folder.iterdir())
    for number in (0, 1):
        assert f"-m drivetrain.train {folder}/s/{number}\n" in str(console)


def test_a_stopped_point_ends_the_sweep(
    folder: Path, words: list[str], console: Said, points: Points
) -> None:
    started = points(
        lambda run_dir: local.Stopped(before_training=True) if run_dir.name == "1" else completed(run_dir)
    )
    found = sweep([*words, "seed=1,2,3", "run_dir=s"], console)
    assert len(started) == 2 and found.stopped and found.exit_status == PREEMPTED
    assert [row[2] for row in rows(console)] == ["completed", "preempted"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_between_two_points_ends_the_sweep(
    number: signal.Signals, folder: Path, words: list[str], console: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no rank runs that could be asked to save."""
    before = signal.getsignal(number)
    started = []

    def start(config: Any, point: list[str], _: object) -> JobResult:
        started.append(point)
        signal.raise_signal(number)
        return JobResult(Path(config.run_dir), "completed", 1.0)

    monkeypatch.setattr(sweep_module, "start", start)
    found = sweep([*words, "seed=1,2", "run_dir=s"], console)
    assert len(started) == 1 and found.exit_status == PREEMPTED
    assert rows(console) == [["0", "seed=1", "not started", "-"]]
    assert signal.getsignal(number) is before
