"""What no single key can say: ranges, and whether keys, data and run directory fit together.

Runs on a laptop before anything is allocated: no torch, and of the data only manifests are read.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from drivetrain.conf.compose import load
from drivetrain.conf.errors import ConfigError
from drivetrain.conf.ranges import ABOVE_ZERO, RANGES
from drivetrain.conf.schema import SCHEMAS, DataConfig, ModelConfig, MuonConfig, RunConfig, ZeroConfig

OWN_TOKENIZER = "leave tokenizer out to use the one the data was built with"
BUILD = "`drivetrain data build INPUT... --tokenizer DIR --out DIR`"


# What a step of every stage logs, beside eval/* and rl/*.
METRICS = ("loss", "grad_norm", "step_seconds", "tokens_per_second", "mfu")


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
    if data:
        problems += _data(config)
    if problems:
        raise ConfigError("\n".join(problems))


def flatten(config: RunConfig) -> dict[str, Any]:
    """Every dotted key and its plain value; enums as their names, a mixture's sources by their names."""

    def walk(prefix: str, value: object) -> Iterator[tuple[str, Any]]:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
        if isinstance(value, dict) and value:
            for name, child in value.items():
                yield from walk(f"{prefix}.{name}" if prefix else name, child)
        else:
            yield prefix, value.name if isinstance(value, Enum) else value

    return dict(walk("", config))


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
    objective = config.objective
    if objective not in METRICS and not re.fullmatch(r"(eval|rl)(/[\w.-]+)+", objective):
        yield f"objective={objective} is no metric; it must be {_either([*METRICS, 'eval/NAME', 'rl/NAME'])}"


def _model(model: ModelConfig) -> Iterator[str]:
    if model.heads % model.kv_heads:
        yield (
            f"model.heads={model.heads} is not a multiple of model.kv_heads={model.kv_heads}; "
            f"use model.kv_heads={_near_divisors(model.heads, model.kv_heads)}"
        )
    if model.head_dim % 2:
        yield (
            f"model.head_dim={model.head_dim} is odd and rotary embeddings turn pairs of numbers; "
            f"use {_near_multiples(model.head_dim, 2)}"
        )
    scaling = model.rope_scaling
    if scaling is not None and scaling.high_freq_factor <= scaling.low_freq_factor:
        yield (
            f"model.rope_scaling.high_freq_factor={scaling.high_freq_factor} must be above "
            f"low_freq_factor={scaling.low_freq_factor}"
        )
    if model.init_from is not None and not Path(model.init_from).is_dir():
        yield f"model.init_from={model.init_from} is no directory; pass a run or a directory with weights"


def _batch(config: RunConfig) -> Iterator[str]:
    """Whole sequences, shared evenly by ranks, and by the passes of a rank."""
    stage, cluster = config.stage, config.cluster
    if stage.seq_len > config.model.max_seq_len:
        yield (
            f"stage.seq_len={stage.seq_len} is longer than model.max_seq_len={config.model.max_seq_len}; "
            "shorten it, or choose a model with a longer context"
        )
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


def _data(config: RunConfig) -> Iterator[str]:
    data, stage, vocab_size = config.data, config.stage, config.model.vocab_size
    if data.path is None and not data.mixture:
        yield f"data.path is missing: build shards with {BUILD} and pass data.path=DIR"
        return
    if data.path is not None and data.mixture:
        yield f"data.path={data.path} and data.mixture are both given; keep one"
        return
    problems: list[str] = []
    manifests = _manifests(data, problems)
    yield from problems
    for key, manifest in manifests.items():
        if (size := manifest["vocab_size"]) > vocab_size:
            yield (
                f"{key} has a vocabulary of {size} tokens and model.vocab_size={vocab_size}; "
                f"use model.vocab_size={math.ceil(size / 64) * 64}"
            )
        if (found := _tokens(manifest, "train")) <= stage.seq_len:
            yield (
                f"{key} has {found} tokens to train on and stage.seq_len={stage.seq_len} needs at least "
                f"{stage.seq_len + 1}; build more data, or shorten stage.seq_len"
            )
    hashes = {key: manifest["tokenizer_hash"] for key, manifest in manifests.items()}
    first = next(iter(hashes), "")
    for key in hashes:
        if hashes[key] != hashes[first]:
            yield f"{key} and {first} were built with different tokenizers; build one of them again"
    held_out = max((_tokens(manifest, "held_out") for manifest in manifests.values()), default=0)
    if manifests and not problems and stage.eval_every > 0 and held_out <= stage.seq_len:
        yield (
            f"stage.eval_every={stage.eval_every} needs at least {stage.seq_len + 1} held-out tokens "
            f"and the data has {held_out}; build it with a larger --held-out, or use stage.eval_every=0"
        )
    if config.tokenizer is not None:
        yield from _tokenizer(Path(config.tokenizer), manifests)


