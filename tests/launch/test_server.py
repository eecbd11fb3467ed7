"""`drivetrain serve` as a process: clients that leave, keys and addresses, the page, faults, the end."""

import asyncio
import base64
import hashlib
import itertools
import json
import re
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from drivetrain.conf.errors import ConfigError, DrivetrainError
from drivetrain.launch import cli
from drivetrain.launch.endpoints import Serving
from drivetrain.launch.server import build_app, read_key, serve
from drivetrain.train.serve import Sampler

CAT = [{"role": "user", "content": "where is the cat?"}]
SHORT: dict[str, Any] = {"messages": CAT, "max_tokens": 1}
LONG: dict[str, Any] = {
    "model": "tiny",
    "messages": CAT,
    "temperature": 0,
    "max_tokens": 4000,
    "stream": True,
}


# --- clients that go away, and too many of them -------------------------------------------------------------


def test_whoever_goes_away_takes_the_request_along(server: Any, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(**LONG)
    next(iter(stream))
    server.wait_until(requests=1)
    stream.close()
    server.wait_until(requests=0)
    with pytest.raises(httpx.ReadTimeout):  # not as a stream
        httpx.post(
            f"{server.url}/v1/chat/completions",
            json=LONG | {"stream": False},
            headers={"Authorization": f"Bearer {server.key}"},
            timeout=0.3,
        )
    server.wait_until(requests=0)


def test_more_than_may_wait_are_told_to_come_back(server: Any, client: openai.OpenAI) -> None:
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


# --- keys and addresses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["wrong", "{key}x", "x{key}", "ü"])
def test_a_wrong_key_opens_nothing(server: Any, wrong: str) -> None:
    headers = {"Authorization": f"Bearer {wrong.format(key=server.key)}".encode()}
    for path in ("chat/completions", "completions"):
        found = server.post(path, {}, headers=headers)
        assert found.status_code == 401 and found.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 401
    assert httpx.get(f"{server.url}/v1/models").status_code == 401
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_the_clients_own_error_is_raised(server: Any) -> None:
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
    path.write_text("  a-key-of-some-length\n")
    assert read_key(path) == "a-key-of-some-length"


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


def test_the_page_loads_nothing_from_elsewhere(server: Any) -> None:
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
                failed = await client.post("/v1/chat/completions", json=SHORT | {"stream": stream})
                assert failed.status_code == (200 if stream else 500)
                last = failed.text.strip().rpartition("data: ")[2]
                error = {
                    "message": "the weights are broken",
                    "type": "server_error",
                    "param": None,
                    "code": None,
                }
                assert json.loads(last) == {"error": error}
                assert (await client.post("/v1/chat/completions", json=SHORT)).status_code == 200
            serving.worker.close(30)
            assert (await client.get("/health")).status_code == 503
            assert (await client.post("/v1/completions", json={"prompt": "a"})).status_code == 503

    serving.worker.start()
    asyncio.run(ask())
    assert not sampler.generator.busy


def test_sigterm_lets_answers_end(
    talker: Path, serve_tiny: Callable[..., Any], kill_tree: Callable[..., None]
) -> None:
    running = serve_tiny(talker, "--name", "tiny")
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
