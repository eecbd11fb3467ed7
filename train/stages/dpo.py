"""Direct preference optimisation and its kin: raise the chosen answer above the rejected one."""

from pathlib import Path
from typing import Any

from torch import nn

from drivetrain.conf.schema import DpoConfig, PreferenceLoss, RunConfig
from drivetrain.data.batch import Batch
from drivetrain.data.chat import Chat
from drivetrain.data.loader import Share
from drivetrain.data.preference import PairBatch
from drivetrain.train.engine.base import Engine, LossSums
from drivetrain.train.mesh import World
from drivetrain.train.preference import answer_logprobs, pair_sums, preference_loss
from drivetrain.train.reference import Reference
from drivetrain.train.stages.pairs import PairStage
from drivetrain.train.stages.samples import answers


class DpoStage(PairStage):
    """`Stage` that trains the model itself on pairs, with DPO, IPO or SimPO."""

    def __init__(
        self, config: RunConfig, share: Share, world: World, run_dir: Path, state: dict[str, Any] | None
    ) -> None:
        assert isinstance(config.stage, DpoConfig)
        super().__init__(config, share, world, state)
        self.dpo: DpoConfig = config.stage
        self.run_dir = run_dir
        wanted = self.cfg.sample_prompts and self.cfg.eval_every
        self.chat = Chat(run_dir / "tokenizer") if wanted else None

    def prepare(self, engine: Engine, resumed: bool) -> None:
        """Have the reference's log-probabilities at hand, before anything is read from the source. Collective.

        Args:
            resumed: whether the engine's weights have been trained already.

        Raises:
            CheckpointError: in a resume they are missing, or belong to other data.
        """
        if self.dpo.loss is PreferenceLoss.simpo:
            return
        reference = Reference(
            self.run_dir / "reference",
            self.model_cfg,
            self.backend,
            self.world,
            self.cfg.seq_len,
            self.micro_batch,
        )
        for sources in (self.train_pairs, self.held_out_pairs):
            if sources:
                reference.attach(sources, engine, resumed)

    def loss(self, model: nn.Module, batch: Batch) -> LossSums:
        assert isinstance(batch, PairBatch)
        policy_P2 = answer_logprobs(model, batch, self.model_cfg, self.backend)
        weights_P = batch.weights_P
        loss_P, rewards_P2 = preference_loss(self.dpo, policy_P2, batch.reference_P2, batch.counts_P2)
        chosen_P, rejected_P = policy_P2.detach().unbind(1)
        return (loss_P * weights_P).sum(), {
            **pair_sums(loss_P, rewards_P2, weights_P),
            "logprobs/chosen": (chosen_P * weights_P).sum(),
            "logprobs/rejected": (rejected_P * weights_P).sum(),
        }

    def samples(self, engine: Engine) -> list[tuple[str, str]]:
        if self.chat is None:
            return []
        return answers(engine, self.chat, self.cfg, self.model_cfg, self.world, self.backend, self.eos_id)
