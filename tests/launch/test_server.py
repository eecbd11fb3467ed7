"""`drivetrain serve` as OpenAI's own client and others meet it: one process on a free port, with a key."""

import asyncio
import base64
import hashlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from drivetrain.conf.errors import ConfigError, DrivetrainError
from drivetrain.launch import cli
from drivetrain.launch.endpoints import MAX_BODY_BYTES, Serving
from drivetrain.launch.openai_api import ApiError, ChatBody, TextBody, parse
from drivetrain.launch.server import build_app, read_key, serve
from drivetrain.model.draw import Sampling
from drivetrain.train.serve import Sampler

KEY = "a-key-of-some-length"
ENV = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
CAT = [{"role": "user", "content": "where is the cat?"}]
LONG: dict[str, Any] = {
    "model": "tiny",
    "messages": CAT,
    "temperature": 0,
    "max_tokens": 4000,
    "stream": True,
}


@dataclass(frozen=True)
class Running:
    url: str
    process: subprocess.Popen[str]

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {KEY}"} | options.pop("headers", {})
        return httpx.post(f"{self.url}/v1/{path}", json=body, headers=headers, timeout=60, **options)

    def wait_until(self, **wanted: int) -> None:
        """For what /health says."""
        deadline = time.monotonic() + 30
        while True:
            found = httpx.get(f"{self.url}/health").json()
            if wanted.items() <= found.items():
                return
            assert time.monotonic() < deadline, found
            time.sleep(0.02)


