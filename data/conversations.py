"""Conversations out of files: the shapes that chat data comes in, as one list of messages.

    messages      [{"role", "content", "tool_calls", "reasoning_content", "weight"}, ...]   (OpenAI)
    conversations [{"from": "human" | "gpt" | ..., "value"}, ...]                           (ShareGPT)
    prompt, completion or response                     two texts, or two lists of messages
    instruction, input, output, history                                                     (Alpaca)
    instruction, context, response                                                          (Dolly)

Beside any of them: "system", a text, and "tools", a list of function schemas. Any of the lists may be JSON in a
text, as Parquet files often have it.
"""

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drivetrain.conf.errors import ConfigError
from drivetrain.data.readers import PARQUET_ROWS, Records, Unusable

if TYPE_CHECKING:
    import pyarrow.parquet

Message = dict[str, Any]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",  # its content is the call
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
SPEAKER, CONTENT = ("role", "from"), ("content", "value")
REASONING = ("reasoning_content", "reasoning", "thinking")
SHAPES = ("messages", "conversations", "prompt", "instruction")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as chat templates read them, and the place they come from.

    A message has `role` (system, user, assistant or tool), `content` (text, empty where there is none), and of
    `reasoning_content`, `tool_calls`, `tool_call_id` and `name` what was given. `learned` says of each message
    whether its tokens are learned: those of the assistant, unless it is part of a prompt or has `weight: 0`.
    """

    messages: list[Message]
    learned: list[bool]
    tools: list[dict[str, Any]] | None = None
    where: str = ""

    def __len__(self) -> int:
        """Characters, roughly: what the work of tokenising grows with."""
        return sum(len(message["content"]) + 16 for message in self.messages)


def conversation_of(record: Any, where: str = "") -> Conversation:
    """A record of any of the shapes above.

    Raises:
        Unusable: it has none of them, or a message is not what it should be; the text names the message.
    """
    if not isinstance(record, dict):
        raise Unusable("not an object with keys")
    shape = next((key for key in SHAPES if record.get(key) is not None), None)
    match shape:
        case "messages" | "conversations":
            given = _list(record[shape], shape)
            in_prompt = 0
        case "prompt":
            prompt = turns(record["prompt"], "user", "prompt")
            given = [*prompt, *turns(_answer(record, "completion", "response"), "assistant", "completion")]
            in_prompt = len(prompt)
        case "instruction":
            given, in_prompt = _alpaca(record), 0
        case _:
            raise Unusable(f"no conversation; a record has one of {', '.join(SHAPES)}{_pairs_hint(record)}")
    begun = _with_system(given, record.get("system"))
    in_prompt += len(begun) - len(given)
    messages = [_message(item, number) for number, item in enumerate(begun, 1)]
    learned = [
        message["role"] == "assistant" and number > in_prompt and _weight(item, number) == 1
        for number, (item, message) in enumerate(zip(begun, messages, strict=True), 1)
    ]
    if not any(learned):
        raise Unusable("no message of the assistant to learn")
    return Conversation(messages, learned, _tools(record.get("tools")), where)


def _with_system(given: list[Any], system: Any) -> list[Message]:
    """The messages after what the record says as the system, unless they say it themselves."""
    if not system:
        return given
    if not isinstance(system, str):
        raise Unusable("system must be text")
    own = [(number, item) for number, item in enumerate(given, 1) if role_of(item) == "system"]
    if not own:
        return [{"role": "system", "content": system}, *given]
    number, item = own[0]
    if _text(_first(item, *CONTENT), number).strip() != system.strip():
        raise Unusable(f"system and message {number}, of the system too, differ; leave one of them")
    return given


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    parsed = _parsed(tools, "tools is text that is")
    return _list(parsed, "tools") if parsed else None


def _answer(record: Mapping[str, Any], *keys: str) -> Any:
    """The answer: under the first of these names that the record has."""
    found = _first(record, *keys)
    if found is None:
        raise Unusable(f"no {' or '.join(keys)}{_pairs_hint(record)}")
    return found


def _pairs_hint(keys: Container[str]) -> str:
    return "; chosen and rejected are built with --pairs" if "chosen" in keys else ""


def _alpaca(record: Mapping[str, Any]) -> list[Message]:
    instruction, extra = record["instruction"], _first(record, "input", "context") or ""
    if not isinstance(instruction, str) or not isinstance(extra, str):
        raise Unusable("instruction and input must be text")
    given: list[Message] = []
    history = _parsed(record.get("history"), "history is text that is") or []
    if not isinstance(history, list):
        raise Unusable("history is not a list of pairs")
    for number, pair in enumerate(history, 1):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise Unusable(f"history {number} is no pair of a question and an answer")
        given += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = f"{instruction}\n\n{extra}" if extra else instruction
    given.append({"role": "user", "content": question})
    given.append({"role": "assistant", "content": _answer(record, "output", "response")})
    return given


def messages_in(value: Any) -> Any:
    """The list that a text spells in JSON, if its items have `role` or `from`; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    spoken = isinstance(found, list) and all(
        isinstance(item, dict) and _first(item, *SPEAKER) is not None for item in found
    )
    return found if spoken and found else value


