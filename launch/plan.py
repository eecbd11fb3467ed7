"""`drivetrain plan`: what a job will need and how long it will take, before anything is started."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from drivetrain.conf.errors import ConfigError
from drivetrain.conf.schema import Checkpointing, FsdpConfig, Precision, RunConfig, ZeroConfig
from drivetrain.conf.units import human_bytes
from drivetrain.model.flops import (
    GPUS,
    ParameterCount,
    find_gpu,
    parameter_count,
    peak_flops,
    train_flops_per_token,
    trained_count,
)
from drivetrain.model.memory import (
    PARTS,
    START,
    USABLE,
    Memory,
    choose_micro_batch,
    estimate,
    sequences_per_rank,
)
from drivetrain.model.memory_engines import moment_bytes

MAX_RANKS = 4096
RANKS_PER_NODE = 8
ESTIMATE = (
    "Activations and working sets are an estimate that has not been compared with measured peaks of a GPU yet; "
    "torch.compile usually needs less."
)
ROWS = {
    "weights": "Weights",
    "optimizer": "Optimizer: moments, master copy",
    "gradients": "Gradients",
    "buffers": "Gathered weights, buffers",
    "activations": "Activations kept for backward",
    "working_set": "Working set: logits, or one block",
}
COLUMNS = {
    "loss": "loss",
    "backward_begins": "backward, first",
    "backward_ends": "last",
    "update": "update",
    START: "start-up",
}
WHEN = {
    "loss": "at the loss",
    "backward_begins": "as the backward pass begins",
    "backward_ends": "as the backward pass ends",
    "update": "at the update",
    START: "as every rank builds the whole model",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Fix:
    """Overrides that make the job fit, and its peak then, in bytes."""

    overrides: list[str]
    peak: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Numbers of one job. Memory in bytes on each rank, time in seconds.

    Attributes:
        memory: by moment of a step and by part; see `drivetrain.model.memory`.
        learning_rate: at its highest, which is `optim.lr`; where none is given, the stage's usual one.
        trained_parameters: all of them, or those of LoRA's adapters, which `parameters` leaves out.
        host_memory: what each rank holds in the CPU's memory, for offload.
        usable_memory: the share of `gpu_memory` that a plan may fill.
        passes: forward and backward passes of a rank in each step.
        fix: the smallest change that makes the job fit; None where it fits, or where none was found.
    """

    model: str
    stage: str
    engine: str
    ranks: int
    shard_ranks: int
    checkpointing: str
    precision: str
    gpu: str
    gpu_memory: float
    usable_memory: float
    parameters: ParameterCount
    trained_parameters: int
    micro_batch: int
    micro_batch_chosen: bool
    passes: int
    seq_len: int
    memory: dict[str, dict[str, int]]
    peak: int
    peak_moment: str
    host_memory: int
    fits: bool
    fix: Fix | None
    flops_per_token: float
    flops_per_step: float
    tokens_per_step: int
    tokens_total: int
    learning_rate: float
    warmup_steps: int
    schedule: str
    mfu: float
    tokens_per_second: float
    step_seconds: float
    wall_seconds: float
    gpu_hours: float
    checkpoint_bytes: int

    @property
    def start(self) -> int:
        """Bytes of weights on each rank before the first step, where that is more than a step needs to hold."""
        return sum(self.memory.get(START, {}).values())


