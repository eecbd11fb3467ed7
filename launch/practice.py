"""Whether environment and rewards of stage=grpo can be made, found out in a process of its own before a run is."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from drivetrain.conf.compose import to_yaml
from drivetrain.conf.errors import ConfigError
from drivetrain.conf.schema import GrpoConfig, RunConfig
from drivetrain.conf.source import tokenizer_of

SECONDS = 300.0  # that making them may take
LINES = 3  # of its last words, where it dies


def check_practice(config: RunConfig) -> list[str]:
    """Make and close them once, as a rank will.

    Returns:
        Warnings: what this machine lacks, and the nodes may have.

    Raises:
        ConfigError: one sentence a line.
    """
    if not isinstance(config.stage, GrpoConfig):
        return []
    source = config.model.init_from or config.run_dir
    tokenizer = config.tokenizer or (tokenizer_of(Path(source)) if source else None)
    here = config.cluster.name == "local"
    asked = {
        "config": to_yaml(config),
        "tokenizer": None if tokenizer is None else str(tokenizer),
        "here": here,
    }
    found = _answer(json.dumps(asked), config.stage.environment)
    if found["problems"]:
        raise ConfigError("\n".join(" ".join(problem.split("\n")) for problem in found["problems"]))
    return found["warnings"]


@cache  # jobs of a sweep that differ elsewhere would ask the same
def _answer(asked: str, environment: str) -> dict[str, list[str]]:
    what = f"stage.environment={environment} or one of stage.rewards"
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "drivetrain.train.rl.check"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,  # a file, which whatever it leaves behind cannot hold open
            start_new_session=True,  # so that what it starts ends with it
            env={**os.environ, "PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        try:
            said, _ = process.communicate(asked.encode(), timeout=SECONDS)
        except subprocess.TimeoutExpired as error:
            raise ConfigError(f"{what} is not made within {SECONDS:g} s; correct what hangs") from error
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        try:
            found: dict[str, list[str]] = json.loads(said)
        except ValueError as error:
            complaints.seek(0)
            last = complaints.read().decode(errors="replace").strip().splitlines()[-LINES:]
            why = " ".join(last) or f"status {process.returncode}"
            raise ConfigError(f"{what} ends the process that makes it: {why}; correct it") from error
    return found
