"""Turns Hydra's and OmegaConf's exceptions into one plain sentence about what was typed.

Their messages are read by pattern, since a fault in an experiment's file arrives as text alone. Both are
pinned to a minor version, and `tests/conf/test_explain.py` holds every case.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import is_dataclass
from enum import Enum
from functools import cache
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from drivetrain.conf.schema import SCHEMAS, RunConfig, options

GROUPS = (*SCHEMAS, "experiment")
MIXTURE = "data.mixture={NAME: {path: DIR, weight: 1.0}}"


def explain(error: Exception, overrides: Sequence[str]) -> str:
    """One sentence: the key, what was given, what is allowed, and the nearest valid name.

    Args:
        error: what Hydra, OmegaConf or PyYAML raised.
        overrides: the words that were composed; empty for a file.
    """
    return misuse(overrides) or _from_exception(error, _parse(overrides))


def misuse(overrides: Sequence[str]) -> str | None:
    """What is wrong with the words themselves, or None. Hydra would let some of it through."""
    for word in overrides:
        if problem := _unreadable(word):
            return problem
    parsed = _parse(overrides)
    return next((problem for override in parsed if (problem := _word_problem(override))), _repeated(parsed))


def _parse(overrides: Sequence[str]) -> list[Override]:
    return OverridesParser.create().parse_overrides(list(overrides))


def _unreadable(word: str) -> str | None:
    """Why Hydra's grammar refuses a word."""
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        pass
    else:
        return None
    key, equals, value = word.partition("=")
    if not word.strip():
        return "an empty word is no setting; write key=VALUE"
    if not equals:
        return f"{word} is no setting; write {word if word in _types() else 'key'}=VALUE"
    if problem := _unbalanced(value):
        return f"{word} {problem}"
    quoted = f"{key}='{value}'"
    try:
        OverridesParser.create().parse_override(quoted)
    except HydraException:
        return f"{word} is no setting; write key=VALUE"
    return f'the value in {word} has characters of its own meaning; quote it: "{quoted}"'


def _unbalanced(value: str) -> str | None:
    """The first quote or bracket of a value without its partner."""
    closing = {"[": "]", "{": "}", "(": ")"}
    awaited: list[str] = []
    quote = ""
    for character in value:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in closing:
            awaited.append(character)
        elif character in closing.values() and (not awaited or closing[awaited.pop()] != character):
            return f"has a {character} that nothing opens"
    if quote:
        return f"has a {quote} that is not closed"
    return f"has a {awaited[-1]} that is not closed" if awaited else None


def _word_problem(override: Override) -> str | None:
    key, word = override.key_or_group, override.input_line or ""
    given = word.partition("=")[2]
    if override.package is not None or key.startswith(("hydra.", "hydra/")):
        return None
    if not key:
        return f"{word} has no key; write key=VALUE"
    if override.is_delete():
        if key not in _types():
            return _unknown_key(key)
        return f"{word} would take {key} away and a run needs it; set it with {key}=VALUE"
    if override.is_sweep_override():
        return f"{word} gives {key} several values and this is one run; keep one of them, or add -m to sweep"
    if key in GROUPS and not isinstance(override.value(), dict):
        if not isinstance(override.value(), str) or given.endswith("_schema"):
            return _unknown_option(key, given, options(key))
        plus = override.is_add()
        return f"{key} has an option already; write {key}={given} without the +" if plus else None
    head, _, leaf = key.rpartition(".")
    if head in SCHEMAS and leaf == "name" and head != "model":
        return f"{key} follows from the option; write {head}={given}"
    if override.is_add() or override.is_force_add():
        if key not in _types() and not key.startswith("data.mixture."):
            return _unknown_key(key)
        if override.is_add() and key in _types():
            return f"{key} exists already; write {key}={given} without the +"
    return None


def _repeated(parsed: Iterable[Override]) -> str | None:
    """A group that gets two different options, where Hydra would take the last."""
    chosen: dict[str, str] = {}
    for override in parsed:
        group, value = override.key_or_group, override.value()
        if group in GROUPS and isinstance(value, str) and chosen.setdefault(group, value) != value:
            return f"{group} is chosen twice, {group}={chosen[group]} and {group}={value}; keep one"
    return None


