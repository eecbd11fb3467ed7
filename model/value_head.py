"""One number in place of logits: the head of a reward model. D width.

The rest of the model keeps its names; the head's only parameter is `head.score` [1, D], so that nothing takes it
for a matrix of logits.
"""

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from drivetrain.model.initialize import fill_normal
from drivetrain.model.transformer import Transformer

R = TypeVar("R")
SCORE = "head.score"


class ValueHead(nn.Module):
    """A row of weights as a module, so that engines which gather weights on use see this use."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.score = nn.Parameter(torch.empty(1, dim))

    def forward(self, hidden_TD: Tensor, read: Callable[[Tensor, Tensor], R]) -> R:
        return read(hidden_TD, self.score)


def give_value_head(model: Transformer) -> None:
    """Put a value head in the place of a model's head, on the same device, before it has weights."""
    with model.embed.weight.device:
        model.head = ValueHead(model.cfg.dim)


def has_value_head(model: Transformer) -> bool:
    return isinstance(model.head, ValueHead)


def value_head_parameters(model: Transformer) -> Iterator[tuple[str, nn.Parameter]]:
    """The head's name and parameter; nothing where a model has another head."""
    if isinstance(model.head, ValueHead):
        yield SCORE, model.head.score


@torch.no_grad()
def initialize_value_head(model: Transformer, seed: int) -> None:
    """N(0, 1/(D + 1)), as in Stiennon et al. 2020 (arXiv 2009.01325, appendix), a function of (seed, position)."""
    assert isinstance(model.head, ValueHead)
    fill_normal(model.head.score, (model.cfg.dim + 1) ** -0.5, seed, SCORE)


def with_value_head(fill: Callable[[Transformer], None], seed: int) -> Callable[[Transformer], None]:
    """A fill for a model with a value head: `fill`'s weights, and a new head where it has none."""

    def both(model: Transformer) -> None:
        initialize_value_head(model, seed)
        fill(model)

    return both
