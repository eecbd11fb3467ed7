import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_type_hints

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from drivetrain.conf.compose import compose, options
from drivetrain.conf.errors import ConfigError
from drivetrain.conf.ranges import RANGES
from drivetrain.conf.schema import SCHEMAS, RopeScaling, RunConfig
from drivetrain.conf.validate import validate

Make = Callable[..., Path]
BUILD = "`drivetrain data build INPUT... --tokenizer DIR --out DIR`"


def problem(config: RunConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(config)
    return str(caught.value)


def test_the_default_run_with_data_is_valid(shards: Make) -> None:
    validate(compose([f"data.path={shards()}"]))
    validate(compose([f"data.path={shards('b')}", "engine=zero", "cluster.nproc=8", "stage.micro_batch=4"]))


def test_every_model_and_experiment_is_valid(shards: Make) -> None:
    data = shards(train=10**6)
    for words in ("model=gpt2_xl", "model=llama3_70b", "experiment=gpt2_124m"):
        validate(compose([f"data.path={data}", "cluster.nproc=8", words]))


@pytest.mark.parametrize("experiment", options("experiment"))
@pytest.mark.parametrize("engine", options("engine"))
def test_every_experiment_runs_on_every_engine(
    experiment: str, engine: str, shards: Make, saved_run: Path
) -> None:
    words = [f"experiment={experiment}", f"engine={engine}"]
    stage = compose(words).stage.name
    if stage == "grpo":
        words.append(f"model.init_from={saved_run}")
    else:
        words.append(f"data.path={shards(train=10**6, held_out=10**5, chat=stage == 'sft')}")
    config = compose(words)
    validate(config)
    assert config.engine.name == engine


SINGLE = {
    "optim.lr=0": "optim.lr=0.0 is out of range; it must be above 0",
    "optim.lr=nan": "optim.lr=nan is out of range; it must be above 0",
    "optim.lr=inf": "optim.lr=inf is out of range; it must be above 0",
    "optim.beta2=1": "optim.beta2=1.0 is out of range; it must be at least 0 and below 1",
    "optim.min_lr_ratio=1.5": "optim.min_lr_ratio=1.5 is out of range; it must be between 0 and 1",
    "optim.decay_ratio=0": "optim.decay_ratio=0.0 is out of range; it must be above 0 and at most 1",
    "stage.steps=0": "stage.steps=0 is out of range; it must be at least 1",
    "seed=-1": f"seed=-1 is out of range; it must be between 0 and {2**63 - 1}",
    f"seed={10**400}": f"seed={10**400} is out of range; it must be between 0 and {2**63 - 1}",
    "checkpoint.keep_last=0": "checkpoint.keep_last=0 is out of range; it must be at least 1",
    "engine=zero engine.zero_stage=4": "engine.zero_stage=4 is out of range; it must be between 0 and 3",
    "stage.micro_batch=most": "stage.micro_batch=most is neither auto nor a whole number of at least 1",
    "stage.micro_batch=0": "stage.micro_batch=0 is neither auto nor a whole number of at least 1",
    "stage.micro_batch=true": "stage.micro_batch=True is neither auto nor a whole number of at least 1",
    "stage.sample_prompts=[{a:b}]": (
        "stage.sample_prompts must be a list of texts; quote those with characters of their own meaning"
    ),
    "objective=evil": (
        "objective=evil is not measured by this run; it must be loss, grad_norm, step_seconds, "
        "tokens_per_second, mfu, eval/loss or eval/bits_per_byte"
    ),
    "objective=eval/typo": (
        "objective=eval/typo is not measured by this run; it must be loss, grad_norm, step_seconds, "
        "tokens_per_second, mfu, eval/loss or eval/bits_per_byte"
    ),
    "objective=eval/bits_per_byte stage.eval_every=0": (
        "objective=eval/bits_per_byte is not measured by this run; it must be loss, grad_norm, step_seconds, "
        "tokens_per_second, mfu or eval/loss, or turn evaluations on with stage.eval_every"
    ),
    "model.kv_heads=2": "model.heads=3 is not a multiple of model.kv_heads=2; use model.kv_heads=1 or 3",
    "model.head_dim=33": (
        "model.head_dim=33 is odd and rotary embeddings turn pairs of numbers; use 32 or 34"
    ),
    "model=llama3_1b model.rope_scaling.high_freq_factor=1": (
        "model.rope_scaling.high_freq_factor=1.0 must be above low_freq_factor=1.0"
    ),
    "kernels=flash_attn cluster.device=cpu": (
        "kernels=flash_attn needs a GPU and cluster.device=cpu; use kernels=sdpa"
    ),
    "kernels=triton model.head_dim=136 engine.precision=fp32": (
        "kernels=triton takes a model.head_dim that is a multiple of 8 up to 128 in fp32, not 136; "
        "use kernels=sdpa"
    ),
    "kernels=flash_attn engine.precision=fp32": (
        "kernels=flash_attn takes bf16, not engine.precision=fp32; use kernels=triton or kernels=sdpa"
    ),
    "kernels=triton model.head_dim=258": (
        "kernels=triton takes a model.head_dim that is a multiple of 8 up to 256 in bf16, not 258; "
        "use kernels=sdpa"
    ),
    "model.init_from=/no/such": (
        "model.init_from=/no/such is no directory; pass a run or a directory with weights"
    ),
    "stage.seq_len=2048": (
        "stage.seq_len=2048 is longer than model.max_seq_len=1024; "
        "shorten it, or choose a model with a longer context"
    ),
    "stage.tokens_per_step=65000": (
        "stage.tokens_per_step=65000 is not a multiple of stage.seq_len=1024; "
        "use stage.tokens_per_step=64512 or 65536"
    ),
    "stage.tokens_per_step=1000": (
        "stage.tokens_per_step=1000 is not a multiple of stage.seq_len=1024; use stage.tokens_per_step=1024"
    ),
    "cluster.nproc=3": (
        "stage.tokens_per_step=65536 makes 64 sequences, which 3 ranks (cluster.nodes=1 times "
        "cluster.nproc=3) cannot share evenly; use stage.tokens_per_step=64512 or 67584"
    ),
    "stage.micro_batch=5 cluster.nproc=4": (
        "a rank's 16 sequences a step are not a multiple of stage.micro_batch=5; use stage.micro_batch=4 or 8"
    ),
    "stage.micro_batch=100": (
        "a rank's 64 sequences a step are not a multiple of stage.micro_batch=100; use stage.micro_batch=64"
    ),
    "engine.replicas=3 cluster.nproc=8": (
        "8 ranks cannot form engine.replicas=3 equal groups; use engine.replicas=2 or 4"
    ),
    "engine=zero engine.replicas=2 cluster.nproc=2": (
        "engine.replicas=2 needs engine=fsdp; use it, or engine.replicas=1"
    ),
    "engine=zero engine.zero_stage=0 engine.offload=true": (
        "engine.offload=true needs partitioned optimizer state and engine.zero_stage=0 has none; "
        "use engine.zero_stage=1, 2 or 3"
    ),
    "engine=zero engine.zero_stage=3 engine.compile=true": (
        "engine.compile=true does not work with engine.zero_stage=3, whose parameters change shape under the "
        "compiled graph as they are gathered and freed; use engine=fsdp, or compile=false"
    ),
    "engine=zero optim=muon": "optim=muon needs whole matrices and so engine=fsdp; use it, or optim=adamw",
    "stage.steps=50": (
        "optim.warmup_steps=100 is more than stage.steps=50, so the learning rate would never reach "
        "optim.lr; use 50 or fewer"
    ),
    "cluster.nodes=2": "cluster.nodes=2 and cluster=local is this machine alone; use cluster.nodes=1",
}


def test_each_source_of_a_mixture_can_be_the_objective(shards: Make) -> None:
    data = f"data.mixture={{a: {{path: {shards('a')}}}, b: {{path: {shards('b')}}}}}"
    validate(compose([data, "objective=eval/b/loss"]))
    assert "eval/a/loss" in problem(compose([data, "objective=eval/c/loss"]))
    validate(compose([data, "stage.eval_every=0"]))  # the default, eval/loss, stands for loss


def test_weights_to_start_from_must_be_saved_ones(shards: Make, tmp_path: Path) -> None:
    words = [f"data.path={shards()}", f"model.init_from={tmp_path / 'run'}"]
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000100"
    checkpoint.mkdir(parents=True)
    assert problem(compose(words)) == (
        f"model.init_from={tmp_path / 'run'} holds no whole checkpoint; pass a run directory that has saved one"
    )
    (checkpoint / "complete.json").touch()
    validate(compose(words))
    validate(compose([words[0], f"model.init_from={checkpoint}"]))


@pytest.mark.parametrize("words", SINGLE, ids=lambda words: words[:60])
def test_one_fault_gets_one_sentence(words: str, shards: Make) -> None:
    assert problem(compose([f"data.path={shards()}", *words.split(" ")])) == SINGLE[words]


def test_every_problem_is_listed(shards: Make) -> None:
    message = problem(compose(["optim.lr=-1", "stage.steps=0", "objective=x"]))
    assert [line.split("=")[0].split(" ")[0] for line in message.splitlines()] == [
        "stage.steps",
        "optim.lr",
        "objective",
        "data.path",
    ]


def numbers(prefix: str, schema: type) -> Iterator[str]:
    for name, kind in get_type_hints(schema).items():
        key = prefix + name
        for below in SCHEMAS.get(key, {}).values():
            yield from numbers(f"{key}.", below)
        if kind in (int, float, int | None, float | None):
            yield key
        elif dataclasses.is_dataclass(kind) and key not in SCHEMAS:
            assert isinstance(kind, type)
            yield from numbers(f"{key}.", kind)


def test_every_number_of_the_schema_has_a_range() -> None:
    assert {*numbers("", RunConfig), *numbers("model.rope_scaling.", RopeScaling)} == set(RANGES)


COUNTS = st.integers(1, 12)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(seq_len=COUNTS, tokens=st.integers(1, 400), nproc=COUNTS, micro=st.one_of(st.just("auto"), COUNTS))
@example(seq_len=4, tokens=96, nproc=3, micro=4)
@example(seq_len=4, tokens=96, nproc=3, micro=3)
def test_exactly_the_divisible_batches_are_valid(
    seq_len: int, tokens: int, nproc: int, micro: int | str, base: RunConfig
) -> None:
    passes = 1 if micro == "auto" else int(micro)
    divisible = tokens % (seq_len * nproc * passes) == 0
    stage = dataclasses.replace(base.stage, seq_len=seq_len, tokens_per_step=tokens, micro_batch=micro)
    config = dataclasses.replace(base, stage=stage, cluster=dataclasses.replace(base.cluster, nproc=nproc))
    if divisible:
        validate(config)
    else:
        assert len(problem(config).splitlines()) == 1


@pytest.fixture
def base(shards: Make) -> RunConfig:
    return compose([f"data.path={shards()}"])


def test_suggested_values_are_valid(base: RunConfig) -> None:
    base.stage.tokens_per_step, base.cluster.nproc, base.stage.micro_batch = 50_001, 6, 2
    for value in problem(base).rpartition("=")[2].split(" or "):
        base.stage.tokens_per_step = int(value)
        validate(base)


def test_validation_imports_no_torch() -> None:
    code = "import sys, drivetrain.conf.validate; sys.exit('torch' in sys.modules)"
    env = {**os.environ, "PYTHONSAFEPATH": "1"}
    assert subprocess.run([sys.executable, "-c", code], env=env, timeout=60).returncode == 0
