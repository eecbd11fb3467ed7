"""OpenAI's completions and chat completions: what a client may ask, and what it gets.

https://platform.openai.com/docs/api-reference. A request that asks for what is not done here is refused, and not
answered as if it had not asked.
"""

import json
import secrets
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from tokenizers import Tokenizer

from drivetrain.model.draw import Sampling
from drivetrain.model.generate import Event, FinishReason, Request
from drivetrain.train.serve import TextStream

MAX_STOPS = 16
# Say nothing about the answer.
HARMLESS = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
}
# Allowed where they ask for nothing.
NEUTRAL: dict[str, Sequence[Any]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "top_logprobs": (0,),
}
B = TypeVar("B", bound=BaseModel)


class ApiError(Exception):
    """Told to the client, as {"error": {"message", "type", "param", "code"}}."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.retry = status, retry
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


# --- requests -----------------------------------------------------------------------------------------------


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


class Body(BaseModel, ABC):
    """What both kinds of request have. `top_k` and `min_p` are not OpenAI's; vLLM calls them so too."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    n: int = Field(1, ge=1)
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: list[str] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @property
    @abstractmethod
    def with_logprobs(self) -> bool: ...

    def sampling(self, default_tokens: int) -> Sampling:
        """Without a seed, one that nobody can guess.

        Raises:
            ApiError: a setting outside its range.
        """
        if len(self.stop) > MAX_STOPS:
            raise ApiError(400, f"stop has {len(self.stop)} texts; give at most {MAX_STOPS}", "stop")
        try:
            return Sampling(
                max_tokens=default_tokens if self.max_tokens is None else self.max_tokens,
                temperature=self.temperature,
                top_k=0 if self.top_k == -1 else self.top_k,
                top_p=self.top_p,
                min_p=self.min_p,
                seed=secrets.randbits(63) if self.seed is None else self.seed,
                stop=tuple(self.stop),
            )
        except ValueError as error:
            raise ApiError(400, str(error)) from error


class ChatBody(Body):
    messages: list[dict[str, Any]]
    logprobs: bool = False
    max_completion_tokens: int | None = None

    @property
    def with_logprobs(self) -> bool:
        return self.logprobs

    def sampling(self, default_tokens: int) -> Sampling:
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise ApiError(
                    400, "max_tokens and max_completion_tokens differ; give one of them", "max_tokens"
                )
            self.max_tokens = self.max_completion_tokens
        return super().sampling(default_tokens)


class TextBody(Body):
    """`prompt`: texts or lists of token ids, which a validator makes of one text or list."""

    prompt: list[str] | list[list[int]]
    logprobs: Literal[0] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _many(cls, value: Any) -> Any:
        if value == []:
            raise ValueError("empty")
        one = isinstance(value, str) or (isinstance(value, list) and type(value[0]) is int)
        return [value] if one else value

    @property
    def with_logprobs(self) -> bool:
        return self.logprobs is not None


def parse(raw: bytes, kind: type[B]) -> B:
    """The JSON of a request.

    Raises:
        ApiError: it is not JSON, or asks for what is not done.
    """
    try:
        found = json.loads(raw)
        if b"\\u" in raw:
            json.dumps(found, ensure_ascii=False).encode()  # JSON can spell half of a surrogate pair
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON in UTF-8 ({error})") from error
    if not isinstance(found, dict):
        raise ApiError(400, "the body is no JSON object")
    asked = {
        name: value
        for name, value in found.items()
        if value is not None and name not in HARMLESS and not (name in NEUTRAL and value in NEUTRAL[name])
    }
    try:
        return kind.model_validate(asked)
    except ValidationError as error:
        raise _as_sentence(error, kind) from error


def _as_sentence(error: ValidationError, kind: type[BaseModel]) -> ApiError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    name = str(first["loc"][0]) if first["loc"] else None
    if first["type"] == "extra_forbidden":
        named = ".".join(map(str, first["loc"]))
        return ApiError(400, f"{named} is unknown or not supported here; leave it out", named, "unsupported")
    if name == "prompt" and first["type"] != "missing":
        said = "a text, a list of texts, a list of token ids, or a list of such lists"
        return ApiError(400, f"prompt must be {said}", name)
    if name == "logprobs" and kind is TextBody:
        said = "the log-probability of each token that was taken is known and no other: use logprobs=0"
        return ApiError(400, said, name)
    said = "is missing" if first["type"] == "missing" else f"is wrong: {first['msg']}"
    return ApiError(400, f"{'.'.join(map(str, first['loc']))} {said}", name)


