"""The next token: the distribution that is sampled from, and a draw from it that other rows do not touch.

B rows, one a sequence · V vocabulary · M blocks of L tokens, the vocabulary in order · F rows with a filter · C
candidates of a row, the likeliest first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drivetrain.conf.errors import DrivetrainError

BLOCK = 256  # L: about the root of a usual vocabulary, so that M + L numbers are drawn and not V
CANDIDATES = 1024  # likeliest tokens that top-p looks at before it sorts them all
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # SplitMix64's increment and multipliers, as signed numbers
_MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX2 = 0x94D049BB133111EB - (1 << 64)


class NotFinite(DrivetrainError, FloatingPointError):
    """Logits that are no numbers to draw from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How a completion is drawn and where it ends. Applied in this order, as transformers does:

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token, and no filter matters.
        top_k: keeps the k likeliest tokens; 0 keeps all.
        top_p: keeps the likeliest tokens, as few as have this share of what top_k kept; 1 keeps all.
        min_p: keeps tokens at least this many times as likely as the likeliest (Nguyen et al. 2024); 0 keeps all.
            Tokens as likely as the last one kept are kept too.
        seed: with the sample's number and the token's place it decides every draw.
        stop_tokens: end the completion and are its last token, as the model's own end tokens do.
        stop: texts that end the completion; its last token is the one that completed the text.

    Raises:
        ValueError: a setting outside its range.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        ranges = {
            "max_tokens must be at least 1": self.max_tokens >= 1,
            "temperature must be 0 or more and finite": 0 <= self.temperature < float("inf"),
            "top_k must be 0 (all) or more": self.top_k >= 0,
            "top_p must be above 0 and at most 1": 0 < self.top_p <= 1,
            "min_p must lie in [0, 1]": 0 <= self.min_p <= 1,
            "seed must lie in [0, 2^63)": 0 <= self.seed < 1 << 63,
            "a stop text must not be empty": all(self.stop),
        }
        for rule, kept in ranges.items():
            if not kept:
                name = rule.split()[0]
                raise ValueError(f"sampling: {rule}, not {getattr(self, name, self.stop)}")

    @property
    def filters(self) -> bool:
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


@dataclass(frozen=True, slots=True)
class Row:
    """What one row's draw depends on besides its logits: place 0 is the completion's first token."""

    sampling: Sampling
    sample: int
    place: int


def _mix(bits: Tensor) -> Tensor:
    """SplitMix64's output function on int64, whose products wrap around (Steele, Lea and Flood 2014)."""
    bits = (bits ^ _shift(bits, 30)) * _MIX1
    bits = (bits ^ _shift(bits, 27)) * _MIX2
    return bits ^ _shift(bits, 31)


def _shift(bits: Tensor, by: int) -> Tensor:
    return (bits >> by) & ((1 << (64 - by)) - 1)  # torch's own shift copies the sign


def gumbel(rows: Sequence[Row], n: int, device: torch.device) -> Tensor:
    """Standard Gumbel noise, fp64 [B, n]: each row is SplitMix64's stream from a hash of (seed, sample, place)."""
    facts_3B = torch.tensor(
        [
            [row.sampling.seed for row in rows],
            [row.sample for row in rows],
            [row.place for row in rows],
        ],
        dtype=torch.int64,
    ).to(device)
    key_B = torch.zeros_like(facts_3B[0])
    for fact_B in facts_3B:
        key_B = _mix(key_B + fact_B + _GOLDEN)
    steps_n = torch.arange(1, n + 1, device=device) * _GOLDEN
    bits_Bn = _shift(_mix(key_B[:, None] + steps_n), 11)
    uniform_Bn = (bits_Bn.double() + 0.5) * 2.0**-53
    return -(-uniform_Bn.log()).log()


