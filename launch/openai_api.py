"""OpenAI's completions and chat completions: what a client may ask; launch/openai_answers.py has what it gets.

https://platform.openai.com/docs/api-reference. A request that asks for what is not done here is refused, and not
answered as if it had not asked.
"""

import json
import secrets
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from drivetrain.model.draw import Sampling

MAX_STOPS = 16
# Say nothing about the answer.
HARMLESS = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
}
# Allowed where they ask for nothing.
NEUTRAL: dict[str, Sequence[Any]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "tools": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "top_logprobs": (0,),
}
NOT_DONE = {
    "tool_choice": "tool_choice can be none or auto; no call can be forced here",
    "parallel_tool_calls": "parallel_tool_calls=false is not supported here; leave it out",
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

    def _max_tokens(self, default_tokens: int) -> int:
        return default_tokens if self.max_tokens is None else self.max_tokens

    def sampling(self, default_tokens: int) -> Sampling:
        """Without a seed, one that nobody can guess.

        Raises:
            ApiError: a setting outside its range.
        """
        if len(self.stop) > MAX_STOPS:
            raise ApiError(400, f"stop has {len(self.stop)} texts; give at most {MAX_STOPS}", "stop")
        try:
            return Sampling(
                max_tokens=self._max_tokens(default_tokens),
                temperature=self.temperature,
                top_k=0 if self.top_k == -1 else self.top_k,
                top_p=self.top_p,
                min_p=self.min_p,
                seed=secrets.randbits(63) if self.seed is None else self.seed,
                stop=tuple(self.stop),
            )
        except ValueError as error:
            raise ApiError(400, str(error)) from error


class Function(BaseModel):
    """`strict` is taken and not kept: no grammar holds the arguments to `parameters`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(None, exclude=True)


class Tool(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["function"]
    function: Function


class ChatBody(Body):
    messages: list[dict[str, Any]]
    logprobs: bool = False
    max_completion_tokens: int | None = None
    tools: list[Tool] = []
    tool_choice: Literal["none", "auto"] = "auto"
    parallel_tool_calls: Literal[True] = True

    @property
    def callable_tools(self) -> list[dict[str, Any]]:
        """Those that the model may call, as its chat template gets them."""
        tools = [] if self.tool_choice == "none" else self.tools
        return [tool.model_dump(exclude_none=True) for tool in tools]

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
    """`prompt`: texts or lists of token ids, which a validator makes of one text or list. `echo`: the prompt is a
    part of the answer, and `max_tokens` may be 0."""

    prompt: list[str] | list[list[int]]
    logprobs: Literal[0, 1] | None = None
    echo: bool = False

    def sampling(self, default_tokens: int) -> Sampling:
        """With `max_tokens` 0 as with 1."""
        if self.nothing_new and self.stream:
            raise ApiError(400, "with max_tokens=0 there is nothing to stream; leave stream out", "stream")
        if self.logprobs == 1 and self.temperature != 0 and not self.nothing_new:
            raise ApiError(
                400,
                "the likeliest token is known where temperature is 0; use that, or logprobs=0 for the "
                "log-probabilities of the tokens that were taken",
                "logprobs",
            )
        return super().sampling(default_tokens)

    def _max_tokens(self, default_tokens: int) -> int:
        return 1 if self.nothing_new else super()._max_tokens(default_tokens)

    @property
    def nothing_new(self) -> bool:
        """Whether the prompt alone is asked about."""
        return self.echo and self.max_tokens == 0

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
        said = "the log-probabilities of the token that was taken and of the likeliest are known: use 0 or 1"
        return ApiError(400, said, name)
    if name in NOT_DONE:
        return ApiError(400, NOT_DONE[name], name, "unsupported")
    said = "is missing" if first["type"] == "missing" else f"is wrong: {first['msg']}"
    return ApiError(400, f"{'.'.join(map(str, first['loc']))} {said}", name)
