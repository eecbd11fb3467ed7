"""A job from its words to its end, without ranks: `local.run` is replaced where they would start."""

import json
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drivetrain.conf.compose import flatten, load
from drivetrain.conf.errors import ConfigError
from drivetrain.conf.tokenizer_file import hash_of
from drivetrain.launch import fit, local
from drivetrain.launch.job import PREEMPTED, JobFailed, key_of, launch, merge_overrides, resume
from drivetrain.train.checkpoint import MARKER, checkpoint_name
from drivetrain.train.lock import lock_run_dir

Said = Any  # the console of conftest.py
End = local.Failure | local.Stopped | None
Ranks = Callable[..., list[Path]]


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    """`ranks(end, **summary)`: from now on ranks end like this, having written that summary if any. Returns a list
    that gets the run directory of each start."""

    def replace(end: End = None, **summary: object) -> list[Path]:
        started = []

        def run(cluster: object, run_dir: Path) -> End:
            assert load(run_dir / "config.yaml").run_dir == str(run_dir)
            started.append(run_dir)
            if summary:
                (run_dir / "summary.json").write_text(json.dumps(summary))
            return end

        monkeypatch.setattr(local, "run", run)
        return started

    return replace


def saved(run_dir: Path, step: int = 4) -> None:
    """What a complete checkpoint looks like to the launcher."""
    checkpoint = run_dir / "checkpoints" / checkpoint_name(step)
    checkpoint.mkdir(parents=True)
    (checkpoint / MARKER).touch()


def summary(run_dir: str | Path) -> Any:
    return json.loads((Path(run_dir) / "summary.json").read_text())


FAILED = local.Failure(1, 1, "ValueError: x", Path("logs/rank_1.log"), ["one", "two"])


# --- starting -----------------------------------------------------------------------------------------------


def test_a_job_is_frozen_started_and_followed(
    folder: Path, words: list[str], console: Said, ranks: Ranks
) -> None:
    started = ranks(status="completed", objective=1.5)
    done = launch([*words, "run_dir=r"], console)
    assert (done.run_dir, done.status, done.objective, done.exit_status) == (
        folder / "r",
        "completed",
        1.5,
        0,
    )
    assert started == [folder / "r"]
    assert (folder / "r" / "overrides.txt").read_text().splitlines() == [*words, "run_dir=r"]
    assert (folder / "r" / "environment.json").is_file() and (folder / "r" / "logs").is_dir()


def test_a_default_run_directory_is_named_by_the_experiment(
    folder: Path, words: list[str], console: Said, ranks: Ranks
) -> None:
    ranks(status="completed")
    run_dirs = [launch(words, console).run_dir for _ in range(2)]
    assert len(set(run_dirs)) == 2 and {path.parent for path in run_dirs} == {folder / "runs" / "default"}


def test_relative_paths_are_frozen_as_absolute_ones(
    folder: Path, words: list[str], shards: Path, console: Said, ranks: Ranks
) -> None:
    ranks(status="completed")
    tokenizer: dict[str, Any] = {"model": {"vocab": {}}, "added_tokens": [{"id": 2047}]}
    shutil.copytree(shards, folder / "shards")
    manifest = json.loads((shards / "manifest.json").read_text()) | {"tokenizer_hash": hash_of(tokenizer)}
    (folder / "shards" / "manifest.json").write_text(json.dumps(manifest))
    (folder / "tok").mkdir()
    (folder / "tok" / "tokenizer.json").write_text(json.dumps(tokenizer))
    saved(folder / "first")
    launch(
        [
            *(word for word in words if not word.startswith("data.path")),
            "data.mixture={a: {path: shards}, b: {path: ./shards}}",
            "tokenizer=../here/tok",
            "model.init_from=first",
            "run_dir=r",
        ],
        console,
    )
    frozen = flatten(load(folder / "r" / "config.yaml"))
    assert [frozen[f"data.mixture.{name}.path"] for name in "ab"] == [str(folder / "shards")] * 2
    assert frozen["tokenizer"] == str(folder / "tok")
    assert frozen["model.init_from"] == str(folder / "first")
    assert (folder / "r" / "tokenizer" / "tokenizer.json").is_file()


