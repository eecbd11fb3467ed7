"""Samples of a model that differs from rank to rank, and of a sharded one with requests of each rank; see rank.py.

Each case: {"name", "overrides", "tokenizer": folder}, or without a tokenizer for requests of each rank.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from drivetrain.conf.compose import compose
from drivetrain.data.loader import share_of
from drivetrain.model.generate import Generator, Request, Sampling
from drivetrain.model.initialize import initialize
from drivetrain.model.transformer import Transformer, build_model
from drivetrain.train.build import build_engine
from drivetrain.train.engine.base import copy_weights
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


def sharded(case: dict[str, Any], world: World) -> dict[str, Any]:
    """What each rank's requests give on the sharded model, and on a whole one."""
    config = compose(case["overrides"])

    def fill(model: Transformer) -> None:
        initialize(model, config.model, 1)

    engine = build_engine(config, world, fill)
    whole = build_model(config.model, "sdpa")
    whole.materialize(world.device)
    copy_weights(engine, whole)
    asked = [
        Request([5 + world.rank] * (9 + place), Sampling(max_tokens=4 + 5 * world.rank, seed=place), 2)
        for place in range(2 * world.rank + 1)
    ]
    options: dict[str, Any] = {"max_batch": 4, "max_prefill": 10}
    found = Generator(engine.model, config.model, world.device, any_rank=world.any, **options).generate(asked)
    alone = Generator(whole, config.model, world.device, **options).generate(asked)
    mine = [[each.tokens for each in row] for row in found]
    assert mine == [[each.tokens for each in row] for row in alone], world.rank
    lengths = sum(len(tokens) for row in mine for tokens in row)
    return {"tokens": world.sum([float(lengths)])[0]}


def run_case(case: dict[str, Any], world: World) -> Any:
    if "tokenizer" not in case:
        return sharded(case, world)
    config = compose(case["overrides"])
    stage = PretrainStage(
        config, share_of(8, 1, world.rank, world.size), world, Path(case["tokenizer"]), None
    )
    token = OFTEN if world.is_main else stage.eos_id
    engine: Any = SimpleNamespace(model=Always(world, token, config.model.vocab_size))
    return stage.samples(engine)
