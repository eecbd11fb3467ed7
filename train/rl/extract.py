"""The answer within a completion."""

import re

from drivetrain.conf.rewards import Extract

_THINK, _THOUGHT = "<think>", "</think>"
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)|\\boxed\s+([^\s${}\\]+)")
# "The answer is 4.", "**Answer:** 4", "#### 4" (GSM8K's own mark)
_ANSWER = re.compile(r"(?:\banswer\b\W{0,4}(?::|\bis\b:?)|####)[ \t*]*([^\n]+)", re.IGNORECASE)
_NUMBER = re.compile(
    r"(?:(?<!\w)[-+−])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
)
_FENCE = re.compile(
    r"^(?P<indent>[ ]{0,3})(?P<fence>`{3,}|~{3,})[^\n`]*\n(?P<body>.*?)^[ ]{0,3}(?P=fence)[`~]*[ \t]*$",
    re.DOTALL | re.MULTILINE,
)


def after_thought(completion: str) -> str:
    """What follows the last </think>; nothing while a thought is still open."""
    _, mark, after = completion.rpartition(_THOUGHT)
    if mark:
        return after
    return "" if _THINK in completion else completion


def answer_in(completion: str, extract: Extract) -> str | None:
    """The answer, without white space around it; None where there is none."""
    text = after_thought(completion)
    match extract:
        case Extract.all:
            found: str | None = text
        case Extract.tag:
            found = _last(_TAG, text)
        case Extract.boxed:
            found = _boxed(text)
        case Extract.answer:
            found = _last(_ANSWER, text)
            found = found and found.strip().rstrip("*").removesuffix(".")
        case Extract.number:
            number = _last(_NUMBER, text)
            found = number and number.replace(",", "").replace("−", "-")
        case Extract.auto:
            for kind in (Extract.tag, Extract.boxed, Extract.answer):
                found = answer_in(completion, kind)
                if found is not None:
                    return found
            found = text
    return found.strip() or None if found is not None else None


def last_block(completion: str) -> str | None:
    """The last fenced block of code, without its fence."""
    blocks = [match["body"] for match in _FENCE.finditer(after_thought(completion))]
    return blocks[-1] if blocks else None


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.findall(text)
    return found[-1] if found else None


def _boxed(text: str) -> str | None:
    """Braces are balanced, as in \\boxed{\\frac{1}{2}}; a box that is never closed is none."""
    for match in reversed(list(_BOX.finditer(text))):
        if match[1]:
            return match[1].rstrip(".,")
        depth = 0
        for end in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[match.end() + 1 : end]
    return None
