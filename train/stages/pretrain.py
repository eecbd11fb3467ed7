"""Pretraining: predict the next token of every document."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from drivetrain.conf.schema import ModelConfig, PretrainConfig, RunConfig
from drivetrain.data.batch import Batch
from drivetrain.data.loader import PretrainSource, Share, Source, open_sources
from drivetrain.data.tokenizer import load_tokenizer
from drivetrain.kernels.linear_cross_entropy import linear_cross_entropy
from drivetrain.model.backend import backend_of
from drivetrain.model.generate import generate
from drivetrain.train.engine.base import Engine, LossSums
from drivetrain.train.evaluate import HeldOut, documents_of
from drivetrain.train.mesh import World


class PretrainStage:
    """`Stage` over shards of documents."""

    def __init__(
        self, config: RunConfig, share: Share, world: World, tokenizer: Path, state: dict[str, Any] | None
    ) -> None:
        assert isinstance(config.stage, PretrainConfig)
        self.cfg: PretrainConfig = config.stage
        self.model_cfg: ModelConfig = config.model
        self.backend = backend_of(config.kernels, world.device)
        self.world, self.tokenizer_dir = world, tokenizer
        source = PretrainSource(config.data, self.cfg.seq_len, share, config.seed, state)
        self.source: Source = source
        self.eos_id = source.eos_id
        self.held_out: HeldOut | None = None
        if self.cfg.eval_every:
            sources = open_sources(config.data, "held_out", self.cfg.seq_len)
            self.held_out = HeldOut(
                sources, self.cfg.eval_tokens, share.micro_batch, config.seed, world, self.tokenizer_dir
            )

    def loss(self, model: nn.Module, batch: Batch) -> LossSums:
        def read(hidden_TD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
            return linear_cross_entropy(
                hidden_TD,
                weight_VD,
                batch.targets_T,
                batch.loss_weights_T,
                z_loss=self.cfg.z_loss,
                backend=self.backend,
            )

        documents = documents_of(batch, self.model_cfg.sliding_window, self.backend)
        minimise, nll = model(batch.tokens_T, batch.positions_T, documents, read)
        return minimise, {"loss": nll}

    def evaluate(self, engine: Engine) -> dict[str, float]:
        return self.held_out.evaluate(engine, self.loss) if self.held_out is not None else {}

    def samples(self, engine: Engine) -> list[tuple[str, str]]:
        if not self.cfg.sample_prompts:
            return []
        tokenizer = load_tokenizer(self.tokenizer_dir)
        rows = []
        for prompt in self.cfg.sample_prompts:
            drawn = generate(
                engine.model,
                tokenizer.encode(prompt).ids or [self.eos_id],
                max_tokens=self.cfg.sample_tokens,
                max_seq_len=self.model_cfg.max_seq_len,
                stop_id=self.eos_id,
                vocab_size=tokenizer.get_vocab_size(),
                device=torch.device(self.world.device),
                sliding_window=self.model_cfg.sliding_window,
                agree=self.world.from_main,
            )
            rows.append((prompt, tokenizer.decode([token for token, _ in drawn])))
        return rows

    def after_step(self, engine: Engine, step: int) -> dict[str, float]:
        return {}
