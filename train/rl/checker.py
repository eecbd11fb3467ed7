"""`python -m drivetrain.train.rl.checker math|gym`: compares answers until its input ends.

Requests and replies are lines of JSON, replies {"score": number or null}. A timer that nobody handles ends the
process in the midst of an answer that takes too long, even where a library is deaf to Python's signals. Some of
these libraries evaluate what they read, so it is shut in as far as the system allows.
"""

import contextlib
import functools
import io
import json
import logging
import os
import resource
import signal
import sys
import sysconfig
from collections.abc import Callable
from typing import Any

from drivetrain.conf.errors import DataError
from drivetrain.train.rl import walls

_MEMORY = 4 << 30  # bytes of address space
_TUPLE = "\0tuple"  # the key of an object that stands for a tuple: some data sets compare with those
Check = Callable[[dict[str, Any]], float | None]


def main() -> None:
    kind = sys.argv[1]
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply
    try:
        check = {"math": _math, "gym": _gym}[kind]()
    except ImportError as error:
        _reply(replies, {"error": f"{error}; run `pip install 'drivetrain[rl]'`"})
        return
    _shut_in()
    _reply(replies, {})
    for line in sys.stdin:
        request = json.loads(line, object_hook=_untag)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, request["seconds"])
        try:
            reply: dict[str, Any] = {"score": check(request)}
        except DataError as error:
            reply = {"error": str(error)}
        except Exception:  # the libraries raise all kinds of errors at odd answers
            reply = {"score": 0.0}
        signal.setitimer(signal.ITIMER_REAL, 0)
        _reply(replies, reply)


def _reply(replies: io.TextIOBase, reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


def to_line(request: dict[str, Any] | None) -> bytes:
    """A request as a line of JSON.

    Raises:
        DataError: something in it has no form in JSON.
    """
    try:
        return json.dumps(_tag(request)).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise DataError(
            f"a sample's reference has no form in JSON ({error}); leave such things out"
        ) from error


def _tag(value: Any) -> Any:
    if isinstance(value, tuple):
        return {_TUPLE: [_tag(each) for each in value]}
    if isinstance(value, list):
        return [_tag(each) for each in value]
    if isinstance(value, dict):
        return {key: _tag(each) for key, each in value.items()}
    return value


def _untag(value: dict[str, Any]) -> Any:
    return tuple(value[_TUPLE]) if _TUPLE in value else value


def _shut_in() -> None:
    """No network, no other process, nothing to write to. Where the kernel has no such walls, without them: what is
    read here is text and no program."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    installed = [path for path in sys.path if path] + list(sysconfig.get_paths().values())
    with contextlib.suppress(OSError):
        walls.drop_rights(None)
        walls.landlock([sys.base_prefix, "/usr/lib", "/usr/share/zoneinfo", "/lib", "/lib64", *installed], [])
        walls.seccomp(fork=False, thread=True, alone=True)


def _math() -> Check:
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limit is off

    def parsed(text: str) -> list[Any]:
        return list(parse(text, parsing_timeout=None))

    @functools.lru_cache(4096)
    def right_one(text: str) -> list[Any]:
        # LaTeX is only seen where it is marked as such.
        return parsed(text) if "$" in text or "\\boxed" in text else parsed(f"\\boxed{{{text}}}")

    def check(request: dict[str, Any]) -> float | None:
        right = [each for each in map(right_one, request["right"]) if each]
        if not right:
            return None
        given = parsed(request["text"])
        return float(any(verify(each, given, timeout_seconds=None) for each in right))

    return check


def _gym() -> Check:
    import reasoning_gym

    @functools.lru_cache(256)
    def scorer(name: str, settings: str) -> Callable[..., float]:
        given = json.loads(settings)
        if given:
            made: Callable[..., float] = reasoning_gym.create_dataset(name, **given).score_answer
            return made
        default: Callable[..., float] = reasoning_gym.get_score_answer_fn(name)
        return default

    def check(request: dict[str, Any]) -> float | None:
        entry = request["entry"]
        try:
            score = scorer(request["kind"], json.dumps(request["settings"]))
        except Exception as error:
            raise DataError(
                f"reasoning-gym cannot score a sample ({type(error).__name__}: {error}); its entry and settings "
                "must be those of the data set that made it"
            ) from error
        return float(score(request["answer"], entry))

    return check


if __name__ == "__main__":
    main()
