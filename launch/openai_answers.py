"""OpenAI's completions and chat completions: what a client gets, whole or in chunks.

https://platform.openai.com/docs/api-reference
"""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from drivetrain.launch.tool_calls import Call, Part, ToolCalls
from drivetrain.model.generate import Event, Request
from drivetrain.model.text import BROKEN, TextStream
from drivetrain.train.echo import PromptLogprobs


class TokenTexts:
    """The text of each token as it is within a text, special ones spelled out."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        # After another token, since SentencePiece's decoders drop the space that a text begins with.
        self.before = tokenizer.encode("a", add_special_tokens=False).ids
        self.skipped = len(self._decode(self.before))

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=False)

    def __call__(self, token: int) -> str:
        return self._decode([*self.before, token])[self.skipped :]


class Answer:
    """One choice of a response as it grows. Its last token may be one that ends it, or be part of a stop text."""

    def __init__(self, index: int, tokenizer: Tokenizer, request: Request, with_calls: bool) -> None:
        self.index = index
        self.stream = TextStream(tokenizer.decode, request.sampling.stop, request.prompt)
        self.parser = ToolCalls() if with_calls else None
        self.text = ""  # without calls
        self.calls: list[dict[str, Any]] = []
        self.finish_reason: str | None = None
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.offsets: list[int] = []  # length of the text before each token

    def add(self, event: Event) -> tuple[str, list[dict[str, Any]]]:
        """The text and the calls that this token lets be told."""
        self.tokens.append(event.token)
        self.logprobs.append(event.logprob)
        self.offsets.append(len(self.text))
        told = self.stream.push(event.token)
        if event.finish_reason:
            told += self.stream.finish()
        parts: list[Part] = [told]
        if self.parser is not None:
            parts = self.parser.push(told)
            if event.finish_reason:
                parts += self.parser.finish()
        text = "".join(part for part in parts if isinstance(part, str))
        calls = [
            _spelled(call, len(self.calls) + number)
            for number, call in enumerate(part for part in parts if isinstance(part, Call))
        ]
        self.text += text
        self.calls += calls
        called = bool(self.calls) and event.finish_reason == "stop"
        self.finish_reason = "tool_calls" if called else event.finish_reason
        return text, calls


def _spelled(call: Call, index: int) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": index, "id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}


class Response(ABC):
    """A response to one body: n answers to each of its requests.

    Args:
        model: the name that it goes under.
        requests: one a prompt.
        with_calls: whether calls of functions are looked for.
    """

    kind, chunk_kind, prefix = "", "", ""

    def __init__(
        self,
        model: str,
        requests: Sequence[Request],
        tokenizer: Tokenizer,
        with_logprobs: bool,
        with_calls: bool = False,
    ) -> None:
        self.requests, self.samples, self.with_logprobs = requests, requests[0].samples, with_logprobs
        self.spell = TokenTexts(tokenizer)
        self.head = {"id": self.prefix + uuid.uuid4().hex, "created": int(time.time()), "model": model}
        self.answers = [
            Answer(place * self.samples + sample, tokenizer, request, with_calls)
            for place, request in enumerate(requests)
            for sample in range(request.samples)
        ]

    def add(self, place: int, event: Event) -> dict[str, Any] | None:
        """One token more; the chunk that tells it, None where there is nothing to tell."""
        answer = self.answers[place * self.samples + event.sample]
        text, calls = answer.add(event)
        if not (text or calls or event.finish_reason or self.with_logprobs):
            return None
        found = self.delta(text, calls) | {"logprobs": self.logprobs(answer, len(answer.tokens) - 1)}
        return self.chunk([{"index": answer.index, "finish_reason": answer.finish_reason, **found}])

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
                "finish_reason": answer.finish_reason or "length",  # nothing more was asked for
                "logprobs": self.logprobs(answer, 0),
                **self.message(answer),
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
        return self.spelled_logprobs(answer, first) if self.with_logprobs else None

    @abstractmethod
    def delta(self, text: str, calls: list[dict[str, Any]]) -> dict[str, Any]: ...

    @abstractmethod
    def message(self, answer: Answer) -> dict[str, Any]: ...

    @abstractmethod
    def spelled_logprobs(self, answer: Answer, first: int) -> dict[str, Any]: ...


class ChatResponse(Response):
    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def opening(self) -> list[dict[str, Any]]:
        first = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return [self.chunk([{"index": answer.index, **first}]) for answer in self.answers]

    def delta(self, text: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        return {"delta": ({"content": text} if text else {}) | ({"tool_calls": calls} if calls else {})}

    def message(self, answer: Answer) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.calls:
            message["content"] = answer.text or None
            message["tool_calls"] = [
                {key: value for key, value in call.items() if key != "index"} for call in answer.calls
            ]
        return {"message": message}

    def spelled_logprobs(self, answer: Answer, first: int) -> dict[str, Any]:
        texts = [self.spell(token) for token in answer.tokens[first:]]
        content = [
            {
                "token": text,
                "logprob": logprob,
                "bytes": None if BROKEN in text else list(text.encode()),  # null: a part of a character
                "top_logprobs": [],
            }
            for text, logprob in zip(texts, answer.logprobs[first:], strict=True)
        ]
        return {"content": content, "refusal": None}


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt as part of its answers. `logprobs`: None where they are not asked for, or not to be computed."""

    text: str
    tokens: Sequence[int]
    logprobs: PromptLogprobs | None


