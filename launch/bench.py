"""`drivetrain bench`: starts a script of bench/, which lies beside the packages in a checkout."""

import os
import subprocess
import sys
from pathlib import Path

from drivetrain.conf.errors import ConfigError

SCRIPTS = {"kernels": "kernels.py", "step": "step.py", "data": "data_loading.py", "rollout": "rollout.py"}


def bench(name: str, arguments: list[str]) -> int:
    """Run one benchmark and return its exit status.

    Raises:
        ConfigError: no such benchmark, or an installation without them.
    """
    if name not in SCRIPTS:
        raise ConfigError(f"bench {name} is not known; use {', '.join(sorted(SCRIPTS))}")
    folder = Path(__file__).resolve().parent.parent / "bench"
    if not folder.is_dir():
        raise ConfigError(
            f"{folder} is missing: benchmarks come with a checkout of Drivetrain, not with a wheel"
        )
    env = {**os.environ, "PYTHONSAFEPATH": "1"}
    return subprocess.run([sys.executable, str(folder / SCRIPTS[name]), *arguments], env=env).returncode
