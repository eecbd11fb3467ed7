"""The loop. It knows no stage and no engine by name."""

from dataclasses import dataclass, field
from typing import Any

from drivetrain.conf.errors import CheckpointError, DrivetrainError
from drivetrain.conf.schema import RunConfig
from drivetrain.train.checkpoint import Checkpointer
from drivetrain.train.engine.base import Engine
from drivetrain.train.mesh import World
from drivetrain.train.metrics import Alarms, Pace
from drivetrain.train.optim import lr_factor
from drivetrain.train.stages.base import Stage
from drivetrain.train.watch import Watch


@dataclass(slots=True)
class Outcome:
    """How the loop ended. `last` and `best` hold the newest metrics and the best of each `eval/*` loss."""

    status: str
    step: int
    last: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    pace: Pace = field(default_factory=Pace)


@dataclass(slots=True)
class Loop:
    config: RunConfig
    world: World
    engine: Engine
    stage: Stage
    checkpointer: Checkpointer
    watch: Watch
    start_step: int = 0

    def run(self) -> Outcome:
        """Train from `start_step` to `stage.steps`, or until somebody asks to stop.

        Raises:
            DrivetrainError: too many steps in a row had no finite gradient.
            CheckpointError: the last checkpoint could not be written.
        """
        cfg, outcome = self.config.stage, Outcome("completed", self.start_step)
        alarms = Alarms(self.config.alarms)
        for step in range(self.start_step + 1, cfg.steps + 1):
            outcome.pace.begin()
            batches = self.stage.source.next_step()
            digest = sum(batch.digest for batch in batches) % (1 << 64)
            factor = lr_factor(self.config.optim, step - 1, cfg.steps)
            metrics: dict[str, Any] = self.engine.accumulate(batches, self.stage.loss)
            result = self.engine.step(factor)
            metrics |= self.stage.after_step(self.engine, step)
            outcome.pace.end(cfg.tokens_per_step)
            outcome.step = step

            for sentence in alarms.check(step, metrics["loss"], result.skipped):
                self.watch.alarm(sentence)
            if alarms.gave_up:
                raise DrivetrainError(
                    f"{alarms.skipped_in_a_row} steps in a row had no finite gradient, the last one step {step}; "
                    "lower optim.lr, or resume from a checkpoint with other data"
                )
            stop = self.world.any(self.watch.stop_requested)
            last = stop or step == cfg.steps
            evaluate = bool(cfg.eval_every) and (step % cfg.eval_every == 0 or (last and not stop))
            if evaluate:
                metrics |= self._evaluate(step)
                _keep_best(outcome.best, metrics)
            if evaluate or last or step % cfg.log_every == 0:
                metrics |= {"grad_norm": result.grad_norm, "lr": self.config.optim.lr * factor}
                metrics |= {
                    "data_digest": f"{self.world.sum_u64(digest):016x}",
                    "skipped": alarms.skipped_total,
                }
                self.watch.log(step, metrics, outcome.pace)
                outcome.last = metrics
            if last or (cfg.save_every and step % cfg.save_every == 0):
                self._save(step, last)
            if stop:
                outcome.status = "preempted"
                break
        return outcome

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
        if name.startswith("eval/") and value < best.get(name, float("inf")):
            best[name] = value
