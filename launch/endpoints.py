"""The endpoints of `drivetrain serve`: a request is read, handed to the worker, and its answer written.

Requests of all clients run together in one `Generator` (launch/worker.py); the event loop only reads, waits and
writes. A client that goes away takes its request with it.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.responses import Response as HttpResponse
from starlette.types import Receive, Scope, Send

from drivetrain.conf.errors import ConfigError
from drivetrain.data.readers import Unusable
from drivetrain.data.tokenizer import chat_templates
from drivetrain.launch.openai_answers import ChatResponse, Echo, Response, TextResponse
from drivetrain.launch.openai_api import ApiError, ChatBody, TextBody, parse
from drivetrain.launch.worker import Busy, Order, StepError, Worker
from drivetrain.model.generate import Request
from drivetrain.train.echo import prompt_logprobs
from drivetrain.train.serve import Sampler

MAX_BODY_BYTES = 8 << 20  # text of some two million tokens
BODY_SECONDS = 60.0  # for a client to send its body
T = TypeVar("T")


class EventStream(StreamingResponse):
    """Server-sent events; however it ends, `release` is called."""

    def __init__(self, events: AsyncIterator[bytes], release: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # the latter: nginx shall not wait
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self.release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.release()


class Serving:
    """The endpoints over one model.

    Args:
        name: that clients know the model by.
        max_waiting: requests without a first token at one time; more are answered with 429.
        max_tokens: of an answer in a chat whose request does not say.

    Raises:
        ConfigError: the tokenizer's chat template refuses a question and its answer.
    """

    def __init__(self, sampler: Sampler, name: str, max_waiting: int, max_tokens: int) -> None:
        self.sampler, self.name, self.max_tokens = sampler, name, max_tokens
        self.prompts = sampler.prompts
        if chat_templates(self.prompts.directory):
            self.prompts.require_chat()
        self.worker = Worker(sampler.generator, max_waiting)
        self.created = int(time.time())

    async def chat_completions(self, http: HttpRequest) -> HttpResponse:
        body = parse(await read_body(http), ChatBody)
        self._check_model(body.model)
        sampling = body.sampling(self.max_tokens)
        tools = body.callable_tools
        request = await _in_thread(self.prompts.answered, body.messages, sampling, body.n, tools)
        response = ChatResponse(
            self.name, [request], self.sampler.tokenizer, body.with_logprobs, with_calls=bool(tools)
        )
        return await self._respond(http, body, response)

    async def completions(self, http: HttpRequest) -> HttpResponse:
        body = parse(await read_body(http), TextBody)
        self._check_model(body.model)
        sampling = body.sampling(default_tokens=16)  # OpenAI's

        def requests() -> list[Request]:
            return [self.prompts.continued(prompt, sampling, body.n) for prompt in body.prompt]

        asked = await _in_thread(requests)
        response = TextResponse(
            self.name,
            asked,
            self.sampler.tokenizer,
            body.with_logprobs,
            await self._echoes(body, asked) if body.echo else (),
            with_top=body.logprobs == 1,
        )
        return (
            JSONResponse(response.whole()) if body.nothing_new else await self._respond(http, body, response)
        )

    async def _echoes(self, body: TextBody, requests: Sequence[Request]) -> list[Echo]:
        """The prompts, and if they are asked for the log-probabilities of their tokens."""
        opened, generator = self.sampler.opened, self.sampler.generator
        found = []
        with self._refusals(requests):
            for request in requests:
                generator.check(request)
            for given, request in zip(body.prompt, requests, strict=True):
                tokens, scores = list(request.prompt), None
                if body.with_logprobs:
                    work = partial(prompt_logprobs, opened, tokens, generator.vocab_size)
                    scores = await self.worker.run(work)
                text = given if isinstance(given, str) else opened.tokenizer.decode(tokens)
                found.append(Echo(text, tokens, scores))
        return found

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._card()]}

    async def model(self, name: str) -> dict[str, Any]:
        self._check_model(name)
        return self._card()

    async def health(self) -> HttpResponse:
        alive = self.worker.alive
        content = {
            "status": "ok" if alive else "the model's thread has ended",
            "requests": sum(len(order.requests) for order in self.worker.orders),
            "waiting": self.worker.waiting,
        }
        return JSONResponse(content, 200 if alive else 503)

    def _card(self) -> dict[str, Any]:
        card = {"id": self.name, "object": "model", "created": self.created, "owned_by": "drivetrain"}
        return card | {"max_model_len": self.sampler.opened.cfg.max_seq_len}

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self.name):
            raise ApiError(
                404, f"there is no model {name} here; this is {self.name}", "model", "model_not_found"
            )

    async def _respond(
        self, http: HttpRequest, body: ChatBody | TextBody, response: Response
    ) -> HttpResponse:
        with self._refusals(response.requests):
            order = await self.worker.submit(response.requests)
        release = partial(self.worker.release, order)
        if body.stream:
            return EventStream(_events(order, response, body.stream_options.include_usage), release)
        try:
            with self._refusals(response.requests):
                stayed = await _unless_gone(http, _filled(order, response))
            # nginx's status for a client that closed; nobody reads it.
            return JSONResponse(response.whole()) if stayed else HttpResponse(status_code=499)
        finally:
            release()

    @contextmanager
    def _refusals(self, requests: Sequence[Request]) -> Iterator[None]:
        """What the worker and the generator say of requests, as clients are told it."""
        if not self.worker.alive:
            raise ApiError(503, "the model's thread has ended; start the server again")
        most = self.worker.max_waiting
        if len(requests) > most:
            raise ApiError(
                400, f"{len(requests)} prompts at once are too many; send at most {most}", "prompt"
            )
        try:
            yield
        except Busy as error:
            raise ApiError(
                429, f"{most} requests wait already; try again later", code="busy", retry=True
            ) from error
        except StepError as error:
            raise ApiError(500, str(error)) from error
        except ValueError as error:
            raise ApiError(400, str(error)) from error


async def _in_thread(work: Callable[..., T], *arguments: Any) -> T:
    """Rendering and tokenising, which would keep the loop from other clients."""
    try:
        return await asyncio.to_thread(work, *arguments)
    except Unusable as error:
        raise ApiError(400, str(error), "messages") from error
    except ConfigError as error:
        raise ApiError(400, str(error)) from error


async def _filled(order: Order, response: Response) -> bool:
    async for place, event in order:
        response.add(place, event)
    return True


async def _events(order: Order, response: Response, with_usage: bool) -> AsyncIterator[bytes]:
    for chunk in response.opening():
        yield _event(chunk)
    try:
        async for place, event in order:
            if chunk_or_none := response.add(place, event):
                yield _event(chunk_or_none)
    except StepError as error:
        yield _event(ApiError(500, str(error)).body)
        return
    if with_usage:
        yield _event(response.usage_chunk())
    yield b"data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


async def _unless_gone(http: HttpRequest, work: Coroutine[Any, Any, bool]) -> bool:
    """What `work` returns; False once the client has closed the connection."""

    async def gone() -> bool:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        return False

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return next(task for task in tasks if task.done()).result()
    finally:
        for task in tasks:
            task.cancel()


async def read_body(http: HttpRequest) -> bytes:
    """Raises ApiError: the body is not declared as JSON, too large, or does not arrive."""
    if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # A page elsewhere can make a browser send plain text here, but not JSON.
        raise ApiError(415, "the body must be JSON: send Content-Type: application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in http.stream():
                body += part
                if len(body) > MAX_BODY_BYTES:
                    raise ApiError(413, f"the body is larger than {MAX_BODY_BYTES >> 20} MiB")
    except TimeoutError as error:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:.0f} seconds") from error
    return bytes(body)
