"""Completions of fixed prompts by the model that is being trained."""

from collections.abc import Sequence

from tokenizers import Tokenizer

from drivetrain.conf.schema import ModelConfig, StageConfig
from drivetrain.data.chat import Chat
from drivetrain.model.generate import Generator, Request, Sampling
from drivetrain.train.engine.base import Engine
from drivetrain.train.mesh import World


def complete(
    engine: Engine,
    prompts: list[list[int]],
    tokenizer: Tokenizer,
    cfg: ModelConfig,
    world: World,
    *,
    backend: str,
    eos_ids: Sequence[int],
    sampling: Sampling,
) -> list[str]:
    """One completion of each prompt (at least one token), as text without control tokens. Collective.

    Of a prompt that is longer than the context its end is taken, with room for one token.
    """
    generator = Generator(
        engine.model,
        cfg,
        world.device,
        backend=backend,
        eos_ids=eos_ids,
        vocab_size=tokenizer.get_vocab_size(),
        agree=world.from_main,
    )
    requests = [Request(prompt[1 - cfg.max_seq_len :], sampling) for prompt in prompts]
    return [tokenizer.decode(one.tokens) for (one,) in generator.generate(requests)]


def answers(
    engine: Engine, chat: Chat, stage: StageConfig, cfg: ModelConfig, world: World, backend: str, eos_id: int
) -> list[tuple[str, str]]:
    """(prompt, answer) of `stage.sample_prompts`, each a user's message, answered greedily. Collective."""
    stop_id = chat.stop_id()
    texts = complete(
        engine,
        [chat.prompt([{"role": "user", "content": said}]) for said in stage.sample_prompts],
        chat.tokenizer,
        cfg,
        world,
        backend=backend,
        eos_ids=[eos_id] if stop_id is None else [eos_id, stop_id],
        sampling=Sampling(max_tokens=stage.sample_tokens, temperature=0),
    )
    return list(zip(stage.sample_prompts, texts, strict=True))
