"""The environment's turns as tokens: what a chat template writes between two turns of the assistant.

Nothing that the model wrote is rendered or tokenised again. A conversation is rendered in which a mark stands for
the assistant's last turn, and what the template writes behind that mark (the end of the turn, the observation, what
prompts for the next turn) is tokenised and put behind the tokens so far. So it makes no difference that a template
strips texts, or leaves thoughts out of earlier turns: the model goes on from exactly what it wrote.
"""

from collections.abc import Iterator, Sequence

from drivetrain.conf.errors import ConfigError
from drivetrain.data.chat import Chat
from drivetrain.data.conversations import Message
from drivetrain.data.readers import Unusable

_MARK, _PROBE = "\ue000", "\ue001"  # private use: no template writes them


class Turns:
    """Renders observations with a tokenizer's chat template.

    Args:
        tools: function schemas that the template shows.

    Raises:
        ConfigError: the template shows no tools, and there are some.
    """

    def __init__(self, chat: Chat, tools: list[dict] | None) -> None:
        self.chat, self.tools, self.tokenizer = chat, tools, chat.tokenizer
        self.end_id = chat.stop_id()
        self.end = "" if self.end_id is None else str(self.tokenizer.id_to_token(self.end_id))
        added = self.tokenizer.get_added_tokens_decoder()
        self.control = sorted((t.content for t in added.values() if t.special), key=len, reverse=True)
        # Text is tokenised behind a control token, as all but the first of a conversation is: some tokenizers put a
        # space before a text's first word.
        self.anchor = self.end or next(iter(self.control), "")
        self._shown: set[str] = set()
        for tool in tools or []:
            name = tool["function"]["name"]
            if name not in chat.render([{"role": "user", "content": "a"}], tools, add_generation_prompt=True):
                raise ConfigError(
                    f"the chat template in {chat.directory} does not show the model its tools ({name}); use a "
                    "tokenizer whose template does, as those of `drivetrain tokenizer train` do"
                )

    def after(self, rounds: Sequence[list[Message]], first: list[Message], last: int) -> list[int]:
        """Tokens that follow the model's last one: the last observation, and what prompts for the next turn.

        Args:
            rounds: all observations so far, each the messages between two turns of the model. first: what came
                before its first turn. last: the last token that it wrote.

        Raises:
            ConfigError: the template refuses such messages, or leaves them out.
        """
        self._check(first, rounds[-1])
        rest = self._behind_mark(first, [[self.plain(each) for each in round_] for round_ in rounds])
        return self._tokens(rest, ends=last == self.end_id)

    def continued(self, text: str) -> list[int]:
        """Tokens of a text that stands within the model's turn."""
        anchored = self.tokenizer.encode(self.anchor + self._plain(text), add_special_tokens=False).ids
        return anchored[1:] if self.anchor else anchored

    def plain(self, message: Message) -> Message:
        """The message without control tokens: an environment's text cannot end a turn."""
        return {**message, "content": self._plain(message["content"])}

    def _plain(self, text: str) -> str:
        text = text.replace(_MARK, "")
        for token in self.control:
            text = text.replace(token, f"{token[:1]} {token[1:]}")
        return text

    def _tokens(self, rest: str, ends: bool) -> list[int]:
        """Args: rest: from the token that ends a turn on. ends: the model wrote that one itself."""
        if self.end_id is None:
            return self.continued(rest)
        tokens: list[int] = self.tokenizer.encode(rest, add_special_tokens=False).ids
        assert tokens[0] == self.end_id
        return tokens[1:] if ends else tokens

    def _check(self, first: list[Message], messages: list[Message]) -> None:
        """Whether the template shows what messages of such roles say."""
        for message in messages:
            role = message["role"]
            if role in self._shown:
                continue
            if _PROBE not in self._behind_mark(first, [[{**message, "content": _PROBE}]]):
                raise ConfigError(
                    f"the chat template in {self.chat.directory} leaves messages of the role {role!r} out, and the "
                    "environment answers with such; use a tokenizer whose template has them"
                )
            self._shown.add(role)

    def _behind_mark(self, first: list[Message], rounds: list[list[Message]]) -> str:
        """What the template writes from the end of the assistant's last turn on."""
        refused = "it does not write what the assistant says"
        for messages in _forms(first, rounds):
            try:
                text = self.chat.render(messages, self.tools, add_generation_prompt=True)
            except Unusable as error:
                refused = str(error)
                continue
            at = text.rfind(_MARK)
            found = at + 1 if not self.end else text.find(self.end, at)
            if 0 <= at < found:
                return text[found:]
        role = rounds[-1][0]["role"]
        raise ConfigError(
            f"the chat template in {self.chat.directory} has no turn of the role {role!r} after the assistant's "
            f"({refused}); use a tokenizer whose template has it"
        )


def _forms(first: list[Message], rounds: list[list[Message]]) -> Iterator[list[Message]]:
    """The conversation with a mark in the assistant's last turn. Most templates want a result to answer a call; for
    those that can show no call, or one at a time, the assistant's turns are plain text."""
    for calls in (True, False):
        messages = list(first)
        number = 0
        for place, round_ in enumerate(rounds):
            text = _MARK if place == len(rounds) - 1 else "a"
            results = [message for message in round_ if message["role"] == "tool"]
            ids = [
                f"call{number + i:05d}" for i in range(len(results))
            ]  # 9 letters and digits, as Mistral asks
            number += len(results)
            if calls and results:
                made = [
                    {"id": id_, "type": "function", "function": {"name": text, "arguments": {}}}
                    for id_ in ids
                ]
                messages.append({"role": "assistant", "content": "", "tool_calls": made})
            else:
                messages.append({"role": "assistant", "content": text})
            given = iter(ids)
            messages += [
                {**message, "tool_call_id": next(given)} if message["role"] == "tool" else message
                for message in round_
            ]
        yield messages
