"""What `stage.environment` names: problems, with tools or without; `verifiers`' environments; your own.

docs/environments.md describes them.
"""

import importlib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from drivetrain.conf.environments import ENVIRONMENTS
from drivetrain.conf.errors import ConfigError
from drivetrain.conf.rewards import Walls
from drivetrain.train.evaluation.gym import GYM, value_of
from drivetrain.train.rl.episodes import Environment
from drivetrain.train.rl.gym_problems import GymEnvironment
from drivetrain.train.rl.questions import Questions
from drivetrain.train.rl.tools import CalculatorTool, PythonTool, Tool, ToolEnvironment, ToolSettings

QUESTIONS, VERIFIERS, CUSTOM = "questions:", "verifiers:", "custom:"
TOOLS = ("calculator", "python", "search")
_FORMS = {"template": False, "tags": True}  # calls=...: whether they are tags
_COMMON = tuple(each.name for each in fields(ToolSettings) if each.name != "tags")
_OWN = ("calls", "seconds", "memory", "walls", "documents", "found")


def build_environment(name: str, seed: int, held_out: int, unseen: bool) -> Environment:
    """What `stage.environment` names.

    Args:
        seed: the run's, which training problems follow from. held_out: problems that are held out.
        unseen: no question is both held out and trained on.

    Raises:
        ConfigError: nothing of that name, or a setting is wrong.
    """
    base, _, query = name.partition("?")
    try:
        settings = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError as error:
        raise ConfigError(
            f"stage.environment={name}: {error}; settings have the form ?NAME=VALUE&NAME=VALUE"
        ) from error
    try:
        if base.startswith((GYM, QUESTIONS)):
            tools = _taken(settings, ("tools", *_COMMON, *_OWN)) if "tools" in settings else {}
            problems = _problems(base, query, settings, set(tools), seed, held_out, unseen)
            return problems if not tools else _with_tools(problems, tools)
        if base.startswith(VERIFIERS):
            from drivetrain.train.rl.verifiers_environment import VerifiersEnvironment

            given = {key: value_of(value) for key, value in settings.items()}
            return VerifiersEnvironment(base.removeprefix(VERIFIERS), given, seed, held_out)
        if base.startswith(CUSTOM):
            return _custom(base.removeprefix(CUSTOM), settings, seed, held_out, unseen)
    except ConfigError as error:
        if name in str(error):
            raise
        raise type(error)(f"stage.environment={name}: {error}") from error
    raise ConfigError(
        f"stage.environment={name} is not known; use {GYM}NAME?SETTING=VALUE, as in {GYM}chain_sum?max_terms=3, or "
        f"one that begins with {', '.join(ENVIRONMENTS[1:])}"
    )


def _taken(settings: dict[str, str], names: tuple[str, ...]) -> dict[str, str]:
    """The settings of these names, which are removed."""
    return {key: settings.pop(key) for key in list(settings) if key in names}


def _problems(
    base: str, query: str, settings: dict[str, str], taken: set[str], seed: int, held_out: int, unseen: bool
) -> Environment:
    if base.startswith(GYM):
        # As it was written: the problems' seeds follow from the name.
        kept = [word for word in query.split("&") if word and word.partition("=")[0] not in taken]
        return GymEnvironment(f"{base}?{'&'.join(kept)}" if kept else base, seed, held_out, unseen)
    path = settings.pop("held_out", None)
    judge = settings.pop("judge", "exact")
    _nothing_left(settings, ("held_out", "judge", "tools"))
    where = Path(base.removeprefix(QUESTIONS))
    return Questions(where, None if path is None else Path(path), judge, seed, held_out, unseen)


def _nothing_left(settings: Mapping[str, Any], known: tuple[str, ...]) -> None:
    if settings:
        raise ConfigError(f"there is no setting {next(iter(settings))}; there is {', '.join(known)}")


def _with_tools(problems: Environment, settings: dict[str, str]) -> ToolEnvironment:
    names = [name for name in settings.pop("tools").replace(",", " ").split() if name]
    form = settings.pop("calls", "template")
    if form not in _FORMS:
        raise ConfigError(f"calls={form}; use one of {', '.join(_FORMS)}")
    common = {key: _number(key, value) for key, value in _taken(settings, _COMMON).items()}
    for key in set(common) - {"penalty"}:
        common[key] = int(common[key])
    tools = [_tool(name, settings) for name in names]
    if not tools or len({tool.name for tool in tools}) < len(names):
        raise ConfigError(f"tools={','.join(names)}; name each tool once, of {', '.join(TOOLS)}")
    unused = [key for key in settings if key not in _used(names)]
    if unused:
        raise ConfigError(f"{unused[0]} belongs to a tool that tools={','.join(names)} does not name")
    return ToolEnvironment(problems, tools, ToolSettings(tags=_FORMS[form], **common))  # type: ignore[arg-type]


def _used(names: list[str]) -> set[str]:
    used = {"python": {"seconds", "memory", "walls"}, "search": {"documents", "found"}}
    return {key for name in names for key in used.get(name, ())}


def _tool(name: str, settings: Mapping[str, str]) -> Tool:
    match name:
        case "calculator":
            return CalculatorTool()
        case "python":
            walls = settings.get("walls", "auto")
            if walls not in Walls.__members__:
                raise ConfigError(f"walls={walls}; use one of {', '.join(Walls.__members__)}")
            seconds = _number("seconds", settings.get("seconds", "5"))
            memory = _number("memory", settings.get("memory", "256"))
            return PythonTool(seconds, int(memory), Walls[walls])
        case "search":
            from drivetrain.train.rl.search import SearchTool

            if "documents" not in settings:
                raise ConfigError("tools=search needs documents=PATH, a file of JSON lines with a text each")
            found = _number("found", settings.get("found", "3"))
            return SearchTool(Path(settings["documents"]), int(found))
    raise ConfigError(f"there is no tool {name}; there is {', '.join(TOOLS)}")


def _number(key: str, value: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise ConfigError(f"{key}={value} is no number; correct it") from error


def _custom(target: str, settings: dict[str, str], seed: int, held_out: int, unseen: bool) -> Environment:
    module, colon, attribute = target.partition(":")
    if not (module and colon and attribute):
        raise ConfigError(f"{target} is not of the form package.module:name; correct it")
    try:
        make = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{target} cannot be imported: {error}; install it or set PYTHONPATH to its folder"
        ) from error
    given = {key: value_of(value) for key, value in settings.items()}
    try:
        made: Environment = make(seed=seed, held_out=held_out, unseen=unseen, **given)
    except TypeError as error:
        raise ConfigError(f"{target} cannot be made: {error}") from error
    return made
