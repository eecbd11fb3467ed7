"""What a person or a client says, as requests to a `Generator`: texts to continue, conversations to answer."""

import dataclasses
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from drivetrain.conf.errors import ConfigError
from drivetrain.data.chat import Chat
from drivetrain.data.conversations import Message, conversation_of
from drivetrain.data.readers import Unusable
from drivetrain.data.tokenizer import bos_id, text_ids
from drivetrain.model.draw import Sampling
from drivetrain.model.generate import Request

Tool = dict[str, Any]


class Prompts:
    """Requests for one model; the tokenizer and its chat template are read once.

    How long a prompt may be is the generator's to say (`Generator.check`).

    Args:
        directory: of the tokenizer. begin: the token that an empty text becomes where texts begin with none.

    Raises:
        ConfigError: as `bos_id`.
    """

    def __init__(self, directory: Path, tokenizer: Tokenizer, begin: int) -> None:
        self.directory, self.tokenizer, self.begin = directory, tokenizer, begin
        self.bos = bos_id(directory)
        added = self.tokenizer.get_added_tokens_decoder()
        self._ids = {token.content: number for number, token in added.items()}
        special = sorted((token.content for token in added.values() if token.special), key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, special)) or "(?!)")

    @cached_property
    def chat(self) -> Chat:
        """The chat template. Raises ConfigError: there is none."""
        return Chat(self.directory)

    @cached_property
    def turn_end(self) -> tuple[int, ...]:
        """The token that ends the assistant's turn, where there is one.

        Raises:
            ConfigError: there is no chat template, or it refuses a question and its answer.
        """
        try:
            end = self.chat.stop_id()
        except Unusable as error:
            raise ConfigError(f"the tokenizer in {self.directory} cannot chat: {error}") from error
        return () if end is None else (end,)

    def require_chat(self) -> None:
        """Raise ConfigError where the tokenizer cannot chat."""
        _ = self.turn_end

    def continued(self, prompt: str | Sequence[int], sampling: Sampling, samples: int = 1) -> Request:
        """For a text, in which special tokens count and which begins as in training, or for token ids as they are;
        an empty one begins a document.

        Raises:
            Unusable: it is not text that UTF-8 can spell.
        """
        if isinstance(prompt, str):
            require_text(prompt, "the prompt")
            prompt = text_ids(self.tokenizer, self.bos, prompt)
        return self._request(prompt or [self.begin], sampling, (), samples)

    def answered(
        self,
        messages: list[dict[str, Any]],
        sampling: Sampling,
        samples: int = 1,
        tools: list[Tool] | None = None,
    ) -> Request:
        """For the assistant's next turn in a conversation (as `data.conversations` reads them).

        Args:
            tools: functions that the model may call, as JSON schemas in OpenAI's form.

        Raises:
            ConfigError: the tokenizer has no chat template. Unusable: a message is not what it should be, or spells
                a control token; or the template refuses the conversation, or takes no tools.
        """
        ends = self.turn_end
        found = self.checked(messages)
        if tools:
            self._check_tools(found, tools)
        return self._request(self.chat.prompt(found, tools or None), sampling, ends, samples)

    def checked(self, messages: list[dict[str, Any]]) -> list[Message]:
        """The messages as they are trained on, so that a prompt is rendered as in training.

        Raises:
            Unusable: one is not what it should be, or spells a control token, which would end its turn.
        """
        if not messages:
            raise Unusable("a conversation has at least one message")
        answer = {"role": "assistant", "content": "."}  # a conversation of training has one
        found = conversation_of({"messages": [*messages, answer]}).messages[:-1]
        for number, message in enumerate(found, 1):
            self._check_spelling(message, f"message {number}")
        return found

    def _check_tools(self, messages: list[Message], tools: list[Tool]) -> None:
        self._check_spelling(tools, "the list of tools")
        if self.chat.render(messages, tools) == self.chat.render(messages):
            raise Unusable("the model's chat template takes no tools; leave them out")

    def _check_spelling(self, value: Any, what: str) -> None:
        text = json.dumps(value, ensure_ascii=False)
        require_text(text, what)
        if spelled := self._spelled.search(text):
            raise Unusable(f"{what} spells the control token {spelled[0]}; leave it out")

    def _request(
        self, prompt: Sequence[int], sampling: Sampling, ends: tuple[int, ...], samples: int
    ) -> Request:
        # A stop text that spells an added token stands for the token, which may decode to nothing.
        spelled = (self._ids[text] for text in sampling.stop if text in self._ids)
        stop_tokens = (*sampling.stop_tokens, *ends, *spelled)
        return Request(prompt, dataclasses.replace(sampling, stop_tokens=stop_tokens), samples)


def require_text(text: str, what: str) -> None:
    """Raise Unusable for text that UTF-8 cannot spell, as bytes of another encoding become on a command line."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Unusable(f"{what} is not UTF-8 (character {error.start + 1})") from error
