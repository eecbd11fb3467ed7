"""`launch -m`: Hydra's own sweeper over whole jobs; each point is a run directory under the sweep's."""

import itertools
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ValueType
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from drivetrain.conf.changes import check_run_dir
from drivetrain.conf.compose import compose, register_schemas, to_run_config
from drivetrain.conf.errors import ConfigError, DrivetrainError
from drivetrain.conf.paths import absolute_paths
from drivetrain.conf.schema import RunConfig
from drivetrain.launch.job import PREEMPTED, JobResult, check, key_of, start


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
    words = [word for word in overrides if key_of(word) != "run_dir"]
    axes = list(_axes(words))
    swept = {key_of(axis[0]) for axis in axes if len(axis) > 1}
    points = list(map(list, itertools.product(*axes)))
    configs = [compose(point) for point in points]
    for config in configs:
        check(absolute_paths(config))
    folder = _folder([word for word in overrides if key_of(word) == "run_dir"], configs[0])
    found, labels = Sweep([]), list[str]()

    def run_point(config: RunConfig, number: int, point: list[str]) -> float:
        labels.append(", ".join(word for word in point if key_of(word) in swept) or "(defaults)")
        console.rule(f"{number}: {labels[-1]}")
        try:
            result = start(replace(config, run_dir=str(folder / str(number))), point, console)
        except DrivetrainError as error:
            console.print(str(error), markup=False)
            found.results.append(error)
            return float("inf")
        found.results.append(result)
        if result.exit_status == PREEMPTED:
            raise _Stop
        return result.objective if result.objective is not None else float("inf")

    def chosen_by_hydra(composed: DictConfig) -> float:
        hydra = HydraConfig.get()
        config = to_run_config(composed, hydra.runtime.choices.get("experiment"))
        return run_point(config, hydra.job.num, list(hydra.overrides.task))

    with _signals_stop():
        try:
            if all(config.cluster.dry_run for config in configs):  # Hydra would make the folder
                for number, (config, point) in enumerate(zip(configs, points, strict=True)):
                    run_point(config, number, point)
            else:
                _run_hydra(chosen_by_hydra, [*words, f"hydra.sweep.dir={_quoted(folder)}"])
        except _Stop:
            found.stopped = True
    console.print(_table(labels, found.results, folder))
    return found


def _folder(chosen: Sequence[str], config: RunConfig) -> Path:
    """The sweep's directory.

    Raises:
        ConfigError: it holds something, is a file, or cannot be written to.
    """
    name = compose(chosen).run_dir or f"runs/sweeps/{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    folder = Path(name).absolute()
    check_run_dir(config, folder)
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; choose another run_dir for the sweep")
    return folder


def _quoted(path: Path) -> str:
    """As Hydra's grammar takes it, in which a comma would make two points."""
    return "'" + str(path).replace("'", "\\'") + "'"


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


def _axes(words: Sequence[str]) -> Iterator[list[str]]:
    """The words that each word of a sweep stands for; of a range, its ends, where a sweeper chooses the points.

    Raises:
        ConfigError: a word stands for what only Hydra could tell.
    """
    for word in words:
        try:
            parsed = OverridesParser.create().parse_override(word)
        except HydraException:
            yield [word]  # `compose` says what is wrong with it
            continue
        if parsed.is_hydra_override():
            continue
        key = parsed.get_key_element()
        if parsed.value_type is ValueType.GLOB_CHOICE_SWEEP:
            raise ConfigError(f"{word} does not say what it sweeps over; write {key}=A,B")
        if parsed.is_interval_sweep():
            interval = parsed.value()
            yield [f"{key}={bound}" for bound in (interval.start, interval.end)]
        elif parsed.is_sweep_override():
            yield [f"{key}={value}" for value in parsed.sweep_string_iterator()]
        else:
            yield [word]


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