class TextResponse(Response):
    """Args:
    echoes: of each request, or none.
    with_top: whether the likeliest tokens are told, too; of what was sampled that is the token itself.
    """

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl-"

    def __init__(
        self,
        model: str,
        requests: Sequence[Request],
        tokenizer: Tokenizer,
        with_logprobs: bool,
        echoes: Sequence[Echo] = (),
        with_top: bool = False,
    ) -> None:
        super().__init__(model, requests, tokenizer, with_logprobs)
        self.decode, self.echoes, self.with_top = tokenizer.decode, echoes, with_top

    def opening(self) -> list[dict[str, Any]]:
        chunks = []
        for answer in self.answers:
            if (echo := self._echo(answer)) is not None:
                said = {"text": echo.text, "logprobs": self._echoed(echo), "finish_reason": None}
                chunks.append(self.chunk([{"index": answer.index, **said}]))
        return chunks

    def delta(self, text: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        return {"text": text}

    def message(self, answer: Answer) -> dict[str, Any]:
        echo = self._echo(answer)
        if echo is None:
            return {"text": answer.text}
        before, after = self._echoed(echo), self.logprobs(answer, 0)
        both = None
        if before is not None and after is not None:
            both = {key: after[key] if after[key] is None else before[key] + after[key] for key in after}
        return {"text": echo.text + answer.text, "logprobs": both}

    def spelled_logprobs(self, answer: Answer, first: int) -> dict[str, Any]:
        echo = self._echo(answer)
        shift = len(echo.text) if echo is not None else 0
        texts, logprobs = [self.spell(token) for token in answer.tokens[first:]], answer.logprobs[first:]
        tops = [{text: logprob} for text, logprob in zip(texts, logprobs, strict=True)]
        return {
            "tokens": texts,
            "token_logprobs": logprobs,
            "top_logprobs": tops if self.with_top else None,
            "text_offset": [shift + offset for offset in answer.offsets[first:]],
        }

    def _echo(self, answer: Answer) -> Echo | None:
        return self.echoes[answer.index // self.samples] if self.echoes else None

    def _echoed(self, echo: Echo) -> dict[str, Any] | None:
        """The log-probabilities of a prompt's tokens; of the first there are none."""
        found = echo.logprobs
        if found is None:
            return None
        stream, offsets = TextStream(self.decode), []
        length = 0
        for token in echo.tokens:
            offsets.append(length)
            length += len(stream.push(token))
        texts = [self.spell(token) for token in echo.tokens]
        pairs = zip(texts[1:], found.logprobs, found.likeliest, found.likeliest_logprobs, strict=True)
        # Last, since of two tokens of one text the likeliest counts.
        tops = [{text: logprob} | {self.spell(token): best} for text, logprob, token, best in pairs]
        return {
            "tokens": texts,
            "token_logprobs": [None, *found.logprobs],
            "top_logprobs": [None, *tops] if self.with_top else None,
            "text_offset": offsets,
        }
