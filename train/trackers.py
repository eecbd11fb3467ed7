"""Where a run's numbers are watched: Weights & Biases, TensorBoard, or nowhere.

`metrics.jsonl` is the record; a tracker is a view of it. So a tracker that breaks is warned about once and
never stops the training.
"""

import netrc
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from omegaconf import OmegaConf

from drivetrain.conf.errors import ConfigError
from drivetrain.conf.schema import RunConfig, WandbConfig, WandbMode
from drivetrain.train.metrics import Shown, records

ANSWER_SECONDS = 4.0  # how long the W&B server may take before the run is recorded offline
INIT_SECONDS = 30.0


class Tracker(Protocol):
    @property
    def run_id(self) -> str | None:
        """The tracker's own name for the run; a checkpoint carries it so that a resumed run continues it."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record the numbers of one optimizer step."""

    def log_samples(self, step: int, rows: Sequence[Shown]) -> None:
        """Record (prompt, completion) pairs."""

    def alert(self, title: str, text: str) -> None:
        """Tell whoever watches that something needs a look."""

    def finish(self, status: str) -> None:
        """Close the record. `status` is completed, failed or preempted."""


def build_tracker(config: RunConfig, run_dir: Path, run_id: str | None, is_main: bool) -> Tracker:
    """The tracker that `config.tracker` names; on any rank but the main one, none.

    Args:
        config: the run; W&B and TensorBoard keep a copy.
        run_dir: W&B writes to `run_dir/wandb`, TensorBoard to `run_dir/tensorboard`.
        run_id: the `run_id` of the segment that is resumed, if any.
        is_main: true on rank 0.

    Raises:
        ConfigError: the tracker's name is unknown, or `tracker.mode=online` and this machine has no W&B key.
    """
    if not is_main:
        return NoTracker()
    match config.tracker:
        case WandbConfig(mode=mode):
            if mode is WandbMode.online and not wandb_key_source():
                raise ConfigError(
                    "tracker.mode=online needs a W&B key and this machine has none; "
                    "run `wandb login`, set WANDB_API_KEY, or use tracker.mode=offline"
                )
            return _guard("W&B", lambda: WandbTracker(config, run_dir, run_id))
        case tracker if tracker.name == "tensorboard":
            return _guard("TensorBoard", lambda: TensorBoardTracker(config, run_dir))
        case tracker if tracker.name == "none":
            return NoTracker()
        case tracker:
            raise ConfigError(f"tracker={tracker.name} is unknown; use none, wandb or tensorboard")


class NoTracker:
    run_id: str | None = None

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def log_samples(self, step: int, rows: Sequence[Shown]) -> None: ...

    def alert(self, title: str, text: str) -> None: ...

    def finish(self, status: str) -> None: ...


class WandbTracker:
    """One W&B run. The optimizer step is its x axis, not W&B's own row counter.

    W&B drops rows whose own counter goes backwards, as it would after a resume from an earlier checkpoint; so
    the counter is left to W&B and `step` is logged as a metric that every other metric is drawn against.
    """

    def __init__(self, config: RunConfig, run_dir: Path, run_id: str | None) -> None:
        assert isinstance(config.tracker, WandbConfig)
        mode, reason = _resolve_mode(config.tracker.mode)
        try:
            self._run = _wandb_init(config, config.tracker, run_dir, run_id, mode)
        except Exception as error:
            if mode == "offline":
                raise
            mode, reason = "offline", f"the server refused: {_first_line(error)}"
            self._run = _wandb_init(config, config.tracker, run_dir, run_id, mode)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if mode == "online":
            _say(f"W&B: {self._run.url}")
        else:
            folder = Path(self._run.dir).parent
            _say(f"W&B: offline ({reason}); upload later with `wandb sync {folder}`")

    @property
    def run_id(self) -> str | None:
        return str(self._run.id)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log({**metrics, "step": step})

    def log_samples(self, step: int, rows: Sequence[Shown]) -> None:
        import wandb

        named = [{"step": step, **record} for record in records(rows)]
        table = wandb.Table(columns=list(named[0]), data=[list(record.values()) for record in named])
        self._run.log({"samples": table, "step": step})

    def alert(self, title: str, text: str) -> None:
        self._run.alert(title=title, text=text, level="WARN")

    def finish(self, status: str) -> None:
        import wandb

        self._run.summary["status"] = status
        if status == "preempted":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if status == "completed" else 1)
        wandb.teardown()  # W&B's own process writes the last records after finish: wait for it


def _wandb_init(config: RunConfig, tracker: WandbConfig, run_dir: Path, run_id: str | None, mode: Any) -> Any:
    import wandb

    resolved: Any = OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True)
    settings = wandb.Settings(
        console="off",  # logs/ in the run directory has the output already
        silent=True,
        disable_git=False,
        disable_code=False,
        init_timeout=INIT_SECONDS,
    )
    return wandb.init(
        dir=str(run_dir),
        mode=mode,
        id=run_id,
        resume="allow",
        project=tracker.project,
        entity=tracker.entity,
        group=tracker.group,
        tags=tracker.tags,
        name=f"{config.experiment or config.stage.name}/{run_dir.name}",
        job_type=config.stage.name,
        config=resolved,
        allow_val_change=True,  # a resumed run may have another engine or number of ranks
        settings=settings,
    )


