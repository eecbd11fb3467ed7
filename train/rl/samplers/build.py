"""`stage.rollout.engine`, put together."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from drivetrain.conf.rollout import RolloutEngine
from drivetrain.conf.schema import GrpoConfig, Precision, RunConfig
from drivetrain.data.chat import Chat
from drivetrain.model.generate import Generator
from drivetrain.model.transformer import build_model
from drivetrain.train.engine.base import Engine
from drivetrain.train.mesh import World
from drivetrain.train.rl.samplers.base import Completer
from drivetrain.train.rl.samplers.local import Local
from drivetrain.train.rl.samplers.shared import Shared

MAX_BATCH = 256  # samples of a rank that the built-in sampler runs at once, and a whole group at least


def drawn_vocabulary(config: RunConfig, chat: Chat) -> int:
    """Tokens that may be drawn, from 0: the built-in sampler leaves out rows of the matrix without a token, vLLM
    and servers do not."""
    stage = config.stage
    assert isinstance(stage, GrpoConfig)
    if stage.rollout.engine is not RolloutEngine.builtin:
        return config.model.vocab_size
    return min(chat.tokenizer.get_vocab_size(), config.model.vocab_size)


def build_samplers(
    config: RunConfig,
    engine: Engine,
    chat: Chat,
    eos_ids: Sequence[int],
    world: World,
    backend: str,
    folder: Path,
) -> tuple[Completer, Completer]:
    """Who completes the prompts that are trained on, and who the held-out ones: the same if it follows the weights.

    Args:
        folder: of the run, for weights that are handed over in files.

    Raises:
        ConfigError: a library is missing, or there is no GPU for vLLM.
    """
    stage = config.stage
    assert isinstance(stage, GrpoConfig)
    rollout, model = stage.rollout, config.model
    dtype = torch.bfloat16 if config.engine.precision is Precision.bf16 else torch.float32
    options: dict[str, Any] = {
        "backend": backend,
        "eos_ids": eos_ids,
        "vocab_size": drawn_vocabulary(config, chat),
        "decode": partial(chat.tokenizer.decode, skip_special_tokens=False),
        "max_batch": max(MAX_BATCH, stage.group_size),
    }
    shared = Shared(lambda: Generator(engine.model, model, world.device, any_rank=world.any, **options))
    if rollout.collective:
        return shared, shared
    asked = rollout.server, chat.tokenizer, eos_ids, world.rank, rollout.timeout_seconds, rollout.retries
    match rollout.engine:
        case RolloutEngine.builtin:
            own = build_model(model, backend)
            own.to(dtype)  # before there is memory of another dtype
            own.materialize(world.device)
            own.requires_grad_(False)
            # Another thread's kernels would break a capture.
            generator = Generator(
                own, model, world.device, kv_tokens=rollout.kv_tokens or None, graphs=False, **options
            )
            local = Local(own, generator, rollout.timeout_seconds)
            local.start()
            return local, local
        case RolloutEngine.vllm:
            from drivetrain.train.rl.samplers.send import describe
            from drivetrain.train.rl.samplers.vllm import Vllm

            described = folder / "rollout"
            if world.is_main:
                describe(described, model, dtype)
            world.barrier()
            vllm = Vllm(
                rollout.vllm,
                described,
                chat.directory,
                model,
                dtype,
                world.device,
                list(eos_ids),
                stage.seq_len,
                rollout.timeout_seconds,
            )
            vllm.start()
            return vllm, vllm
        case RolloutEngine.vllm_server:
            from drivetrain.train.rl.samplers.server import VllmServer

            sent = Path(rollout.server.weights or folder / "rollout")
            server = VllmServer(*asked, folder=sent, model=model, dtype=dtype, world=world)
            return server, server
        case RolloutEngine.endpoint:
            from drivetrain.train.rl.samplers.server import Server

            return Server(*asked), shared
