"""The distribution that is sampled from, and that draws follow it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from drivetrain.model import draw as module
from drivetrain.model.draw import BLOCK, Row, Sampling, draw, gumbel

CPU = torch.device("cpu")


def splitmix(state: int, n: int) -> list[int]:
    """The generator as published, in Python's integers."""
    found = []
    for _ in range(n):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        found.append(z ^ (z >> 31))
    return found


def test_the_noise_is_splitmix_of_seed_sample_and_place() -> None:
    rows = [
        Row(Sampling(seed=seed), sample, place) for seed, sample, place in [(0, 0, 0), (2**63 - 1, 7, 900)]
    ]
    found = gumbel(rows, 5, CPU)
    for row, noise in zip(rows, found.tolist(), strict=True):
        key = 0
        for fact in (row.sampling.seed, row.sample, row.place):
            key = splitmix(key + fact, 1)[0]
        uniform = torch.tensor(
            [((bits >> 11) + 0.5) / 2**53 for bits in splitmix(key, 5)], dtype=torch.float64
        )
        assert noise == pytest.approx((-(-uniform.log()).log()).tolist(), rel=1e-12)


def test_noise_differs_from_row_to_row() -> None:
    facts = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)]
    noise = gumbel([Row(Sampling(seed=a), b, c) for a, b, c in facts], 400, CPU)
    correlation = torch.corrcoef(noise) - torch.eye(len(facts))
    assert correlation.abs().max() < 0.2
    assert noise.mean() == pytest.approx(0.5772, abs=0.1)  # Euler's constant


def expected(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """transformers' order of filters; the probabilities that they leave."""
    warpers: list[Any] = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return LogitsProcessorList(warpers)(None, logits_V[None])[0].softmax(-1)


def probabilities(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """What `draw` says of every token, by having it take each."""
    V = len(logits_V)
    rows = [Row(sampling, 0, 0)] * V
    return draw(logits_V.repeat(V, 1), rows, lambda tokens_B: torch.arange(V))[2].exp()


@settings(max_examples=40)
@given(
    vocab=st.sampled_from([1, 7, BLOCK, BLOCK + 1, 300]),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 5, 400]),
    top_p=st.sampled_from([1.0, 0.9, 0.3, 1e-6]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
    seed=st.integers(0, 99),
)
def test_the_distribution_is_that_of_transformers(
    vocab: int, temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    logits_V = 3 * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    torch.testing.assert_close(
        probabilities(logits_V, sampling), expected(logits_V, sampling), rtol=1e-4, atol=1e-6
    )


def test_top_p_looks_past_its_first_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CANDIDATES", 4)
    logits_V = torch.randn(300, generator=torch.Generator().manual_seed(1))
    for sampling in (Sampling(top_p=0.8), Sampling(top_p=0.8, top_k=9), Sampling(top_p=0.01)):
        torch.testing.assert_close(probabilities(logits_V, sampling), expected(logits_V, sampling))


@pytest.mark.parametrize("vocab", [5, 2 * BLOCK, 2 * BLOCK + 5])
def test_draws_follow_the_distribution(vocab: int) -> None:
    """In a vocabulary of one block and of several, the last one short."""
    draws = 4000
    logits_V = torch.randn(vocab, generator=torch.Generator().manual_seed(2))
    logits_V[[0, vocab - 1]] += 5
    sampling = Sampling(temperature=1.3)
    rows = [Row(sampling, sample, 3) for sample in range(draws)]
    tokens_B, logprobs_B, behaviour_B, kept_B = draw(logits_V.repeat(draws, 1), rows)
    share_V = (logits_V / 1.3).softmax(-1)
    found_V = torch.bincount(tokens_B, minlength=vocab)
    sigma_V = (share_V * (1 - share_V) * draws).sqrt()
    assert ((found_V - share_V * draws).abs() < 5 * sigma_V + 2).all()
    torch.testing.assert_close(logprobs_B, logits_V.log_softmax(-1)[tokens_B], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(behaviour_B, share_V.log()[tokens_B], rtol=1e-4, atol=1e-5)
    assert (kept_B == 0).all()


@pytest.mark.parametrize(
    "filters", [{"top_p": 0.8}, {"top_k": 20}, {"min_p": 0.1}, {"top_k": 20, "top_p": 0.5}], ids=str
)
def test_what_a_filter_keeps_turns_one_distribution_into_the_other(filters: dict[str, Any]) -> None:
    """Beside a row without a filter, and one that takes the likeliest."""
    logits_V = torch.randn(300, generator=torch.Generator().manual_seed(2))
    sampling = Sampling(temperature=0.7, **filters)
    rows = [*(Row(sampling, sample, 0) for sample in range(50))]
    rows += [Row(Sampling(temperature=0.7), 0, 0), Row(replace(sampling, temperature=0.0), 0, 0)]
    tokens_B, _, behaviour_B, kept_B = draw(logits_V.repeat(len(rows), 1), rows)
    full_B = (logits_V / 0.7).log_softmax(-1)[tokens_B]
    torch.testing.assert_close((behaviour_B + kept_B)[:-1], full_B[:-1], rtol=1e-4, atol=1e-5)
    kept = probabilities(logits_V, sampling) > 0
    mass = (logits_V / 0.7).softmax(-1)[kept].sum().log().item()
    assert kept_B[:50].tolist() == pytest.approx([mass] * 50, abs=1e-5) and mass < -0.01
    assert kept_B[50:].tolist() == [0, 0]


def test_rows_of_all_kinds_side_by_side_are_as_they_are_alone() -> None:
    kinds = [
        Sampling(),
        Sampling(temperature=0.0, top_k=3),
        Sampling(top_k=3),
        Sampling(temperature=0.5, top_p=0.5),
        Sampling(min_p=0.2, top_p=0.9),
    ]
    rows = [Row(kind, sample, 0) for sample in range(20) for kind in kinds]
    logits_BV = 2 * torch.randn(len(rows), 400, generator=torch.Generator().manual_seed(3))
    together = draw(logits_BV, rows)
    for i, row in enumerate(rows):
        for all_of_it, alone in zip(together, draw(logits_BV[i : i + 1], [row]), strict=True):
            torch.testing.assert_close(all_of_it[i : i + 1], alone)
    greedy = [i for i, row in enumerate(rows) if row.sampling.temperature == 0]
    assert torch.equal(together[0][greedy], logits_BV[greedy].argmax(-1))
    assert (together[2][greedy] == 0).all()


def test_a_difference_in_the_last_bits_changes_no_token() -> None:
    rows = [Row(Sampling(), sample, 0) for sample in range(500)]
    logits_BV = 2 * torch.randn(500, 3000, generator=torch.Generator().manual_seed(4))
    noise_BV = 1e-6 * torch.randn(500, 3000, generator=torch.Generator().manual_seed(5))
    assert torch.equal(draw(logits_BV, rows)[0], draw(logits_BV + noise_BV, rows)[0])


def test_logits_that_are_not_finite_are_refused() -> None:
    with pytest.raises(FloatingPointError, match="not finite"):
        draw(torch.tensor([[0.0, float("nan")]]), [Row(Sampling(), 0, 0)])


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 1.5},
        {"seed": -1},
        {"seed": 2**63},
        {"stop": ("",)},
    ],
)
def test_settings_outside_their_range_are_refused(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match="a stop text" if name == "stop" else name):
        Sampling(**wrong)
