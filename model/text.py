"""Text of tokens that come one by one.

A token's text depends on what is before it: SentencePiece's decoders drop the space that a text begins with, and a
character may be spread over several tokens. So a few tokens before it are always decoded along.
"""

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]

BROKEN = "\N{REPLACEMENT CHARACTER}"  # what decoders make of bytes that are no whole character
CHARACTER_BYTES = 4  # of UTF-8 at most, so at most as many tokens
CONTEXT = 8  # tokens of a prompt that are looked at first


class TextStream:
    """Whole characters, and nothing from a stop text on. What is told is what decoding the completion after its
    prompt adds to decoding the prompt alone; bytes at the end that are no whole character are left out.

    Args:
        decode: tokens to text.
        stop: texts that the completion ends before.
        prompt: the tokens that it follows. Where these end within a character, all of it is told.

    Attributes:
        stopped: whether a stop text was found.
    """

    def __init__(self, decode: Decode, stop: Sequence[str] = (), prompt: Sequence[int] = ()) -> None:
        self.decode, self.stop = decode, tuple(stop)
        self.stopped = False
        self._tokens = _context(decode, prompt)
        self._first = 0  # tokens from here on are decoded
        self._read = _whole(decode, self._tokens)  # those up to here are told
        self._told = decode(self._tokens[: self._read])  # text of those decoded
        self._held = ""  # may be the beginning of a stop text

    def push(self, token: int) -> str:
        """The text that this token adds to what can be told."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        text = self.decode(self._tokens[self._first :])
        whole = text.rstrip(BROKEN)
        # A run of bytes, some of which were whole characters, may be none together, for now or for good.
        if not whole.startswith(self._told) and whole != text:
            return ""
        added = whole[len(self._told) :]
        self._told = whole
        if added and whole == text:
            self._first, self._read = self._read, len(self._tokens)
            self._told = self.decode(self._tokens[self._first :])
        return self._tell(self._held + added) if added else ""

    def _tell(self, text: str) -> str:
        found = [place for place in map(text.find, self.stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        begun = max((_overlap(text, stop) for stop in self.stop), default=0)
        self._held = text[len(text) - begun :]
        return text[: len(text) - begun]

    def finish(self) -> str:
        """What was held back, after the last token."""
        held, self._held = self._held, ""
        return held


def _context(decode: Decode, prompt: Sequence[int]) -> list[int]:
    """The end of a prompt, from the beginning of a character, as long as it needs to be to have a text."""
    size = CONTEXT
    while size < len(prompt):
        for tokens in (list(prompt[-size - more :]) for more in range(CHARACTER_BYTES)):
            if (text := decode(tokens)) and not text.startswith(BROKEN):
                return tokens
        size *= 4
    return list(prompt)


def _whole(decode: Decode, tokens: list[int]) -> int:
    """How many tokens there are before those that begin a character and do not end it."""
    ends = range(len(tokens), max(0, len(tokens) - CHARACTER_BYTES), -1)
    return next((end for end in ends if not decode(tokens[:end]).endswith(BROKEN)), len(tokens))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
