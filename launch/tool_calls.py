"""Calls of functions in what a model writes: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

The marks of our own ChatML template, of Nous Hermes and of Qwen 2.5 and 3.
"""

import json
from dataclasses import dataclass
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class Call:
    """`arguments`: a JSON object, as text."""

    name: str
    arguments: str


Part = str | Call


class ToolCalls:
    """Text that comes in pieces, taken apart into text and calls. White space around a call is left out; what is
    marked as a call and is none stays text."""

    def __init__(self) -> None:
        self._held = ""  # may be a call, or white space before one
        self._tried = 0  # ends of a call in it that are none
        self._last: Part = ""

    def push(self, text: str) -> list[Part]:
        """What can be told now."""
        self._held += text
        parts: list[Part] = []
        while self._advance(parts, ended=False):
            pass
        return parts

    def finish(self) -> list[Part]:
        """The rest."""
        parts: list[Part] = []
        while self._advance(parts, ended=True):
            pass
        if self._held.strip() or not isinstance(self._last, Call):
            self._tell(self._held, parts)
        self._held = ""
        return parts

    def _tell(self, part: Part, parts: list[Part]) -> None:
        if part:
            parts.append(part)
            self._last = part

    def _advance(self, parts: list[Part], ended: bool) -> bool:
        """Take one thing off what is held, if it is known what it is."""
        start = self._held.find(OPEN)
        if start < 0:
            known = _before_a_mark(self._held)
        elif self._held[:start].strip():
            known = len(self._held[:start].rstrip())
        else:
            return self._take_call(start, parts, ended)
        if not known:
            return False
        self._tell(self._held[:known], parts)
        self._held = self._held[known:]
        return True

    def _take_call(self, start: int, parts: list[Part], ended: bool) -> bool:
        """The call that begins at `start`, or that it is none."""
        body = start + len(OPEN)
        ends = _places(self._held, CLOSE, body)
        for end in ends[self._tried :]:
            call = _call(self._held[body:end])
            if call is not None:
                self._tell(call, parts)
                self._held, self._tried = self._held[end + len(CLOSE) :], 0
                return True
            if not _within_a_text(self._held[body:end]):
                return self._tell_mark(body, parts)
            self._tried += 1
        return self._tell_mark(body, parts) if ended else False

    def _tell_mark(self, body: int, parts: list[Part]) -> bool:
        self._tell(self._held[:body], parts)
        self._held, self._tried = self._held[body:], 0
        return True


def _places(text: str, what: str, start: int) -> list[int]:
    found = []
    while (start := text.find(what, start)) >= 0:
        found.append(start)
        start += len(what)
    return found


def _before_a_mark(text: str) -> int:
    """Characters that no call can follow at once: all but the beginning of a mark, and white space before it."""
    begun = next(n for n in range(min(len(text), len(OPEN) - 1), -1, -1) if text.endswith(OPEN[:n]))
    return len(text[: len(text) - begun].rstrip())


def _call(text: str) -> Call | None:
    try:
        # strict=False: models write line breaks in strings.
        found: Any = json.loads(text, strict=False, parse_constant=_no_json)
        if not isinstance(found, dict) or not isinstance(found.get("arguments", {}), dict):
            return None
        name, arguments = found.get("name"), json.dumps(found.get("arguments", {}), ensure_ascii=False)
        if not isinstance(name, str) or not name:
            return None
        (name + arguments).encode()  # JSON can spell half of a surrogate pair
    except (ValueError, RecursionError):
        return None
    return Call(name, arguments)


def _no_json(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _within_a_text(text: str) -> bool:
    """Whether JSON ends inside a string, so that a mark that follows is part of it."""
    try:
        json.loads(text, strict=False)
    except json.JSONDecodeError as error:
        return error.msg.startswith("Unterminated string")
    except RecursionError:
        pass
    return False
