"""A reward model: one number for a conversation, higher for the answer that people chose."""

from torch import nn

from drivetrain.data.batch import Batch
from drivetrain.data.preference import PairBatch
from drivetrain.train.engine.base import LossSums
from drivetrain.train.preference import answer_scores, bradley_terry_loss, pair_sums
from drivetrain.train.stages.pairs import PairStage


class RewardModelStage(PairStage):
    """`Stage` that trains a model with a value head by Bradley and Terry's model of comparisons."""

    def loss(self, model: nn.Module, batch: Batch) -> LossSums:
        assert isinstance(batch, PairBatch)
        rewards_P2 = answer_scores(model, batch, self.model_cfg, self.backend)
        loss_P, weights_P = bradley_terry_loss(rewards_P2), batch.weights_P
        return (loss_P * weights_P).sum(), pair_sums(loss_P, rewards_P2, weights_P)
