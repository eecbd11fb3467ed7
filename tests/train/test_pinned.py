"""The reference of stage.kl_coef stays what the run began with, whatever becomes of `model.init_from`."""

import json
import shutil
from pathlib import Path

import pytest

from drivetrain.conf.errors import CheckpointError
from drivetrain.data.shards import hash_file
from drivetrain.train.build import newest_weights
from drivetrain.train.checkpoint import MARKER, checkpoint_name
from drivetrain.train.pinned import FILE, _chosen


def save(run: Path, step: int, text: str = "weights") -> Path:
    folder = run / "checkpoints" / checkpoint_name(step)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_text(text)
    digests = {"model.safetensors": hash_file(folder / "model.safetensors")}
    (folder / MARKER).write_text(json.dumps({"files": digests}))
    return folder


def test_a_source_that_goes_on_changes_nothing(tmp_path: Path) -> None:
    source, path = tmp_path / "source", tmp_path / "run" / FILE
    first = save(source, 10)
    (source / "config.yaml").touch()
    assert _chosen(path, source, newest_weights) == first
    save(source, 20, "others")
    assert newest_weights(source) != first
    assert _chosen(path, source, newest_weights) == first
    moved = source.rename(tmp_path / "moved")
    assert _chosen(path, moved, newest_weights) == moved / "checkpoints" / checkpoint_name(10)


def test_weights_that_are_gone_or_others_are_refused(tmp_path: Path) -> None:
    source, path = tmp_path / "source", tmp_path / "run" / FILE
    first = save(source, 10)
    (source / "config.yaml").touch()
    _chosen(path, source, newest_weights)
    save(source, 10, "trained anew")
    said = r"the reference of stage\.kl_coef, are no longer those in model\.init_from=.*; restore them, or start in"
    with pytest.raises(CheckpointError, match=said):
        _chosen(path, source, newest_weights)
    shutil.rmtree(first)
    with pytest.raises(CheckpointError, match=said):
        _chosen(path, source, newest_weights)


def test_a_hugging_face_directory_is_known_by_its_weights(tmp_path: Path) -> None:
    source, path = tmp_path / "source", tmp_path / "run" / FILE
    source.mkdir()
    (source / "config.json").touch()
    with pytest.raises(CheckpointError, match="has no safetensors"):
        _chosen(path, source, newest_weights)
    (source / "model.safetensors").write_text("weights")
    assert _chosen(path, source, newest_weights) == _chosen(path, source, newest_weights) == source
    (source / "model.safetensors").write_text("others")
    with pytest.raises(CheckpointError, match="are no longer those"):
        _chosen(path, source, newest_weights)
