"""What the stages minimise. T tokens · D width · V vocabulary."""

from torch import Tensor, nn

from drivetrain.conf.schema import ModelConfig
from drivetrain.data.batch import Batch
from drivetrain.kernels.linear_cross_entropy import linear_cross_entropy
from drivetrain.train.engine.base import LossSums
from drivetrain.train.evaluate import documents_of


def next_token_loss(
    model: nn.Module, batch: Batch, cfg: ModelConfig, backend: str, z_loss: float = 0.0
) -> LossSums:
    """The negative log-likelihood of each next token in nats, weighted and summed over a micro-batch.

    Args:
        z_loss: weight of logsumexp(logits)^2 in what is minimised; "loss" leaves it out.
    """

    def read(hidden_TD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy(
            hidden_TD, weight_VD, batch.targets_T, batch.loss_weights_T, z_loss=z_loss, backend=backend
        )

    documents = documents_of(batch, cfg.sliding_window, backend)
    minimise, nll = model(batch.tokens_T, batch.positions_T, documents, read)
    return minimise, {"loss": nll}
