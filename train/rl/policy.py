"""What a model makes of packed completions: log-probabilities, and the loss of a micro-batch.

K tokens of completions in a micro-batch of T packed tokens · D width · V vocabulary.

With top-p or top-k a token y was drawn from b(y) / Z, b the sampler's distribution at its temperature over the
vocabulary that it draws from, and Z the probability under b of the tokens that the filter kept. The trainer's p is
divided by the same Z, kept from the sampler and not computed anew: the importance ratio is (p(y) / Z) / (b(y) / Z),
so p(y) / b(y), and Z leaves every ratio. At equal weights that is exact, and 1. Once weights differ, a filter that
keeps the same tokens would divide p by Z', their probability under p: the ratio here is Z' / Z times that one,
first order in the change of the weights, and the gradient is that of log p, without - d log Z'.
"""

import torch
from torch import Tensor, nn

from drivetrain.conf.schema import GrpoConfig, KlIn, ModelConfig
from drivetrain.data.batch import Batch
from drivetrain.kernels.token_logprob import token_logprob
from drivetrain.train.engine.base import LossSums
from drivetrain.train.evaluate import documents_of
from drivetrain.train.rl.objective import divergence, importance_weights, surrogate


def trained_places(batch: Batch) -> Tensor:
    """Where a completion's token is predicted, int64 [K]; one place where there is none, for a pass that is empty
    still takes part in what the ranks do together."""
    at_K = batch.loss_weights_T.nonzero().squeeze(1)
    return at_K if len(at_K) else at_K.new_zeros(1)


def logprobs_of(
    model: nn.Module,
    batch: Batch,
    at_K: Tensor,
    cfg: ModelConfig,
    backend: str,
    temperature: float,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of the tokens predicted at `at_K`, and the entropy there; natural, at `temperature`, [K].

    Args:
        vocab_size: tokens from here on (padding of the matrix) have no probability, as in the sampler; None: all
            have some.
    """
    V = vocab_size or cfg.vocab_size
    targets_K = batch.targets_T[at_K].clamp(max=V - 1)  # an empty pass's one place may show padding

    def read(hidden_TD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
        return token_logprob(
            hidden_TD[at_K], weight_VD[:V], targets_K, temperature=temperature, backend=backend
        )

    documents = documents_of(batch, cfg.sliding_window, backend)
    found: tuple[Tensor, Tensor] = model(batch.tokens_T, batch.positions_T, documents, read)
    return found


def _sequences(batch: Batch) -> Tensor:
    """A number for each document, and for each of its branches where it has some; [T]."""
    if batch.branches_2T is not None:
        return batch.branches_2T[0]
    lengths = batch.cu_seqlens.diff()
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)


def policy_loss(
    logprobs_K: Tensor, entropy_K: Tensor, batch: Batch, at_K: Tensor, cfg: GrpoConfig
) -> tuple[LossSums, Tensor]:
    """The objective of a micro-batch and what to report, as sums; and how far trainer and sampler are apart, [K].

    Everything but "loss" is a sum over tokens, so that the engine's division makes means of them. The entropy bonus
    is that of A3C (Mnih et al., arXiv 1602.01783), section 4, after Williams and Peng 1991: the entropy at each
    place of what a token is drawn from, before filters, with its own gradient.
    """
    assert batch.token_weights_T is not None and batch.advantages_T is not None
    assert batch.behaviour_logprobs_T is not None
    mask_K = batch.loss_weights_T[at_K]
    weights_K, advantages_K = batch.token_weights_T[at_K], batch.advantages_T[at_K]
    # One update for each rollout: the weights before it are those that are trained.
    old_K = logprobs_K.detach() if batch.old_logprobs_T is None else batch.old_logprobs_T[at_K]
    behaviour_K = batch.behaviour_logprobs_T[at_K]
    behaviour_K = torch.where(behaviour_K.isnan(), old_K, behaviour_K)  # nobody told it: no correction
    _, sequence_K = _sequences(batch)[at_K].unique_consecutive(return_inverse=True)

    found = surrogate(cfg.variant, logprobs_K, old_K, advantages_K, sequence_K, cfg.clip_low, cfg.clip_high)
    importance_K = importance_weights(cfg.importance, old_K, behaviour_K, sequence_K, cfg.importance_cap)
    loss_K = found.loss * importance_K - cfg.entropy_coef * entropy_K
    gap_K = (old_K - behaviour_K) * mask_K
    stats = {
        "rl/clip_fraction": found.clipped * mask_K,
        "rl/ratio": found.ratio * mask_K,
        "rl/gap_mean": gap_K.abs(),
        "rl/importance": importance_K * mask_K,
    }
    if batch.reference_logprobs_T is not None:
        kl_K = divergence(cfg.kl_estimator, logprobs_K, batch.reference_logprobs_T[at_K])
        if cfg.kl_in is KlIn.loss:
            loss_K = loss_K + cfg.kl_coef * kl_K
        stats["rl/kl"] = kl_K * mask_K
    minimise = (loss_K * weights_K).sum()
    sums = {name: value.detach().sum() for name, value in stats.items()}
    return (minimise, {"loss": minimise.detach(), **sums}), gap_K.detach()