def start(source: Path, *words: str) -> Running:
    process = subprocess.Popen(
        [sys.executable, "-m", "drivetrain.launch.cli", "serve", str(source), "--port", "0", *words],
        env=ENV,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    said = process.stderr.readline()
    found = re.fullmatch(r"serving tiny on (http://127\.0\.0\.1:\d+) \(Ctrl-C stops it\)\n", said)
    assert found, said + process.communicate()[1]
    return Running(found[1], process)


@pytest.fixture(scope="module")
def server(
    talker: Path, tmp_path_factory: pytest.TempPathFactory, kill_tree: Callable[..., None]
) -> Iterator[Running]:
    key = tmp_path_factory.mktemp("key") / "key"
    key.write_text(KEY + "\n")
    running = start(talker, "--api-key-file", str(key), "--max-batch", "4", "--max-waiting", "4")
    yield running
    kill_tree(running.process)


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return server.client()


@pytest.fixture(scope="module")
def sampler(talker: Path) -> Sampler:
    """The same model in this process."""
    return Sampler(talker, max_batch=4)


# --- answers ------------------------------------------------------------------------------------------------


def test_a_chat_is_answered_as_the_sampler_answers(client: openai.OpenAI, sampler: Sampler) -> None:
    found = client.chat.completions.create(
        model="tiny", messages=CAT, max_tokens=9, seed=4, temperature=0.9, top_p=0.95, logprobs=True, n=2
    )
    sampling = Sampling(max_tokens=9, seed=4, temperature=0.9, top_p=0.95)
    wanted = sampler.complete(sampler.chat_request(CAT, sampling, 2))
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
    assert usage.prompt_tokens == len(sampler.chat_request(CAT, sampling).prompt)
    assert usage.completion_tokens == sum(len(each["tokens"]) for each in wanted)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_texts_are_continued_one_or_many(client: openai.OpenAI, sampler: Sampler) -> None:
    prompts = ["the cat", "the dog is", ""]
    found = client.completions.create(model="tiny", prompt=prompts, max_tokens=6, seed=1, n=2, logprobs=0)
    wanted = [
        each
        for prompt in prompts
        for each in sampler.complete(sampler.request(prompt, Sampling(max_tokens=6, seed=1), 2))
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
    (wanted,) = sampler.complete(sampler.chat_request(plain, Sampling(max_tokens=8, temperature=0)))
    assert found.choices[0].message.content == wanted["text"]


# --- clients that go away, too many of them, and wrong ones -------------------------------------------------


def test_whoever_goes_away_takes_the_request_along(server: Running, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(**LONG)
    next(iter(stream))
    server.wait_until(requests=1)
    stream.close()
    server.wait_until(requests=0)
    with pytest.raises(httpx.ReadTimeout):  # not as a stream
        httpx.post(
            f"{server.url}/v1/chat/completions",
            json=LONG | {"stream": False},
            headers={"Authorization": f"Bearer {KEY}"},
            timeout=0.3,
        )
    server.wait_until(requests=0)


def test_more_than_may_wait_are_told_to_come_back(server: Running, client: openai.OpenAI) -> None:
    streams = []
    try:
        for _ in range(4):
            streams.append(client.chat.completions.create(**LONG))
            assert any(chunk.choices[0].delta.content for chunk in itertools.islice(streams[-1], 4))
        streams += [client.chat.completions.create(**LONG) for _ in range(4)]
        server.wait_until(requests=8, waiting=4)
        with pytest.raises(openai.RateLimitError, match="4 requests wait already; try again later") as error:
            client.chat.completions.create(model="tiny", messages=CAT)
        assert error.value.response.headers["retry-after"] == "1"
    finally:
        for stream in streams:
            stream.close()
    server.wait_until(requests=0)
    assert client.completions.create(model="tiny", prompt="a", max_tokens=1).choices


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
        "message 1 has a part of type 'image_url'; text alone can be learned",
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
    "long": ("completions", TEXT | {"prompt": "a" * 9000}, 400, "a prompt has 1 to 4095 tokens"),
    "logprobs": (
        "completions",
        TEXT | {"logprobs": 2},
        400,
        "the log-probability of each token that was taken",
    ),
    "top": (
        "chat/completions",
        CHAT | {"top_logprobs": 2},
        400,
        "top_logprobs is unknown or not supported here",
    ),
    "tools": ("chat/completions", CHAT | {"tools": [{}]}, 400, "tools is unknown or not supported here"),
    "echo": (
        "completions",
        TEXT | {"echo": True},
        400,
        "echo is unknown or not supported here; leave it out",
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
def test_what_is_wrong_is_said(server: Running, case: str) -> None:
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


def test_bodies_that_are_no_json_are_refused(server: Running) -> None:
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


# --- keys and addresses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["wrong", KEY[:-1], KEY + "x", "ü"])
def test_a_wrong_key_opens_nothing(server: Running, key: str) -> None:
    headers = {"Authorization": f"Bearer {key}".encode()}
    for path in ("chat/completions", "completions"):
        found = server.post(path, {}, headers=headers)
        assert found.status_code == 401 and found.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 401
    assert httpx.get(f"{server.url}/v1/models").status_code == 401
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_the_clients_own_error_is_raised(server: Running) -> None:
    with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
        server.client("wrong").models.list()


NOWHERE = Path("nowhere")
OPTIONS: dict[str, Any] = {"port": 0, "name": None, "max_batch": 1, "max_waiting": 1, "max_tokens": 1}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
def test_other_machines_are_let_in_with_a_key_alone(host: str) -> None:
    with pytest.raises(
        ConfigError, match="lets other machines in and there is no API key; write one to a file"
    ):
        serve(NOWHERE, host=host, key_file=None, **OPTIONS)


def test_a_key_file_holds_a_key(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        serve(NOWHERE, host="0.0.0.0", key_file=path, **OPTIONS)
    for text in ("", "\n", "short\n", "a key with some spaces", "one-line-of-a-key\nand-another-line\n"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="must hold one line of 16 or more characters"):
            read_key(path)
    path.write_bytes("schlüssel-von-guter-länge".encode())
    with pytest.raises(ConfigError, match="cannot be read: it is not ASCII text"):
        read_key(path)
    path.write_text(f"  {KEY}\n")
    assert read_key(path) == KEY


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(DrivetrainError, match=f"cannot listen on 127.0.0.1 port {port}: Address already"):
            serve(NOWHERE, host="127.0.0.1", key_file=None, **OPTIONS | {"port": port})


def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "drivetrain.launch.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.setattr(sys, "argv", ["drivetrain", "serve", "nowhere"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said == (
        "error: serve needs uvicorn, which is not installed; run `pip install 'drivetrain[serve]'`"
    )


# --- the page, faults, the end ------------------------------------------------------------------------------


def test_the_page_loads_nothing_from_elsewhere(server: Running) -> None:
    found = httpx.get(server.url)
    page, policy = found.text, found.headers["content-security-policy"]
    assert found.status_code == 200 and policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    assert not re.search(r"https?:|//[a-z]|@import|url\(|innerHTML|\ssrc=|\son\w+=|style=", page)
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    for path in ("docs", "redoc", "openapi.json"):
        assert httpx.get(f"{server.url}/{path}").status_code == 404


def test_without_a_key_only_this_machine_is_answered(sampler: Sampler) -> None:
    app = build_app(Serving(sampler, "tiny", 4, 8), None)

    async def status(host: str) -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as client:
            return (await client.get("http://127.0.0.1/v1/models", headers={"Host": host})).status_code

    for host, wanted in {
        "localhost:80": 200,
        "[::1]": 200,
        "127.0.0.1": 200,
        "evil.example": 403,
    }.items():
        assert asyncio.run(status(host)) == wanted, host


def test_a_failed_step_fails_those_that_ran_and_no_more(
    sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving = Serving(sampler, "tiny", 4, 8)
    app = build_app(serving, None)

    def fail() -> Any:
        monkeypatch.undo()
        raise FloatingPointError("the weights are broken\nmore")

    async def ask() -> None:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://localhost"
        ) as client:
            for stream in (False, True):
                monkeypatch.setattr(sampler.generator, "step", fail)
                failed = await client.post("/v1/chat/completions", json=CHAT | {"stream": stream})
                assert failed.status_code == (200 if stream else 500)
                last = failed.text.strip().rpartition("data: ")[2]
                error = {
                    "message": "the weights are broken",
                    "type": "server_error",
                    "param": None,
                    "code": None,
                }
                assert json.loads(last) == {"error": error}
                assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
            serving.worker.close(30)
            assert (await client.get("/health")).status_code == 503
            assert (await client.post("/v1/completions", json=TEXT)).status_code == 503

    serving.worker.start()
    asyncio.run(ask())
    assert not sampler.generator.busy


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


def test_sigterm_lets_answers_end(talker: Path, kill_tree: Callable[..., None]) -> None:
    running = start(talker, "--name", "tiny")
    try:
        client = running.client("none-is-needed")
        stream = client.chat.completions.create(**LONG | {"max_tokens": 800})
        next(iter(stream))
        running.process.send_signal(signal.SIGTERM)
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
        assert running.process.wait(30) == 0 and running.process.stderr.read() == ""
    finally:
        kill_tree(running.process)