def _from_exception(error: Exception, parsed: list[Override]) -> str:
    chain = list(_causes(error))
    if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark):
        return f"{mark.name} is not YAML: {error.problem} in line {mark.line + 1}"
    text = str(chain[-1])
    found = re.match(r"In '(experiment/[^']+)': ", text)
    place = f"{found[1]}.yaml: " if found else ""
    readers = (
        _option_problem,
        _key_problem,
        _reference_problem,
        _missing_value,
        _value_problem,
        _file_problem,
    )
    for reader in readers:
        if sentence := reader(text, parsed):
            return place + sentence
    first = text.splitlines()[0] if text else type(chain[-1]).__name__
    return f"{place}the settings do not fit together: {first}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _option_problem(text: str, parsed: list[Override]) -> str | None:
    found = re.search(r"Could not find '([^']*)/([^'/]*)'", text)
    if not found:
        return None
    group, name = found.groups()
    listed = re.findall(r"^\t(\S+)$", text.partition("Config search path")[0], flags=re.MULTILINE)
    chosen_here = any(override.key_or_group == group for override in parsed)
    experiment = _given("experiment", parsed)
    where = "" if chosen_here or experiment is None else f" in experiment={experiment}"
    return _unknown_option(group, name, [o for o in listed if not o.endswith("_schema")], where)


def _unknown_option(group: str, given: str, allowed: Sequence[str], where: str = "") -> str:
    near = _nearest(given, allowed)
    hint = f"; did you mean {group}={near}?" if near else ""
    return f"unknown option {group}={given}{where}; {group} can be {_either(allowed)}{hint}"


def _key_problem(text: str, parsed: list[Override]) -> str | None:
    rope_scaling = any(override.key_or_group.startswith("model.rope_scaling") for override in parsed)
    if rope_scaling and "NoneType" in text:
        return (  # OmegaConf 2.3 cannot merge into an optional node that is null
            "model.rope_scaling is null in this model and cannot be set by a word; "
            "write it in the model's file, or choose a model that has it, such as model=llama3_1b"
        )
    if found := re.search(r"Multiple values for (\w+)\. To override a value use 'override \w+: (\w+)'", text):
        group, option = found.groups()
        return (
            f"the experiment's file chooses {group} without `override`; write `override /{group}: {option}`"
        )
    if found := re.search(r"Could not override '([^']+)'\. No match in the defaults list", text):
        return f"there is no group {found[1]} to override; the groups are {', '.join(SCHEMAS)}"
    if found := re.search(r"^Key '.+' not in '\w+'$.*?full_key: (\S+)", text, re.MULTILINE | re.DOTALL):
        return _unknown_key(found[1])
    if found := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(found[1])
    return None


def _unknown_key(key: str) -> str:
    head, _, leaf = key.rpartition(".")
    if key.startswith("hydra."):
        return f"unknown key {key}; Hydra has none of that name"
    if owners := _owners(key):
        group = key.partition(".")[0]
        words = [f"{group}={option}" for option in owners]
        return f"{key} belongs to {_either(words)}; add {words[0]}"
    if re.match(r"data\.mixture\.[^.]+\.", key):
        near = _nearest(leaf, ["path", "weight"])
        return f"unknown key {key}; " + (f"did you mean {head}.{near}?" if near else f"write {MIXTURE}")
    known = [name for name in _types() if not name.endswith(".name") or name == "model.name"]
    siblings = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == head]
    elsewhere = [name for name in known if name.rpartition(".")[2] == leaf]
    if elsewhere:
        return f"unknown key {key}; did you mean {_nearest(key, elsewhere, 0.0)}?"
    if near := _nearest(leaf, siblings):
        return f"unknown key {key}; did you mean {f'{head}.' if head else ''}{near}?"
    if near := _nearest(key, known, 0.8):
        return f"unknown key {key}; did you mean {near}?"
    if siblings and head:
        return f"unknown key {key}; {head} has {', '.join(siblings)}"
    return f"unknown key {key}; the keys are {', '.join(name for name in known if '.' not in name)}"


def _owners(key: str) -> list[str]:
    """Options whose class has a key that another option of the same group lacks."""
    group, _, name = key.partition(".")
    have = [option for option, schema in SCHEMAS.get(group, {}).items() if name in get_type_hints(schema)]
    return have if have and len(have) < len(SCHEMAS[group]) else []


def _reference_problem(text: str, parsed: list[Override]) -> str | None:
    found = re.search(r"full_key: (\S*)", text)
    key = found[1] if found else "a value"
    if found := re.search(r"Interpolation key '([^']+)' not found", text):
        return f"{key} refers to ${{{found[1]}}}, and there is no such key"
    if found := re.search(r"Environment variable '([^']+)' not found", text):
        return f"{key} refers to the environment variable {found[1]}, which is not set"
    if found := re.search(r"Unsupported interpolation type (\S+)", text):
        return f"{key} refers to ${{{found[1]}:...}}, and nothing is called {found[1]}; quote a literal $"
    return None