def make_plan(
    config: RunConfig, gpu_memory: float | None = None, mfu: float = 0.4, gpu: str = "H100 SXM"
) -> Plan:
    """Plan a validated job.

    Args:
        gpu_memory: bytes; by default what the GPU's data sheet says.
        mfu: share of the GPU's peak that is assumed, above 0 and at most 1.
        gpu: a name from `drivetrain.model.flops.GPUS`, or one that contains it.

    Raises:
        ConfigError: an unknown GPU, or an mfu or memory that cannot be.
    """
    found = find_gpu(gpu)
    if found is None:
        raise ConfigError(f"--gpu {gpu!r} is not known; use {', '.join(known.name for known in GPUS)}")
    if not 0 < mfu <= 1:
        raise ConfigError(f"--mfu {mfu} is out of range; it is a share of the peak, above 0 and at most 1")
    if gpu_memory is not None and not gpu_memory > 0:
        raise ConfigError(f"gpu_memory={gpu_memory} bytes cannot be; it must be above 0")
    available = gpu_memory or found.memory
    size, memory = _memory(config, available)
    fits = memory.peak <= USABLE * available
    count, (_, trained) = parameter_count(config.model), trained_count(config.model, config.lora)
    stage, engine = config.stage, config.engine
    ranks = config.cluster.nodes * config.cluster.nproc
    # The trainer lets tensor cores multiply fp32 (float32_matmul_precision "high").
    peak = peak_flops(found.name, "bf16" if engine.precision is Precision.bf16 else "tf32")
    assert peak is not None
    flops = train_flops_per_token(config.model, stage.seq_len, config.lora)
    rate = mfu * peak * ranks / flops
    tokens = stage.tokens_per_step * stage.steps
    return Plan(
        model=config.model.name,
        stage=stage.name,
        engine=_engine_name(config),
        ranks=ranks,
        shard_ranks=ranks // engine.replicas,
        checkpointing=engine.checkpointing.value,
        precision=engine.precision.value,
        gpu=found.name,
        gpu_memory=available,
        usable_memory=USABLE * available,
        parameters=count,
        trained_parameters=trained.total,
        micro_batch=size,
        micro_batch_chosen=stage.micro_batch == "auto",
        passes=sequences_per_rank(config) // size,
        seq_len=stage.seq_len,
        memory=memory.by_moment,
        peak=memory.peak,
        peak_moment=memory.peak_moment,
        host_memory=memory.host,
        fits=fits,
        fix=None if fits else smallest_fix(config, available),
        flops_per_token=flops,
        flops_per_step=flops * stage.tokens_per_step,
        tokens_per_step=stage.tokens_per_step,
        tokens_total=tokens,
        learning_rate=config.optim.lr,
        warmup_steps=config.optim.warmup_steps,
        schedule=config.optim.schedule.value,
        mfu=mfu,
        tokens_per_second=rate,
        step_seconds=stage.tokens_per_step / rate,
        wall_seconds=tokens / rate,
        gpu_hours=tokens / rate * ranks / 3600,
        checkpoint_bytes=4 * trained.total + moment_bytes(config.optim, trained),
    )


def _memory(config: RunConfig, available: float) -> tuple[int, Memory]:
    """The micro-batch, chosen where it is auto, and its plan."""
    if config.stage.micro_batch == "auto":
        size = choose_micro_batch(config, available)
    else:
        size = int(config.stage.micro_batch)
    return size, estimate(config, size)


def _engine_name(config: RunConfig) -> str:
    match config.engine:
        case ZeroConfig(zero_stage=stage, offload=offload):
            return f"ZeRO-{stage}{' with offload' if offload else ''}"
        case _ if config.engine.replicas > 1:
            return f"FSDP2, {config.engine.replicas} replicas"
        case _:
            return "FSDP2"


def smallest_fix(config: RunConfig, available: float) -> Fix | None:
    """The first of a list of changes, from the cheapest to the dearest, after which the job fits.

    Each change is tried with the configured micro-batch before it is tried with the largest that fits: a smaller
    micro-batch alone; recomputation; a higher ZeRO stage; more ranks of a node; the optimizer on the CPU; more
    nodes.
    """
    given = config.stage.micro_batch
    for changes in _changes(config):
        changed = _apply(config, changes)
        sequences = changed.stage.tokens_per_step // changed.stage.seq_len
        if sequences % (changed.cluster.nodes * changed.cluster.nproc):
            continue
        candidates = [_apply(changed, {"stage.micro_batch": "auto"})]
        if given != "auto" and sequences_per_rank(changed) % given == 0:
            candidates.insert(0, changed)
        for candidate in candidates:
            size, memory = _memory(candidate, available)
            if memory.peak <= USABLE * available:
                words = [f"{key}={_word(value)}" for key, value in changes.items()]
                if given not in ("auto", size):
                    words.insert(0, f"stage.micro_batch={size}")
                return Fix(overrides=words, peak=memory.peak)
    return None


