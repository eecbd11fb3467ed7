import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from drivetrain.conf.compose import compose, to_yaml
from drivetrain.conf.errors import ConfigError
from drivetrain.conf.ranges import RANGES
from drivetrain.conf.schema import SCHEMAS, RopeScaling, RunConfig
from drivetrain.conf.validate import check_resume, check_run_dir, validate

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
    for words in [*([f"model={name}"] for name in ("gpt2_xl", "llama3_70b")), ["experiment=gpt2_124m"]]:
        validate(compose([f"data.path={data}", "cluster.nproc=8", *words]))


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
        "objective=evil is no metric; it must be loss, grad_norm, step_seconds, tokens_per_second, mfu, "
        "eval/NAME or rl/NAME"
    ),
    "model.kv_heads=2": "model.heads=3 is not a multiple of model.kv_heads=2; use model.kv_heads=1 or 3",
    "model.head_dim=33": (
        "model.head_dim=33 is odd and rotary embeddings turn pairs of numbers; use 32 or 34"
    ),
    "model=llama3_1b model.rope_scaling.high_freq_factor=1": (
        "model.rope_scaling.high_freq_factor=1.0 must be above low_freq_factor=1.0"
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


def test_data_is_needed_once(shards: Make) -> None:
    data = shards()
    assert problem(compose([])) == f"data.path is missing: build shards with {BUILD} and pass data.path=DIR"
    both = compose([f"data.path={data}", f"data.mixture={{a: {{path: {data}}}}}"])
    assert problem(both) == f"data.path={data} and data.mixture are both given; keep one"


def test_directories_must_hold_a_manifest(shards: Make, tmp_path: Path) -> None:
    empty, broken = tmp_path / "empty", shards("broken")
    empty.mkdir()
    (broken / "manifest.json").write_text('{"shards": []}')
    words = f"data.mixture={{a: {{path: {tmp_path}/none}}, b: {{path: {empty}}}, c: {{path: {broken}}}}}"
    assert problem(compose([words])).splitlines() == [
        f"data.mixture.a.path={tmp_path}/none is no directory; build shards with {BUILD}",
        f"data.mixture.b.path={empty} has no manifest.json, so its build did not finish; run {BUILD}",
        f"data.mixture.c.path={broken} has a manifest.json that cannot be read as one; build the data again",
    ]


def test_data_must_fit_the_model_and_the_stage(shards: Make) -> None:
    data = shards(vocab_size=50257, train=1024, held_out=1024)
    assert problem(compose([f"data.path={data}"])).splitlines() == [
        f"data.path={data} has a vocabulary of 50257 tokens and model.vocab_size=2048; "
        "use model.vocab_size=50304",
        f"data.path={data} has 1024 tokens to train on and stage.seq_len=1024 needs at least 1025; "
        "build more data, or shorten stage.seq_len",
        "stage.eval_every=100 needs at least 1025 held-out tokens and the data has 1024; "
        "build it with a larger --held-out, or use stage.eval_every=0",
    ]
    enough = shards("enough", train=1025, held_out=0)
    validate(compose([f"data.path={enough}", "stage.eval_every=0"]))


def test_sources_share_a_tokenizer_and_have_weights(shards: Make) -> None:
    a, b = shards("a"), shards("b", tokenizer_hash="b" * 32)
    config = compose([f"data.mixture={{a: {{path: {a}}}, b: {{path: {b}}}}}"])
    assert problem(config) == (
        f"data.mixture.b.path={b} and data.mixture.a.path={a} were built with different tokenizers; "
        "build one of them again"
    )
    config = compose([f"data.mixture={{a: {{path: {a}, weight: 0}}, b: {{path: {a}, weight: inf}}}}"])
    assert problem(config).splitlines() == [
        "data.mixture.a.weight=0.0 is out of range; it must be above 0",
        "data.mixture.b.weight=inf is out of range; it must be above 0",
    ]


@pytest.mark.parametrize(
    ("definition", "reason"),
    [
        (None, "tokenizer={path} has no tokenizer.json; leave tokenizer out"),
        ("{}", "{path}/tokenizer.json cannot be read as a tokenizer"),
        ({"model": {"vocab": {"a": 0, "b": 9}}, "added_tokens": []}, "tokenizer={path} has 10 tokens and"),
        ({"model": {"vocab": [["a", 0.0]]}, "added_tokens": [{"id": 2047}]}, None),
        ({"model": {"vocab": {"a": 2047}}, "added_tokens": [{"id": 5}]}, None),
    ],
)
def test_a_given_tokenizer_is_the_datas(definition: Any, reason: str | None, shards: Make) -> None:
    data = shards()
    path = data / "tokenizer"
    path.mkdir()
    if definition is not None:
        text = definition if isinstance(definition, str) else json.dumps(definition)
        (path / "tokenizer.json").write_text(text)
    config = compose([f"data.path={data}", f"tokenizer={path}"])
    if reason is None:
        validate(config)
    else:
        assert problem(config).startswith(reason.format(path=path))


def test_validation_imports_no_torch() -> None:
    code = "import sys, drivetrain.conf.validate; sys.exit('torch' in sys.modules)"
    env = {**os.environ, "PYTHONSAFEPATH": "1"}
    assert subprocess.run([sys.executable, "-c", code], env=env, timeout=60).returncode == 0


def test_a_run_directory_is_used_once(base: RunConfig, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    check_run_dir(base, run_dir)
    run_dir.mkdir()
    check_run_dir(base, run_dir)
    (run_dir / "config.yaml").write_text(to_yaml(dataclasses.replace(base, run_dir="elsewhere")))
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