def test_the_run_directory_is_held_while_ranks_run_and_free_afterwards(
    folder: Path, words: list[str], console: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`tests/train/test_lock.py` has the strangers."""
    path, me = folder / "r" / ".lock", f"{platform.node()} {os.getpid()}"

    def run(cluster: object, run_dir: Path) -> local.Failure:
        os.close(lock_run_dir(run_dir))  # as a rank, which is of the family
        assert path.read_text().splitlines() == [me, me]
        return FAILED

    monkeypatch.setattr(local, "run", run)
    with pytest.raises(JobFailed):
        launch([*words, "run_dir=r"], console)
    os.close(lock_run_dir(folder / "r"))
    assert path.read_text().splitlines() == [me]


# --- ends ---------------------------------------------------------------------------------------------------


def test_a_failed_rank_is_named_and_the_summary_says_why(
    folder: Path, words: list[str], console: Said, ranks: Ranks
) -> None:
    ranks(FAILED)
    with pytest.raises(JobFailed) as caught:
        launch([*words, "run_dir=r"], console)
    assert str(caught.value) == (
        "rank 1 failed: ValueError: x\nits last lines:\n  one\n  two\nwhole log: logs/rank_1.log"
    )
    assert caught.value.exit_status == 1
    assert summary("r") == {"status": "failed", "reason": "ValueError: x"}


def test_a_wrong_setting_that_a_rank_found_is_the_whole_message(
    folder: Path, words: list[str], console: Said, ranks: Ranks
) -> None:
    ranks(local.Failure(0, 2, "has done 8 of stage.steps=8", Path("x"), []))
    with pytest.raises(JobFailed) as caught:
        launch([*words, "run_dir=r"], console)
    assert (str(caught.value), caught.value.exit_status) == ("has done 8 of stage.steps=8", 2)
    assert not (folder / "r" / "summary.json").exists()


@pytest.mark.parametrize("before_training", [True, False])
def test_ranks_that_were_stopped_without_a_save_are_preempted(
    before_training: bool, folder: Path, words: list[str], console: Said, ranks: Ranks
) -> None:
    ranks(status="completed", objective=1.5)
    launch([*words, "run_dir=r"], console)
    saved(folder / "r")
    end = local.Stopped(before_training)
    ranks(end)
    done = resume(Path("r"), ["stage.steps=9"], console)
    assert (done.status, done.exit_status) == ("preempted", PREEMPTED)
    assert f"{end.reason}; `drivetrain resume {folder / 'r'}` goes on" in str(console)
    kept = {"objective": 1.5} if before_training else {}  # what is known of the steps before still holds
    assert summary("r") == {"status": "preempted", "reason": end.reason, **kept}


def test_a_rank_that_saved_on_a_second_signal_has_the_last_word(
    folder: Path, words: list[str], console: Said, ranks: Ranks
) -> None:
    ranks(local.Stopped(False), status="preempted", steps=5, objective=2.0)
    done = launch([*words, "run_dir=r"], console)
    assert (done.exit_status, done.objective) == (PREEMPTED, 2.0)
    assert summary("r")["steps"] == 5 and "without a save" not in str(console)


def test_ranks_that_end_well_and_say_nothing_have_failed(
    folder: Path, words: list[str], console: Said, ranks: Ranks
) -> None:
    ranks()
    with pytest.raises(JobFailed, match=r"ended well, and .*r/summary.json cannot be read"):
        launch([*words, "run_dir=r"], console)


def test_a_full_disk_does_not_hide_why_a_run_ended(
    folder: Path, words: list[str], console: Said, ranks: Ranks
) -> None:
    """The file that becomes summary.json is a device that is always full."""
    (folder / "r").mkdir()
    (folder / "r" / "summary.json.tmp").symlink_to("/dev/full")
    ranks(FAILED)
    with pytest.raises(JobFailed) as caught:
        launch([*words, "run_dir=r"], console)
    first, *_, last = str(caught.value).splitlines()
    assert first == "rank 1 failed: ValueError: x"
    assert last == f"{folder / 'r' / 'summary.json'} cannot be written: No space left on device"
    ranks(local.Stopped(True))
    assert launch([*words, "run_dir=r"], console).exit_status == PREEMPTED
    assert "goes on\n" in str(console) and last in str(console)


def test_a_full_disk_before_the_start_starts_nothing(
    folder: Path, words: list[str], console: Said, ranks: Ranks
) -> None:
    (folder / "r").mkdir()
    (folder / "r" / "config.yaml.tmp").symlink_to("/dev/full")
    started = ranks()
    with pytest.raises(ConfigError, match=r"r cannot be made: No space left on device; choose another"):
        launch([*words, "run_dir=r"], console)
    assert not started


# --- again --------------------------------------------------------------------------------------------------


def test_a_run_that_failed_before_its_first_checkpoint_is_no_dead_end(
    folder: Path, words: list[str], console: Said, ranks: Ranks
) -> None:
    words = [*words, "run_dir=r"]
    started = ranks(FAILED)
    for again in (lambda: launch(words, console), lambda: resume(Path("r"), [], console)):
        for _ in range(2):
            with pytest.raises(JobFailed):
                again()
    assert started == [folder / "r"] * 4
    assert "nothing was saved yet: starting at step 0" in str(console)
    saved(folder / "r")
    with pytest.raises(ConfigError, match=r"holds this run already; continue it with `drivetrain resume"):
        launch(words, console)
    ranks(status="completed")
    assert resume(Path("r"), [], console).status == "completed"
    assert str(console).count("nothing was saved yet") == 2


def test_a_resume_from_another_folder(
    folder: Path, words: list[str], shards: Path, console: Said, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks(status="completed")
    (folder / "shards").symlink_to(shards)
    words = [*(word for word in words if not word.startswith("data.path")), "data.path=shards"]
    launch([*words, "run_dir=r"], console)
    saved(folder / "r")
    other = folder.parent / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    for more in ([], ["optim.lr=1e-4"]):
        resume(Path("../here/r"), more, console)
        assert load(folder / "r" / "config.yaml").data.path == str(folder / "shards")
    with pytest.raises(ConfigError, match=f"data.path={other}/shards is no directory"):
        resume(Path("../here/r"), ["data.path=shards"], console)
    (other / "shards").symlink_to(shards)
    resume(Path("../here/r"), ["data.path=shards"], console)
    assert load(folder / "r" / "config.yaml").data.path == str(other / "shards")


def test_what_a_resume_changes_is_said_and_kept(
    folder: Path, words: list[str], console: Said, ranks: Ranks
) -> None:
    """fp32 was typed at the start, and the engine changes alone."""
    ranks(status="completed")
    launch([*words, "run_dir=r"], console)
    saved(folder / "r")
    resume(Path("r"), ["engine=zero", "stage.steps=20"], console)
    for line in ("engine.name: fsdp -> zero", "engine.zero_stage: null -> 2", "stage.steps: 8 -> 20"):
        assert f"{line}\n" in str(console)
    assert "engine.precision" not in str(console) and "cluster" not in str(console)
    resume(Path("r"), ["engine.zero_stage=1"], console)
    frozen = flatten(load(folder / "r" / "config.yaml"))
    assert (frozen["engine.precision"], frozen["engine.zero_stage"], frozen["stage.steps"]) == ("fp32", 1, 20)
    said = (folder / "r" / "overrides.txt").read_text().splitlines()
    assert said[-3:] == ["engine=zero", "stage.steps=20", "engine.zero_stage=1"]


def test_a_refused_resume_leaves_the_run_as_it_was(
    folder: Path, words: list[str], console: Said, ranks: Ranks
) -> None:
    ranks(status="completed")
    launch([*words, "run_dir=r"], console)
    saved(folder / "r")
    before = {path: path.read_bytes() for path in (folder / "r").rglob("*") if path.is_file()}
    started = ranks()
    for word in ("seed=1", "optim.lr=x", "cluster.nproc=3", "stage.stepss=2"):
        with pytest.raises(ConfigError, match=word.split("=")[0]):
            resume(Path("r"), [word], console)
    resume(Path("r"), ["cluster.dry_run=true"], console)
    assert not started
    assert {path: path.read_bytes() for path in (folder / "r").rglob("*") if path.is_file()} == before


def test_a_run_resumes_when_what_it_began_from_is_gone(
    folder: Path, words: list[str], console: Said, ranks: Ranks
) -> None:
    ranks(status="completed")
    saved(folder / "first")
    launch([*words, "model.init_from=first", "run_dir=r"], console)
    (folder / "first").rename(folder / "gone")
    with pytest.raises(ConfigError, match="first is no directory"):
        resume(Path("r"), [], console)
    saved(folder / "r")
    assert resume(Path("r"), [], console).status == "completed"


def test_a_prompt_with_a_line_break_survives_a_resume(
    folder: Path, words: list[str], console: Said, ranks: Ranks
) -> None:
    ranks(status="completed")
    launch([*words, "stage.sample_prompts=['Question: 1+1\nAnswer:', '\u2028']", "run_dir=r"], console)
    for lr in ("1e-4", "1e-5"):
        resume(Path("r"), [f"optim.lr={lr}"], console)
    assert load(folder / "r" / "config.yaml").stage.sample_prompts == ["Question: 1+1\nAnswer:", "\u2028"]


def test_a_run_without_its_words_is_not_composed_from_nothing(
    folder: Path, words: list[str], console: Said, ranks: Ranks
) -> None:
    ranks(status="completed")
    launch([*words, "run_dir=r"], console)
    (folder / "r" / "overrides.txt").unlink()
    with pytest.raises(ConfigError, match=r"overrides.txt cannot be read: No such file"):
        resume(Path("r"), [], console)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (["seed=1", "optim.lr=1"], ["optim.lr=2"], ["seed=1", "optim.lr=2"]),
        (["++seed=1", "tracker=wandb"], ["seed=2"], ["tracker=wandb", "seed=2"]),
        (["engine.precision=fp32"], ["engine=zero"], ["engine.precision=fp32", "engine=zero"]),
        (
            ["engine=zero", "engine.zero_stage=3", "engine.compile=true"],
            ["engine=fsdp"],
            ["engine.compile=true", "engine=fsdp"],
        ),
        (["engine.reshard_after_forward=false"], ["engine=zero"], ["engine=zero"]),
        (
            ["cluster.nproc=2", "cluster.device=cpu"],
            ["cluster=torchrun"],
            ["cluster.nproc=2", "cluster.device=cpu", "cluster=torchrun"],
        ),
        (["tracker=wandb", "tracker.mode=offline"], ["tracker=none"], ["tracker=none"]),
        (["experiment=demo", "seed=3"], ["experiment=gpt2_124m"], ["seed=3", "experiment=gpt2_124m"]),
    ],
)
def test_words_of_a_resume_on_top_of_those_of_the_start(
    old: list[str], new: list[str], expected: list[str]
) -> None:
    assert merge_overrides(old, new) == expected


@pytest.mark.parametrize(
    ("word", "key"),
    [("a.b=c=d", "a.b"), ("+a=1", "a"), ("++a=1", "a"), ("~a", "a"), ("engine@x=y", "engine")],
)
def test_the_key_of_a_word(word: str, key: str) -> None:
    assert key_of(word) == key


# --- the plan -----------------------------------------------------------------------------------------------


def test_the_plan_is_said_before_the_ranks_start(
    folder: Path, words: list[str], console: Said, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks(status="completed")
    launch([*words, "run_dir=a"], console)
    assert str(console).startswith("plan: a rank needs about ") and str(console).count("plan:") == 1
    gpu = fit.Gpu("NVIDIA H100 80GB HBM3", 2 * 10**6)
    monkeypatch.setattr(fit, "local_gpus", lambda: (gpu,) * 2)
    launch([*words, "stage.micro_batch=4", "run_dir=b"], console)  # activations are an estimate
    assert "\nwarning: plan: a rank needs about " in str(console)
    started = ranks()
    monkeypatch.setattr(fit, "local_gpus", lambda: (fit.Gpu(gpu.name, 10**5),) * 2)
    for more in ([], ["cluster.dry_run=true"]):
        with pytest.raises(ConfigError, match=r"^weights, moments and gradients take .* and NVIDIA H100"):
            launch([*words, "run_dir=c", *more], console)
    assert not started and not (folder / "c").exists()


def test_torchrun_on_other_machines_prepares_and_says_so(
    folder: Path, words: list[str], console: Said, ranks: Ranks
) -> None:
    started = ranks()
    done = launch([*words, "cluster=torchrun", "cluster.nodes=2", "run_dir=r"], console)
    assert (done.status, done.exit_status, started) == ("prepared", 0, [])
    assert "on GPUs of 80 GB (H100 SXM)" in str(console)
    last = str(console).splitlines()[-1]
    assert "--nnodes=2" in last and last.endswith(f"-m drivetrain.train {folder / 'r'}")
