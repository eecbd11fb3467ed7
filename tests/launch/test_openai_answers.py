"""What OpenAI's own client gets from `drivetrain serve`: what the sampler says, whole or in chunks."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from drivetrain.model.draw import Sampling
from drivetrain.train.serve import Sampler

CAT = [{"role": "user", "content": "where is the cat?"}]


def test_a_chat_is_answered_as_the_sampler_answers(client: openai.OpenAI, sampler: Sampler) -> None:
    found = client.chat.completions.create(
        model="tiny", messages=CAT, max_tokens=9, seed=4, temperature=0.9, top_p=0.95, logprobs=True, n=2
    )
    sampling = Sampling(max_tokens=9, seed=4, temperature=0.9, top_p=0.95)
    wanted = sampler.complete(sampler.prompts.answered(CAT, sampling, 2))
    assert len(found.choices) == 2 and found.model == "tiny" and found.object == "chat.completion"
    for choice, each in zip(found.choices, wanted, strict=True):
        assert choice.message.role == "assistant" and choice.message.content == each["text"]
        assert choice.finish_reason == each["finish_reason"]
        assert choice.logprobs is not None and choice.logprobs.content is not None
        assert [token.logprob for token in choice.logprobs.content] == pytest.approx(
            each["logprobs"], abs=1e-4
        )
        assert "".join(token.token for token in choice.logprobs.content).startswith(each["text"][:1])
    usage = found.usage
    assert usage is not None
    assert usage.prompt_tokens == len(sampler.prompts.answered(CAT, sampling).prompt)
    assert usage.completion_tokens == sum(len(each["tokens"]) for each in wanted)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_texts_are_continued_one_or_many(client: openai.OpenAI, sampler: Sampler) -> None:
    prompts = ["the cat", "the dog is", ""]
    found = client.completions.create(model="tiny", prompt=prompts, max_tokens=6, seed=1, n=2, logprobs=0)
    wanted = [
        each
        for prompt in prompts
        for each in sampler.complete(sampler.prompts.continued(prompt, Sampling(max_tokens=6, seed=1), 2))
    ]
    assert [choice.text for choice in found.choices] == [each["text"] for each in wanted]
    assert [choice.index for choice in found.choices] == list(range(6))
    for choice, each in zip(found.choices, wanted, strict=True):
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs == pytest.approx(each["logprobs"], abs=1e-4)
        assert choice.logprobs.text_offset is not None and choice.logprobs.text_offset[0] == 0
    ids = sampler.tokenizer.encode("the cat").ids
    for prompt in (ids, [ids]):
        by_ids = client.completions.create(model="tiny", prompt=prompt, max_tokens=6, seed=1, n=2)
        assert [choice.text for choice in by_ids.choices] == [each["text"] for each in wanted[:2]]
    assert client.completions.create(model="tiny", prompt="a", temperature=0).usage.completion_tokens == 16


@pytest.mark.parametrize("stop", [[], ["e", " "]])
def test_a_stream_adds_up_to_the_answer(client: openai.OpenAI, stop: list[str]) -> None:
    asked: dict[str, Any] = {"model": "tiny", "seed": 7, "n": 3, "max_tokens": 30, "stop": stop}
    whole = client.chat.completions.create(messages=CAT, logprobs=True, **asked)
    texts, reasons, logprobs = [""] * 3, [None] * 3, [[], [], []]
    usage, roles = None, []
    for chunk in client.chat.completions.create(
        messages=CAT, logprobs=True, stream=True, stream_options={"include_usage": True}, **asked
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert reasons[choice.index] is None
            roles += [choice.delta.role] if choice.delta.role else []
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason
            logprobs[choice.index] += (choice.logprobs and choice.logprobs.content) or []
    assert roles == ["assistant"] * 3 and usage == whole.usage
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert logprobs == [choice.logprobs.content for choice in whole.choices]
    told = client.completions.create(prompt="the cat", stream=True, **asked)
    parts = ["", "", ""]
    for each in told:
        parts[each.choices[0].index] += each.choices[0].text
    again = client.completions.create(prompt="the cat", **asked)
    assert parts == [choice.text for choice in again.choices]


def test_a_seed_repeats_and_none_does_not(client: openai.OpenAI) -> None:
    def text(**options: Any) -> str:
        found = client.completions.create(model="tiny", prompt="the", max_tokens=20, **options)
        return found.choices[0].text

    assert text(seed=3) == text(seed=3) != text(seed=4)
    assert text() != text()
    assert text(temperature=0) == text(temperature=0, seed=9) == text(extra_body={"top_k": 1})


def test_many_clients_get_what_each_gets_alone(client: openai.OpenAI) -> None:
    def ask(number: int) -> list[str | None]:
        # Four at once: two of four rows each, so that some wait and some run together.
        found = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "the cat " * number}],
            max_tokens=5 + 4 * number,
            seed=number,
            n=1 + number % 2,
        )
        return [choice.message.content for choice in found.choices]

    alone = [ask(number) for number in range(1, 9)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(1, 9))) == alone


def test_stop_texts_end_an_answer_before_them(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "the cat", "seed": 11, "max_tokens": 40}
    (whole,) = client.completions.create(**asked).choices
    stop = whole.text[8:10]
    assert len(stop) == 2
    (choice,) = client.completions.create(stop=stop, **asked).choices
    assert (choice.text, choice.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    unused = ["nothing like this", "nor this"]
    assert client.completions.create(stop=unused, **asked).choices[0].text == whole.text


def test_the_conversation_is_rendered_as_in_training(client: openai.OpenAI, sampler: Sampler) -> None:
    parts = [{"type": "text", "text": "where is "}, {"type": "text", "text": "the cat?"}]
    turns: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "here"},
        {"role": "user", "content": "and?"},
    ]
    plain = [
        {"role": "system", "content": "Be brief."},
        *CAT,
        {"role": "assistant", "content": "here"},
        {"role": "user", "content": "and?"},
    ]
    found = client.chat.completions.create(
        model="tiny", messages=turns, max_completion_tokens=8, temperature=0
    )
    (wanted,) = sampler.complete(sampler.prompts.answered(plain, Sampling(max_tokens=8, temperature=0)))
    assert found.choices[0].message.content == wanted["text"]