# --- answers ------------------------------------------------------------------------------------------------


class Answer:
    """One choice of a response as it grows. Its last token may be one that ends it, or be part of a stop text."""

    def __init__(self, index: int, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.index, self.stream = index, TextStream(tokenizer, stop)
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.offsets: list[int] = []  # length of the text before each token

    def add(self, event: Event) -> str:
        """The text that this token lets be told."""
        self.tokens.append(event.token)
        self.logprobs.append(event.logprob)
        self.offsets.append(len(self.text))
        added = self.stream.push(event.token)
        if event.finish_reason:
            added += self.stream.finish()
        self.text += added
        self.finish_reason = event.finish_reason
        return added


class Response(ABC):
    """A response to one body: n answers to each of its requests.

    Args:
        model: the name that it goes under.
        requests: one a prompt.
    """

    kind, chunk_kind, prefix = "", "", ""

    def __init__(
        self, model: str, requests: Sequence[Request], tokenizer: Tokenizer, with_logprobs: bool
    ) -> None:
        self.tokenizer, self.with_logprobs = tokenizer, with_logprobs
        self.requests, self.samples = requests, requests[0].samples
        self.head = {"id": self.prefix + uuid.uuid4().hex, "created": int(time.time()), "model": model}
        self.answers = [
            Answer(place * self.samples + sample, tokenizer, request.sampling.stop)
            for place, request in enumerate(requests)
            for sample in range(request.samples)
        ]

    def add(self, place: int, event: Event) -> dict[str, Any] | None:
        """One token more; the chunk that tells it, None where there is nothing to tell."""
        answer = self.answers[place * self.samples + event.sample]
        added = answer.add(event)
        if not (added or event.finish_reason or self.with_logprobs):
            return None
        found = self.delta(added) | {"logprobs": self.logprobs(answer, len(answer.tokens) - 1)}
        return self.chunk([{"index": answer.index, "finish_reason": event.finish_reason, **found}])

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.head, "object": self.chunk_kind, "choices": choices}

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first token."""
        return []

    def usage_chunk(self) -> dict[str, Any]:
        return self.chunk([]) | {"usage": self.usage()}

    def whole(self) -> dict[str, Any]:
        choices = [
            {
                "index": answer.index,
                "finish_reason": answer.finish_reason,
                "logprobs": self.logprobs(answer, 0),
                **self.message(answer.text),
            }
            for answer in self.answers
        ]
        return {**self.head, "object": self.kind, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Tokens; a prompt counts once for all its answers."""
        read = sum(len(request.prompt) for request in self.requests)
        written = sum(len(answer.tokens) for answer in self.answers)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def logprobs(self, answer: Answer, first: int) -> dict[str, Any] | None:
        """Of the tokens from `first` on, under the model at temperature 1."""
        if not self.with_logprobs:
            return None
        texts = [self.tokenizer.decode([token], skip_special_tokens=False) for token in answer.tokens[first:]]
        return self.spelled_logprobs(texts, answer.logprobs[first:], answer.offsets[first:])

    @abstractmethod
    def delta(self, text: str) -> dict[str, Any]: ...

    @abstractmethod
    def message(self, text: str) -> dict[str, Any]: ...

    @abstractmethod
    def spelled_logprobs(
        self, texts: list[str], logprobs: list[float], offsets: list[int]
    ) -> dict[str, Any]: ...


class ChatResponse(Response):
    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def opening(self) -> list[dict[str, Any]]:
        first = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return [self.chunk([{"index": answer.index, **first}]) for answer in self.answers]

    def delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def message(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def spelled_logprobs(self, texts: list[str], logprobs: list[float], offsets: list[int]) -> dict[str, Any]:
        # `bytes` is null where a token is a part of a character.
        content = [
            {
                "token": text,
                "logprob": logprob,
                "bytes": None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode()),
                "top_logprobs": [],
            }
            for text, logprob in zip(texts, logprobs, strict=True)
        ]
        return {"content": content, "refusal": None}


class TextResponse(Response):
    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl-"

    def delta(self, text: str) -> dict[str, Any]:
        return {"text": text}

    message = delta

    def spelled_logprobs(self, texts: list[str], logprobs: list[float], offsets: list[int]) -> dict[str, Any]:
        return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": None, "text_offset": offsets}
