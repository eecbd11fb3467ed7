"""Continue a prompt, one token at a time, by running the whole text again: no cache yet, right on every engine."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from drivetrain.kernels.attention import make_documents
from drivetrain.model.transformer import logits


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt: list[int],
    *,
    max_tokens: int,
    max_seq_len: int,
    stop_id: int,
    vocab_size: int,
    device: torch.device,
    sliding_window: int | None = None,
    temperature: float = 0.8,
    seed: int = 0,
    agree: Callable[[int], int] = int,
) -> Iterator[tuple[int, float]]:
    """Yield (token, its log-probability under the model at temperature 1) until `stop_id` or `max_tokens`.

    Args:
        model: a `Transformer`, or an engine's wrapper of one; then a collective call on every rank.
        prompt: at least one token. Past `max_seq_len` the oldest tokens are left out.
        vocab_size: tokens from here on (padding of the matrix) are never drawn.
        temperature: 0 takes the likeliest token.
        agree: makes one token of those that the ranks drew. Their logits may differ in the last bit, and a rank
            that stopped alone would leave the others waiting in the next forward pass.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(max_tokens):
        context = tokens[-max_seq_len:]
        T = len(context)
        cu_seqlens = torch.tensor([0, T], dtype=torch.int32, device=device)
        documents = make_documents(cu_seqlens, T, T, T, sliding_window)
        tokens_T = torch.tensor(context, dtype=torch.int32, device=device)
        # Every length is a new shape. The stance is global: it must not outlive this call into the caller's code.
        with torch.compiler.set_stance("force_eager"):
            logits_V = model(tokens_T, torch.arange(T, device=device), documents, _last_logits)
        logprobs_V = logits_V[:vocab_size].cpu().log_softmax(dim=-1)
        token = agree(_draw(logprobs_V, temperature, generator))
        tokens.append(token)
        yield token, float(logprobs_V[token])
        if token == stop_id:
            return


def _last_logits(hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
    return logits(hidden_TD[-1:], weight_VD)[0]


def _draw(logprobs_V: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logprobs_V.argmax())
    return int(torch.multinomial((logprobs_V / temperature).softmax(dim=-1), 1, generator=generator))
