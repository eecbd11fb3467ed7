"""Supervised fine-tuning: predict the assistant's tokens of every conversation."""

from pathlib import Path
from typing import Any

from torch import nn

from drivetrain.conf.schema import RunConfig, SftConfig, TooLong
from drivetrain.data.batch import Batch
from drivetrain.data.chat import Chat
from drivetrain.data.loader import Share, Source
from drivetrain.data.packing import Rows
from drivetrain.data.sft import HeldOutConversations, SftSource, open_conversations
from drivetrain.model.backend import backend_for
from drivetrain.train.engine.base import Engine, LossSums
from drivetrain.train.evaluate import HeldOut
from drivetrain.train.losses import next_token_loss
from drivetrain.train.mesh import World
from drivetrain.train.stages.samples import answers


class SftStage:
    """`Stage` over shards of conversations."""

    def __init__(
        self, config: RunConfig, share: Share, world: World, tokenizer: Path, state: dict[str, Any] | None
    ) -> None:
        assert isinstance(config.stage, SftConfig)
        self.cfg, self.model_cfg = config.stage, config.model
        self.backend = backend_for(config, world.device)
        self.world = world
        source = SftSource(config.data, self.cfg.seq_len, self.cfg.too_long, share, config.seed, state)
        self.source: Source = source
        self.eos_id = source.eos_id
        self._rows = source.streams
        self.notes = [note_on(name, rows) for name, rows in source.streams.items()]
        self.chat = Chat(tokenizer) if self.cfg.sample_prompts and self.cfg.eval_every else None
        self.held_out: HeldOut | None = None
        if self.cfg.eval_every:
            self.held_out = self._held_out(config, share.micro_batch, tokenizer)

    def _held_out(self, config: RunConfig, micro_batch: int, tokenizer: Path) -> HeldOut:
        opened = open_conversations(config.data, "held_out")
        wanted = max(1, self.cfg.eval_tokens // len(opened) // self.cfg.seq_len)
        rows = {
            name: HeldOutConversations(source, self.cfg.seq_len, self.cfg.too_long, config.seed, name, wanted)
            for name, source in opened.items()
        }
        return HeldOut(rows, self.cfg.eval_tokens, micro_batch, config.seed, self.world, tokenizer)

    def loss(self, model: nn.Module, batch: Batch) -> LossSums:
        return next_token_loss(model, batch, self.model_cfg, self.backend)

    def evaluate(self, engine: Engine) -> dict[str, float]:
        return self.held_out.evaluate(engine, self.loss) if self.held_out is not None else {}

    def samples(self, engine: Engine) -> list[tuple[str, str]]:
        if self.chat is None:
            return []
        return answers(engine, self.chat, self.cfg, self.model_cfg, self.world, self.backend, self.eos_id)

    def after_step(self, engine: Engine, step: int) -> dict[str, float]:
        """How full the rows of the run were, and how often each conversation of a source has been seen."""
        state = self.source.state()
        found = {"data/utilisation": state["tokens"] / (state["sample"] * self.cfg.seq_len)}
        for name, rows in self._rows.items():
            key = "data/epoch" if len(self._rows) == 1 else f"data/{name}/epoch"
            found[key] = state["streams"][name]["conversations"] / rows.kept
        return found


def note_on(name: str, rows: Rows) -> str:
    """A source in one sentence: its conversations, how full its rows are, and which of them are too long."""
    note = (
        f"{name}: {len(rows.conversations):,} conversations in rows of {rows.row_len:,} tokens that are "
        f"{rows.utilisation():.1%} full"
    )
    if not rows.longer:
        return note
    fate = "left out" if rows.too_long is TooLong.drop else f"cut to their first {rows.row_len:,} tokens"
    return f"{note}; {rows.longer:,} are longer and {fate} (stage.too_long={rows.too_long.name})"
