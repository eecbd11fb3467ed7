import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from drivetrain.launch.doctor import Check, Status, examine, exit_status, render, to_json


@pytest.fixture(scope="module")
def checks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Check]:
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_API_KEY", raising=False)
        patch.setenv("HOME", str(home))
        patch.setenv("NETRC", str(home / "none"))
        found = examine(run_dir=home / "not" / "yet" / "there", data_dir=home)
    assert list(home.glob(".drivetrain-doctor-*")) == []  # the probe is gone
    return {check.name: check for check in found}


def test_every_part_of_the_machine_has_a_line(checks: dict[str, Check]) -> None:
    names = {"Python", "drivetrain", "torch", "triton", "deepspeed", "accelerate", "transformers", "wandb"}
    names |= {
        "flash-attn",
        "bf16",
        "Communication",
        "CPU and memory",
        "/dev/shm",
        "Disk",
        "Compilers",
        "W&B",
        "git",
    }
    assert names <= set(checks) and any(name.startswith("GPU") for name in checks)
    assert all(check.remedy for check in checks.values() if check.status is not Status.ok)
    assert not any("could not be examined" in check.found for check in checks.values())


def test_lines_say_what_is_there(checks: dict[str, Check]) -> None:
    import torch

    assert torch.__version__ in checks["torch"].found
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in checks["Python"].found
    assert "gloo" in checks["Communication"].found
    assert "MB/s" in checks["Disk"].found and checks["Disk"].status is not Status.fail
    assert checks["W&B"].status is Status.warn and "no API key" in checks["W&B"].found


def test_data_without_a_manifest_fails_with_the_command_that_makes_it(
    checks: dict[str, Check], tmp_path: Path
) -> None:
    assert checks["Data"].status is Status.fail and "manifest.json is missing" in checks["Data"].found
    assert checks["Data"].remedy.startswith("drivetrain data build ")
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "a.bin").write_bytes(bytes(2**24))
    data = next(check for check in examine(data_dir=tmp_path) if check.name == "Data")
    assert data.status is Status.ok and data.found.endswith("0.02 GiB of tokens")


def test_a_place_that_cannot_be_written_fails() -> None:
    disk = next(check for check in examine(run_dir=Path("/proc/runs")) if check.name == "Disk")
    assert disk.status is Status.fail and "cannot be written" in disk.found and "run_dir" in disk.remedy


def test_only_a_failure_changes_the_exit_status() -> None:
    fine, warned = Check(name="a", found="x"), Check(name="b", status=Status.warn, found="y", remedy="z")
    assert exit_status([fine, warned]) == 0
    assert exit_status([fine, Check(name="c", status=Status.fail, found="y", remedy="z")]) == 1


def test_json_and_table_hold_the_same(checks: dict[str, Check]) -> None:
    parsed = json.loads(to_json(list(checks.values())))
    assert [entry["name"] for entry in parsed] == list(checks)
    assert set(parsed[0]) == {"name", "status", "found", "remedy"} and parsed[0]["status"] == "ok"
    out = io.StringIO()
    Console(width=200, file=out).print(
        render([*checks.values(), Check(name="markup", found="[red]not markup[/red]")])
    )
    text = out.getvalue()
    assert all(name in text for name in checks) and "[red]not markup[/red]" in text


def test_a_missing_package_fails_with_the_command_that_installs_it() -> None:
    """Another interpreter, whose metadata says that one package is missing and another one old."""
    script = """
import importlib.metadata as metadata
from drivetrain.launch import doctor
real = metadata.version
def version(name):
    if name == "accelerate":
        raise metadata.PackageNotFoundError(name)
    return "0.1" if name == "wandb" else real(name)
metadata.version = version
print(doctor.to_json(list(doctor._packages())))
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    lines = {entry["name"]: entry for entry in json.loads(done.stdout)}
    assert (lines["accelerate"]["status"], lines["accelerate"]["found"]) == ("fail", "not installed")
    assert lines["accelerate"]["remedy"].startswith('pip install "accelerate>=')
    assert lines["wandb"]["status"] == "fail" and lines["wandb"]["found"].startswith("0.1, but >=")
    assert lines["triton"]["status"] == "ok"
