"""Calls of tools in what a model wrote, in the form that the chat template of its tokenizer writes them.

The form is read off the template: a call whose name and argument are marks is rendered, and what stands around and
between them says how calls begin, end and are spelled. Known are JSON objects, one after the other or in a list:

    <tool_call>\\n{"name": "add", "arguments": {"a": 1}}\\n</tool_call>      ChatML, Qwen, Hermes
    {"name": "add", "parameters": {"a": 1}}                                Llama 3
    [TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]                  Mistral
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from drivetrain.conf.errors import ConfigError
from drivetrain.data.chat import Chat
from drivetrain.data.conversations import Message
from drivetrain.data.readers import Unusable
from drivetrain.train.rl.extract import after_thought

_NAME, _KEY, _VALUE = "\ue000", "\ue001", "\ue002"  # private use: no template writes them
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class Call:
    """A call, or with `error` what looks like one and is none."""

    name: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    error: str = ""


class CallForm:
    """How a chat template writes calls.

    Raises:
        ConfigError: it writes none, or in a form that is not one of the above.
    """

    def __init__(self, chat: Chat, tools: list[dict[str, Any]]) -> None:
        text = _rendered(chat, tools)
        opening = text.find(_NAME)
        starts = [at for at in range(opening, -1, -1) if text[at] == "{"]
        found = None
        for start in starts:  # the innermost object that has both the name and the arguments
            made = _object(text, start)
            if made is not None and _NAME in made[0].values() and {_KEY: _VALUE} in made[0].values():
                found = made
                break
        if found is None:
            raise ConfigError(
                f"the chat template in {chat.directory} writes calls of tools in a form that is not known; use a "
                "tokenizer whose template writes them as JSON, or tools with calls=tags"
            )
        keys = {value if isinstance(value, str) else "": key for key, value in found[0].items()}
        self.name, self.arguments = keys[_NAME], keys[""]
        before, after = text[:start].rstrip(), text[found[1] :].lstrip()
        self.listed = before.endswith("[") and after.startswith("]")
        if self.listed:
            before, after = before[:-1].rstrip(), after[1:].lstrip()
        self.open, self.close = before.lstrip(), after.rstrip()

    def read(self, text: str) -> tuple[Call, ...]:
        """The calls in a turn of the model's, in order; none: it is an answer."""
        return tuple(call for part in self._parts(after_thought(text)) for call in self._calls(part))

    def beside(self, text: str) -> str:
        """What a turn says before its first call."""
        after = after_thought(text)
        thought = text[: len(text) - len(after)]
        if self.open:
            return (thought + after.partition(self.open)[0]).rstrip()
        return thought.rstrip() if self.read(text) else text

    def _parts(self, text: str) -> Iterator[str]:
        """What stands between the marks."""
        if not self.open:
            whole = text.strip()
            if whole.startswith("{") and re.match(rf'\{{\s*"({self.name}|{self.arguments})"\s*:', whole):
                yield whole
            return
        for part in text.split(self.open)[1:]:
            yield part.partition(self.close)[0] if self.close else part

    def _calls(self, part: str) -> Iterator[Call]:
        try:
            given = json.loads(part)
        except ValueError as error:
            yield Call(error=f"this call is not JSON ({error})")
            return
        except RecursionError:
            yield Call(error="this call is not JSON (too deep)")
            return
        for each in given if isinstance(given, list) and self.listed else [given]:
            yield self._call(each)

    def _call(self, given: Any) -> Call:
        form = f'{{"{self.name}": NAME, "{self.arguments}": OBJECT}}'
        if not isinstance(given, dict) or not isinstance(given.get(self.name), str):
            return Call(error=f"a call has the form {form}")
        arguments = given.get(self.arguments, {})
        if not isinstance(arguments, dict):
            return Call(given[self.name], error=f"a call has the form {form}")
        return Call(given[self.name], arguments)


def _rendered(chat: Chat, tools: list[dict[str, Any]]) -> str:
    """What the template writes for a turn with a call, without what begins and what ends every turn."""
    question: Message = {"role": "user", "content": "a"}
    call = {
        "id": "call00000",
        "type": "function",
        "function": {"name": _NAME, "arguments": {_KEY: _VALUE}},
    }
    try:
        plain = chat.render([question, {"role": "assistant", "content": _NAME}], tools)
        called = chat.render([question, {"role": "assistant", "content": "", "tool_calls": [call]}], tools)
    except Unusable as error:
        raise ConfigError(
            f"the chat template in {chat.directory} takes no calls of tools ({error}); use a tokenizer whose "
            "template does, or tools with calls=tags"
        ) from error
    at = plain.rfind(_NAME)
    head, tail = plain[:at].rstrip(), plain[at + 1 :]
    if not called.startswith(head) or not called.endswith(tail) or _NAME not in called:
        raise ConfigError(
            f"the chat template in {chat.directory} takes no calls of tools; use a tokenizer whose template does, "
            "or tools with calls=tags"
        )
    return called[len(head) : len(called) - len(tail)]


def _object(text: str, start: int) -> tuple[dict[str, Any], int] | None:
    """The JSON object that begins there, and where it ends."""
    try:
        found, end = _DECODER.raw_decode(text, start)
    except ValueError:
        return None
    return (found, end) if isinstance(found, dict) else None