def turns(value: Any, role: str, key: str) -> list[Message]:
    """A prompt or a completion: a text is one message, unless it spells a list of messages in JSON."""
    value = messages_in(value)
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return _list(value, key)


def without_nulls(value: Any) -> Any:
    """Objects of a Parquet row without the keys that hold null; items of lists stay.

    A struct has every key that any row's object has, and null in those that an object lacks. A null that was meant
    cannot be told from these; JSON in a text keeps it.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def role_of(message: Mapping[str, Any]) -> str | None:
    """Who speaks, as chat templates call it; None: a role that is not known."""
    return ROLES.get(_spelled(message))


def _spelled(message: Mapping[str, Any]) -> str:
    return str(_first(message, *SPEAKER)).lower()


def _first(item: Mapping[str, Any], *keys: str) -> Any:
    """The first of these that is there and not null."""
    return next((item[key] for key in keys if item.get(key) is not None), None)


def _parsed(value: Any, what: str) -> Any:
    """What a text spells in JSON, None for one of white space; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise Unusable(f"{what} not JSON ({error})") from error


def _list(value: Any, key: str) -> list[Any]:
    if isinstance(value, str):
        value = _parsed(value, f"{key} is text that is")
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise Unusable(f"{key} is not a list of objects")
    if not value:
        raise Unusable(f"{key} is empty")
    return value


def _message(item: dict[str, Any], number: int) -> Message:
    """One message in the form of `Conversation`."""
    role = role_of(item)
    if role is None:
        raise Unusable(
            f"message {number} has the role {_first(item, *SPEAKER)!r}; known are {', '.join(ROLES)}"
        )
    content = _text(_first(item, *CONTENT), number)
    message: Message = {"role": role, "content": content}
    reasoning = next((item[key] for key in REASONING if item.get(key)), None)
    if reasoning is not None:
        message["reasoning_content"] = _text(reasoning, number)
    calls = _parsed(item.get("tool_calls"), f"message {number} has tool_calls in a text that is")
    if _spelled(item) == "function_call":
        calls, message["content"] = _parsed(content, f"message {number} is a function_call that is"), ""
    if calls:
        message["tool_calls"] = [
            _call(call, number) for call in (calls if isinstance(calls, list) else [calls])
        ]
    if role == "assistant" and not (message["content"].strip() or calls or reasoning):
        raise Unusable(f"message {number}, of the assistant, is empty")
    for key in ("name", "tool_call_id"):
        if item.get(key) is not None:
            message[key] = item[key]
    return message


def _weight(item: dict[str, Any], number: int) -> int:
    weight = item.get("weight")
    if weight not in (None, 0, 1):
        raise Unusable(f"message {number} has the weight {weight!r}; it can be 0 or 1")
    return 1 if weight is None else int(weight)


def _text(content: Any, number: int) -> str:
    """A message's text, of which a list of parts may hold several."""
    if content is None:
        return ""
    if isinstance(content, list):
        parts = [part if isinstance(part, str) else _part(part, number) for part in content]
        return "".join(parts)
    if not isinstance(content, str):
        raise Unusable(f"message {number} has a content that is no text")
    return content


def _part(part: Any, number: int) -> str:
    text = part.get("text") if isinstance(part, dict) else None
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise Unusable(f"message {number} has a part of type {kind!r}; only text can be read")
    return text


def _call(call: Any, number: int) -> dict[str, Any]:
    """A tool call with its arguments as an object, which templates write as JSON."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Unusable(f"message {number} has a tool call without a function name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"message {number} has tool arguments that are")
    plain: dict[str, Any] = {
        "type": "function",
        "function": {"name": function["name"], "arguments": {} if arguments is None else arguments},
    }
    return plain if call.get("id") is None else {"id": call["id"], **plain}


class ConversationReader(Records[Conversation]):
    """The conversations of JSON lines and Parquet files; see `conversation_of`."""

    def of_text(self, text: str, path: Path) -> Conversation | None:
        raise ConfigError(f"{path} is a text file and holds no conversations; give JSON lines or Parquet")

    def of_json(self, record: Any, where: str) -> Conversation | None:
        json.dumps(record, ensure_ascii=False).encode("utf-8")  # JSON can spell half of a surrogate pair
        return conversation_of(record, where)

    def of_parquet(
        self, file: "pyarrow.parquet.ParquetFile", path: Path
    ) -> Iterator[tuple[int, Conversation | None]]:
        columns = file.schema_arrow.names
        if not set(columns) & set(SHAPES):
            raise ConfigError(
                f"{path} holds no conversations: its columns are {', '.join(columns)}, and one of "
                f"{', '.join(SHAPES)} is needed{_pairs_hint(columns)}"
            )
        row = 0
        for batch in file.iter_batches(PARQUET_ROWS):
            for index in range(batch.num_rows):
                row += 1
                where = f"{path}, row {row}"
                try:
                    read = {name: batch.column(name)[index].as_py() for name in columns}
                    found = conversation_of(without_nulls(read), where)
                except UnicodeDecodeError as error:
                    self.problem(where, f"not UTF-8 ({error.reason})")
                except Unusable as error:
                    self.problem(where, str(error))
                else:
                    yield row, found