def _manifests(data: DataConfig, problems: list[str]) -> dict[str, dict[str, Any]]:
    """Manifests by the word that names their directory; what cannot be read goes to `problems`."""
    paths: dict[str, str | None] = {"data.path": data.path}
    if data.mixture:
        paths = {f"data.mixture.{name}.path": source.path for name, source in data.mixture.items()}
    found = {}
    for key, value in paths.items():
        word, directory = f"{key}={value}", Path(str(value))
        if not directory.is_dir():
            problems.append(f"{word} is no directory; build shards with {BUILD}")
        elif not (directory / "manifest.json").is_file():
            problems.append(f"{word} has no manifest.json, so its build did not finish; run {BUILD}")
        else:
            try:
                manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
                _tokens(manifest, "train")
                if not isinstance(manifest["vocab_size"], int) or not manifest["tokenizer_hash"]:
                    raise ValueError("a manifest without its tokenizer")
            except (OSError, ValueError, KeyError, TypeError):
                problems.append(
                    f"{word} has a manifest.json that cannot be read as one; build the data again"
                )
            else:
                found[word] = manifest
    return found


def _tokens(manifest: dict[str, Any], split: str) -> int:
    return sum(int(shard["tokens"]) for shard in manifest["shards"] if shard["split"] == split)


def _tokenizer(directory: Path, manifests: dict[str, dict[str, Any]]) -> Iterator[str]:
    path = directory / "tokenizer.json"
    if not path.is_file():
        yield f"tokenizer={directory} has no tokenizer.json; {OWN_TOKENIZER}"
        return
    try:
        definition = json.loads(path.read_text(encoding="utf-8"))
        vocab = definition["model"]["vocab"]  # a list in Unigram models, whose ids are the positions
        ids = [len(vocab) - 1] if isinstance(vocab, list) else list(vocab.values())
        size = 1 + max([*ids, *(token["id"] for token in definition["added_tokens"])])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        yield f"{path} cannot be read as a tokenizer; copy or train it again"
        return
    for key, manifest in manifests.items():
        if manifest["vocab_size"] != size:
            yield (
                f"tokenizer={directory} has {size} tokens and {key} was built with {manifest['vocab_size']}; "
                f"{OWN_TOKENIZER}"
            )


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


def check_run_dir(config: RunConfig, run_dir: Path) -> None:
    """Whether a new run may be written to a directory.

    Raises:
        ConfigError: it holds a run already, is a file, or cannot be written to.
    """
    if (run_dir / "config.yaml").is_file():
        differences = _differences(load(run_dir / "config.yaml"), config)
        if not differences:
            raise ConfigError(
                f"{run_dir} holds this run already; continue it with `drivetrain resume {run_dir}`"
            )
        raise ConfigError(
            f"{run_dir} holds another run: {'; '.join(differences[:3])}"
            + (f"; and {len(differences) - 3} more" if len(differences) > 3 else "")
            + "; choose another run_dir"
        )
    existing = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(f"run_dir={run_dir}: {existing} is a file; choose another run_dir")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"run_dir={run_dir}: {existing} cannot be written to; choose another run_dir")


def _differences(old: RunConfig, new: RunConfig) -> list[str]:
    ignored = ("run_dir", "cluster.dry_run")  # neither says what the run is
    changed = _changes(old, new)
    return [
        f"{key} is {_show(was)} there and {_show(now)} here"
        for key, (was, now) in changed.items()
        if key not in ignored
    ]


def _changes(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ; a key that one side lacks counts as null there."""
    before, after = flatten(old), flatten(new)
    keys = dict.fromkeys([*before, *after])
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def _show(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


# Keys that a resume may change, and why it may not change the others.
MAY_CHANGE = re.compile(
    r"run_dir|kernels|objective|experiment|(engine|cluster|tracker|checkpoint|alarms)\..*|optim\.(?!name$).*"
    r"|stage\.(steps|micro_batch|eval_.*|save_every|log_every|sample_.*)"
    r"|data\.(path|prefetch|mixture\..*)"
)
BATCH = "the batch of a step is a function of (seed, step) and would be another one"
WHY_NOT = {
    "model": "the checkpoint holds the weights of this model",
    "tokenizer": "the checkpoint has learned the token ids of the old one",
    "optim": "the checkpoint holds the moments of the old optimizer",
    "stage.name": "the checkpoint holds the state of the old stage",
    "data": BATCH,
    "seed": BATCH,
    "stage.seq_len": BATCH,
    "stage.tokens_per_step": BATCH,
}


def check_resume(old: RunConfig, new: RunConfig) -> None:
    """Whether a run may go on with changed settings: another engine or learning rate, but the same batches.

    Raises:
        ConfigError: one sentence a line, for every key that may not change.
    """
    problems = []
    if (names := set(old.data.mixture)) != set(new.data.mixture):
        was, now = (", ".join(sorted(group)) or "none" for group in (names, set(new.data.mixture)))
        problems.append(f"the sources of data.mixture cannot change at a resume ({was}; now {now}): {BATCH}")
    for key, (was, now) in _changes(old, new).items():
        if not MAY_CHANGE.fullmatch(key) and key != "data.mixture":
            why = WHY_NOT.get(key) or WHY_NOT.get(key.partition(".")[0]) or "the loss would be another one"
            problems.append(f"{key} cannot change at a resume ({_show(was)}; now {_show(now)}): {why}")
    if problems:
        raise ConfigError("\n".join(f"{problem}; keep it, or start a new run" for problem in problems))
