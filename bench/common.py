"""What the benchmarks share: fresh processes, facts about the machine, result files and tables.

Only the standard library is imported at the top: workers also run under a peer's own Python.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
RESULTS = BENCH / "results"
Row = dict[str, Any]


def parser(doc: str, name: str, repeats: int = 3) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("--quick", action="store_true", help="once and briefly: does it run, not how fast")
    made.add_argument(
        "--out", type=Path, default=None, help=f"default results/{name}.json; --quick writes none"
    )
    made.add_argument("--markdown", action="store_true", help="print a Markdown table instead")
    made.add_argument("--only", default="", help="rows whose key contains this, comma-separated")
    made.add_argument("--repeats", type=int, default=repeats, help="processes for each row; the best counts")
    return made


def wanted(key: str, only: str) -> bool:
    return not only or any(part in key for part in only.split(","))


def status_kb(field: str) -> int:
    """A line of /proc/self/status, in KiB; 0 where the kernel has none."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    return 0


def anonymous_bytes() -> int:
    """Memory of this process that no file backs, shared memory included: what a loader really takes."""
    return 1024 * (status_kb("RssAnon") + status_kb("RssShmem"))


def run_worker(arguments: Sequence[str], python: str = sys.executable, timeout_s: float = 900) -> Row:
    """Run `python bench/SCRIPT ...` in a fresh process; the row is the JSON in the file it is given as `--to`.

    A worker that fails gives `{"error": its last line}`.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "row.json"
        command = [python, "-P", *arguments, "--to", str(answer)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return {"error": f"not finished after {timeout_s:.0f} s"}
        if answer.is_file():
            return json.loads(answer.read_text())  # type: ignore[no-any-return]
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
        return {"error": lines[-1][:200]}


def versions(*packages: str) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device() -> dict[str, Any]:
    """The processor and how busy other programs kept it when the benchmark began."""
    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 1e9, 1),
        "kernel": platform.release(),
        "load_at_start": round(os.getloadavg()[0], 2),
    }


def write_result(path: Path, found_on: dict[str, Any], versions_: dict[str, Any], rows: list[Row]) -> None:
    """{command, date, device, versions, rows} as JSON."""
    result = {
        "command": shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": found_on,
        "versions": versions_,
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def show(title: str, header: Sequence[str], lines: Sequence[Sequence[str]], markdown: bool) -> None:
    """A table on the terminal, or in Markdown; every column but the first is flushed right."""
    if markdown:
        print("| " + " | ".join(header) + " |")
        print("| " + " | ".join("---" if i == 0 else "---:" for i in range(len(header))) + " |")
        for line in lines:
            print("| " + " | ".join(line) + " |")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for line in lines:
        table.add_row(*line)
    Console().print(table)