def _missing_value(text: str, parsed: list[Override]) -> str | None:
    if "issing mandatory value" not in text or not (found := re.search(r"full_key: (\S+)", text)):
        return None
    key = found[1]
    if key in SCHEMAS:
        return f"{key} is not chosen; {key} can be {_either(options(key))}"
    return f"{key} has no value; set {key} to {_allowed(_type_of(key))}"


def _value_problem(text: str, parsed: list[Override]) -> str | None:
    found = re.search(r"full_key: (\S+)", text)
    if not found:
        return None
    key = found[1]
    if key == "experiment" and "to string" in text:
        return "the file lacks its first line; begin it with `# @package _global_`"
    below = next((o for o in parsed if o.key_or_group.startswith("data.mixture.")), None)
    if (
        "is not a subclass of SourceConfig" in text or key == "data.mixture"
    ):  # OmegaConf names only the last part of the key
        name = below.key_or_group if below else key
        return f"{name} is no source of the mixture; write {MIXTURE}"
    if key not in _types() and not key.startswith("data.mixture."):
        return None
    if longer := next((o.key_or_group for o in parsed if o.key_or_group.startswith(f"{key}.")), None):
        return f"unknown key {longer}; {key} is {_allowed(_type_of(key))}"
    kind = _type_of(key)
    given = _given(key, parsed)
    if given is None:
        quoted = re.search(r"(?:Value|value) '([^']*)'", text)
        given = quoted[1] if quoted else "null" if "not Optional" in text else "what it was given"
    return f"{key} must be {_allowed(kind)}, not {given}{_hint(kind, given)}"


def _file_problem(text: str, parsed: list[Override]) -> str | None:
    found = re.search(r"Merge error: (\w+) is not a subclass of (\w+)", text)
    return f"the keys of {found[1]} and {found[2]} are mixed; choose one option" if found else None


def _hint(kind: Any, given: str) -> str:
    kind = _plain(kind)
    if isinstance(kind, type) and issubclass(kind, Enum):
        near = _nearest(given, [member.name for member in kind])
        return f"; did you mean {near}?" if near else ""
    if kind is int and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE]\+?\d{1,2}", given):
        number = float(given)
        return f"; write {int(number)}" if number.is_integer() else ""
    return ""


def _given(key: str, parsed: Iterable[Override]) -> str | None:
    """The value that the last word for a key gives it, as typed."""
    words = [override.input_line or "" for override in parsed if override.key_or_group == key]
    return words[-1].partition("=")[2] if words else None


def _nearest(name: str, names: Sequence[str], cutoff: float = 0.6) -> str | None:
    by_lower = {candidate.lower(): candidate for candidate in names}
    near = difflib.get_close_matches(name.lower(), list(by_lower), 1, cutoff)
    return by_lower[near[0]] if near else None


def _either(names: Sequence[str]) -> str:
    return " or ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


@cache
def _types() -> dict[str, Any]:
    """Every dotted key of every option, and the type it is annotated with."""
    types: dict[str, Any] = {}

    def walk(prefix: str, schema: type) -> None:
        for name, kind in get_type_hints(schema).items():
            key = prefix + name
            types.setdefault(key, kind)
            plain = _plain(kind)
            below = SCHEMAS[key].values() if key in SCHEMAS else [plain] if is_dataclass(plain) else []
            for child in below:
                assert isinstance(child, type)
                walk(f"{key}.", child)

    walk("", RunConfig)
    return types


def _type_of(key: str) -> Any:
    if key.startswith("data.mixture."):
        return float if key.endswith(".weight") else str
    return _types().get(key, Any)


def _plain(kind: Any) -> Any:
    """`X` out of `X | None`."""
    if isinstance(kind, UnionType):
        return next(part for part in get_args(kind) if part is not type(None))
    return kind


def _allowed(kind: Any) -> str:
    plain = _plain(kind)
    null = " or null" if plain is not kind else ""
    if isinstance(plain, type) and issubclass(plain, Enum):
        return _either([member.name for member in plain]) + null
    if get_origin(plain) is list:
        return "a list such as [a,b]"
    if get_origin(plain) is dict:
        return "{NAME: {path: DIR, weight: 1.0}}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(
        plain, "a value"
    ) + null
