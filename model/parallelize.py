"""Everything that is done to the model before it trains: recompute, compile, shard."""

from typing import cast

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from drivetrain.conf.schema import Checkpointing, EngineConfig, FsdpConfig, Precision
from drivetrain.model.transformer import Block, Transformer


def recompute_and_compile(model: Transformer, cfg: EngineConfig) -> None:
    """Activation checkpointing inside each block, and one compiled graph that all blocks share."""
    for module in model.blocks:
        block = cast(Block, module)
        block.checkpointing = Checkpointing(cfg.checkpointing)
        if cfg.compile:
            block.compile(fullgraph=True, dynamic=False)
    if cfg.compile:
        model.norm.compile(fullgraph=True, dynamic=False)


def shard(model: Transformer, cfg: FsdpConfig, mesh: DeviceMesh) -> FSDPModule:
    """FSDP2: one group a block, and one for embedding, last norm and head.

    In bf16 the weights are cast once, when they are gathered; gradients are reduced in fp32. Inputs are not
    cast: the rotary tables stay fp32.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if cfg.precision is Precision.bf16 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=cfg.reshard_after_forward)
    # The root is needed again at once by the backward pass: resharding it would only gather it twice.
    return fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
