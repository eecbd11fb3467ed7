"""Ids of tool calls in the form that Mistral's chat templates ask for: 9 letters and digits.

Data sets have ids of other forms (`call_Vy3...`), or none. A new id is a digest of the old one, or of the call's
place where there is none, so that calls and replies still belong together and a beginning of a conversation has the
ids that the whole has.
"""

import re

import xxhash

from drivetrain.data.conversations import Message

LENGTH = 9
_FITS = re.compile(f"[0-9A-Za-z]{{{LENGTH}}}")
_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def short_id(given: object) -> str:
    """The id itself where it fits, else 9 letters and digits of its digest."""
    text = str(given)
    if _FITS.fullmatch(text):
        return text
    rest, digits = xxhash.xxh3_64_intdigest(text.encode()), ""
    for _ in range(LENGTH):
        rest, digit = divmod(rest, len(_DIGITS))
        digits += _DIGITS[digit]
    return digits


def with_short_ids(messages: list[Message]) -> list[Message]:
    """The messages with such an id in every call and every reply of a tool.

    A reply without an id answers the first call before it that has no reply yet.
    """
    made: list[Message] = []
    waiting: list[str] = []
    for number, message in enumerate(messages):
        if message.get("tool_calls"):
            calls = [
                {**call, "id": short_id(call.get("id") or f"call {at} of message {number}")}
                for at, call in enumerate(message["tool_calls"])
            ]
            waiting = [call["id"] for call in calls]
            message = {**message, "tool_calls": calls}
        elif message["role"] == "tool":
            unasked = f"reply of message {number}"
            reply = short_id(message.get("tool_call_id") or (waiting[0] if waiting else unasked))
            waiting = [one for one in waiting if one != reply]
            message = {**message, "tool_call_id": reply}
        made.append(message)
    return made
