"""Killed, cut off, corrupted, out of space: the curve is the undisturbed one, and nothing whole is lost."""

import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Fixtures and the Cli class come from conftest.py.
Cli = Any


def assert_close(found: dict[int, Any], expected: dict[int, Any]) -> None:
    assert {step: digest for step, (_, digest) in found.items()} == {
        step: digest for step, (_, digest) in expected.items()
    }
    losses = [[curve[step][0] for step in sorted(curve)] for curve in (found, expected)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_sigkill_at_a_random_step_then_resume_is_bit_equal(cli: Cli, undisturbed: Cli) -> None:
    step = random.randint(5, 20)
    launcher = cli.start(*cli.small("run"))
    cli.wait_for_step("run", step, launcher)
    cli.kill_tree(launcher)
    assert "resumed from step_" in cli("resume", "run").stdout, f"killed at step {step}"
    assert cli.curve("run") == undisturbed.curve("whole"), f"killed at step {step}"
    summary = cli.summary("run")
    assert summary["status"] == "completed" and summary["resumed_from"] % 4 == 0


def test_sigkill_during_a_save_then_resume_is_bit_equal(cli: Cli, undisturbed: Cli) -> None:
    """A larger model, so that a save takes a while; killed the moment its temporary folder appears."""
    big = ("model.ffn_dim=16384", "stage.save_every=2", "stage.steps=8", "stage.eval_every=0")
    cli(*cli.small("whole", *big))
    launcher = cli.start(*cli.small("run", *big))
    checkpoints = cli.folder / "run" / "checkpoints"
    cli.wait_until(lambda: (checkpoints / "step_00000004.tmp").exists(), launcher)
    cli.kill_tree(launcher)
    torn = checkpoints / "step_00000004.tmp"
    assert torn.exists() and not (torn / "complete.json").exists(), "it was not killed while saving"
    assert (checkpoints / "step_00000002" / "complete.json").exists()
    assert "resumed from step_00000002" in cli("resume", "run").stdout
    assert cli.curve("run") == cli.curve("whole")
    assert not torn.exists()


def test_resume_on_other_ranks_and_another_engine(cli: Cli, undisturbed: Cli) -> None:
    """2 ranks FSDP2 -> SIGTERM -> 1 rank ZeRO-2 -> SIGTERM -> 4 ranks FSDP2, through the command line."""
    segments = [
        cli.small("run"),
        ["resume", "run", "engine=zero", "engine.zero_stage=2", "cluster.nproc=1"],
    ]
    for words, step in zip(segments, (6, 13), strict=True):
        launcher = cli.start(*words)
        cli.wait_for_step("run", step, launcher)
        launcher.send_signal(signal.SIGTERM)
        launcher.communicate(timeout=60)
        assert launcher.returncode == 75
        assert cli.summary("run")["status"] == "preempted"
        assert cli.summary("run")["steps"] < 24
    cli("resume", "run", "engine=fsdp", "cluster.nproc=4", "stage.micro_batch=1")
    assert cli.summary("run")["status"] == "completed"
    assert_close(cli.curve("run"), undisturbed.curve("whole"))


def flip_a_byte(path: Path) -> None:
    with path.open("r+b") as file:
        middle = path.stat().st_size // 2
        file.seek(middle)
        byte = file.read(1)
        file.seek(middle)
        file.write(bytes([byte[0] ^ 1]))


def test_a_flipped_byte_in_a_shard_is_named(cli: Cli) -> None:
    copy = cli.folder / "shards"
    shutil.copytree(cli.shards, copy)
    assert "every checksum matches" in cli("data", "verify", "shards").stdout
    broken = next(copy.glob("train*.bin"))
    flip_a_byte(broken)
    said = cli("data", "verify", "shards", status=1).stderr
    assert broken.name in said and "Traceback" not in said


def test_a_flipped_byte_in_a_checkpoint_falls_back_and_says_so(cli: Cli, undisturbed: Cli) -> None:
    shutil.copytree(undisturbed.folder / "whole", cli.folder / "run")
    checkpoints = cli.folder / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_00000020", "step_00000024"]
    broken = next((checkpoints / "step_00000024").glob("*.safetensors"))
    flip_a_byte(broken)
    said = cli("resume", "run").stdout
    assert broken.name in said and "corrupt" in said
    assert "falling back to an earlier one" in said and "resumed from step_00000020" in said
    assert cli.curve("run") == undisturbed.curve("whole")


def test_every_checkpoint_corrupt_is_an_error_not_a_fresh_start(cli: Cli, undisturbed: Cli) -> None:
    shutil.copytree(undisturbed.folder / "whole", cli.folder / "run")
    for path in (cli.folder / "run" / "checkpoints").glob("*/*.safetensors"):
        flip_a_byte(path)
    before = cli.curve("run")
    said = cli("resume", "run", status=1).stderr
    assert "holds no whole checkpoint" in said and "Traceback" not in said.split("error:")[0]
    assert cli.curve("run") == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 3 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=False)


def test_a_full_disk_while_saving_loses_no_earlier_checkpoint(cli: Cli, small_disk: Path) -> None:
    """Checkpoints of 0.9 MB on a disk of 3 MB that keeps them all: some save must fail."""
    (cli.folder / "run").mkdir()
    (cli.folder / "run" / "checkpoints").symlink_to(small_disk)
    words = ("checkpoint.keep_last=50", "stage.eval_every=0", "model.dim=64")
    done = cli(*cli.small("run", *words), status=1)
    assert "could not be written" in done.stderr and "No space left" in done.stderr
    assert "could not be written" in done.stdout  # an earlier one: said, and the training went on
    whole = sorted(path.name for path in small_disk.iterdir())
    assert whole and "step_00000024" not in whole and not any(name.endswith(".tmp") for name in whole)
    assert cli.summary("run")["status"] == "failed"
    for name in whole[:-1]:  # what the message asks for: free some space
        shutil.rmtree(small_disk / name)
    again = cli("resume", "run", "checkpoint.keep_last=1", "stage.eval_every=0")
    assert f"resumed from {whole[-1]}" in again.stdout
    assert cli.summary("run")["status"] == "completed"
