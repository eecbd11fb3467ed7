"""What `stage.environment` may begin with; train/rl/environments.py makes them."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qsl

ENVIRONMENTS = ("reasoning_gym:", "questions:", "verifiers:", "custom:")


def environment_problems(name: str) -> Iterator[str]:
    """What can be seen without making it: its form, and files that are not there."""
    if not name.startswith(ENVIRONMENTS):
        names = f"{', '.join(ENVIRONMENTS[:-1])} or {ENVIRONMENTS[-1]}"
        yield (
            f"stage.environment={name} is not known; it begins with {names}, as in "
            f"{ENVIRONMENTS[0]}chain_sum?max_terms=3"
        )
        return
    base, _, query = name.partition("?")
    try:
        settings = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError as error:
        yield f"stage.environment={name}: {error}; settings have the form ?NAME=VALUE&NAME=VALUE"
        return
    kind, _, what = base.partition(":")
    if kind == "custom" and not is_target(what):
        yield f"stage.environment={name}: {what} is not of the form package.module:name; correct it"
    if kind in ("questions", "reasoning_gym"):
        named = ("held_out", "documents") if kind == "questions" else ("documents",)
        files = [settings[key] for key in named if key in settings]
        for path in [*([what] if kind == "questions" else []), *files]:
            if not Path(path).exists():
                yield f"stage.environment={name}: {path or 'the file'} does not exist; check the path"


def is_target(word: str) -> bool:
    """Whether it has the form package.module:name."""
    module, _, attribute = word.partition(":")
    return bool(module and attribute)
