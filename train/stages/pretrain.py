"""Pretraining: predict the next token of every document."""

from pathlib import Path
from typing import Any

from torch import nn

from drivetrain.conf.schema import ModelConfig, PretrainConfig, RunConfig
from drivetrain.data.batch import Batch
from drivetrain.data.loader import PretrainSource, Share, Source, open_sources
from drivetrain.data.tokenizer import bos_id, load_tokenizer, text_ids
from drivetrain.model.backend import backend_for
from drivetrain.model.generate import Sampling
from drivetrain.train.engine.base import Engine, LossSums
from drivetrain.train.evaluate import HeldOut
from drivetrain.train.losses import next_token_loss
from drivetrain.train.mesh import World
from drivetrain.train.stages.samples import complete

SAMPLE_TEMPERATURE = 0.8


class PretrainStage:
    """`Stage` over shards of documents."""

    def __init__(
        self, config: RunConfig, share: Share, world: World, tokenizer: Path, state: dict[str, Any] | None
    ) -> None:
        assert isinstance(config.stage, PretrainConfig)
        self.cfg: PretrainConfig = config.stage
        self.model_cfg: ModelConfig = config.model
        self.backend = backend_for(config, world.device)
        self.world, self.tokenizer_dir = world, tokenizer
        source = PretrainSource(config.data, self.cfg.seq_len, share, config.seed, state)
        self.source: Source = source
        self.notes: list[str] = []
        self.eos_id = source.eos_id
        self.held_out: HeldOut | None = None
        if self.cfg.eval_every:
            sources = open_sources(config.data, "held_out", self.cfg.seq_len)
            self.held_out = HeldOut(
                sources, self.cfg.eval_tokens, share.micro_batch, config.seed, world, self.tokenizer_dir
            )

    def loss(self, model: nn.Module, batch: Batch) -> LossSums:
        return next_token_loss(model, batch, self.model_cfg, self.backend, self.cfg.z_loss)

    def evaluate(self, engine: Engine) -> dict[str, float]:
        return self.held_out.evaluate(engine, self.loss) if self.held_out is not None else {}

    def samples(self, engine: Engine) -> list[tuple[str, str]]:
        if not self.cfg.sample_prompts:
            return []
        tokenizer, bos = load_tokenizer(self.tokenizer_dir), bos_id(self.tokenizer_dir)
        texts = complete(
            engine,
            [text_ids(tokenizer, bos, prompt) or [self.eos_id] for prompt in self.cfg.sample_prompts],
            tokenizer,
            self.model_cfg,
            self.world,
            backend=self.backend,
            eos_ids=[self.eos_id],
            sampling=Sampling(max_tokens=self.cfg.sample_tokens, temperature=SAMPLE_TEMPERATURE),
        )
        return list(zip(self.cfg.sample_prompts, texts, strict=True))

    def after_step(self, engine: Engine, step: int) -> dict[str, float]:
        return {}
