"""Engines that start from a directory's weights; see rank.py.

Each case: {"name", "overrides", "expected": a safetensors file}. Out: the weights that are not the expected ones;
for each rank the bytes that it read and the largest piece of them; the loss before and after a step.
"""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from drivetrain.conf.compose import compose
from drivetrain.conf.hf_tensors import Part
from drivetrain.data.batch import Batch, batch_from_windows
from drivetrain.kernels.linear_cross_entropy import linear_cross_entropy
from drivetrain.model.hf import HfWeights
from drivetrain.train.build import _fill, build_engine
from drivetrain.train.evaluate import documents_of
from drivetrain.train.mesh import World

READ: list[int] = []


class Counting(HfWeights):
    def _read(self, part: Part, stored_name: str, start: int, stop: int) -> Tensor:
        piece = super()._read(part, stored_name, start, stop)
        READ.append(piece.nbytes)
        return piece


def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    def read(hidden_TD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy(hidden_TD, weight_VD, batch.targets_T, batch.loss_weights_T)

    minimise, nll = model(batch.tokens_T, batch.positions_T, documents_of(batch, None, "sdpa"), read)
    return minimise, {"loss": nll}


def run_case(case: dict[str, Any], world: World) -> dict[str, Any]:
    import drivetrain.model.hf as module

    module.HfWeights = Counting  # type: ignore[misc]
    READ.clear()
    config = compose(case["overrides"])
    engine = build_engine(config, world, _fill(config, None))
    expected = load_file(case["expected"])
    wrong = [name for name, whole in engine.full_weights() if not torch.equal(whole, expected.pop(name))]
    read: list[Any] = [None] * world.size
    dist.all_gather_object(read, [sum(READ), max(READ, default=0)])
    batch = batch_from_windows(np.arange(1, 18)[None], 0)
    losses = [engine.evaluate([batch], loss)["loss"]]
    engine.accumulate([batch], loss)
    engine.step(1.0)
    losses.append(engine.evaluate([batch], loss)["loss"])
    return {"wrong": wrong, "missing": sorted(expected), "read": read, "losses": losses}
