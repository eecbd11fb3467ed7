"""`launch -m`: Hydra's own sweeper over whole jobs; each point is a run directory under the sweep's."""

import itertools
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from drivetrain.conf.compose import compose, register_schemas, to_run_config
from drivetrain.conf.errors import ConfigError, DrivetrainError
from drivetrain.conf.paths import absolute_paths
from drivetrain.launch.job import PREEMPTED, JobResult, check, start


class _Stop(BaseException):
    """Out of Hydra's sweeper, which goes on after every Exception."""


@dataclass(slots=True)
class Sweep:
    """What became of the points that were started."""

    results: list[JobResult | DrivetrainError]
    stopped: bool = False

    @property
    def exit_status(self) -> int:
        if self.stopped:
            return PREEMPTED
        return int(any(isinstance(result, DrivetrainError) for result in self.results))


def sweep(overrides: Sequence[str], console: Console) -> Sweep:
    """Run every point of the grid. One that fails is recorded and the sweep goes on; one that is stopped ends it.

    Raises:
        ConfigError: an override of any point is wrong; nothing was started.
    """
    chosen = [word for word in overrides if word.startswith("run_dir=")]
    words = [word for word in overrides if not word.startswith("run_dir=")]
    for point in _points(words):
        check(absolute_paths(compose(point)))
    name = chosen[-1].split("=", 1)[1] if chosen else f"runs/sweeps/{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    folder = Path(name).absolute()
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; choose another run_dir for the sweep")
    found, labels = Sweep([]), list[str]()

    def run_point(composed: DictConfig) -> float:
        hydra = HydraConfig.get()
        labels.append(", ".join(word for word in hydra.overrides.task if word not in words) or "(defaults)")
        console.rule(f"{hydra.job.num}: {labels[-1]}")
        composed.run_dir = str(folder / str(hydra.job.num))
        config = to_run_config(composed, hydra.runtime.choices.get("experiment"))
        try:
            result = start(config, list(hydra.overrides.task), console)
        except DrivetrainError as error:
            console.print(str(error), markup=False)
            found.results.append(error)
            return float("inf")
        found.results.append(result)
        if result.exit_status == PREEMPTED:
            raise _Stop
        return result.objective if result.objective is not None else float("inf")

    with _signals_stop():
        try:
            _run_hydra(run_point, [*words, f"hydra.sweep.dir={folder}"])
        except _Stop:
            found.stopped = True
    console.print(_table(labels, found.results, folder))
    return found


def _run_hydra(run_point: Callable[[DictConfig], float], words: list[str]) -> None:
    """Hydra's multirun, whose own faults (an unknown sweeper) are as much a wrong setting as ours."""
    register_schemas()
    GlobalHydra.instance().clear()
    search_path = create_config_search_path("pkg://drivetrain.conf")
    try:
        hydra = Hydra.create_main_hydra2(task_name="drivetrain", config_search_path=search_path)
        mode = f"hydra.mode={RunMode.MULTIRUN.name}"
        hydra.multirun("config", run_point, [*words, mode], with_log_configuration=False)
    except HydraException as error:
        raise ConfigError(f"the sweep cannot run: {str(error).splitlines()[0]}") from error
    finally:
        GlobalHydra.instance().clear()


@contextmanager
def _signals_stop() -> Iterator[None]:
    """SIGINT and SIGTERM between two points end the sweep; while ranks run, `local.run` sees to them."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Stop

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _points(words: Sequence[str]) -> Iterator[list[str]]:
    """Every point of a grid, as words of one run; where a sweeper chooses its points, the corners of its ranges."""
    axes: list[list[str]] = []
    for word in words:
        try:
            parsed = OverridesParser.create().parse_override(word)
        except HydraException:
            axes.append([word])  # `compose` says what is wrong with it
            continue
        if parsed.is_hydra_override():
            continue
        key = parsed.get_key_element()
        if parsed.is_interval_sweep():
            interval = parsed.value()
            axes.append([f"{key}={bound}" for bound in (interval.start, interval.end)])
        elif parsed.is_sweep_override():
            axes.append([f"{key}={value}" for value in parsed.sweep_string_iterator()])
        else:
            axes.append([word])
    yield from map(list, itertools.product(*axes))


def _table(labels: list[str], results: Sequence[JobResult | DrivetrainError], folder: Path) -> Table:
    table = Table(title=str(folder))
    for name in ("point", "overrides", "status", "objective"):
        table.add_column(name, overflow="fold")
    for number, (label, result) in enumerate(itertools.zip_longest(labels, results)):
        if isinstance(result, JobResult):
            objective = "-" if result.objective is None else f"{result.objective:.4f}"
            table.add_row(str(number), label, result.status, objective)
        else:
            table.add_row(str(number), label, "not started" if result is None else "failed", "-")
    return table
