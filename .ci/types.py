"""Runs mypy over a tree of links, because type checkers do not read setuptools' folder map."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("conf", "kernels", "model", "data", "train", "launch")


def main() -> int:
    tree = ROOT / ".types" / "drivetrain"
    tree.mkdir(parents=True, exist_ok=True)
    for folder in FOLDERS:
        link = tree / folder
        if not link.is_symlink():
            link.symlink_to(Path("..") / ".." / folder)
    flags = ["--namespace-packages", "--explicit-package-bases", "-p", "drivetrain"]
    env = {**os.environ, "MYPYPATH": str(ROOT / ".types")}
    return subprocess.run([sys.executable, "-m", "mypy", *flags], cwd=ROOT, env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
