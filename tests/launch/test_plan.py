import dataclasses
import io
import json

import pytest
from rich.console import Console

from drivetrain.conf.compose import compose
from drivetrain.conf.errors import ConfigError
from drivetrain.conf.schema import options
from drivetrain.conf.units import human_bytes
from drivetrain.conf.validate import validate
from drivetrain.launch.plan import Plan, duration, make_plan, render
from drivetrain.model.flops import parameter_count, train_flops_per_token

LLAMA = [
    "model=llama3_8b",
    "cluster.nproc=8",
    "stage.seq_len=8192",
    "stage.tokens_per_step=4194304",
    "stage.steps=1000",
]


def plan(*overrides: str, gpu: str = "H100 SXM", gpu_memory: float | None = None) -> Plan:
    config = compose(overrides)
    validate(config, data=False)
    return make_plan(config, gpu=gpu, gpu_memory=gpu_memory)


def text_of(made: Plan, width: int = 100) -> str:
    out = io.StringIO()
    Console(width=width, file=out).print(render(made))
    return out.getvalue()


def test_numbers_follow_from_one_another() -> None:
    config = compose(LLAMA)
    made = make_plan(config, mfu=0.5)
    flops = train_flops_per_token(config.model, 8192)
    assert made.flops_per_step == flops * 4194304
    assert made.tokens_total == 4194304 * 1000
    assert made.tokens_per_second * flops == pytest.approx(0.5 * 989e12 * 8)
    assert made.step_seconds * made.tokens_per_second == pytest.approx(4194304)
    assert made.wall_seconds == pytest.approx(1000 * made.step_seconds)
    assert made.gpu_hours == pytest.approx(8 * made.wall_seconds / 3600)
    assert made.checkpoint_bytes == 12 * parameter_count(config.model).total
    assert made.micro_batch * made.passes * 8 * 8192 == 4194304
    assert made.peak == max(sum(parts.values()) for parts in made.memory.values())
    assert made.peak == sum(made.memory[made.peak_moment].values())
    assert make_plan(config, mfu=0.25).wall_seconds == pytest.approx(2 * made.wall_seconds)


def test_muon_saves_one_moment_of_every_block_matrix() -> None:
    adamw, muon = plan("model=gpt2_124m"), plan("model=gpt2_124m", "optim=muon")
    assert adamw.checkpoint_bytes - muon.checkpoint_bytes == 4 * adamw.parameters.block_matrices


def test_fp32_is_timed_with_tensor_cores() -> None:
    low, full = plan(*LLAMA), plan(*LLAMA, "engine.precision=fp32")
    assert low.tokens_per_second / full.tokens_per_second == pytest.approx(989 / 494)


def test_auto_is_planned_with_the_largest_micro_batch_that_fits() -> None:
    auto = plan("experiment=gpt2_124m")
    assert auto.micro_batch_chosen and auto.fits and auto.fix is None
    larger = plan("experiment=gpt2_124m", f"stage.micro_batch={2 * auto.micro_batch}")
    assert not larger.fits and not larger.micro_batch_chosen
    assert plan("experiment=gpt2_124m", gpu_memory=20e9).micro_batch < auto.micro_batch


