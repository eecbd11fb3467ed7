"""The real W&B in offline mode and the real TensorBoard: what they wrote is read back from their files."""

import dataclasses
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from drivetrain.conf.compose import compose
from drivetrain.conf.errors import ConfigError
from drivetrain.conf.schema import RunConfig, TrackerConfig
from drivetrain.train.trackers import NoTracker, build_tracker


def config(*overrides: str) -> RunConfig:
    return compose(["stage.steps=7", *overrides])


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


History = Callable[[Path, str], list[tuple[int, float]]]


def test_wandb_offline_has_metrics_config_samples_and_one_id_over_a_resume(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    wandb_records: Callable[[Path], Iterator[tuple[str, Any]]],
    wandb_history: History,
) -> None:
    wandb_config = ["tracker=wandb", "tracker.mode=offline", "tracker.tags=[a,b]", "tracker.group=g"]
    first = build_tracker(config(*wandb_config), tmp_path, None, is_main=True)
    for step in (1, 2, 3):
        first.log(step, {"loss": 4.0 / step, "eval/loss": 1.0, "grad_norm": math.nan})
    first.log_samples(3, [("Once", "upon <b>a time</b>")])
    first.alert("loss spike", "step 3")
    first.finish("preempted")

    second = build_tracker(config(*wandb_config, "engine=zero"), tmp_path, first.run_id, is_main=True)
    second.log(2, {"loss": 2.5})  # back to an earlier checkpoint
    second.finish("completed")

    assert first.run_id and second.run_id == first.run_id
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and all(line.startswith("W&B: offline (as configured)") for line in printed)
    assert wandb_history(tmp_path, "loss") == [(1, 4.0), (2, 2.0), (3, 4 / 3), (2, 2.5)]
    assert math.isnan(wandb_history(tmp_path, "grad_norm")[0][1])

    records = list(wandb_records(tmp_path))
    runs = [record.run for _, record in records if record.HasField("run")]
    assert {run.run_id for run in runs} == {first.run_id}
    assert {file for file, _ in records} == {f"run-{first.run_id}.wandb"}
    assert (runs[0].project, runs[0].run_group, list(runs[0].tags)) == ("drivetrain", "g", ["a", "b"])
    kept = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert kept["stage"]["steps"] == 7 and kept["engine"]["precision"] == "bf16"
    assert set(kept) >= {field.name for field in dataclasses.fields(RunConfig)}

    metrics = [record.metric for _, record in records if record.HasField("metric")]
    assert any(metric.glob_name == "*" and metric.step_metric == "step" for metric in metrics)
    assert [record.alert.title for _, record in records if record.HasField("alert")] == ["loss spike"]
    assert [record.exit.exit_code for _, record in records if record.HasField("exit")] == [1, 0]
    assert sum(record.HasField("preempting") for _, record in records) == 1
    tables = [json.loads(path.read_text()) for path in tmp_path.glob("wandb/*/files/media/table/*.json")]
    assert [table["data"] for table in tables] == [[[3, "Once", "upon <b>a time</b>"]]]


SEGMENT = """
import sys
from pathlib import Path
from drivetrain.conf.compose import compose
from drivetrain.train.trackers import build_tracker
config = compose(["tracker=wandb", "tracker.mode=" + sys.argv[2]])
tracker = build_tracker(config, Path(sys.argv[1]), None, True)
tracker.log(1, {"loss": 1.0})
tracker.finish("completed")
"""


def segment(run_dir: Path, mode: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONSAFEPATH": "1", **environment}
    command = [sys.executable, "-c", SEGMENT, str(run_dir), mode]
    return subprocess.run(
        command, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=90
    )


def test_auto_is_offline_without_a_key(tmp_path: Path, wandb_history: History) -> None:
    done = segment(tmp_path, "auto")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1
    assert done.stdout.startswith(
        "W&B: offline (no API key; `wandb login` makes one); upload later with `wandb"
    )
    assert wandb_history(tmp_path, "loss") == [(1, 1.0)]


@pytest.mark.parametrize("mode", ["auto", "online"])
def test_offline_when_the_server_does_not_answer(tmp_path: Path, wandb_history: History, mode: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # a port that nobody else can take, and is closed
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
    done = segment(tmp_path, mode, WANDB_API_KEY="a" * 40, WANDB_BASE_URL=url)
    assert done.returncode == 0, done.stderr
    assert f"W&B: offline ({url} did not answer within 4 s)" in done.stdout
    assert wandb_history(tmp_path, "loss") == [(1, 1.0)]


def test_online_without_a_key_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tracker\.mode=online needs a W&B key"):
        build_tracker(config("tracker=wandb", "tracker.mode=online"), tmp_path, None, is_main=True)
    assert not (tmp_path / "wandb").exists()


def test_tensorboard_scalars_samples_and_a_resume_that_voids_later_steps(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps, factor in (((1, 2, 3), 1.0), ((2, 3), 10.0)):
        tracker = build_tracker(config("tracker=tensorboard"), tmp_path, None, is_main=True)
        for step in steps:
            tracker.log(step, {"loss": step * factor, "eval/loss": 0.5})
        tracker.log_samples(steps[-1], [("Once", "upon\n# a time")])
        tracker.alert("loss spike", "look")
        tracker.finish("completed")
        assert tracker.run_id is None
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(point.step, point.value) for point in events.Scalars("loss")] == [(1, 1.0), (2, 20.0), (3, 30.0)]
    samples = events.Tensors("samples/text_summary")[-1]
    assert samples.tensor_proto.string_val[0].decode() == "    Once\n\n→\n\n    upon\n    # a time"
    assert b"steps: 7" in events.Tensors("config/text_summary")[-1].tensor_proto.string_val[0]
    assert b"look" in events.Tensors("alerts/text_summary")[-1].tensor_proto.string_val[0]


def test_a_tracker_that_breaks_warns_once_and_never_raises(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    tracker = build_tracker(config("tracker=tensorboard"), tmp_path, None, is_main=True)
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 1.0})
    tracker.finish("failed")
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 and printed[0].startswith(
        "TensorBoard failed and the training goes on without it: "
    )


def test_a_tracker_that_cannot_start_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["tracker=wandb", "tracker.mode=offline", "tracker.project=no/slash"]
    assert isinstance(build_tracker(config(*overrides), tmp_path, None, is_main=True), NoTracker)
    assert capsys.readouterr().out.startswith("W&B could not start and the training goes on without it: ")


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "none"])
def test_other_ranks_and_none_write_nothing(tmp_path: Path, name: str) -> None:
    tracker = build_tracker(config(f"tracker={name}"), tmp_path, None, is_main=name == "none")
    tracker.log(1, {"loss": 1.0})
    tracker.finish("completed")
    assert tracker.run_id is None and list(tmp_path.iterdir()) == []


def test_unknown_tracker_is_named(tmp_path: Path) -> None:
    wrong = dataclasses.replace(config(), tracker=TrackerConfig(name="mlflow"))
    with pytest.raises(ConfigError, match="tracker=mlflow is unknown; use none, wandb or tensorboard"):
        build_tracker(wrong, tmp_path, None, is_main=True)
