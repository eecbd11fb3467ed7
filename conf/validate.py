"""What no single key can say: ranges, and whether keys and data fit together.

Runs on a laptop before anything is allocated: no torch, and of the data no token is read.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drivetrain.conf.changes import has_checkpoint, show
from drivetrain.conf.check_data import data_problems
from drivetrain.conf.compose import flatten
from drivetrain.conf.errors import ConfigError, DrivetrainError
from drivetrain.conf.grpo import grpo_problems
from drivetrain.conf.head_dim import head_dim_problem
from drivetrain.conf.hf_config import differences
from drivetrain.conf.hf_tensors import tensors_of
from drivetrain.conf.hf_values import generation_ends
from drivetrain.conf.lora import lora_problems
from drivetrain.conf.preference import preference_problems
from drivetrain.conf.ranges import ABOVE_ZERO, RANGES
from drivetrain.conf.schema import (
    SCHEMAS,
    Device,
    DpoConfig,
    GrpoConfig,
    Kernels,
    ModelConfig,
    MuonConfig,
    Positions,
    Precision,
    RewardModelConfig,
    RunConfig,
    ZeroConfig,
)
from drivetrain.conf.source import Kind, describes, hf_folder, kind_of, model_of

# What a step of every stage logs.
METRICS = ("loss", "grad_norm", "step_seconds", "tokens_per_second", "mfu")
# What an evaluation adds, as eval/NAME and for each of several sources.
EVALS = ("loss", "bits_per_byte")
ANSWER_EVALS = ("error", "completion_tokens_mean")
PAIR_EVALS = ("loss", "accuracy", "margin")


def validate(config: RunConfig, data: bool = True) -> None:
    """Check a whole run before anything is started.

    Args:
        data: False leaves the shards out, for a plan made before they exist.

    Raises:
        ConfigError: one sentence a line, for every problem that was found.
    """
    problems = [*_ranges(config), *_names(config)]
    if not problems:  # what follows divides by these numbers
        problems += [*_model(config.model), *_batch(config), *_engine(config), *_cluster(config)]
        problems += [*_kernels(config), *lora_problems(config), *preference_problems(config)]
        problems += grpo_problems(config)
    if data:
        problems += data_problems(config)
    if problems:
        raise ConfigError("\n".join(problems))


def _ranges(config: RunConfig) -> Iterator[str]:
    values = flatten(config)
    for key, allowed in RANGES.items():
        if (value := values.get(key)) is not None and value not in allowed:
            yield f"{key}={value} is out of range; it must be {allowed}"
    micro_batch = config.stage.micro_batch
    if micro_batch != "auto" and (not isinstance(micro_batch, int) or micro_batch is True or micro_batch < 1):
        yield f"stage.micro_batch={micro_batch} is neither auto nor a whole number of at least 1"
    for name, source in config.data.mixture.items():
        if source.weight not in ABOVE_ZERO:
            yield f"data.mixture.{name}.weight={source.weight} is out of range; it must be {ABOVE_ZERO}"
    if not all(isinstance(prompt, str) for prompt in config.stage.sample_prompts):
        yield "stage.sample_prompts must be a list of texts; quote those with characters of their own meaning"


def _names(config: RunConfig) -> Iterator[str]:
    for group, schemas in SCHEMAS.items():
        name = getattr(getattr(config, group), "name", None)
        if group not in ("model", "data") and name not in schemas:
            yield f"{group}.name={name} is no option; it must be {_either(schemas)}"
    measured = metrics_of(config)
    if config.objective not in measured:
        yield (
            f"objective={config.objective} is not measured by this run; it must be {_either(measured)}"
            + ("" if config.stage.eval_every else ", or turn evaluations on with stage.eval_every")
        )


def metrics_of(config: RunConfig) -> list[str]:
    """What a run can be judged by; `eval/loss`, the default, stands for `loss` where nothing is evaluated."""
    if not config.stage.eval_every:
        return [*METRICS, "eval/loss"]
    if isinstance(config.stage, GrpoConfig):
        return [*METRICS, "eval/loss", *(f"eval/{name}" for name in ANSWER_EVALS)]
    sources = [f"{name}/" for name in sorted(config.data.mixture)] if len(config.data.mixture) > 1 else []
    evals = PAIR_EVALS if isinstance(config.stage, (DpoConfig, RewardModelConfig)) else EVALS
    return [*METRICS, *(f"eval/{source}{name}" for source in ["", *sources] for name in evals)]


def _model(model: ModelConfig) -> Iterator[str]:
    if model.heads % model.kv_heads:
        yield (
            f"model.heads={model.heads} is not a multiple of model.kv_heads={model.kv_heads}; "
            f"use model.kv_heads={_near_divisors(model.heads, model.kv_heads)}"
        )
    if model.head_dim % 2 and model.positions is Positions.rope:
        yield (
            f"model.head_dim={model.head_dim} is odd and rotary embeddings turn pairs of numbers; "
            f"use {_near_multiples(model.head_dim, 2)}"
        )
    learned = model.positions is Positions.learned
    if learned and (model.rope_scaling is not None or model.nope_every):
        key = "nope_every" if model.nope_every else "rope_scaling"
        yield f"model.{key} is about rotary embeddings, which model.positions=learned has not; use positions=rope"
    scaling = model.rope_scaling
    if scaling is not None and scaling.high_freq_factor <= scaling.low_freq_factor:
        yield (
            f"model.rope_scaling.high_freq_factor={scaling.high_freq_factor} must be above "
            f"low_freq_factor={scaling.low_freq_factor}"
        )
    if model.init_from is not None:
        yield from _init_from(model, Path(model.init_from))


def _init_from(model: ModelConfig, source: Path) -> Iterator[str]:
    """Whether there are whole weights, and whether they are those of this model."""
    word, kind = f"model.init_from={source}", kind_of(source)
    if not source.is_dir():
        yield f"{word} is no directory; pass a run or a directory with weights"
    elif kind is None:
        yield f"{word} has neither a checkpoint nor a config.json; pass a run directory or a Hugging Face directory"
    elif kind is Kind.run and not has_checkpoint(source):
        yield f"{word} holds no whole checkpoint; pass a run directory that has saved one"
    elif kind is Kind.hugging_face or describes(source):
        try:
            theirs = model_of(source)
            gaps = differences(model, theirs)
            if gaps:
                yield (
                    f"{word} is another model: "
                    + ", ".join(
                        f"{key} is {show(was)} there and {show(here)} here"
                        for key, (here, was) in gaps.items()
                    )
                    + "; use model=auto to take all of it from there"
                )
                return
            generation_ends(hf_folder(source), theirs.vocab_size)  # a run keeps them for its export
            if kind is Kind.hugging_face:
                tensors_of(source, theirs)
        except DrivetrainError as error:
            yield f"{word}: {error}"


def _batch(config: RunConfig) -> Iterator[str]:
    """Whole sequences, shared evenly by ranks, and by the passes of a rank."""
    stage, cluster = config.stage, config.cluster
    if stage.seq_len > config.model.max_seq_len:
        yield (
            f"stage.seq_len={stage.seq_len} is longer than model.max_seq_len={config.model.max_seq_len}; "
            "shorten it, or choose a model with a longer context"
        )
    if isinstance(stage, GrpoConfig):
        return  # its rows are packed anew at every step, and shared out as they are
    world = cluster.nodes * cluster.nproc
    passes = 1 if stage.micro_batch == "auto" else stage.micro_batch
    tokens = f"stage.tokens_per_step={stage.tokens_per_step}"
    fit = (
        f"use stage.tokens_per_step={_near_multiples(stage.tokens_per_step, stage.seq_len * world * passes)}"
    )
    sequences, rest = divmod(stage.tokens_per_step, stage.seq_len)
    if rest:
        yield f"{tokens} is not a multiple of stage.seq_len={stage.seq_len}; {fit}"
    elif sequences % world:
        yield (
            f"{tokens} makes {sequences} sequences, which {world} ranks (cluster.nodes={cluster.nodes} "
            f"times cluster.nproc={cluster.nproc}) cannot share evenly; {fit}"
        )
    elif sequences // world % passes:
        share = sequences // world
        yield (
            f"a rank's {share} sequences a step are not a multiple of stage.micro_batch={passes}; "
            f"use stage.micro_batch={_near_divisors(share, passes)}"
        )


def _engine(config: RunConfig) -> Iterator[str]:
    engine, optim = config.engine, config.optim
    world = config.cluster.nodes * config.cluster.nproc
    if world % engine.replicas:
        yield (
            f"{world} ranks cannot form engine.replicas={engine.replicas} equal groups; "
            f"use engine.replicas={_near_divisors(world, engine.replicas)}"
        )
    if isinstance(engine, ZeroConfig):
        if engine.replicas > 1:
            yield f"engine.replicas={engine.replicas} needs engine=fsdp; use it, or engine.replicas=1"
        if engine.offload and engine.zero_stage == 0:
            yield (
                "engine.offload=true needs partitioned optimizer state and engine.zero_stage=0 has none; "
                "use engine.zero_stage=1, 2 or 3"
            )
        if engine.compile and engine.zero_stage == 3:
            yield (
                "engine.compile=true does not work with engine.zero_stage=3, whose parameters change shape "
                "under the compiled graph as they are gathered and freed; use engine=fsdp, or compile=false"
            )
        if isinstance(optim, MuonConfig):
            yield "optim=muon needs whole matrices and so engine=fsdp; use it, or optim=adamw"
    if optim.warmup_steps > config.stage.steps:
        yield (
            f"optim.warmup_steps={optim.warmup_steps} is more than stage.steps={config.stage.steps}, so the "
            f"learning rate would never reach optim.lr; use {config.stage.steps} or fewer"
        )


def _cluster(config: RunConfig) -> Iterator[str]:
    if config.cluster.name == "local" and config.cluster.nodes != 1:
        nodes = config.cluster.nodes
        yield f"cluster.nodes={nodes} and cluster=local is this machine alone; use cluster.nodes=1"


def _kernels(config: RunConfig) -> Iterator[str]:
    kernels, head_dim = config.kernels, config.model.head_dim
    if kernels not in (Kernels.triton, Kernels.flash_attn):
        return
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and kernels is Kernels.triton
    if config.cluster.device is Device.cpu and not interpreted:
        yield f"kernels={kernels.name} needs a GPU and cluster.device=cpu; use kernels=sdpa"
    fp32 = config.engine.precision is Precision.fp32
    if fp32 and kernels is Kernels.flash_attn:
        yield "kernels=flash_attn takes bf16, not engine.precision=fp32; use kernels=triton or kernels=sdpa"
    if problem := head_dim_problem(head_dim, config.engine.precision):
        yield f"kernels={kernels.name} {problem}"


def _near_multiples(value: int, unit: int) -> str:
    below = value // unit * unit
    return _either([str(multiple) for multiple in (below, below + unit) if multiple])


def _near_divisors(number: int, value: int) -> str:
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    divisors = sorted({*small, *(number // divisor for divisor in small)})
    below = max(divisor for divisor in divisors if divisor <= value)
    above = next((divisor for divisor in divisors if divisor > value), None)
    return _either([str(divisor) for divisor in (below, above) if divisor])


def _either(names: Any) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else str(last)
