"""One rank: `python -m drivetrain.train RUN_DIR`, under torchrun, accelerate, deepspeed, srun, or alone."""

import contextlib
import hashlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from drivetrain.conf.errors import ConfigError, DrivetrainError
from drivetrain.train.process import allow_many_files, end_process
from drivetrain.train.stop import Stop

if TYPE_CHECKING:  # importing Hydra and torch takes seconds, in which a signal must find somebody who listens
    from drivetrain.conf.schema import RunConfig


def main(arguments: list[str]) -> int:
    """Train what `RUN_DIR/config.yaml` says, from its newest whole checkpoint if there is one.

    Returns:
        0 when completed or preempted (`summary.json` says which), 1 on failure, 2 on a wrong setting.
    """
    stop = Stop()
    stop.listen()
    arguments = [word for word in arguments if not word.startswith("--local_rank=")]  # deepspeed's launcher
    if len(arguments) != 1:
        print("usage: python -m drivetrain.train RUN_DIR", file=sys.stderr)
        return 2
    run_dir = Path(arguments[0]).resolve()
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    _redirect(run_dir, rank)
    allow_many_files()
    try:
        from drivetrain.conf.compose import load

        train(load(run_dir / "config.yaml"), run_dir, stop)
    except BaseException as error:
        return _failed(run_dir, rank, error)
    return 0


def train(config: "RunConfig", run_dir: Path, stop: Stop) -> None:
    """Build everything the configuration names, and loop."""
    from drivetrain.train.build import build_run
    from drivetrain.train.mesh import init_world, leave_world

    began = time.monotonic()
    world = init_world(config.cluster.device)
    digest = hashlib.sha256((run_dir / "config.yaml").read_bytes()).hexdigest()
    if not world.all_equal(digest):
        raise ConfigError(f"the ranks have read different configurations from {run_dir / 'config.yaml'}")
    run = build_run(config, run_dir, world, stop)
    status = "failed"
    try:
        outcome = run.loop.run()
        status = outcome.status
        run.finish(outcome, time.monotonic() - began)
    finally:
        run.close(status)
    leave_world()


def _redirect(run_dir: Path, rank: int) -> None:
    """Every rank's stderr, and all but rank 0's stdout, go to `logs/rank_N.log`."""
    try:
        (run_dir / "logs").mkdir(exist_ok=True)
        log = (run_dir / "logs" / f"rank_{rank}.log").open("a", buffering=1)
    except OSError as error:
        print(f"{run_dir} is not a run directory that can be written: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from error
    os.dup2(log.fileno(), 2)
    if rank != 0:
        os.dup2(log.fileno(), 1)


def _failed(run_dir: Path, rank: int, error: BaseException) -> int:
    """Leave the reason where the launcher and a person find it; no clean-up that could hang on other ranks.

    A full disk may be the reason, and then takes neither log nor record: standard output is left.
    """
    expected = isinstance(error, DrivetrainError)
    status = error.exit_status if isinstance(error, DrivetrainError) else 1
    with contextlib.suppress(OSError):
        traceback.print_exception(error)
    message = str(error) if expected else f"{type(error).__name__}: {error}"
    record = {"rank": rank, "time": time.time(), "status": status, "message": message, "trace": not expected}
    try:
        (run_dir / "logs" / f"rank_{rank}.error.json").write_text(json.dumps(record))
    except OSError:
        print(f"rank {rank} failed: {message}")
    return status


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
