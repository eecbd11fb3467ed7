"""Log-probabilities of a prompt's own tokens, what OpenAI's completions call `echo`.

T tokens · V vocabulary · D width · C tokens of which the logits are in memory at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drivetrain.kernels.attention import make_documents
from drivetrain.model.draw import NotFinite
from drivetrain.model.transformer import logits
from drivetrain.train.serve import OpenModel

MOST_LOGITS = 1 << 26  # in memory at once: 256 MiB in fp32


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Of each token but the first, natural and at temperature 1; and of the one that greedy decoding would take."""

    logprobs: list[float]
    likeliest: list[int]
    likeliest_logprobs: list[float]


@torch.no_grad()
def prompt_logprobs(opened: OpenModel, tokens: Sequence[int], drawn: int) -> PromptLogprobs:
    """One pass of the model over `tokens`, at least one and at most its max_seq_len.

    Args:
        drawn: tokens from here on are never drawn, and so never the likeliest.

    Raises:
        NotFinite: the model's logits are not finite.
    """
    T, device = len(tokens), opened.device
    tokens_T = torch.tensor(tokens, dtype=torch.int64, device=device)
    ends = torch.tensor([0, T], dtype=torch.int32, device=device)
    documents = make_documents(ends, T, T, T, opened.cfg.sliding_window, backend=opened.backend)

    def read(hidden_TD: Tensor, weight_VD: Tensor) -> list[Tensor]:
        chunk = max(1, MOST_LOGITS // len(weight_VD))
        pairs = zip(hidden_TD[:-1].split(chunk), tokens_T[1:].split(chunk), strict=True)
        return [_scores(logits(hidden_CD, weight_VD), next_C, drawn) for hidden_CD, next_C in pairs]

    positions_T = torch.arange(T, device=device)
    found = torch.cat(opened.model(tokens_T, positions_T, documents, read), dim=1)
    if not bool(found.isfinite().all()):
        raise NotFinite("the model gives logits that are not finite numbers; its weights are broken")
    logprobs, likeliest, likeliest_logprobs = found.tolist()
    return PromptLogprobs(logprobs, [int(token) for token in likeliest], likeliest_logprobs)


def _scores(logits_CV: Tensor, next_C: Tensor, drawn: int) -> Tensor:
    """fp64 [3, C]: log-probability of what comes next, the likeliest token, and its log-probability."""
    total_C = logits_CV.logsumexp(dim=-1)
    best_C, likeliest_C = logits_CV[:, :drawn].max(dim=-1)
    taken_C = logits_CV.gather(1, next_C[:, None]).squeeze(1)
    return torch.stack([each.double() for each in (taken_C - total_C, likeliest_C, best_C - total_C)])
