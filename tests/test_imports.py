"""What import-linter is set up to refuse, in a copy of the packages."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("conf", "kernels", "model", "data", "train", "launch")


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("train/loop.py", "launch.run_dir"),
        ("data/batch.py", "kernels.attention"),
        ("data/batch.py", "model.generate"),
        ("model/flops.py", "data.batch"),
        ("kernels/swiglu.py", "conf.schema"),
        ("conf/errors.py", "launch.local"),
    ],
)
def test_an_import_against_the_flow_is_refused(tmp_path: Path, importer: str, imported: str) -> None:
    for package in PACKAGES:
        unwanted = shutil.ignore_patterns("__pycache__", "*.yaml")
        shutil.copytree(ROOT / package, tmp_path / "drivetrain" / package, ignore=unwanted)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "drivetrain" / importer).open("a") as file:
        file.write(f"\nimport drivetrain.{imported}\n")
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    wrong = f"drivetrain.{importer.removesuffix('.py').replace('/', '.')} -> drivetrain.{imported}"
    assert done.returncode == 1 and wrong in done.stdout, done.stdout + done.stderr
