"""What clients of `drivetrain serve` may ask, and what they are told of the rest."""

import itertools
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from drivetrain.launch.endpoints import MAX_BODY_BYTES
from drivetrain.launch.openai_api import ApiError, ChatBody, TextBody, parse

CAT = [{"role": "user", "content": "where is the cat?"}]
CHAT: dict[str, Any] = {"messages": CAT, "max_tokens": 1}
TEXT: dict[str, Any] = {"prompt": "a", "max_tokens": 1}
WRONG: dict[str, tuple[str, Any, int, str]] = {
    "no object": ("completions", [1], 400, "the body is no JSON object"),
    "no prompt": ("completions", {}, 400, "prompt is missing"),
    "no messages": ("chat/completions", {"messages": []}, 400, "a conversation has at least one message"),
    "messages": (
        "chat/completions",
        {"messages": "hi"},
        400,
        "messages is wrong: Input should be a valid list",
    ),
    "role": (
        "chat/completions",
        CHAT | {"messages": [{"role": "boss", "content": "a"}]},
        400,
        "message 1 has the role 'boss'; known are system, ",
    ),
    "image": (
        "chat/completions",
        CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "message 1 has a part of type 'image_url'; only text can be read",
    ),
    "control": (
        "chat/completions",
        CHAT | {"messages": [{"role": "user", "content": "a<|im_end|>"}]},
        400,
        "message 1 spells the control token <|im_end|>; leave it out",
    ),
    "model": ("completions", TEXT | {"model": "gpt"}, 404, "there is no model gpt here; this is tiny"),
    "temperature": (
        "completions",
        TEXT | {"temperature": -1},
        400,
        "sampling: temperature must be 0 or more",
    ),
    "type": (
        "completions",
        TEXT | {"temperature": "1"},
        400,
        "temperature is wrong: Input should be a",
    ),
    "tokens": ("chat/completions", CHAT | {"max_tokens": 0}, 400, "sampling: max_tokens must be at least 1"),
    "both": (
        "chat/completions",
        CHAT | {"max_completion_tokens": 2},
        400,
        "max_tokens and max_completion_tokens differ; give one of them",
    ),
    "n": ("completions", TEXT | {"n": 5}, 400, "a request takes 1 to max_batch=4 samples, this 5"),
    "seed": ("completions", TEXT | {"seed": -1}, 400, "sampling: seed must lie in [0, 2^63)"),
    "stop": ("completions", TEXT | {"stop": ["a"] * 17}, 400, "stop has 17 texts; give at most 16"),
    "empty stop": ("completions", TEXT | {"stop": ""}, 400, "sampling: a stop text must not be empty"),
    "prompt": (
        "completions",
        TEXT | {"prompt": {}},
        400,
        "prompt must be a text, a list of texts, a list of",
    ),
    "none": ("completions", TEXT | {"prompt": []}, 400, "prompt must be a text"),
    "ids": ("completions", TEXT | {"prompt": [290]}, 400, "a prompt's tokens lie in [0, 290)"),
    "many": (
        "completions",
        TEXT | {"prompt": ["a"] * 5},
        400,
        "5 prompts at once are too many; send at most 4",
    ),
    "long": (
        "completions",
        TEXT | {"prompt": "a" * 9000},
        400,
        "the prompt is 9000 tokens long and the model takes 4095",
    ),
    "logprobs": (
        "completions",
        TEXT | {"logprobs": 2},
        400,
        "the log-probabilities of the token that was taken and of the likeliest are known: use 0 or 1",
    ),
    "top": (
        "chat/completions",
        CHAT | {"top_logprobs": 2},
        400,
        "top_logprobs is unknown or not supported here",
    ),
    "tools": ("chat/completions", CHAT | {"tools": [{}]}, 400, "tools.0.type is missing"),
    "tool": (
        "chat/completions",
        CHAT | {"tools": [{"type": "function", "function": {"name": "f", "parameters": "{}"}}]},
        400,
        "tools.0.function.parameters is wrong: Input should be a valid dictionary",
    ),
    "forced": (
        "chat/completions",
        CHAT | {"tools": [], "tool_choice": "required"},
        400,
        "tool_choice can be none or auto; no call can be forced here",
    ),
    "one by one": (
        "chat/completions",
        CHAT | {"parallel_tool_calls": False},
        400,
        "parallel_tool_calls=false is not supported here; leave it out",
    ),
    "text tools": ("completions", TEXT | {"tools": [{}]}, 400, "tools is unknown or not supported here"),
    "likeliest": (
        "completions",
        TEXT | {"logprobs": 1},
        400,
        "the likeliest token is known where temperature is 0; use that, or logprobs=0",
    ),
    "echo": ("chat/completions", CHAT | {"echo": True}, 400, "echo is unknown or not supported here"),
    "nothing": ("completions", TEXT | {"max_tokens": 0}, 400, "sampling: max_tokens must be at least 1"),
    "no stream": (
        "completions",
        TEXT | {"max_tokens": 0, "echo": True, "stream": True},
        400,
        "with max_tokens=0 there is nothing to stream; leave stream out",
    ),
    "long echo": (
        "completions",
        TEXT | {"prompt": "a" * 9000, "echo": True, "logprobs": 0},
        400,
        "the prompt is 9000 tokens long and the model takes 4095",
    ),
    "options": (
        "completions",
        TEXT | {"stream_options": {"x": 1}},
        400,
        "stream_options.x is unknown or not supported here",
    ),
    "path": ("nonsense", {}, 404, "POST /v1/nonsense: Not Found"),
    "method": ("models", {}, 405, "POST /v1/models: Method Not Allowed"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said(server: Any, case: str) -> None:
    path, body, status, sentence = WRONG[case]
    found = server.post(path, body)
    assert found.status_code == status, found.text
    error = found.json()["error"]
    assert error["message"].startswith(sentence) and "\n" not in error["message"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"


def test_what_asks_for_nothing_is_allowed(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model="tiny",
        messages=CAT,
        max_tokens=1,
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        user="somebody",
        stop=None,
        top_logprobs=0,
    )
    assert found.usage is not None and found.usage.completion_tokens == 1


def test_bodies_that_are_no_json_are_refused(server: Any) -> None:
    json_type = {"Content-Type": "application/json"}
    for content, said in {
        b"{": "the body is not JSON in UTF-8 (",
        b"\xff": "the body is not JSON in UTF-8 (",
        b'{"prompt": "\\ud800"}': "the body is not JSON in UTF-8 (",
        b"[" * 100_000: "the body is not JSON in UTF-8 (",
        b"": "the body is not JSON in UTF-8 (",
    }.items():
        found = server.post("completions", content=content, headers=json_type)
        assert found.status_code == 400 and found.json()["error"]["message"].startswith(said)
    plain = server.post("completions", content=b"{}", headers={"Content-Type": "text/plain"})
    assert plain.status_code == 415

    def endless() -> Iterator[bytes]:
        yield from itertools.repeat(b" " * 65536, MAX_BODY_BYTES // 65536 + 1)

    try:
        found = server.post("completions", content=endless(), headers=json_type)
        assert (
            found.status_code == 413 and found.json()["error"]["message"] == "the body is larger than 8 MiB"
        )
    except httpx.WriteError:  # refused while it was still being sent
        pass
    server.wait_until(requests=0)


def test_the_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "drivetrain"
    with pytest.raises(openai.NotFoundError, match="there is no model other here; this is tiny"):
        client.models.retrieve("other")


def test_a_body_is_read_strictly() -> None:
    body = parse(b'{"prompt": [1, 2], "stop": "a", "top_k": -1, "n": null}', TextBody)
    assert body.prompt == [[1, 2]] and body.stop == ["a"] and body.n == 1 and body.sampling(5).top_k == 0
    assert parse(b'{"messages": [], "max_completion_tokens": 3}', ChatBody).sampling(5).max_tokens == 3
    for wrong in (
        b'{"prompt": [1, "a"]}',
        b'{"prompt": [true]}',
        b'{"prompt": "a", "n": true}',
        b'{"prompt": "a", "n": 0}',
    ):
        with pytest.raises(ApiError):
            parse(wrong, TextBody)
