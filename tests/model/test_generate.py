from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from drivetrain.conf.schema import ModelConfig
from drivetrain.kernels.attention import make_documents
from drivetrain.model.generate import generate
from drivetrain.model.initialize import initialize
from drivetrain.model.transformer import Transformer, build_model, logits

VOCAB = 40


@pytest.fixture(scope="module", params=[None, 4], ids=["full", "sliding"])
def model(request: pytest.FixtureRequest) -> Transformer:
    cfg = ModelConfig(
        name="small",
        vocab_size=VOCAB,
        dim=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        ffn_dim=48,
        max_seq_len=64,
        init_std=0.5,  # logits far from each other
        sliding_window=request.param,
    )
    built = build_model(cfg, "sdpa")
    built.materialize(torch.device("cpu"))
    initialize(built, cfg, 1)
    return built


def run(model: Transformer, prompt: list[int], **changes: Any) -> list[tuple[int, float]]:
    settings = {"max_tokens": 12, "max_seq_len": 64, "stop_id": -1, "vocab_size": VOCAB, "temperature": 0.0}
    where = {"device": torch.device("cpu"), "sliding_window": model.cfg.sliding_window}
    return list(generate(model, prompt, **(settings | where | changes)))


def full_logprobs(model: Transformer, tokens: list[int]) -> Tensor:
    """[T, V] of the whole text in one forward pass."""
    T = len(tokens)
    documents = make_documents(torch.tensor([0, T], dtype=torch.int32), T, T, T, model.cfg.sliding_window)
    with torch.no_grad():
        return model(torch.tensor(tokens), torch.arange(T), documents, logits).log_softmax(-1)


def test_greedy_is_the_argmax_of_a_full_forward_pass(model: Transformer) -> None:
    prompt = [3, 1, 4, 1, 5]
    drawn = run(model, prompt)
    tokens = [token for token, _ in drawn]
    logprobs_TV = full_logprobs(model, prompt + tokens)[len(prompt) - 1 : -1]
    assert tokens == logprobs_TV.argmax(-1).tolist()
    torch.testing.assert_close(
        torch.tensor([logprob for _, logprob in drawn]), logprobs_TV.max(-1).values, rtol=1e-4, atol=1e-5
    )


def test_a_seed_repeats_itself_and_another_does_not(model: Transformer) -> None:
    first, again, other = (run(model, [7], temperature=1.5, seed=seed, max_tokens=20) for seed in (5, 5, 6))
    assert first == again != other
    torch.manual_seed(99)  # the global generator plays no part
    assert run(model, [7], temperature=1.5, seed=5, max_tokens=20) == first


def test_the_logprob_is_that_of_temperature_one(model: Transformer) -> None:
    drawn = run(model, [2, 9], temperature=2.0, seed=3)
    tokens = [2, 9, *(token for token, _ in drawn)]
    logprobs_TV = full_logprobs(model, tokens)
    for place, (token, logprob) in enumerate(drawn):
        assert logprob == pytest.approx(float(logprobs_TV[place + 1, token]), abs=1e-4)


def test_draws_follow_the_tempered_distribution(model: Transformer) -> None:
    draws = 800
    found = Counter(run(model, [8], max_tokens=1, temperature=1.7, seed=seed)[0][0] for seed in range(draws))
    expected_V = (full_logprobs(model, [8])[0] / 1.7).softmax(-1)
    for token in range(VOCAB):
        share = float(expected_V[token])
        sigma = (share * (1 - share) * draws) ** 0.5
        assert abs(found[token] - share * draws) < 5 * sigma + 1


def test_the_stop_token_is_the_last(model: Transformer) -> None:
    tokens = [token for token, _ in run(model, [3])]
    stop = tokens[4]
    stopped = [token for token, _ in run(model, [3], stop_id=stop)]
    assert stopped == tokens[: tokens.index(stop) + 1]
    assert len(run(model, [3], max_tokens=5)) == 5
    assert run(model, [3], max_tokens=0) == []


def test_the_agreed_token_goes_on_and_stops(model: Transformer) -> None:
    """What another rank drew: the text goes on with it, its log-probability is told, and it may be the stop."""
    drawn: list[int] = []

    def agree(token: int) -> int:
        drawn.append(token)
        return [11, 12, 13][len(drawn) - 1]

    found = run(model, [3], agree=agree, stop_id=13)
    assert [token for token, _ in found] == [11, 12, 13]
    logprobs_TV = full_logprobs(model, [3, 11, 12])
    assert drawn == logprobs_TV.argmax(-1).tolist()
    for place, (token, logprob) in enumerate(found):
        assert logprob == pytest.approx(float(logprobs_TV[place, token]), abs=1e-4)


def test_tokens_past_the_vocabulary_are_never_drawn(model: Transformer) -> None:
    drawn = [
        token for seed in range(10) for token, _ in run(model, [3], vocab_size=6, temperature=5.0, seed=seed)
    ]
    assert set(drawn) == set(range(6))
    greedy = run(model, [3], vocab_size=6, max_tokens=1)
    assert greedy[0][1] == pytest.approx(
        float(full_logprobs(model, [3])[0, :6].log_softmax(-1).max()), abs=1e-4
    )


def test_past_the_longest_context_the_oldest_tokens_are_left_out(model: Transformer) -> None:
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    tokens = [token for token, _ in run(model, prompt, max_seq_len=4)]
    text = prompt + tokens
    for place in range(len(prompt), len(text)):
        assert text[place] == int(full_logprobs(model, text[place - 4 : place])[-1].argmax())


def test_code_between_two_tokens_may_still_compile(model: Transformer) -> None:
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        compiled.append(1)
        return graph.forward

    double = torch.compile(lambda x: x * 2, backend=backend)
    for _ in generate(
        model,
        [3],
        max_tokens=2,
        max_seq_len=8,
        stop_id=-1,
        vocab_size=VOCAB,
        device=torch.device("cpu"),
        sliding_window=model.cfg.sliding_window,
    ):
        double(torch.ones(3))
    assert compiled == [1]
