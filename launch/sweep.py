"""`launch -m`: Hydra's own sweeper over whole jobs; each point is a run directory under the sweep's."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from drivetrain.conf.compose import compose, register_schemas, to_run_config
from drivetrain.conf.errors import ConfigError, DrivetrainError
from drivetrain.launch.job import JobResult, start


def sweep(overrides: Sequence[str], console: Console) -> list[JobResult | DrivetrainError]:
    """Run every point of the grid; a point that fails is recorded and the sweep goes on.

    Raises:
        ConfigError: an override is wrong; nothing was started.
    """
    from hydra.core.global_hydra import GlobalHydra

    chosen = [word for word in overrides if word.startswith("run_dir=")]
    points = [word for word in overrides if not word.startswith("run_dir=")]
    _check_first_point(points)
    folder = (
        Path(chosen[-1].split("=", 1)[1])
        if chosen
        else Path("runs/sweeps") / time.strftime("%Y-%m-%d_%H-%M-%S")
    )
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; choose another run_dir for the sweep")
    results: list[JobResult | DrivetrainError] = []
    labels: list[str] = []

    def point(composed: DictConfig) -> float:
        hydra = HydraConfig.get()
        labels.append(", ".join(word for word in hydra.overrides.task if word not in points) or "(defaults)")
        console.rule(f"{hydra.job.num}: {labels[-1]}")
        composed.run_dir = str(folder / str(hydra.job.num))
        config = to_run_config(composed, hydra.runtime.choices.get("experiment"))
        try:
            result = start(config, list(hydra.overrides.task), console)
        except DrivetrainError as error:
            console.print(str(error), markup=False)
            results.append(error)
            return float("inf")
        results.append(result)
        return result.objective if result.objective is not None else float("inf")

    register_schemas()
    GlobalHydra.instance().clear()
    search_path = create_config_search_path("pkg://drivetrain.conf")
    try:
        hydra = Hydra.create_main_hydra2(task_name="drivetrain", config_search_path=search_path)
        words = [*points, f"hydra.sweep.dir={folder}", f"hydra.mode={RunMode.MULTIRUN.name}"]
        hydra.multirun("config", point, words, with_log_configuration=False)
    finally:
        GlobalHydra.instance().clear()
    console.print(_table(labels, results, folder))
    return results


def _check_first_point(points: Sequence[str]) -> None:
    """Compose the first value of every axis, so that a mistyped key is one sentence and not a trace."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    first: list[str] = []
    for word in points:
        try:
            parsed = OverridesParser.create().parse_override(word)
        except HydraException:
            first.append(word)  # `compose` says what is wrong with it
            continue
        if parsed.is_hydra_override():
            continue
        if parsed.is_sweep_override():
            first.append(f"{parsed.get_key_element()}={next(iter(parsed.sweep_string_iterator()))}")
        else:
            first.append(word)
    compose(first)


def _table(labels: list[str], results: Sequence[Any], folder: Path) -> Table:
    table = Table(title=str(folder))
    for name in ("point", "overrides", "status", "objective"):
        table.add_column(name, overflow="fold")
    for number, (label, result) in enumerate(zip(labels, results, strict=True)):
        done = isinstance(result, JobResult)
        status = result.status if done else "failed"
        objective = f"{result.objective:.4f}" if done and result.objective is not None else "-"
        table.add_row(str(number), label, status, objective)
    return table
