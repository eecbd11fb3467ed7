"""One rank; several ranks and engines are in test_parity.py, killed runs in tests/e2e."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from drivetrain.conf.errors import CheckpointError
from drivetrain.conf.schema import CheckpointConfig, Device
from drivetrain.train.build import resume_point
from drivetrain.train.checkpoint import Checkpointer, checkpoint_name, complete_steps, newest_whole
from drivetrain.train.mesh import World, init_world, leave_world


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    yield init_world(Device.cpu)
    leave_world()


def saver(run_dir: Path, world: World, keep_last: int) -> Checkpointer:
    return Checkpointer(run_dir / "checkpoints", CheckpointConfig(keep_last=keep_last), world)


def save(checkpointer: Checkpointer, *steps: int) -> None:
    for step in steps:
        failed = checkpointer.save(step, {"model.w": torch.full((8, 8), float(step))}, {"step": step})
        assert failed is None and checkpointer.wait() is None


def corrupt(run_dir: Path, step: int) -> None:
    (path,) = (run_dir / "checkpoints" / checkpoint_name(step)).glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_what_a_resume_passed_over_is_set_aside_and_pruning_keeps_the_whole_ones(
    tmp_path: Path, world: World
) -> None:
    save(saver(tmp_path, world, keep_last=3), 100, 200, 300)
    for step in (200, 300):
        corrupt(tmp_path, step)
    chosen, notes = resume_point(tmp_path, world)
    assert chosen is not None and chosen.name == "step_00000100"
    for step in (200, 300):
        said = " ".join(note for note in notes if checkpoint_name(step) in note)
        assert "corrupt" in said and "falling back" in said and f"{checkpoint_name(step)}.corrupt" in said
    save(saver(tmp_path, world, keep_last=2), 150)
    checkpoints = tmp_path / "checkpoints"
    assert complete_steps(checkpoints) == [100, 150]
    assert newest_whole(checkpoints, print) == 150
    assert {path.name for path in checkpoints.glob("*.corrupt")} == {
        "step_00000200.corrupt",
        "step_00000300.corrupt",
    }
    # The same step again: the folder of that name is free, or made so.
    save(saver(tmp_path, world, keep_last=2), 300)
    corrupt(tmp_path, 300)
    chosen, _ = resume_point(tmp_path, world)
    assert chosen is not None and chosen.name == "step_00000150"


def test_nothing_is_renamed_where_no_checkpoint_is_whole(tmp_path: Path, world: World) -> None:
    save(saver(tmp_path, world, keep_last=2), 1, 2)
    for step in (1, 2):
        corrupt(tmp_path, step)
    with pytest.raises(CheckpointError, match=r"holds no whole checkpoint: .*00002.*corrupt.*00001"):
        resume_point(tmp_path, world)
    assert complete_steps(tmp_path / "checkpoints") == [1, 2]


def test_a_checkpoint_carries_its_state(tmp_path: Path, world: World) -> None:
    save(saver(tmp_path, world, keep_last=2), 7)
    assert json.loads((tmp_path / "checkpoints" / "step_00000007" / "state.json").read_text()) == {"step": 7}