def _changes(config: RunConfig) -> Iterator[dict[str, Any]]:
    recompute: list[dict[str, Any]] = [{}]
    if config.engine.checkpointing is Checkpointing.none:
        recompute.append({"engine.checkpointing": Checkpointing.selective})
    if config.engine.checkpointing is not Checkpointing.block:
        recompute.append({"engine.checkpointing": Checkpointing.block})
    partition: list[dict[str, Any]] = [{}]
    offload: list[dict[str, Any]] = []
    if isinstance(config.engine, ZeroConfig):
        stages = range(config.engine.zero_stage + 1, 3 if config.engine.compile else 4)
        partition += [{"engine.zero_stage": stage} for stage in stages]
        offload = [change | {"engine.offload": True} for change in partition]
        offload = [change for change in offload if change.get("engine.zero_stage", config.engine.zero_stage)]
    elif isinstance(config.engine, FsdpConfig) and not config.engine.reshard_after_forward:
        partition.append({"engine.reshard_after_forward": True})
    if config.engine.replicas > 1:
        partition.append({"engine.replicas": 1})
    for first in partition:
        for second in recompute:
            yield first | second
    wider = [ranks | partition[-1] | second for ranks in _more_ranks(config) for second in recompute]
    yield from (change for change in wider if "cluster.nodes" not in change)
    yield from (first | recompute[-1] for first in offload)
    yield from (change for change in wider if "cluster.nodes" in change)


def _more_ranks(config: RunConfig) -> Iterator[dict[str, Any]]:
    """Twice as many ranks, again and again: a node's first, then more nodes."""
    nodes, nproc = config.cluster.nodes, config.cluster.nproc
    while nodes * nproc * 2 <= MAX_RANKS:
        if nproc * 2 <= RANKS_PER_NODE:
            nproc *= 2
        else:
            nodes *= 2
        yield {
            key: value
            for key, value, old in (
                ("cluster.nodes", nodes, config.cluster.nodes),
                ("cluster.nproc", nproc, config.cluster.nproc),
            )
            if value != old
        }


