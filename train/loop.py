"""The loop. It knows no stage and no engine by name."""

from dataclasses import dataclass, field
from typing import Any

from drivetrain.conf.errors import CheckpointError, DrivetrainError
from drivetrain.conf.schema import RunConfig
from drivetrain.train.checkpoint import Checkpointer, origin
from drivetrain.train.engine.base import Engine
from drivetrain.train.mesh import World
from drivetrain.train.metrics import Alarms, Pace, plain
from drivetrain.train.optim import lr_factor
from drivetrain.train.stages.base import Stage
from drivetrain.train.watch import Watch

RISES = ("accuracy", "margin")  # what a better model has more of; of all other `eval/*` it has less


@dataclass(slots=True)
class Outcome:
    """Where the run stands, and how it ended. `last` and `best` hold the newest metrics and the best of each
    `eval/*` number, `skipped` how many steps had no finite gradient."""

    status: str
    step: int
    last: dict[str, Any] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    skipped: int = 0
    pace: Pace = field(default_factory=Pace)


def begin(state: dict[str, Any] | None) -> Outcome:
    """Where a checkpoint's state left off; without one, the very beginning."""
    if state is None:
        return Outcome("completed", 0)
    return Outcome("completed", int(state["step"]), state["last"], state["best"], int(state["skipped"]))


@dataclass(slots=True)
class Loop:
    config: RunConfig
    world: World
    engine: Engine
    stage: Stage
    checkpointer: Checkpointer
    watch: Watch
    outcome: Outcome
    base: dict[str, Any] = field(default_factory=dict)  # which frozen weights the adapters belong to

    def run(self) -> Outcome:
        """Train from where `outcome` stands to `stage.steps`, or until somebody asks to stop.

        Raises:
            DrivetrainError: too many steps in a row had no finite gradient.
            CheckpointError: the last checkpoint could not be written.
        """
        cfg, outcome = self.config.stage, self.outcome
        alarms = Alarms(self.config.alarms, outcome.skipped)
        if self._asked_to_stop():  # while everything was starting: there is nothing to save
            outcome.status = "preempted"
            return outcome
        for step in range(outcome.step + 1, cfg.steps + 1):
            outcome.pace.begin()
            batches = self.stage.source.next_step()
            digest = sum(batch.digest for batch in batches) % (1 << 64)
            factor = lr_factor(self.config.optim, step - 1, cfg.steps)
            metrics: dict[str, Any] = self.engine.accumulate(batches, self.stage.loss)
            result = self.engine.step(factor)
            metrics |= self.stage.after_step(self.engine, step)
            outcome.pace.end(sum(batch.tokens for batch in batches) * self.world.size)
            outcome.step = step
            for sentence in alarms.check(step, metrics["loss"], result.skipped):
                self.watch.alarm(sentence)
            if alarms.gave_up:
                raise DrivetrainError(
                    f"{alarms.skipped_in_a_row} steps in a row had no finite gradient, the last one step {step}; "
                    "lower optim.lr, or resume from a checkpoint with other data"
                )
            outcome.skipped = alarms.skipped_total
            stop = self._asked_to_stop()
            last = stop or step == cfg.steps
            evaluate = bool(cfg.eval_every) and (step % cfg.eval_every == 0 or (last and not stop))
            if evaluate:
                metrics |= self._evaluate(step)
                _keep_best(outcome.best, metrics)
            if evaluate or last or step % cfg.log_every == 0:
                metrics |= {"grad_norm": result.grad_norm, "lr": self.config.optim.lr * factor}
                metrics |= {"data_digest": f"{self.world.sum_u64(digest):016x}", "skipped": outcome.skipped}
                self.watch.log(step, metrics, outcome.pace)
                outcome.last = metrics
            if last or (cfg.save_every and step % cfg.save_every == 0):
                self._save(step, last)
            if stop:
                outcome.status = "preempted"
                break
        return outcome

    def _asked_to_stop(self) -> bool:
        """Whether any rank was asked. The same all-reduce tells when a background save has ended on all of them."""
        flags = [float(self.watch.stop_requested), float(self.checkpointer.finished())]
        asked, saved = self.world.sum(flags)
        if saved == self.world.size and (failed := self.checkpointer.wait()):
            self.watch.alarm(failed)
        return asked > 0

    def _evaluate(self, step: int) -> dict[str, float]:
        found = self.stage.evaluate(self.engine)
        self.watch.evaluated(step, found, self.stage.samples(self.engine))
        return found

    def _save(self, step: int, last: bool) -> None:
        state = {
            "step": step,
            "optimizer_steps": self.engine.optimizer_steps(),
            "source": self.stage.source.state(),
            "tracker_run_id": self.watch.run_id,
            # Every draw of random numbers is a function of (seed, step): the seed is all there is to keep.
            "seed": self.config.seed,
            "world_size": self.world.size,
            "engine": self.config.engine.name,
            "last": plain(self.outcome.last),
            "best": self.outcome.best,
            "skipped": self.outcome.skipped,
            **self.base,
            **origin(self.config),
        }
        failed = self.checkpointer.save(step, self.engine.tensors(), state)
        if last:
            failed = self.checkpointer.wait() or failed
            if failed:
                raise CheckpointError(f"{failed}; free some space and run `drivetrain resume`")
        if failed:
            self.watch.alarm(failed)


def _keep_best(best: dict[str, float], metrics: dict[str, float]) -> None:
    for name, value in metrics.items():
        if name.startswith("eval/"):
            sign = -1 if name.endswith(RISES) or "pass@" in name else 1
            if sign * value < sign * best.get(name, sign * float("inf")):  # never so for NaN
                best[name] = value
