"""Samples of a model that differs from rank to rank; see rank.py.

Each case: {"name", "overrides", "tokenizer": folder}.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from drivetrain.conf.compose import compose
from drivetrain.data.loader import share_of
from drivetrain.train.mesh import World
from drivetrain.train.stages.pretrain import PretrainStage

OFTEN = 5  # the token that rank 0 would draw for ever


class Always(nn.Module):
    """Draws one token, and meets the other ranks in every forward pass, as a sharded model does."""

    def __init__(self, world: World, token: int, vocab_size: int) -> None:
        super().__init__()
        self.world = world
        self.weight_VD = torch.zeros(vocab_size, 1)
        self.weight_VD[token] = 1000.0

    def forward(self, tokens_T: Tensor, positions_T: Tensor, documents: Any, read: Any) -> Any:
        self.world.barrier()
        return read(torch.ones(len(tokens_T), 1), self.weight_VD)


def run_case(case: dict[str, Any], world: World) -> list[tuple[str, str]]:
    config = compose(case["overrides"])
    stage = PretrainStage(
        config, share_of(8, 1, world.rank, world.size), world, Path(case["tokenizer"]), None
    )
    token = OFTEN if world.is_main else stage.eos_id
    engine: Any = SimpleNamespace(model=Always(world, token, config.model.vocab_size))
    return stage.samples(engine)
