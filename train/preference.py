"""What is minimised over preference pairs, and what models make of them. Pure: no ranks.

P pairs; of P2, column 0 is the chosen answer, column 1 the rejected one · T tokens · D width · V vocabulary · Q
learned tokens. An answer's reward is what each loss compares; all in nats.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drivetrain.conf.schema import DpoConfig, ModelConfig, PreferenceLoss
from drivetrain.data.preference import PairBatch
from drivetrain.kernels.token_logprob import token_logprob
from drivetrain.train.evaluate import documents_of

Losses = tuple[Tensor, Tensor]  # of each pair [P], and its rewards [P, 2]


def dpo_loss(policy_P2: Tensor, reference_P2: Tensor, beta: float, label_smoothing: float = 0.0) -> Losses:
    """−(1 − ε)·log σ(r₀ − r₁) − ε·log σ(r₁ − r₀) with r = β·(log π − log π_ref) of a whole answer.

    Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, eq. 7); where a share ε of the labels is
    taken to be wrong, conservative DPO (Mitchell 2023, https://ericmitchell.ai/cdpo.pdf, eq. 3).

    Args:
        policy_P2, reference_P2: summed log-probabilities of the answers.
    """
    rewards_P2 = beta * (policy_P2 - reference_P2)
    return _logistic(rewards_P2[:, 0] - rewards_P2[:, 1], label_smoothing), rewards_P2


def ipo_loss(policy_P2: Tensor, reference_P2: Tensor, counts_P2: Tensor, beta: float) -> Losses:
    """(h₀ − h₁ − 1/(2β))² with h = (log π − log π_ref) / |y|; the rewards are β·h.

    Identity preference optimisation (Azar et al. 2023, arXiv 2310.12036, eq. 17, where β is called τ). The mean
    over an answer's |y| tokens in place of the sum is its authors' correction of an implementation
    (https://huggingface.co/blog/pref-tuning, addendum).
    """
    h_P2 = (policy_P2 - reference_P2) / counts_P2
    return (h_P2[:, 0] - h_P2[:, 1] - 1 / (2 * beta)) ** 2, beta * h_P2


def simpo_loss(
    policy_P2: Tensor, counts_P2: Tensor, beta: float, margin: float, label_smoothing: float = 0.0
) -> Losses:
    """−log σ(r₀ − r₁ − γ) with r = β·log π / |y|: no reference, and a margin γ that the chosen answer must win by.

    Simple preference optimisation (Meng et al. 2024, arXiv 2405.14734, eq. 6). `label_smoothing` as in DPO.
    """
    rewards_P2 = beta * policy_P2 / counts_P2
    return _logistic(rewards_P2[:, 0] - rewards_P2[:, 1] - margin, label_smoothing), rewards_P2


def bradley_terry_loss(rewards_P2: Tensor) -> Tensor:
    """−log σ(r₀ − r₁) of each pair (Bradley and Terry 1952; Ouyang et al. 2022, arXiv 2203.02155, eq. 1)."""
    return -F.logsigmoid(rewards_P2[:, 0] - rewards_P2[:, 1])


def _logistic(lead_P: Tensor, label_smoothing: float) -> Tensor:
    return -(1 - label_smoothing) * F.logsigmoid(lead_P) - label_smoothing * F.logsigmoid(-lead_P)


def preference_loss(cfg: DpoConfig, policy_P2: Tensor, reference_P2: Tensor, counts_P2: Tensor) -> Losses:
    """The configured one of the losses above."""
    match cfg.loss:
        case PreferenceLoss.dpo:
            return dpo_loss(policy_P2, reference_P2, cfg.beta, cfg.label_smoothing)
        case PreferenceLoss.ipo:
            return ipo_loss(policy_P2, reference_P2, counts_P2, cfg.beta)
        case PreferenceLoss.simpo:
            return simpo_loss(policy_P2, counts_P2, cfg.beta, cfg.margin, cfg.label_smoothing)


def pair_sums(loss_P: Tensor, rewards_P2: Tensor, weights_P: Tensor) -> dict[str, Tensor]:
    """Weighted sums over pairs of the loss, of both rewards, of their difference, and of how often the chosen
    answer has the higher one."""
    chosen_P, rejected_P = rewards_P2.detach().unbind(1)
    each = {
        "loss": loss_P.detach(),
        "rewards/chosen": chosen_P,
        "rewards/rejected": rejected_P,
        "rewards/margin": chosen_P - rejected_P,
        "rewards/accuracy": (chosen_P > rejected_P).float(),
    }
    return {name: (value_P * weights_P).sum() for name, value_P in each.items()}


# --- what a model makes of a batch --------------------------------------------------------------------------


def answer_logprobs(model: nn.Module, batch: PairBatch, cfg: ModelConfig, backend: str) -> Tensor:
    """The summed log-probability of each answer, fp32 [P, 2]. Of prompts no logits are computed."""

    def read(hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
        hidden_QD = hidden_TD.index_select(0, batch.learned_Q)
        targets_Q = batch.targets_T.index_select(0, batch.learned_Q)
        logprobs_Q, _ = token_logprob(hidden_QD, weight_VD, targets_Q, backend=backend)
        counts = batch.counts_P2.flatten()
        return torch.segment_reduce(logprobs_Q, "sum", lengths=counts, unsafe=True).view(-1, 2)

    documents = documents_of(batch, cfg.sliding_window, backend)
    found: Tensor = model(batch.tokens_T, batch.positions_T, documents, read)
    return found


def answer_scores(model: nn.Module, batch: PairBatch, cfg: ModelConfig, backend: str) -> Tensor:
    """What a model with a value head makes of each conversation's last token, fp32 [P, 2]."""

    def read(hidden_TD: Tensor, score_1D: Tensor) -> Tensor:
        hidden_PD = hidden_TD.index_select(0, batch.ends_P2.flatten())
        return F.linear(hidden_PD.float(), score_1D.float()).view(-1, 2)

    documents = documents_of(batch, cfg.sliding_window, backend)
    found: Tensor = model(batch.tokens_T, batch.positions_T, documents, read)
    return found
