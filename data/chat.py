"""Conversations as tokens, each with its weight: 1 where the assistant wrote it and it is learned, else 0.

A conversation is rendered once with the tokenizer's own Jinja template and tokenised once; the characters that the
assistant wrote are then mapped to tokens by their offsets. Where the template marks those characters
(`{% generation %}`, transformers' extension of Jinja), the marks are taken. Where it does not, the conversation is
also rendered up to each turn: what those renderings share with the whole says where a turn begins and how it ends.
"""

import re
from pathlib import Path

import numpy as np

from drivetrain.data.call_ids import with_short_ids
from drivetrain.data.conversations import Conversation, Message
from drivetrain.data.readers import Unusable
from drivetrain.data.tokenizer import (
    chat_templates,
    load_template_tokenizer,
    require_chat_template,
    special_tokens,
)

_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_PROBE = "\ue000"  # private use: no template writes it
Span = tuple[int, int]


class Chat:
    """A tokenizer with its chat template.

    Args:
        directory: a tokenizer directory with `chat_template.jinja`, or a template in `tokenizer_config.json`.

    Raises:
        ConfigError: it cannot be read, or has no chat template.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        require_chat_template(directory)
        self.tokenizer = load_template_tokenizer(directory)
        self._templates = chat_templates(directory)
        self._named = special_tokens(directory)
        self._short_ids: dict[str, bool] = {}  # by template
        added = self.tokenizer.get_added_tokens_decoder().values()
        self._special = sorted({token.content for token in added if token.special}, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, self._special)) or "(?!)")

    def render(
        self, messages: list[Message], tools: list[dict] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The conversation as text.

        Raises:
            Unusable: the template refuses it; the text says why.
        """
        return self._render(messages, tools, add_generation_prompt, marks=False)[0]

    def _render(
        self, messages: list[Message], tools: list[dict] | None, prompt: bool, marks: bool
    ) -> tuple[str, list[Span]]:
        called = any(message.get("tool_calls") or message["role"] == "tool" for message in messages)
        if called and self._wants_short_ids(tools):
            messages = with_short_ids(messages)
        return self._render_as_given(messages, tools, prompt, marks)

    def _wants_short_ids(self, tools: list[dict] | None) -> bool:
        """Whether the template refuses a call for an id that has not 9 characters (Mistral's do)."""
        template = self._template(tools)
        if template not in self._short_ids:
            self._short_ids[template] = self._takes("a" * 9, tools) and not self._takes("a" * 8, tools)
        return self._short_ids[template]

    def _takes(self, call_id: str, tools: list[dict] | None) -> bool:
        call = {"id": call_id, "type": "function", "function": {"name": "a", "arguments": {}}}
        messages: list[Message] = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "a", "name": "a", "tool_call_id": call_id},
            {"role": "assistant", "content": "a"},
        ]
        try:
            self._render_as_given(messages, tools, prompt=False, marks=False)
        except Unusable:
            return False
        return True

    def _render_as_given(
        self, messages: list[Message], tools: list[dict] | None, prompt: bool, marks: bool
    ) -> tuple[str, list[Span]]:
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=self._template(tools),
                return_assistant_tokens_mask=marks,
                add_generation_prompt=prompt,
                **self._named,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise Unusable(f"the chat template refuses it ({error})") from error
        return texts[0], spans[0] if marks else []

    def _template(self, tools: list[dict] | None) -> str:
        if tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        return self._templates.get("default") or next(iter(self._templates.values()))

    def prompt(self, messages: list[Message], tools: list[dict] | None = None) -> list[int]:
        """Tokens that the assistant's next turn follows on."""
        text = self.render(messages, tools, add_generation_prompt=True)
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def stop_id(self) -> int | None:
        """The special token that ends a turn of the assistant; None where the template ends it with plain text."""
        text = self.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        end = self._turn_end(text)
        return self.tokenizer.token_to_id(end) if end else None

    def _turn_end(self, text: str) -> str | None:
        stripped = text.rstrip()
        return next((token for token in self._special if stripped.endswith(token)), None)

    def encode(self, conversation: Conversation) -> tuple[str, np.ndarray, np.ndarray]:
        """The text, its tokens (int64 [n]) and their weights (uint8 [n]).

        A token has weight 1 if any of its characters is the assistant's. The end of a turn is the assistant's too,
        white space that the template adds after it is not, unless the template's own marks say otherwise.

        Raises:
            Unusable: the template refuses the conversation, a text in it spells a control token, or the turns of
                the assistant cannot be told apart in what the template makes of it.
        """
        self._check_spelling(conversation)
        text, spans = self.spans(conversation)
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        tokens = np.array(encoding.ids, dtype=np.int64)
        weights = np.zeros(len(tokens), dtype=np.uint8)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        for start, end in spans:
            weights[(offsets[:, 0] < end) & (offsets[:, 1] > start)] = 1
        if not weights[1:].any():  # nothing precedes the first token, so nothing can predict it
            raise Unusable("the chat template leaves nothing of the assistant's messages")
        return text, tokens, weights

    def _check_spelling(self, conversation: Conversation) -> None:
        """Whoever writes `<|im_end|>` into a message would end the turn there."""
        for number, message in enumerate(conversation.messages, 1):
            found = self._spelled.search("\0".join(_texts(message)))
            if found:
                raise Unusable(f"message {number} spells the control token {found[0]}")
        if found := self._spelled.search("\0".join(_texts(conversation.tools or []))):
            raise Unusable(f"the tools spell the control token {found[0]}")

    def spans(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The rendered text, and (first, one past the last) character of every stretch that is learned."""
        if not _MARKS.search(self._template(conversation.tools)):
            return self._spans_by_prefixes(conversation)
        text, marked = self._render(conversation.messages, conversation.tools, prompt=False, marks=True)
        turns = [
            learned
            for message, learned in zip(conversation.messages, conversation.learned, strict=True)
            if message["role"] == "assistant"
        ]
        if all(turns):
            return text, marked
        if len(marked) != len(turns):
            raise Unusable(
                f"the chat template marks {len(marked)} stretches for {len(turns)} turns, so that a turn cannot be "
                "left out; give all of them weight 1"
            )
        return text, [span for span, learned in zip(marked, turns, strict=True) if learned]

    # --- without marks --------------------------------------------------------------------------------------

    def _spans_by_prefixes(self, conversation: Conversation) -> tuple[str, list[Span]]:
        messages, tools = conversation.messages, conversation.tools
        text = self.render(messages, tools)
        spans, end = [], 0
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                start = self._turn_start(text, end, messages[:number], tools)
                end = self._end_of_turn(text, start, messages[: number + 1], tools)
                if conversation.learned[number]:
                    spans.append((start, end))
        return text, spans

    def _turn_start(self, text: str, past: int, before: list[Message], tools: list[dict] | None) -> int:
        """Where the turn after the messages `before` begins in `text`: after what prompts for it.

        Args:
            past: where the assistant's last turn ended.
        """
        if not before:
            raise Unusable("it begins with the assistant, and the chat template has no generation marks")
        plain = self.render(before, tools)
        prompted = self.render(before, tools, add_generation_prompt=True)
        question = before[-1]["content"].strip() if before[-1]["role"] == "user" else ""
        start = _end_of(plain, text, past, question)
        if start is None:
            raise Unusable(
                f"the chat template renders message {len(before)} otherwise than when it is the last one, and has "
                "no generation marks"
            )
        header = prompted[len(plain) :] if prompted.startswith(plain) else ""
        if not header:
            # Either the turn needs none (Mistral), or the template knows no add_generation_prompt.
            probed = self.render([*before, {"role": "assistant", "content": _PROBE}], tools)
            header = probed[len(plain) : probed.find(_PROBE)] if probed.startswith(plain) else ""
            header = header if header.strip() else ""
        return start + _shared(header, text[start:])

    def _end_of_turn(self, text: str, start: int, upto: list[Message], tools: list[dict] | None) -> int:
        """One past the special token that ends the turn which begins at `start` and is the last of `upto`."""
        rendered = self.render(upto, tools)
        token = self._turn_end(rendered)
        if token is not None:  # no message spells it, so the first one ends the turn
            found = text.find(token, start)
            if found >= 0:
                return found + len(token)
        elif text.startswith(rendered) and len(rendered) > start:
            return len(rendered)
        raise Unusable(
            f"the chat template ends message {len(upto)} otherwise than when it is the last one, and has no "
            "generation marks"
        )


def _end_of(rendered: str, text: str, past: int, last: str) -> int | None:
    """Where in `text` the messages end that are `rendered` alone; None: not to be found.

    Templates that treat the newest messages in a way of their own (Mistral puts the tools before the last question)
    have no prefix in common: then the longest end of `rendered` that `text` has after `past`, if it holds the
    `last` message.
    """
    if text.startswith(rendered) and len(rendered) >= past:
        return len(rendered)
    low, high = 0, len(rendered)  # the longest end: whatever holds it holds all shorter ones
    while low < high:
        middle = (low + high + 1) // 2
        if text.find(rendered[len(rendered) - middle :], past) >= 0:
            low = middle
        else:
            high = middle - 1
    tail = rendered[len(rendered) - low :]
    if not low or last not in tail:
        return None
    return text.find(tail, past) + low


def _shared(header: str, text: str) -> int:
    """Characters that both begin with."""
    pairs = zip(header, text, strict=False)
    return next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(header), len(text)))


def _texts(value: object) -> list[str]:
    """All texts of a tree, keys too."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for pair in value.items() for item in pair for text in _texts(item)]
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    return []
