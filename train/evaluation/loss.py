"""The loss of a model on shards: what the training loop's evaluation computes, in one process and on any split."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from drivetrain.conf.compose import load
from drivetrain.conf.errors import ConfigError, DataError
from drivetrain.conf.schema import DataConfig, RunConfig, SftConfig, SourceConfig, TooLong
from drivetrain.conf.source import RUN_CONFIG, Kind, kind_of
from drivetrain.data.batch import Batch
from drivetrain.data.loader import open_sources
from drivetrain.data.sft import HeldOutConversations, open_conversations
from drivetrain.data.shards import Manifest
from drivetrain.data.tokenizer import tokenizer_hash
from drivetrain.train.engine.base import Loss, LossSums
from drivetrain.train.evaluate import HeldOut, Sequences
from drivetrain.train.evaluation.score import BATCH_TOKENS, Advance, silent
from drivetrain.train.losses import next_token_loss
from drivetrain.train.mesh import World
from drivetrain.train.serve import OpenModel

SEQ_LEN = 2048  # where no run says otherwise and the model sees as far
TOKENS = 131072


@dataclass(frozen=True, slots=True)
class Shards:
    """Which tokens are read. With a run's own values they are those of its evaluations.

    Attributes:
        paths: directories by name. The name has a part in which windows are drawn; "data" is that of `data.path`.
        tokens: how many to read in all, shared evenly by the directories.
        seed: of the draw.
    """

    paths: Mapping[str, Path]
    seq_len: int
    tokens: int
    seed: int
    split: str = "held_out"
    too_long: TooLong = TooLong.drop


def run_config(source: Path) -> RunConfig | None:
    """The configuration of the run that the weights come from; None for what was not trained here."""
    place = source.parent.parent if kind_of(source) is Kind.checkpoint else source
    path = place / RUN_CONFIG
    return load(path) if path.is_file() and kind_of(source) is not Kind.hugging_face else None


def paths_of(config: RunConfig) -> dict[str, Path]:
    """The directories that a run is trained on, by name; none where it was imported."""
    data = config.data
    if data.path is not None:
        return {"data": Path(data.path)}
    return {name: Path(each.path) for name, each in data.mixture.items()}


def check_tokenizer(opened: OpenModel, directory: Path) -> Manifest:
    """The manifest of shards that the model's own tokenizer made.

    Raises:
        ConfigError: another one did. DataError: there is no manifest.
    """
    manifest = Manifest.read(directory)
    if manifest.tokenizer_hash != tokenizer_hash(opened.tokenizer_dir):
        raise ConfigError(
            f"{directory} was built with another tokenizer than the model's; build it again with "
            f"`drivetrain data build INPUT... --tokenizer {opened.tokenizer_dir} --out DIR`"
        )
    return manifest


def held_out_loss(opened: OpenModel, shards: Shards, advance: Advance = silent) -> dict[str, Any]:
    """`loss` (nats a token), `perplexity` (its exponential; None: it overflows), `bits_per_byte`, and `tokens`, how
    many were predicted; with several directories also `sources`, each one's loss and bits per byte by name.

    Of conversations the assistant's tokens count. `advance` is told of batches.

    Raises:
        ConfigError: the shards are another tokenizer's, or sequences are longer than the model sees. DataError: a
            directory is missing, has no such split, or not one sequence.
    """
    if shards.seq_len > opened.cfg.max_seq_len:
        raise ConfigError(
            f"sequences of {shards.seq_len} tokens are longer than the model's max_seq_len="
            f"{opened.cfg.max_seq_len}; use a shorter --seq-len"
        )
    sources = _sequences(opened, shards)
    micro_batch = max(1, BATCH_TOKENS[opened.device.type] // shards.seq_len)
    world = World(rank=0, size=1, local_rank=0, device=opened.device)
    held_out = HeldOut(sources, shards.tokens, micro_batch, shards.seed, world, opened.tokenizer_dir)
    runner = _OneProcess(opened, advance)

    def loss(model: nn.Module, batch: Batch) -> LossSums:
        return next_token_loss(model, batch, opened.cfg, opened.backend)

    found = held_out.evaluate(runner, loss)
    result: dict[str, Any] = {
        "loss": found["eval/loss"],
        "perplexity": perplexity(found["eval/loss"]),
        "bits_per_byte": found["eval/bits_per_byte"],
        "tokens": runner.tokens,
    }
    if len(sources) > 1:
        keys = ("loss", "bits_per_byte")
        result["sources"] = {name: {key: found[f"eval/{name}/{key}"] for key in keys} for name in sources}
    return result


def perplexity(loss: float) -> float | None:
    """exp(loss); None where no float holds it (from 709.8 nats on), since JSON has no infinity."""
    try:
        return math.exp(loss)
    except OverflowError:
        return None


def _sequences(opened: OpenModel, shards: Shards) -> dict[str, Sequences]:
    manifests = [check_tokenizer(opened, path) for path in shards.paths.values()]
    mixture = {name: SourceConfig(path=str(path)) for name, path in shards.paths.items()}
    cfg = DataConfig(mixture=mixture)
    chat = {manifest.chat for manifest in manifests}
    if len(chat) > 1:
        raise ConfigError(
            "some of the directories hold conversations and some documents; evaluate them one by one"
        )
    if not chat.pop():
        _check_lengths(manifests, shards)
        return {**open_sources(cfg, shards.split, shards.seq_len)}
    opened_sources = open_conversations(cfg, shards.split)
    wanted = max(1, shards.tokens // len(opened_sources) // shards.seq_len)
    return {
        name: HeldOutConversations(source, shards.seq_len, shards.too_long, shards.seed, name, wanted)
        for name, source in opened_sources.items()
    }


def _check_lengths(manifests: list[Manifest], shards: Shards) -> None:
    """A window lies in one shard."""
    for path, manifest in zip(shards.paths.values(), manifests, strict=True):
        longest = max((shard.tokens for shard in manifest.split(shards.split)), default=0)
        if longest <= shards.seq_len:
            raise ConfigError(
                f"{path} has {longest} {shards.split} tokens in its longest shard and a sequence takes "
                f"{shards.seq_len + 1}; use a shorter --seq-len, or another --split"
            )


def shards_of(config: RunConfig, **changes: Any) -> Shards:
    """What a run evaluates on; `changes` are of `Shards`."""
    stage = config.stage
    own: dict[str, Any] = {
        "paths": paths_of(config),
        "seq_len": stage.seq_len,
        "tokens": stage.eval_tokens,
        "seed": config.seed,
        "too_long": stage.too_long if isinstance(stage, SftConfig) else TooLong.drop,
    }
    return Shards(**own | changes)


class _OneProcess:
    """An engine's evaluation without ranks."""

    def __init__(self, opened: OpenModel, advance: Advance) -> None:
        self.opened, self.advance = opened, advance
        self.tokens = 0

    @torch.no_grad()
    def evaluate(self, batches: list[Batch], loss: Loss) -> dict[str, float]:
        weight = sum(float(batch.loss_weights_T.sum()) for batch in batches)
        if not weight:
            raise DataError("the sequences that were drawn have no token to predict; read more --tokens")
        sums: dict[str, Tensor] = {}
        for batch in batches:
            for name, value in loss(self.opened.model, batch.to(self.opened.device))[1].items():
                sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + value.double().cpu()
            self.advance(1, len(batches))
        self.tokens += round(weight)
        return {name: float(value) / weight for name, value in sums.items()}