def _apply(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    for key, value in changes.items():
        group, name = key.split(".")
        config = replace(config, **{group: replace(getattr(config, group), **{name: value})})
    return config


def _word(value: object) -> str:
    if isinstance(value, Checkpointing):
        return value.value
    return str(value).lower() if isinstance(value, bool) else str(value)


def render(plan: Plan) -> Group:
    """Tables for a rich console, at their best from 90 columns on."""
    head = Text.assemble(
        (plan.model, "bold"),
        f" · {plan.stage} · {plan.engine} {plan.precision} · {plan.ranks} rank{'s' * (plan.ranks > 1)}"
        f" · checkpointing {plan.checkpointing} · {plan.gpu}, {plan.gpu_memory / 1e9:.0f} GB",
    )
    return Group(head, _memory_table(plan), _verdict(plan), _numbers_table(plan), Text(ESTIMATE, "dim"))


def _memory_table(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
    table.add_column("Memory of a rank", footer="Total", no_wrap=True)
    for moment in plan.memory:
        total = sum(plan.memory[moment].values())
        style = "bold" if moment == plan.peak_moment else ""
        table.add_column(
            COLUMNS[moment],
            footer=Text(human_bytes(total), style or "not bold"),
            justify="right",
            no_wrap=True,
        )
    for part in PARTS:
        table.add_row(ROWS[part], *(human_bytes(parts[part]) for parts in plan.memory.values()))
    return table


def _verdict(plan: Plan) -> Text:
    share = f"{USABLE:.0%} of {plan.gpu_memory / 1e9:.0f} GB, {human_bytes(plan.usable_memory)}"
    when = WHEN[plan.peak_moment]
    if plan.fits:
        return Text.assemble(
            ("fits", "bold green"), f": the peak of {human_bytes(plan.peak)} {when} is within {share}\n"
        )
    text = Text.assemble(
        ("does not fit", "bold red"), f": the peak of {human_bytes(plan.peak)} {when} is above {share}\n"
    )
    if plan.start > plan.usable_memory:
        text.append("DeepSpeed builds the whole model on every rank before it divides it; use engine=fsdp\n")
    elif plan.fix is None:
        text.append("nothing that was tried makes it fit; use a smaller model, or shorter sequences\n")
    else:
        text.append("the smallest change that makes it fit: ")
        text.append(" ".join(plan.fix.overrides), "bold")
        text.append(f" (peak {human_bytes(plan.fix.peak)})\n")
        if any(word.startswith("cluster.nodes=") for word in plan.fix.overrides):
            text.append("several nodes need a cluster, not cluster=local\n", "dim")
    return text


def _numbers_table(plan: Plan) -> Table:
    count = plan.parameters
    embedding = f"{_number(count.embedding)} embedding" + (
        f", {_number(count.head)} head" if count.head else " = head"
    )
    chosen = "chosen: the largest that fits" if plan.micro_batch_chosen else "as configured"
    if plan.micro_batch_chosen and not plan.fits:
        chosen = "the smallest there is"
    passes = "one pass" if plan.passes == 1 else f"{plan.passes:,} passes"
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    blocks = f"{_number(count.blocks)} in blocks, {embedding}"
    table.add_row("Parameters", _number(count.total), blocks)
    if plan.trained_parameters != count.total:
        share = plan.trained_parameters / count.total
        table.add_row("Trained", _number(plan.trained_parameters), f"{share:.2%} of them more, as adapters")
    table.add_row("Micro-batch", f"{plan.micro_batch:,} × {plan.seq_len:,}", f"{chosen}; {passes} a step")
    warmup = f"after {plan.warmup_steps:,} steps of warm-up; optim.lr"
    table.add_row("Learning rate", f"{plan.learning_rate:.3g}", f"{plan.schedule}, {warmup}")
    table.add_row(
        "FLOPs a token", _number(plan.flops_per_token), "forward and backward, recomputation left out"
    )
    table.add_row("FLOPs a step", _number(plan.flops_per_step), f"{plan.tokens_per_step:,} tokens")
    steps = plan.tokens_total // plan.tokens_per_step
    per_parameter = plan.tokens_total / count.total
    table.add_row(
        "Tokens", _number(plan.tokens_total), f"{steps:,} steps; {per_parameter:,.3g} tokens a parameter"
    )
    table.add_row(
        "Tokens a second", _number(plan.tokens_per_second), f"if {plan.mfu:.0%} of the GPUs' peak is reached"
    )
    table.add_row("Step", duration(plan.step_seconds))
    table.add_row(
        "Wall time", duration(plan.wall_seconds), f"{_hours(plan.gpu_hours)} GPU hours, without evaluations"
    )
    table.add_row("Checkpoint", human_bytes(plan.checkpoint_bytes), "fp32 weights and moments, on disk")
    if plan.host_memory:
        table.add_row(
            "CPU memory", human_bytes(plan.host_memory), "of each rank, for the offloaded optimizer"
        )
    return table


def _number(number: float) -> str:
    """A count for people: 8.03 B; beyond a quadrillion in powers of ten."""
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if scale <= number < 1e15:
            return f"{number / scale:.3g} {unit}"
    return f"{number:.2e}" if number >= 1e15 else f"{number:.3g}"


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


def duration(seconds: float) -> str:
    """A span of time in the one or two units that matter."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours / 24:,.1f} days"
