import json
import math
import time
from pathlib import Path

import pytest
import torch

from drivetrain.conf.schema import AlarmConfig
from drivetrain.train.metrics import (
    METRICS,
    SAMPLES,
    SUMMARY,
    Alarms,
    MetricsFile,
    Pace,
    peak_memory_bytes,
    read_metrics,
    write_summary,
)


def logged(run_dir: Path, *steps: int, start: int = 0) -> None:
    file = MetricsFile(run_dir, start, pytest.fail)
    for step in steps:
        file.log({"step": step, "loss": 1.0 / step})
    file.close()


def steps(run_dir: Path) -> list[int]:
    return [row["step"] for row in read_metrics(run_dir)]


def samples(run_dir: Path) -> list[dict[str, object]]:
    lines = (run_dir / SAMPLES).read_bytes().decode().split("\n")
    return [json.loads(line) for line in lines if line]


def test_rows_come_back_as_they_were_logged(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    file = MetricsFile(tmp_path, 0, pytest.fail)
    row = {"step": 1, "loss": 2.5, "tokens": 10**15, "data_digest": "00ff", "mfu": None}
    file.log(row)
    assert read_metrics(tmp_path) == [row]  # before it is closed: whoever follows the run sees it at once
    file.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_cannot_say_is_null(tmp_path: Path, value: float) -> None:
    file = MetricsFile(tmp_path, 0, pytest.fail)
    file.log({"step": 1, "loss": value})
    file.close()
    write_summary(tmp_path, {"objective": value, "steps": 3, "final": {"loss": value, "rows": [1.0, value]}})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": None}]
    assert json.loads((tmp_path / SUMMARY).read_text(), parse_constant=pytest.fail) == {
        "objective": None,
        "steps": 3,
        "final": {"loss": None, "rows": [1.0, None]},
    }


@pytest.mark.parametrize(
    "torn", [b'{"step": 3, "lo', b'{"step": 3, "text": "\xe6\x97', b"\x00\x00\x00", b"{"]
)
def test_a_torn_last_line_is_left_out_and_does_not_spoil_the_next(tmp_path: Path, torn: bytes) -> None:
    logged(tmp_path, 1, 2)
    path = tmp_path / METRICS
    path.write_bytes(path.read_bytes() + torn)
    assert steps(tmp_path) == [1, 2]
    logged(tmp_path, 3, start=2)
    assert steps(tmp_path) == [1, 2, 3]
    assert all(json.loads(line) for line in path.read_bytes().splitlines())


def test_a_resume_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    logged(tmp_path, 1, 2, 3, 4, 5)
    logged(tmp_path, 4, 5, 6, start=3)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    logged(tmp_path, start=0)
    assert steps(tmp_path) == []


def test_samples_of_any_text_survive_a_resume(tmp_path: Path) -> None:
    texts = [
        "line\nline",
        "two\u2028three\u2029",
        "next\x85line\x0b\x0c\x1c",
        "日本語 \U0001f600",
        '"\\',
        "\x00",
    ]
    file = MetricsFile(tmp_path, 0, pytest.fail)
    file.log_samples(10, [(text, text[::-1]) for text in texts])
    file.log_samples(20, [("late", "later")])
    file.close()
    expected = [{"step": 10, "prompt": text, "completion": text[::-1]} for text in texts]
    assert samples(tmp_path) == [*expected, {"step": 20, "prompt": "late", "completion": "later"}]
    path = tmp_path / SAMPLES
    path.write_bytes(path.read_bytes() + '{"step": 20, "prompt": "日'.encode()[:-1])
    MetricsFile(tmp_path, 15, pytest.fail).close()
    assert samples(tmp_path) == expected


def test_a_full_disk_is_warned_about_once_and_stops_nothing(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    for name in (METRICS, SAMPLES):
        (tmp_path / name).symlink_to("/dev/full")
    warnings: list[str] = []
    file = MetricsFile(tmp_path, 0, warnings.append)
    for step in range(200):  # more than a buffer holds
        file.log({"step": step, "text": "x" * 100})
    file.log_samples(200, [("a", "b")])
    file.close()
    (warning,) = warnings
    assert METRICS in warning and "No space left on device" in warning and "goes on" in warning


def test_the_summary_is_replaced_whole(tmp_path: Path) -> None:
    write_summary(tmp_path, {"status": "running", "long": "x" * 1000})
    write_summary(tmp_path, {"status": "completed"})
    assert json.loads((tmp_path / SUMMARY).read_text()) == {"status": "completed"}
    assert [path.name for path in tmp_path.iterdir()] == [SUMMARY]


def test_a_spike_is_a_loss_far_above_the_median_of_a_full_window() -> None:
    alarms = Alarms(AlarmConfig(spike_factor=1.5, window=5))
    for step, loss in enumerate([9.0, 2.0, 2.0, 1.0, 3.0]):
        assert alarms.check(step, loss, skipped=False) == []  # not full before the fifth
    assert alarms.check(5, 3.0, skipped=False) == []  # 1.5 times the median of 2 is no spike
    (found,) = alarms.check(6, 3.2, skipped=False)  # window 2 2 1 3 3
    assert found == "step 6: loss 3.200 is a spike, above 3.000"
    # The window moves on: a loss that stays high is the new normal.
    said = [bool(alarms.check(7 + step, 3.3, skipped=False)) for step in range(6)]
    assert said == [False] * 6


def test_skipped_steps_are_told_counted_and_given_up_on() -> None:
    alarms = Alarms(AlarmConfig(max_skipped=2, window=3))
    (found,) = alarms.check(1, math.nan, skipped=True)
    assert found == "step 1: the gradient is not finite; the step was skipped on every rank"
    assert not alarms.gave_up
    assert alarms.check(2, 1.0, skipped=False) == []
    alarms.check(3, math.inf, skipped=True)
    assert not alarms.gave_up and alarms.skipped_total == 2  # two, but not in a row
    alarms.check(4, math.nan, skipped=True)
    assert alarms.gave_up and alarms.skipped_in_a_row == 2 and alarms.skipped_total == 3
    # A loss that is not finite is not part of the window.
    for step in (5, 6):
        assert alarms.check(step, 1.0, skipped=False) == []
    assert len(alarms.check(7, 1.6, skipped=False)) == 1


def test_without_a_limit_no_run_is_given_up() -> None:
    alarms = Alarms(AlarmConfig(max_skipped=0))
    for step in range(50):
        alarms.check(step, math.nan, skipped=True)
    assert not alarms.gave_up and alarms.skipped_total == 50


def test_pace_counts_steps_and_leaves_out_what_lies_between(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    pace = Pace()
    assert pace.median_rate is None
    taken = []
    for seconds in ((10.0, 10.0), (2.0, 4.0), (2.0, 2.0), (0.5, 1.5)):
        for one in seconds:
            now += 1000.0  # an evaluation
            pace.begin()
            now += one
            pace.end(tokens=60)
        taken.append(pace.take())
    assert taken == [(10.0, 6.0), (3.0, 20.0), (2.0, 30.0), (1.0, 60.0)]
    assert pace.median_rate == 30.0  # the first, which compiles and warms up, is left out


def test_one_line_alone_is_the_median() -> None:
    pace = Pace()
    pace.begin()
    time.sleep(0.001)
    pace.end(tokens=10)
    _, rate = pace.take()
    assert pace.median_rate == rate > 0


def test_peak_memory_is_in_bytes() -> None:
    assert 50e6 < peak_memory_bytes(torch.device("cpu")) < 1e12  # torch alone takes more than 50 MB
