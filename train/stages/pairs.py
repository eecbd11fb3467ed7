"""What the stages of preference learning share: packed pairs, held-out ones, and what is said of them."""

from abc import ABC, abstractmethod
from typing import Any

from torch import nn

from drivetrain.conf.schema import RunConfig, StageConfig
from drivetrain.data.batch import Batch
from drivetrain.data.loader import Share, Source
from drivetrain.data.packing import Rows
from drivetrain.data.preference import HeldOutPairs, Pairs, PairSource, open_pairs
from drivetrain.model.backend import backend_for
from drivetrain.train.engine.base import Engine, LossSums
from drivetrain.train.evaluate import dealt_batches
from drivetrain.train.mesh import World

EVALS = {"loss": "loss", "accuracy": "rewards/accuracy", "margin": "rewards/margin"}


class PairStage(ABC):
    """`Stage` over shards of preference pairs: a step's loss is the mean over all of its pairs."""

    def __init__(self, config: RunConfig, share: Share, world: World, state: dict[str, Any] | None) -> None:
        self.cfg: StageConfig = config.stage
        self.model_cfg, self.seed = config.model, config.seed
        self.backend = backend_for(config, world.device)
        self.world, self.micro_batch = world, share.micro_batch
        source = PairSource(config.data, self.cfg.seq_len, share, config.seed, state)
        self.source: Source = source
        self.eos_id = source.eos_id
        self.train_pairs = source.pairs
        self._rows = source.streams
        self.notes = [note_on(name, rows) for name, rows in source.streams.items()]
        self.held_out_pairs: dict[str, Pairs] = {}
        if self.cfg.eval_every:
            self.held_out_pairs = open_pairs(config.data, "held_out", self.cfg.seq_len)

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> LossSums: ...

    def evaluate(self, engine: Engine) -> dict[str, float]:
        """`eval/loss`, `eval/accuracy`, `eval/margin` over held-out pairs; with several sources also each one's."""
        parts = {name: engine.evaluate(self._held_out(name), self.loss) for name in self.held_out_pairs}
        found = {}
        for key, stat in EVALS.items():
            found[f"eval/{key}"] = sum(part[stat] for part in parts.values()) / len(parts)
            if len(parts) > 1:
                found |= {f"eval/{name}/{key}": part[stat] for name, part in parts.items()}
        return found

    def _held_out(self, name: str) -> list[Batch]:
        wanted = max(1, self.cfg.eval_tokens // len(self.held_out_pairs) // self.cfg.seq_len)
        rows = HeldOutPairs(self.held_out_pairs[name], self.cfg.seq_len, self.seed, name, wanted)
        return dealt_batches(rows, wanted, self.micro_batch, f"{self.seed}/{name}", self.world)

    def samples(self, engine: Engine) -> list[tuple[str, str]]:
        return []

    def after_step(self, engine: Engine, step: int) -> dict[str, float]:
        """How full the rows of the run were, and how often each pair of a source has been seen."""
        state = self.source.state()
        found = {"data/utilisation": state["tokens"] / (state["sample"] * self.cfg.seq_len)}
        for name, rows in self._rows.items():
            key = "data/epoch" if len(self._rows) == 1 else f"data/{name}/epoch"
            found[key] = state["streams"][name]["conversations"] / rows.kept
        return found


def note_on(name: str, rows: Rows) -> str:
    """A source in one sentence: its pairs, how full its rows are, and how many of them are too long."""
    note = (
        f"{name}: {len(rows.conversations):,} pairs in rows of {rows.row_len:,} tokens that are "
        f"{rows.utilisation():.1%} full"
    )
    return f"{note}; {rows.longer:,} are longer and left out" if rows.longer else note
