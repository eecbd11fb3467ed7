"""What a person or a client says, as requests to a `Generator`: texts to continue, conversations to answer."""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

from drivetrain.conf.errors import ConfigError
from drivetrain.data.chat import Chat
from drivetrain.data.conversations import Message, conversation_of
from drivetrain.data.readers import Unusable
from drivetrain.data.tokenizer import chat_templates, require_chat_template
from drivetrain.model.draw import Sampling
from drivetrain.model.generate import Request
from drivetrain.train.serve import OpenModel


class Prompts:
    """Requests for one model; the tokenizer and its chat template are read once. Safe to share between threads.

    Raises:
        ConfigError: the tokenizer has a chat template that refuses a question and its answer.
    """

    def __init__(self, opened: OpenModel) -> None:
        self.directory, self.tokenizer, self.begin = opened.tokenizer_dir, opened.tokenizer, opened.eos_ids[0]
        added = self.tokenizer.get_added_tokens_decoder()
        self._ids = {token.content: number for number, token in added.items()}
        special = sorted((token.content for token in added.values() if token.special), key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, special)) or "(?!)")
        self.chat = Chat(self.directory) if chat_templates(self.directory) else None
        try:
            end = self.chat.stop_id() if self.chat else None
        except Unusable as error:
            raise ConfigError(f"the tokenizer in {self.directory} cannot chat: {error}") from error
        self._turn_end = () if end is None else (end,)

    def continued(self, prompt: str | Sequence[int], sampling: Sampling, samples: int = 1) -> Request:
        """For a text, in which special tokens count, or for token ids; an empty one begins a document."""
        tokens = self.tokenizer.encode(prompt).ids if isinstance(prompt, str) else prompt
        return Request(tokens or [self.begin], self._stopping(sampling, ()), samples)

    def answered(self, messages: list[dict[str, Any]], sampling: Sampling, samples: int = 1) -> Request:
        """For the assistant's next turn in a conversation (as `data.conversations` reads them).

        Raises:
            ConfigError: the tokenizer has no chat template. Unusable: a message is not what it should be, spells a
                control token, or the template refuses the conversation.
        """
        if self.chat is None:
            require_chat_template(self.directory)
        assert self.chat is not None
        tokens = self.chat.prompt(self.checked(messages))
        return Request(tokens, self._stopping(sampling, self._turn_end), samples)

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
            if spelled := self._spelled.search(json.dumps(message, ensure_ascii=False)):
                raise Unusable(f"message {number} spells the control token {spelled[0]}; leave it out")
        return found

    def _stopping(self, sampling: Sampling, ends: tuple[int, ...]) -> Sampling:
        """A stop text that spells an added token stands for the token, which may decode to nothing."""
        spelled = (self._ids[text] for text in sampling.stop if text in self._ids)
        return dataclasses.replace(sampling, stop_tokens=(*sampling.stop_tokens, *ends, *spelled))
