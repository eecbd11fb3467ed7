"""The sampler, one request at a time, against full forward passes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from drivetrain.kernels.attention import make_documents
from drivetrain.model.generate import Completion, Generator, Request, Sampling, TooLong
from drivetrain.model.transformer import Transformer, logits

VOCAB, CONTEXT = 40, 64  # of the small models
CPU = torch.device("cpu")
Models = dict[int | None, Transformer]
GREEDY = Sampling(max_tokens=12, temperature=0.0)
windows = pytest.mark.parametrize("window", [None, 4], ids=["full", "sliding"])
caches = pytest.mark.parametrize("paged", [False, True], ids=["host", "paged"])
pytestmark = pytest.mark.usefixtures("short_prompts_are_shared")


def sampler(model: Transformer, **options: Any) -> Generator:
    return Generator(model, model.cfg, CPU, **options)


def one(model: Transformer, prompt: list[int], sampling: Sampling = GREEDY, **options: Any) -> Completion:
    return sampler(model, **options).generate([Request(prompt, sampling)])[0][0]


def full_logprobs(model: Transformer, tokens: Sequence[int]) -> Tensor:
    """[T, V] of the whole text in one forward pass."""
    T = len(tokens)
    documents = make_documents(torch.tensor([0, T], dtype=torch.int32), T, T, T, model.cfg.sliding_window)
    with torch.no_grad():
        return model(torch.tensor(tokens), torch.arange(T), documents, logits).log_softmax(-1)


def check_logprobs(model: Transformer, prompt: list[int], completion: Completion) -> None:
    logprobs_TV = full_logprobs(model, prompt + completion.tokens)[len(prompt) - 1 : -1]
    expected = logprobs_TV[torch.arange(len(completion.tokens)), completion.tokens]
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=1e-4, atol=1e-4)


# --- one request --------------------------------------------------------------------------------------------


@caches
@windows
def test_greedy_is_the_argmax_of_a_full_forward_pass(models: Models, window: int | None, paged: bool) -> None:
    model = models[window]
    for prompt, samples in (([3, 1, 4, 1, 5], 1), ([7] * 16, 2), ([9, 2] * 10, 3)):
        sampling = replace(GREEDY, max_tokens=20)
        (found,) = sampler(model, paged=paged).generate([Request(prompt, sampling, samples)])
        assert len(found) == samples
        for each in found:
            logprobs_TV = full_logprobs(model, prompt + each.tokens)[len(prompt) - 1 : -1]
            assert each.tokens == logprobs_TV.argmax(-1).tolist()
            assert each.behaviour_logprobs == [0.0] * 20 and each.finish_reason == "length"
            check_logprobs(model, prompt, each)


@caches
@windows
def test_logprobs_are_the_models_and_those_sampled_from(
    models: Models, window: int | None, paged: bool
) -> None:
    model, prompt = models[window], [2, 9, 30]
    sampling = Sampling(max_tokens=25, temperature=2.0, top_k=5, seed=3)
    for each in sampler(model, paged=paged).generate([Request(prompt, sampling, 2)])[0]:
        check_logprobs(model, prompt, each)
        logprobs_TV = full_logprobs(model, prompt + each.tokens)[len(prompt) - 1 : -1]
        likeliest_T5, tokens_T5 = (logprobs_TV / 2).topk(5)
        at = [row.index(token) for row, token in zip(tokens_T5.tolist(), each.tokens, strict=True)]
        expected = likeliest_T5.log_softmax(-1)[torch.arange(25), at]
        torch.testing.assert_close(torch.tensor(each.behaviour_logprobs), expected, rtol=1e-4, atol=1e-4)
    plain = one(model, prompt, Sampling(max_tokens=9))
    assert plain.behaviour_logprobs == pytest.approx(plain.logprobs, abs=1e-6)


def test_a_seed_repeats_itself_and_another_does_not(models: Models) -> None:
    first, again, other = (
        one(models[None], [7], Sampling(temperature=1.5, max_tokens=20, seed=seed)) for seed in (5, 5, 6)
    )
    assert first == again and first.tokens != other.tokens
    torch.manual_seed(99)  # the global generator plays no part
    assert one(models[None], [7], Sampling(temperature=1.5, max_tokens=20, seed=5)) == first


def test_a_sample_is_the_same_among_more_or_fewer(models: Models) -> None:
    request = Request([7, 3], Sampling(max_tokens=20, seed=5), samples=5)
    many = sampler(models[None]).generate([request])[0]
    assert len({tuple(each.tokens) for each in many}) == 5
    few = sampler(models[None]).generate([replace(request, samples=2)])[0]
    assert [each.tokens for each in few] == [each.tokens for each in many[:2]]


def test_end_tokens_and_stop_tokens_are_the_last(models: Models) -> None:
    model = models[None]
    tokens = one(model, [3]).tokens
    stop = tokens[4]
    expected = tokens[: tokens.index(stop) + 1]
    by_eos = one(model, [3], eos_ids=[stop])
    by_token = one(model, [3], replace(GREEDY, stop_tokens=(stop,)))
    assert by_eos.tokens == by_token.tokens == expected
    assert by_eos.finish_reason == by_token.finish_reason == "stop"
    assert len(one(model, [3], replace(GREEDY, max_tokens=5)).tokens) == 5


def test_a_stop_text_ends_with_the_token_that_completes_it(models: Models) -> None:
    def decode(tokens: list[int]) -> str:
        return "".join(f"<{token}>" for token in tokens)

    model = models[None]
    tokens = one(model, [3]).tokens
    text = f"{tokens[4]}><{tokens[5]}"
    found = one(model, [3], replace(GREEDY, stop=("never", text)), decode=decode)
    place = next(i for i in range(len(tokens)) if text in decode(tokens[: i + 1]))
    assert found.tokens == tokens[: place + 1] and found.finish_reason == "stop"


def test_a_stop_text_is_found_as_it_stands_after_the_prompt(models: Models) -> None:
    """Where the decoder drops the space that a text begins with; and nothing is looked for in the prompt."""

    def decode(tokens: list[int]) -> str:
        return "".join(f" {token}" for token in tokens)[1:]

    first = one(models[None], [3]).tokens[0]
    stop = replace(GREEDY, stop=(f" {first}",))
    assert one(models[None], [3], stop, decode=decode).tokens == [first]
    found = one(models[None], [3, 3], replace(GREEDY, stop=("3 3 23",)), decode=decode)
    assert len(found.tokens) == 12 and found.finish_reason == "length"


def test_a_prompt_that_is_too_long_says_by_how_much(models: Models) -> None:
    with pytest.raises(TooLong) as error:
        sampler(models[None]).check(Request([1] * 70))
    assert (error.value.length, error.value.most) == (70, CONTEXT - 1)


def test_the_context_ends_a_completion(models: Models) -> None:
    found = one(models[None], [3] * 60, replace(GREEDY, max_tokens=100))
    assert len(found.tokens) == CONTEXT - 60 and found.finish_reason == "length"


def test_tokens_past_the_vocabulary_are_never_drawn(models: Models) -> None:
    model = models[None]
    sampling = Sampling(max_tokens=12, temperature=5.0)
    (found,) = sampler(model, vocab_size=6).generate([Request([3], sampling, 10)])
    assert {token for each in found for token in each.tokens} == set(range(6))
    greedy = one(model, [3], vocab_size=6)
    expected = float(full_logprobs(model, [3])[0, :6].log_softmax(-1).max())
    assert greedy.logprobs[0] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("request_", "options", "said"),
    [
        (Request([]), {}, "this has 0"),
        (Request([1] * CONTEXT), {}, "prompt is 64 tokens long and the model takes 63"),
        (Request([VOCAB]), {}, r"lie in \[0, 40\)"),
        (Request([-1]), {}, r"lie in \[0, 40\)"),
        (Request([1], samples=9), {"max_batch": 8}, "max_batch=8"),
        (Request([1], samples=0), {}, "this 0"),
        (Request([1], Sampling(stop=("a",))), {}, "decode="),
        (Request([1] * 9, Sampling(max_tokens=9), 2), {"kv_tokens": 26}, "takes 27 tokens of cache"),
    ],
)
def test_a_request_that_cannot_run_is_refused(
    models: Models, request_: Request, options: dict[str, Any], said: str
) -> None:
    generator = sampler(models[None], **options)
    with pytest.raises(ValueError, match=said):
        generator.submit(request_)
    with pytest.raises(ValueError, match=said):
        generator.check(request_)
    assert not generator.busy


# --- several ranks ------------------------------------------------------------------------------------------


def test_the_agreed_token_goes_on_and_stops(models: Models) -> None:
    """What another rank drew: the text goes on with it, its log-probability is told, and it may be the stop."""
    model, drawn = models[None], []

    def agree(tokens_B: Tensor) -> Tensor:
        drawn.extend(tokens_B.tolist())
        return torch.tensor([[11, 12, 13][len(drawn) - 1]])

    found = one(model, [3], agree=agree, eos_ids=[13], kv_tokens=CONTEXT)
    assert found.tokens == [11, 12, 13]
    assert drawn == full_logprobs(model, [3, 11, 12]).argmax(-1).tolist()
    check_logprobs(model, [3], found)


def test_an_idle_rank_takes_every_pass_of_the_others(models: Models) -> None:
    passes: list[int] = []
    busy = iter([True] * 3 * 3 + [False])  # 3 x (goes on, prefill, decode), then all are done

    def any_rank(here: bool) -> bool:
        assert not here
        return next(busy)

    model = models[4]
    hook = model.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    try:
        assert sampler(model, any_rank=any_rank).generate([]) == []
    finally:
        hook.remove()
    assert passes == [1] * 6
