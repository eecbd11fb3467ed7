"""What a stage of a model's life adds to the loop: a source, a loss, evaluations."""

from collections.abc import Sequence
from typing import Protocol

from torch import nn

from drivetrain.data.batch import Batch
from drivetrain.data.loader import Source
from drivetrain.train.engine.base import Engine, LossSums
from drivetrain.train.metrics import Shown


class Stage(Protocol):
    source: Source
    notes: list[str]  # what to say of the data when the run starts

    def loss(self, model: nn.Module, batch: Batch) -> LossSums:
        """Weighted sums over one micro-batch; see `LossSums`. Pure: knows no ranks."""

    def evaluate(self, engine: Engine) -> dict[str, float]:
        """Held-out numbers, keys `eval/*`. Collective."""

    def samples(self, engine: Engine) -> Sequence[Shown]:
        """(prompt, completion) of the configured prompts, or of a step's own with their scores. Collective."""

    def after_step(self, engine: Engine, step: int) -> dict[str, float]:
        """What happens between steps: nothing, except in reinforcement learning."""
