"""`drivetrain serve SOURCE`: OpenAI's completions and chat completions over HTTP, and a page to chat with."""

import asyncio
import base64
import hashlib
import hmac
import importlib.resources
import ipaddress
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn
from fastapi import APIRouter, Depends, FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.responses import Response as HttpResponse
from starlette.exceptions import HTTPException

from drivetrain.conf.errors import ConfigError, DrivetrainError
from drivetrain.launch.endpoints import Serving
from drivetrain.launch.openai_api import ApiError
from drivetrain.train.serve import Sampler

GRACE_SECONDS = 30  # for answers to end after SIGTERM
MIN_KEY_CHARACTERS = 16
PAGE = "chat_page.html"


def build_app(serving: Serving, key: str | None) -> FastAPI:
    """The routes.

    Args:
        key: that clients of /v1 must send; None: none, and only requests addressed to this machine are answered, so
            that no page elsewhere reaches it through a name that it lets point here.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        serving.worker.start()
        yield
        await asyncio.to_thread(serving.worker.close, float(GRACE_SECONDS))

    async def check_key(http: HttpRequest) -> None:
        if key is not None and not _same(http.headers.get("authorization", ""), f"Bearer {key}"):
            said = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
            raise ApiError(401, said, code="invalid_api_key")

    async def check_host(http: HttpRequest) -> None:
        if key is None and not _is_loopback(http.url.hostname or ""):
            raise ApiError(403, "this server answers on 127.0.0.1 and localhost alone", code="wrong_host")

    page, policy = _page()

    async def chat_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "Cache-Control": "no-cache"})

    api = APIRouter(prefix="/v1", dependencies=[Depends(check_key)])
    api.add_api_route("/chat/completions", serving.chat_completions, methods=["POST"], response_model=None)
    api.add_api_route("/completions", serving.completions, methods=["POST"], response_model=None)
    api.add_api_route("/models", serving.models)
    api.add_api_route("/models/{name:path}", serving.model)
    # FastAPI's own pages load their scripts from elsewhere.
    app = FastAPI(
        docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan, dependencies=[Depends(check_host)]
    )
    app.include_router(api)
    app.add_api_route("/health", serving.health, response_model=None)
    app.add_api_route("/", chat_page, response_model=None)
    app.add_exception_handler(ApiError, _said)
    app.add_exception_handler(HTTPException, _not_found)
    app.add_exception_handler(Exception, _fault)
    return app


def _same(given: str, wanted: str) -> bool:
    """In a time that says nothing of how much is right."""
    return hmac.compare_digest(*(hashlib.sha256(text.encode()).digest() for text in (given, wanted)))


async def _said(_: HttpRequest, error: Exception) -> HttpResponse:
    assert isinstance(error, ApiError)
    headers = {"Retry-After": "1"} if error.retry else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status in (408, 413):
        headers["Connection"] = "close"  # the rest of the body has not been read
    return JSONResponse(error.body, error.status, headers)


async def _not_found(http: HttpRequest, error: Exception) -> HttpResponse:
    assert isinstance(error, HTTPException)
    said = f"{http.method} {http.url.path}: {error.detail}"
    return JSONResponse(ApiError(error.status_code, said).body, error.status_code, error.headers)


async def _fault(_: HttpRequest, error: Exception) -> HttpResponse:
    return JSONResponse(ApiError(500, f"a fault of the server: {type(error).__name__}").body, 500)


def _page() -> tuple[str, str]:
    """The chat page, and a policy under which nothing runs but its own script, and nothing is loaded."""
    page = (importlib.resources.files("drivetrain.launch") / PAGE).read_text(encoding="utf-8")

    def digest(tag: str) -> str:
        found = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert found is not None
        return f"'sha256-{base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}'"

    policy = (
        f"default-src 'none'; script-src {digest('script')}; style-src {digest('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


# --- the process --------------------------------------------------------------------------------------------


def serve(
    source: Path,
    *,
    host: str,
    port: int,
    key_file: Path | None,
    name: str | None,
    max_batch: int,
    max_waiting: int,
    max_tokens: int,
) -> None:
    """Serve until SIGTERM or SIGINT, after which answers that run may end.

    Args:
        port: 0: one that is free; the line that says where it serves names it.

    Raises:
        ConfigError: no key where others could reach it, a key file that holds none, or as `open_model`.
        DrivetrainError: the address cannot be had.
    """
    key = read_key(key_file) if key_file is not None else None
    if key is None and not _is_loopback(host):
        raise ConfigError(
            f"--host {host} lets other machines in and there is no API key; write one to a file that you alone can "
            "read (`openssl rand -hex 32 > key`) and pass --api-key-file key, or listen on 127.0.0.1"
        )
    with _bound(host, port) as listener:
        sampler = Sampler(source, max_batch=max_batch)
        serving = Serving(sampler, name or source.resolve().name, max_waiting, max_tokens)
        server = _Server(
            uvicorn.Config(
                build_app(serving, key),
                ws="none",
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=GRACE_SECONDS,
            ),
            said=f"{serving.name} on http://{_spelled(host)}:{listener.getsockname()[1]}",
        )
        # uvicorn raises a signal that has stopped it once more, when all is done, to who had it before.
        before = {each: signal.signal(each, lambda *_: None) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            server.run(sockets=[listener])
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


class _Server(uvicorn.Server):
    """Says where it serves when it does."""

    def __init__(self, config: uvicorn.Config, said: str) -> None:
        super().__init__(config)
        self.said = said

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(f"serving {self.said} (Ctrl-C stops it)", file=sys.stderr, flush=True)


def read_key(path: Path) -> str:
    """The one line of a key file.

    Raises:
        ConfigError: it cannot be read, or does not hold one line of at least `MIN_KEY_CHARACTERS` printable ASCII
            characters without spaces.
    """
    try:
        key = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not ASCII text"
        raise ConfigError(f"--api-key-file {path} cannot be read: {reason}") from error
    if len(key) < MIN_KEY_CHARACTERS or not re.fullmatch(r"[!-~]+", key):
        raise ConfigError(
            f"--api-key-file {path} must hold one line of {MIN_KEY_CHARACTERS} or more characters without spaces; "
            "`openssl rand -hex 32` makes one"
        )
    return key


def _is_loopback(host: str) -> bool:
    """Whether it is an address of this machine to itself."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bound(host: str, port: int) -> socket.socket:
    """A socket that nobody can connect to yet."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        said = (
            f"cannot listen on {host} port {port}: {error.strerror or error}; choose another --host or --port"
        )
        raise DrivetrainError(said) from error
    return listener


def _spelled(host: str) -> str:
    return f"[{host}]" if ":" in host else host
