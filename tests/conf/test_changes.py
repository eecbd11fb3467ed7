import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from drivetrain.conf.changes import changes, check_resume, check_run_dir, has_checkpoint
from drivetrain.conf.compose import compose, to_yaml
from drivetrain.conf.errors import ConfigError
from drivetrain.conf.schema import RunConfig

Make = Callable[..., Path]


@pytest.fixture
def base(shards: Make) -> RunConfig:
    return compose([f"data.path={shards()}"])


def test_a_run_directory_is_used_once(base: RunConfig, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    check_run_dir(base, run_dir)
    run_dir.mkdir()
    check_run_dir(base, run_dir)
    (run_dir / "config.yaml").write_text(to_yaml(dataclasses.replace(base, run_dir="elsewhere")))
    (run_dir / "checkpoints" / "step_00000100").mkdir(parents=True)
    (run_dir / "checkpoints" / "step_00000100" / "complete.json").touch()
    with pytest.raises(ConfigError) as caught:
        check_run_dir(base, run_dir)
    assert str(caught.value) == (
        f"{run_dir} holds this run already; continue it with `drivetrain resume {run_dir}`"
    )
    other = compose(
        [f"data.path={base.data.path}", "stage.steps=7", "engine.compile=true", "seed=1", "optim.lr=1"]
    )
    with pytest.raises(ConfigError) as caught:
        check_run_dir(other, run_dir)
    assert str(caught.value) == (
        f"{run_dir} holds another run: seed is 0 there and 1 here; stage.steps is 1000 there and 7 here; "
        "engine.compile is false there and true here; and 1 more; choose another run_dir"
    )


def test_a_run_that_saved_nothing_may_be_launched_again(base: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(base))
    for torn in ("step_00000100", "step_00000100.tmp", "step_00000200.corrupt"):
        (tmp_path / "checkpoints" / torn).mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000100.tmp" / "complete.json").touch()
    assert not has_checkpoint(tmp_path)
    check_run_dir(base, tmp_path)
    with pytest.raises(ConfigError, match="holds another run"):
        check_run_dir(compose([f"data.path={base.data.path}", "seed=1"]), tmp_path)


def test_changes_are_those_that_say_what_a_run_is() -> None:
    old, new = compose(["run_dir=a"]), compose(["run_dir=b", "engine=zero", "cluster.dry_run=true"])
    assert changes(old, new) == {
        "engine.name": ("fsdp", "zero"),
        "engine.reshard_after_forward": (True, None),
        "engine.zero_stage": (None, 2),
        "engine.offload": (None, False),
    }


def test_a_run_directory_must_be_one(base: RunConfig, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for run_dir in (file, file / "below"):
        with pytest.raises(
            ConfigError, match=f"^run_dir={run_dir}: {file} is a file; choose another run_dir$"
        ):
            check_run_dir(base, run_dir)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_run_directory_must_be_writable(base: RunConfig, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot be written to; choose another run_dir"):
        check_run_dir(base, tmp_path / "run")
    tmp_path.chmod(0o700)


MIXTURE = "data.mixture={a: {path: x, weight: 1}, b: {path: y}}"


@pytest.mark.parametrize(
    "words",
    [
        "run_dir=elsewhere",
        "stage.steps=5",
        "stage.micro_batch=2 stage.eval_every=1 stage.eval_tokens=9 stage.save_every=3 stage.log_every=5",
        "stage.sample_prompts=[a] stage.sample_tokens=9",
        "engine=zero engine.zero_stage=3 engine.precision=fp32",
        "cluster.nproc=4 cluster.device=cpu",
        "optim.lr=1 optim.schedule=wsd optim.beta1=0.5",
        "tracker=wandb",
        "checkpoint.keep_last=9 alarms.window=3 kernels=reference objective=loss",
        "data.mixture={a:{path:z,weight:5},b:{path:y}} data.prefetch=4",
    ],
)
def test_these_may_change_at_a_resume(words: str) -> None:
    check_resume(compose([MIXTURE]), compose([MIXTURE, *words.split(" ")]))


def test_who_samples_may_change_at_a_resume() -> None:
    words = ["stage.rollout.max_staleness=2", "stage.rollout.server.urls=[a, b]", "stage.rollout.retries=3"]
    check_resume(compose(["stage=grpo"]), compose(["stage=grpo", *words]))


BATCH = (
    "the batch of a step is a function of (seed, step) and would be another one; keep it, or start a new run"
)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("seed=3", f"seed cannot change at a resume (0; now 3): {BATCH}"),
        ("stage.seq_len=512", f"stage.seq_len cannot change at a resume (1024; now 512): {BATCH}"),
        (
            "stage.tokens_per_step=1024",
            f"stage.tokens_per_step cannot change at a resume (65536; now 1024): {BATCH}",
        ),
        (
            "model.dim=8",
            "model.dim cannot change at a resume (192; now 8): the checkpoint holds the weights of this "
            "model; keep it, or start a new run",
        ),
        (
            "tokenizer=t",
            "tokenizer cannot change at a resume (null; now t): the checkpoint has learned the token ids of "
            "the old one; keep it, or start a new run",
        ),
        (
            "optim=muon",
            "optim.name cannot change at a resume (adamw; now muon): the checkpoint holds the moments of the "
            "old optimizer; keep it, or start a new run",
        ),
        (
            "stage.z_loss=1",
            "stage.z_loss cannot change at a resume (0.0; now 1.0): the loss would be another one; "
            "keep it, or start a new run",
        ),
        (
            "data.mixture={c:{path:x}}",
            f"the sources of data.mixture cannot change at a resume (a, b; now a, b, c): {BATCH}",
        ),
    ],
)
def test_these_may_not_change_at_a_resume(words: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_resume(compose([MIXTURE]), compose([MIXTURE, *words.split(" ")]))
    assert str(caught.value) == expected


def test_the_rows_of_fine_tuning_may_not_change_at_a_resume() -> None:
    with pytest.raises(ConfigError) as caught:
        check_resume(compose(["stage=sft"]), compose(["stage=sft", "stage.too_long=truncate"]))
    assert str(caught.value) == f"stage.too_long cannot change at a resume (drop; now truncate): {BATCH}"


def test_one_source_cannot_become_a_mixture_at_a_resume() -> None:
    check_resume(compose(["data.path=x"]), compose(["data.path=y"]))
    with pytest.raises(
        ConfigError, match=r"sources of data\.mixture cannot change at a resume \(none; now a, b\)"
    ):
        check_resume(compose(["data.path=x"]), compose([MIXTURE]))


def test_another_model_names_every_key_that_differs() -> None:
    with pytest.raises(ConfigError) as caught:
        check_resume(compose([]), compose(["model=llama3_1b"]))
    lines = str(caught.value).splitlines()
    assert {line.split(" ")[0] for line in lines} >= {"model.name", "model.dim", "model.rope_scaling.factor"}