def _resolve_mode(mode: WandbMode) -> tuple[str, str]:
    """(online or offline, why offline)."""
    if mode is WandbMode.offline:
        return "offline", "as configured"
    if not wandb_key_source():
        return "offline", "no API key; `wandb login` makes one"
    if not wandb_answers():
        return "offline", f"{wandb_url()} did not answer within {ANSWER_SECONDS:.0f} s"
    return "online", ""


def wandb_key_source() -> str | None:
    """Where W&B finds its key (`WANDB_API_KEY`, a netrc file, its settings), or None. The key stays there."""
    for variable in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        if os.environ.get(variable):
            return variable
    settings = _wandb_settings()
    host = urlsplit(settings.base_url).netloc
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            if netrc.netrc(str(path)).authenticators(host):
                return str(path)
        except (OSError, netrc.NetrcParseError):
            continue
    return "its settings file" if settings.api_key else None


def wandb_url() -> str:
    """The W&B server that this machine is set up for."""
    return str(_wandb_settings().base_url)


def wandb_answers(seconds: float = ANSWER_SECONDS) -> bool:
    """Whether the W&B server answers at all, found out within `seconds`."""
    url = wandb_url()
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=seconds).close()
        except urllib.error.HTTPError:
            pass  # an answer, if not a kind one
        except (OSError, ValueError):
            return
        answered.set()

    asking = threading.Thread(target=ask, daemon=True)  # name resolution doesn't heed the timeout
    asking.start()
    asking.join(seconds)
    return answered.is_set()


def _wandb_settings() -> Any:
    import wandb

    return wandb.setup(wandb.Settings(silent=True)).settings


class TensorBoardTracker:
    """Scalars and text in `run_dir/tensorboard`.

    The writer opens at the first record, because that record's step says from where on an earlier segment's
    events are void (TensorBoard's `purge_step`).
    """

    run_id: str | None = None

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # fails here, at the start, when it is missing

        self._make = SummaryWriter
        self._folder = run_dir / "tensorboard"
        self._config = OmegaConf.to_yaml(OmegaConf.structured(config))
        self._open: Any = None
        self._step = 0

    def _writer(self, step: int) -> Any:
        if self._open is None:
            resumed = any(self._folder.glob("events.*"))
            self._open = self._make(str(self._folder), purge_step=step if resumed else None)
            self._open.add_text("config", _verbatim(self._config), step)
        self._step = step
        return self._open

    def log(self, step: int, metrics: dict[str, float]) -> None:
        writer = self._writer(step)
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    def log_samples(self, step: int, rows: Sequence[Shown]) -> None:
        text = "\n\n---\n\n".join(
            "\n\n→\n\n".join(_verbatim(str(value)) for value in record.values()) for record in records(rows)
        )
        self._writer(step).add_text("samples", text, step)

    def alert(self, title: str, text: str) -> None:
        if self._open is not None:
            self._open.add_text("alerts", f"{_verbatim(title)}\n\n{_verbatim(text)}", self._step)

    def finish(self, status: str) -> None:
        if self._open is not None:
            self._open.close()


class GuardedTracker:
    """A tracker whose failures become one warning."""

    def __init__(self, label: str, tracker: Tracker) -> None:
        self._label = label
        self._tracker = tracker
        self._warned = False

    @property
    def run_id(self) -> str | None:
        return self._tracker.run_id

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._try(lambda: self._tracker.log(step, metrics))

    def log_samples(self, step: int, rows: Sequence[Shown]) -> None:
        self._try(lambda: self._tracker.log_samples(step, rows))

    def alert(self, title: str, text: str) -> None:
        self._try(lambda: self._tracker.alert(title, text))

    def finish(self, status: str) -> None:
        self._try(lambda: self._tracker.finish(status))

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            if not self._warned:
                _say(f"{self._label} failed and the training goes on without it: {_first_line(error)}")
            self._warned = True


def _guard(label: str, build: Callable[[], Tracker]) -> Tracker:
    try:
        return GuardedTracker(label, build())
    except Exception as error:
        _say(f"{label} could not start and the training goes on without it: {_first_line(error)}")
        return NoTracker()


def _say(text: str) -> None:
    print(text, flush=True)


def _first_line(error: Exception) -> str:
    text = next(iter(str(error).splitlines()), "") or type(error).__name__
    return text if len(text) <= 200 else f"{text[:199]}…"  # a proxy may answer with a whole page


def _verbatim(text: str) -> str:
    """Markdown that shows `text` as it is: an indented block, which nothing inside can end."""
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])
