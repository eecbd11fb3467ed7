"""Reinforcement learning: the model practises on problems, and what was better than its siblings gets likelier."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from drivetrain.conf.schema import GrpoConfig, RunConfig
from drivetrain.data.batch import Batch
from drivetrain.data.chat import Chat
from drivetrain.data.loader import Source
from drivetrain.data.tokenizer import eos_id
from drivetrain.model.backend import backend_for
from drivetrain.train.engine.base import Engine, LossSums
from drivetrain.train.mesh import World
from drivetrain.train.metrics import Shown
from drivetrain.train.rl.accuracy import held_out_accuracy
from drivetrain.train.rl.ahead import Ahead
from drivetrain.train.rl.alarms import RlAlarms
from drivetrain.train.rl.environments import build_environment
from drivetrain.train.rl.ledger import Ledger
from drivetrain.train.rl.lockstep import Lockstep
from drivetrain.train.rl.packing import pack
from drivetrain.train.rl.policy import logprobs_of, policy_loss, trained_places
from drivetrain.train.rl.report import Gap, rollout_metrics, unscored
from drivetrain.train.rl.rollout import Sampler
from drivetrain.train.rl.samplers.build import build_samplers, drawn_vocabulary
from drivetrain.train.rl.source import Rollouts, RolloutSource

Say = Callable[[str], None]


class GrpoStage:
    """`Stage` whose source is the model itself: it has none before `prepare`."""

    source: Source

    def __init__(
        self,
        config: RunConfig,
        micro_batch: int,
        world: World,
        tokenizer: Path,
        state: dict[str, Any] | None,
    ) -> None:
        assert isinstance(config.stage, GrpoConfig)
        self.config, self.cfg, self.model_cfg = config, config.stage, config.model
        self.micro_batch, self.world, self.state = micro_batch, world, state
        self.backend = backend_for(config, world.device)
        self.notes: list[str] = []
        self.environment = build_environment(
            self.cfg.environment, config.seed, self.cfg.eval_problems, self.cfg.eval_unseen
        )
        self.chat, self.folder = Chat(tokenizer), tokenizer.parent
        self.vocab_size = drawn_vocabulary(config, self.chat)
        self.eos_id = eos_id(tokenizer)
        self.gap = Gap()
        self.before: dict[str, float] = {}
        self.alarms = RlAlarms(config.alarms.window, (state or {}).get("alarms"))

    def prepare(self, engine: Engine, reference: nn.Module | None, note: Say, alarm: Say) -> None:
        """Give the stage the weights that sample, and the frozen ones to stay close to. Collective.

        What a new run begins with is evaluated; its numbers are those of the first step, before its update.
        """
        self.alarm = alarm
        stop = self.chat.stop_id()
        ends = [self.eos_id] if stop is None else [self.eos_id, stop]
        completer, evaluator = build_samplers(
            self.config, engine, self.chat, ends, self.world, self.backend, self.folder
        )
        self.completer, self.synced = completer, -1
        self.sampler = Sampler(
            self.cfg, self.environment, self.chat, ends, self.world, self.config.seed, completer, evaluator
        )
        ledger = Ledger(self.state)
        rollouts: Rollouts = Lockstep(self.sampler, ledger)
        if not completer.collective:
            rollouts = Ahead(self.sampler, ledger, lambda: completer.version)
        self.source = self.rollouts = RolloutSource(
            self.cfg,
            rollouts,
            partial(self._sync, engine),
            partial(
                pack,
                row_len=self.cfg.seq_len,
                micro_batch=self.micro_batch,
                rank=self.world.rank,
                ranks=self.world.size,
                pad_id=self.eos_id,
                share=self._prompts_can_be_shared(),
            ),
            self.world,
            partial(self._logprobs, engine.model),
            None if reference is None else partial(self._logprobs, reference),
            self.state,
            self.alarms,
            completer.follows,
        )
        if self.state is None and self.cfg.eval_every:
            self.before = self.evaluate(engine)
            asked = len(self.sampler.environment.held_out(self.cfg.eval_problems))
            accuracy = self.before.get("eval/accuracy")
            solved = "none" if accuracy is None else f"{accuracy:.1%}"
            judged = "could be judged" if accuracy is None else "are solved"
            note(f"before training {solved} of {asked} held-out problems {judged}")

    def _prompts_can_be_shared(self) -> bool:
        """Whether the attention takes documents that branch."""
        window = self.model_cfg.sliding_window
        return self.backend != "flash_attn" and (window is None or window >= self.cfg.seq_len)

    def _sync(self, engine: Engine, version: int) -> None:
        """Have the sampler take the weights that have seen so many updates, if it has not. Collective."""
        if self.synced != version:
            self.completer.sync(engine, version)
            self.synced = version

    @torch.no_grad()
    def _logprobs(self, model: nn.Module, batch: Batch) -> Tensor:
        """fp32 [T] on the CPU, 0 where nothing is trained. Collective."""
        there = batch.to(self.world.device)
        at_K = trained_places(there)
        logprobs_K, _ = self._read(model, there, at_K)
        out_T = torch.zeros(batch.tokens)
        out_T[at_K.cpu()] = logprobs_K.float().cpu()
        return out_T * (batch.loss_weights_T > 0)

    def _read(self, model: nn.Module, batch: Batch, at_K: Tensor) -> tuple[Tensor, Tensor]:
        cfg, temperature = self.model_cfg, self.cfg.temperature
        return logprobs_of(model, batch, at_K, cfg, self.backend, temperature, self.vocab_size)

    def loss(self, model: nn.Module, batch: Batch) -> LossSums:
        at_K = trained_places(batch)
        logprobs_K, entropy_K = self._read(model, batch, at_K)
        sums, gap_K = policy_loss(logprobs_K, entropy_K, batch, at_K, self.cfg)
        self.gap.add(gap_K, entropy_K.detach(), batch.loss_weights_T[at_K])
        return sums

    def evaluate(self, engine: Engine) -> dict[str, float]:
        if self.completer.follows:
            self._sync(engine, self.rollouts.updates)
        return held_out_accuracy(self.sampler, self.cfg.eval_problems, self.cfg.eval_samples)

    def samples(self, engine: Engine) -> list[Shown]:
        return self.rollouts.table(self.sampler.tokenizer.decode)

    def close(self) -> None:
        """End the threads and processes that rollouts and rewards have started."""
        if hasattr(self, "sampler"):
            self.rollouts.close()
            self.sampler.close()

    def after_step(self, engine: Engine, step: int) -> dict[str, float]:
        source = self.rollouts
        found = {
            **rollout_metrics(source.groups),
            **self.gap.take(self.world),
            **source.metrics,
            "rl/seconds_train": (seconds := time.perf_counter() - source.handed_out),
        }
        found["rl/trained_tokens_per_second"] = found["rl/tokens"] / seconds
        if step == 1:
            found |= self.before
        source.metrics = {}
        keys = ("rl/entropy", "rl/reward_mean", "rl/reward_std", "rl/completion_tokens_mean")
        for sentence in self.alarms.check(step, *(found[key] for key in keys)):
            self.alarm(sentence)
        completions = sum(len(group.completions) for group in source.groups)
        for sentence in self.alarms.unscored(step, unscored(source.groups), completions):
            self.alarm(sentence)
        return found