@pytest.mark.parametrize(
    ("overrides", "memory", "expected"),
    [
        (["experiment=gpt2_124m", "stage.micro_batch=512"], None, {"stage.micro_batch"}),
        ([*LLAMA, "stage.micro_batch=1", "engine.replicas=8"], 200e9, {"engine.checkpointing"}),
        ([*LLAMA], 64e9, {"engine.checkpointing"}),
        (["model=llama3_8b", "stage.seq_len=4096", "stage.tokens_per_step=1048576"], None, {"cluster.nproc"}),
        (["engine=zero", "engine.zero_stage=0", "model=gpt2_xl"], 26e9, {"engine.zero_stage"}),
        (
            ["model=llama3_70b", "stage.seq_len=4096", "stage.tokens_per_step=4194304"],
            None,
            {"cluster.nodes"},
        ),
        (
            [*LLAMA, "engine=zero", "engine.zero_stage=2", "stage.tokens_per_step=65536"],
            40e9,
            {"engine.zero_stage", "engine.checkpointing"},
        ),
        (
            [*LLAMA, "engine=zero", "cluster.nproc=2", "stage.seq_len=1024", "stage.tokens_per_step=2048"],
            48e9,
            {"engine.offload"},
        ),
    ],
    ids=str,
)
def test_the_proposed_change_makes_the_job_fit(
    overrides: list[str], memory: float | None, expected: set[str]
) -> None:
    made = plan(*overrides, gpu_memory=memory)
    assert not made.fits and made.fix is not None
    keys = {word.partition("=")[0] for word in made.fix.overrides}

    assert expected <= keys
    # cluster=local has one node, and is the only cluster there is to validate with.
    config = compose([*overrides, *made.fix.overrides])
    if "cluster.nodes" not in keys:
        validate(config, data=False)
    changed = make_plan(config, gpu_memory=memory)
    assert changed.fits and changed.peak == made.fix.peak


def test_what_cannot_fit_says_so() -> None:
    made = plan("model=llama3_70b", "stage.seq_len=131072", "stage.tokens_per_step=131072", gpu_memory=1e9)
    assert not made.fits and made.fix is None
    assert "nothing that was tried makes it fit" in text_of(made)


@pytest.mark.parametrize("model", [name for name in options("model") if name != "auto"])
def test_tables_fit_a_hundred_columns(model: str) -> None:
    for engine in (["engine=fsdp"], ["engine=zero", "engine.zero_stage=3", "engine.offload=true"]):
        made = plan(f"model={model}", *engine, "cluster.nproc=8")
        lines = text_of(made).splitlines()
        assert max(map(len, lines)) <= 100 and "…" not in "".join(lines)
        text = " ".join(" ".join(lines).split())
        assert "an estimate that has not been compared with measured peaks" in text
        for words in ("Weights", "Gradients", "Total", "FLOPs a token", "Wall time", "Checkpoint"):
            assert words in text
        assert human_bytes(made.peak) in text and ("does not fit" in text) is not made.fits
        assert ("CPU memory" in text) is (made.host_memory > 0)


def test_the_learning_rate_is_shown_though_none_was_given() -> None:
    for words, shown in (
        (["stage=sft"], "Learning rate 2e-05 cosine, after 100 steps of warm-up; optim.lr"),
        (["stage=sft", "lora.rank=8"], "Learning rate 0.0002 cosine"),
        (["stage=dpo", "optim.lr=5e-7", "optim.schedule=linear"], "Learning rate 5e-07 linear"),
    ):
        assert shown in " ".join(text_of(make_plan(compose(words))).split())


def test_json_holds_everything() -> None:
    made = plan(*LLAMA)
    read = json.loads(json.dumps(dataclasses.asdict(made)))
    assert set(read) == {field.name for field in dataclasses.fields(Plan)}
    assert read["parameters"]["total"] == made.parameters.total
    assert read["memory"]["loss"]["activations"] == made.memory["loss"]["activations"]
    assert read["fix"]["overrides"] == made.fix.overrides if made.fix else read["fix"] is None


def test_wrong_arguments_are_explained() -> None:
    config = compose(LLAMA)
    with pytest.raises(ConfigError, match=r"--gpu 'TPU v5' is not known; use B200, .*RTX 4090"):
        make_plan(config, gpu="TPU v5")
    with pytest.raises(ConfigError, match=r"--mfu 40.* above 0 and at most 1"):
        make_plan(config, mfu=40)
    with pytest.raises(ConfigError, match="must be above 0"):
        make_plan(config, gpu_memory=-1)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "12.3 ms"),
        (12.3, "12.3 s"),
        (90, "1 min 30 s"),
        (3600 * 5 + 61, "5 h 1 min"),
        (86400 * 3, "3.0 days"),
    ],
)
def test_spans_of_time_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text