def draw(
    logits_BV: Tensor, rows: Sequence[Row], agree: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One token a row.

    First the block that the token lies in, then the token, each as the largest of log-probability plus Gumbel noise
    (Gumbel 1954; the two draws multiply to the token's own probability). So a difference in the logits' last bits
    changes a token only if two of them come within that difference of a tie: about 1 in 10^6 tokens in fp32. The
    inverse of the cumulative distribution, whose every boundary moves with every logit, would change many more.

    Args:
        logits_BV: fp32.
        agree: replaces the tokens, int64 [B], by those that all ranks shall have.

    Returns:
        tokens int64 [B]; their log-probabilities under the logits as they are; those under the distribution that
        was sampled from; and the log of the probability that the filters kept, of all there is at this temperature:
        0 without filters. The last two add up to the log-probability at this temperature before the filters. Both
        are 0 where the temperature is 0; fp32 [B] all three.

    Raises:
        NotFinite: logits that are not finite.
    """
    device = logits_BV.device
    top_B1, likeliest_B1 = logits_BV.max(dim=-1, keepdim=True)
    weights_BV = (logits_BV - top_B1).exp_()
    model_total_B = _block_sums(weights_BV).sum(dim=-1)
    if not bool(model_total_B.isfinite().all()):
        raise NotFinite("the model gives logits that are not finite numbers; its weights are broken")
    settings = [row.sampling for row in rows]
    weights_BV = _tempered(logits_BV, top_B1, weights_BV, settings)
    blocks_BM = _block_sums(weights_BV)
    log_all_B = blocks_BM.sum(dim=-1).log()
    if filtered := [i for i, each in enumerate(settings) if each.filters]:
        _filter(weights_BV, filtered, settings)
        blocks_BM = _block_sums(weights_BV)
    noise = gumbel(rows, blocks_BM.shape[1] + BLOCK, device)
    block_B1 = (blocks_BM.double().log() + noise[:, BLOCK:]).argmax(dim=-1, keepdim=True)
    inside_BL = block_B1 * BLOCK + torch.arange(BLOCK, device=device)
    V = logits_BV.shape[1]
    near_BL = weights_BV.gather(1, inside_BL.clamp(max=V - 1)).masked_fill_(inside_BL >= V, 0)
    offset_B1 = (near_BL.double().log() + noise[:, :BLOCK]).argmax(dim=-1, keepdim=True)
    greedy_B = torch.tensor([each.temperature == 0 for each in settings], device=device)
    tokens_B = torch.where(greedy_B, likeliest_B1[:, 0], (block_B1 * BLOCK + offset_B1)[:, 0])
    if agree is not None:
        tokens_B = agree(tokens_B)
    at_B1 = tokens_B[:, None]
    logprobs_B = (logits_BV.gather(1, at_B1) - top_B1)[:, 0] - model_total_B.log()
    log_drawn_B = blocks_BM.sum(dim=-1).log()
    behaviour_B = (weights_BV.gather(1, at_B1)[:, 0].log() - log_drawn_B).masked_fill(greedy_B, 0)
    return tokens_B, logprobs_B, behaviour_B, (log_drawn_B - log_all_B).masked_fill(greedy_B, 0)


def _block_sums(weights_BV: Tensor) -> Tensor:
    """fp32 [B, M]; the last block may be short."""
    V = weights_BV.shape[1]
    whole = V - V % BLOCK
    sums_BM = weights_BV[:, :whole].unflatten(1, (-1, BLOCK)).sum(dim=-1) if whole else weights_BV[:, :0]
    return torch.cat([sums_BM, weights_BV[:, whole:].sum(dim=-1, keepdim=True)], dim=1)


def _tempered(logits_BV: Tensor, top_B1: Tensor, weights_BV: Tensor, settings: list[Sampling]) -> Tensor:
    """Unnormalised probabilities at each row's temperature, the likeliest token's 1.

    Args:
        weights_BV: those of temperature 1; may be changed.
    """
    device = logits_BV.device
    if any(each.temperature not in (0, 1) for each in settings):
        temperature_B1 = torch.tensor([[each.temperature or 1.0] for each in settings], device=device)
        weights_BV = torch.sub(logits_BV, top_B1, out=weights_BV).div_(temperature_B1).exp_()
    return weights_BV


def _filter(weights_BV: Tensor, filtered: list[int], settings: list[Sampling]) -> None:
    """Make 0 of what the filters of these rows leave out."""
    rows_F = torch.tensor(filtered, device=weights_BV.device)
    some_FV = weights_BV[rows_F]
    floor_F1 = _floor(some_FV, [settings[i] for i in filtered])
    weights_BV[rows_F] = some_FV.masked_fill_(some_FV < floor_F1, 0)


def _floor(weights_FV: Tensor, settings: list[Sampling]) -> Tensor:
    """The smallest weight that passes the filters, [F, 1]."""
    device, V = weights_FV.device, weights_FV.shape[1]
    k_F1 = torch.tensor([[min(each.top_k or V, V)] for each in settings], device=device)
    p_F1 = torch.tensor([[each.top_p] for each in settings], device=device, dtype=torch.float64)
    floor_F1 = torch.tensor([[each.min_p] for each in settings], device=device)
    limited = [each.top_k for each in settings if 0 < each.top_k < V]
    if not limited and all(each.top_p == 1 for each in settings):
        return floor_F1
    total_F1 = weights_FV.double().sum(dim=-1, keepdim=True)
    for C in (min(V, max(CANDIDATES, *limited, 0)), V):
        likeliest_FC = weights_FV.topk(C, dim=-1).values
        mass_FC = likeliest_FC.double().cumsum(dim=-1)
        last_F1 = (k_F1 - 1).clamp(max=C - 1)
        target_F1 = p_F1 * torch.where(k_F1 < V, mass_FC.gather(1, last_F1), total_F1)
        if C == V or bool(((mass_FC[:, -1:] >= target_F1) | (p_F1 == 1)).all()):
            break
    needed_F1 = (mass_FC < target_F1).sum(dim=-1, keepdim=True).clamp(max=C - 1)
    zero_F1 = torch.zeros_like(floor_F1)
    by_p_F1 = torch.where(p_F1 < 1, likeliest_FC.gather(1, needed_F1), zero_F1)
    by_k_F1 = torch.where(k_F1 < V, likeliest_FC.gather(1, last_F1), zero_F1)
    return torch.maximum(floor_F1, torch.maximum(by_p_F1, by_k_F1))
