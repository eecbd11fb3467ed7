"""Tools that a model may call while it works on a problem, and the episodes in which it does.

    stage.environment='reasoning_gym:chain_sum?max_terms=6&tools=calculator,python&max_turns=4'

A turn without a call is the answer. Calls have the form that the chat template writes (`calls.py`), and results
come back as its tool turns. With `calls=tags` they are written as `<search>words</search>`, for one argument, and
the result follows at once in the same turn, as `<information>...</information>`: Search-R1 (arXiv 2503.09516).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from drivetrain.conf.errors import ConfigError
from drivetrain.conf.rewards import Walls
from drivetrain.data.conversations import Message
from drivetrain.train.rl.calculator import CalculatorError, calculate
from drivetrain.train.rl.calls import Call
from drivetrain.train.rl.episodes import Environment, Episode, Problem, Step, Turn
from drivetrain.train.rl.rewards import Reward
from drivetrain.train.rl.sandbox import Limits, Status, describe, run

ERRORS = "tool_errors"  # the part of the reward that calls without a result cost
_MIB = 1 << 20


class ToolError(Exception):
    """A call has no result; the text tells the model why."""


class Tool(Protocol):
    """Something to call with one text. Many episodes may do so at the same time.

    Attributes:
        name: of its function, and of its tags. about: what it does, for the model. argument: the text's name.
    """

    name: str
    about: str
    argument: str

    def __call__(self, text: str) -> str:
        """The result.

        Raises:
            ToolError: there is none.
        """


class CalculatorTool:
    name, argument = "calculator", "expression"
    about = "Computes an arithmetic expression, such as (3 + 4) * 12 / 7 or sqrt(2) ** 3."

    def __call__(self, text: str) -> str:
        try:
            return calculate(text)
        except CalculatorError as error:
            raise ToolError(str(error)) from error


class PythonTool:
    """Each call is a program of its own, in the sandbox.

    Raises:
        ConfigError: code cannot be shut in on this machine.
    """

    name, argument = "python", "code"
    about = "Runs a Python program and returns what it prints. Nothing is kept from one program to the next."

    def __init__(self, seconds: float, memory: int, walls: Walls) -> None:
        self.limits = Limits(seconds=seconds, cpu_seconds=int(seconds) + 1, memory=memory * _MIB)
        self.walls = walls
        describe(walls)

    def __call__(self, text: str) -> str:
        found = run(text, limits=self.limits, walls=self.walls)
        said = found.stdout + found.stderr
        if found.status is Status.ok:
            return said
        reasons = {
            Status.timeout: f"took longer than {self.limits.seconds:g} s",
            Status.memory: "wanted too much memory",
            Status.output: "printed or stored too much",
        }
        raise ToolError(f"{said.rstrip()}\nthe program {reasons.get(found.status, 'failed')}".lstrip())


@dataclass(frozen=True, slots=True)
class ToolSettings:
    """What is common to all tools.

    Attributes:
        max_turns: of the model; the last one can only be an answer.
        tags: calls are tags, in place of those of the chat template.
        penalty: taken off the reward for each call that is malformed or has no result.
        characters: of a result that the model gets to see; what is longer loses its middle.
        workers: calls at the same time.
    """

    max_turns: int = 4
    tags: bool = False
    penalty: float = 0.0
    characters: int = 2000
    workers: int = 8

    def __post_init__(self) -> None:
        for name, least in (("max_turns", 2), ("penalty", 0), ("characters", 10), ("workers", 1)):
            if not getattr(self, name) >= least:
                raise ConfigError(
                    f"{name}={getattr(self, name)} of an environment with tools; use {least} or more"
                )


class ToolEnvironment:
    """The problems and the reward of an environment that asks and is answered, with tools."""

    def __init__(self, problems: Environment, tools: Sequence[Tool], settings: ToolSettings) -> None:
        self.problems, self.settings = problems, settings
        self.by_name = {tool.name: tool for tool in tools}
        self.reward: Reward = problems.reward
        self.tools = None if settings.tags else [schema(tool) for tool in tools]
        self.stop: tuple[str, ...] = tuple(f"</{name}>" for name in self.by_name) if settings.tags else ()
        self.parts: tuple[str, ...] = (ERRORS,) if settings.penalty else ()
        self.workers = settings.workers

    def problem(self, number: int) -> Problem:
        return self._told(self.problems.problem(number))

    def held_out(self, count: int) -> list[Problem]:
        return [self._told(problem) for problem in self.problems.held_out(count)]

    def _told(self, problem: Problem) -> Problem:
        """A chat template says itself which tools there are."""
        if not self.settings.tags:
            return problem
        first, *rest = problem.messages
        told = " ".join(
            f"{tool.about} To use it, write <{name}>{tool.argument}</{name}>."
            for name, tool in self.by_name.items()
        )
        note = f"{told} The result follows between <information> and </information>.\n\n"
        return Problem([{**first, "content": note + first["content"]}, *rest], problem.reference)

    def correct(self, parts: Mapping[str, Sequence[float]]) -> list[bool]:
        return self.problems.correct(parts)

    def reset(self, problem: Problem, seed: int) -> Episode:
        return (TagEpisode if self.settings.tags else CallEpisode)(self)

    def result(self, call: Call) -> tuple[str, bool]:
        """What the model gets to see, and whether it is a result."""
        try:
            if call.error:
                raise ToolError(call.error)
            tool = self.by_name.get(call.name)
            if tool is None:
                raise ToolError(f"there is no tool {call.name[:50]!r}; there is {', '.join(self.by_name)}")
            text = call.arguments.get(tool.argument)
            if not isinstance(text, str) or len(call.arguments) != 1:
                raise ToolError(f"{tool.name} takes one argument, {tool.argument!r}, which is a text")
            return self._cut(tool(text)), True
        except ToolError as error:
            return self._cut(f"error: {error}"), False

    def _cut(self, text: str) -> str:
        most = self.settings.characters
        text = text.strip()
        if len(text) <= most:
            return text
        return f"{text[: most - most // 3]} [...] {text[-(most // 3) :]}"

    def close(self) -> None:
        self.problems.close()


class CallEpisode:
    """Calls as the chat template has them."""

    def __init__(self, environment: ToolEnvironment) -> None:
        self.environment, self.turns = environment, 0

    def step(self, turn: Turn) -> Step:
        self.turns += 1
        if turn.cut or not turn.calls or self.turns == self.environment.settings.max_turns:
            return Step(done=True)
        messages: list[Message] = []
        wrong = 0
        for call in turn.calls:
            content, good = self.environment.result(call)
            messages.append({"role": "tool", "name": call.name or "unknown", "content": content})
            wrong += not good
        return Step(messages, _cost(self.environment.settings, wrong))

    def end(self) -> Mapping[str, float]:
        return {}


class TagEpisode:
    """Calls as tags, within one turn of the chat template."""

    def __init__(self, environment: ToolEnvironment) -> None:
        self.environment, self.turns = environment, 0
        names = "|".join(map(re.escape, environment.by_name))
        self.ended = re.compile(rf"</({names})>\s*\Z")

    def step(self, turn: Turn) -> Step:
        self.turns += 1
        ended = self.ended.search(turn.text)
        if turn.cut or ended is None or self.turns == self.environment.settings.max_turns:
            return Step(done=True)
        name = ended[1]
        opened = turn.text.rfind(f"<{name}>")
        if opened < 0:
            call = Call(name, error=f"a call has the form <{name}>...</{name}>")
        else:
            text = turn.text[opened + len(name) + 2 : ended.start()]
            call = Call(name, {self.environment.by_name[name].argument: text.strip()})
        content, good = self.environment.result(call)
        return Step(
            f"\n<information>\n{content}\n</information>\n", _cost(self.environment.settings, not good)
        )

    def end(self) -> Mapping[str, float]:
        return {}


def _cost(settings: ToolSettings, wrong: int) -> dict[str, float]:
    return {ERRORS: -settings.penalty * wrong} if settings.penalty else {}


def schema(tool: Tool) -> dict[str, Any]:
    """What a chat template shows of it, in OpenAI's form."""
    parameters = {
        "type": "object",
        "properties": {tool.argument: {"type": "string"}},
        "required": [tool.argument],
    }
    function = {"name": tool.name, "description": tool.about, "parameters": parameters}
    return {"type": "function", "function": function}
