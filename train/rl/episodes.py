"""What environments are made of: problems, episodes in which a model takes turns, and what comes of them.

A single-turn environment is a question and a reward:

    class Capitals(SingleTurn):
        reward = MyReward()                                  # scores answers, `rewards.Reward`
        def problem(self, number): ...                       # -> Problem(messages, reference)
        def held_out(self, count): ...
        def correct(self, parts): ...

One of several turns is a subclass of `Defaults` with a `reset` that begins an `Episode`, whose `step` reads what
the model wrote and answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import add
from typing import Any, Literal, Protocol

from drivetrain.data.conversations import Message
from drivetrain.model.generate import Completion
from drivetrain.train.rl.calls import Call
from drivetrain.train.rl.rewards import Reward, Sample

End = Literal["stop", "length", "failed"]


class EpisodeError(Exception):
    """An episode cannot go on, through no fault of the model's: it is dropped and counted, the step goes on."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What is asked, and what the reward needs to know to judge an answer."""

    messages: list[Message]
    reference: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Turn:
    """What the model wrote.

    Attributes:
        text: control tokens that a template gives a meaning included, without the token that ended it.
        cut: it did not come to an end: no room was left. Nothing can follow.
        calls: of the environment's `tools`, as the chat template writes them; none: it is an answer.
        beside: the text without its calls.
    """

    text: str
    cut: bool
    calls: tuple[Call, ...] = ()
    beside: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """What the environment says to it.

    Attributes:
        observation: messages, which the chat template renders as turns of their own; or a text, put as it is behind
            what the model wrote, whose turn goes on.
        rewards: parts of the reward by the names in the environment's `parts`, added up over an episode.
        done: the episode is over, and the observation is not used.
    """

    observation: list[Message] | str = ""
    rewards: Mapping[str, float] = field(default_factory=dict)
    done: bool = False


class Episode(Protocol):
    """One attempt at one problem. Episodes of an environment may step at the same time, in threads of their own."""

    def step(self, turn: Turn) -> Step:
        """Answer what the model wrote.

        Raises:
            EpisodeError: it cannot.
        """

    def end(self) -> Mapping[str, float]:
        """The last rewards, as in `Step`. Called once, however the episode ends; lets go of what it holds."""


class Environment(Protocol):
    """Problems, episodes about them, and a reward.

    Attributes:
        reward: scores finished episodes, many at once: `Sample.completion` is the last turn, `Sample.messages` all
            that came before it.
        tools: function schemas that the chat template shows the model; None: there are none.
        stop: texts that end a turn, besides the tokens that always do.
        parts: names of the rewards that steps may give; those of `reward` are added to them.
        workers: episodes that step at the same time.
    """

    tools: list[dict[str, Any]] | None
    stop: tuple[str, ...]
    parts: tuple[str, ...]
    workers: int

    @property
    def reward(self) -> Reward:
        """See above."""

    def problem(self, number: int) -> Problem:
        """A problem to train on, from 0; the same at every call."""

    def held_out(self, count: int) -> list[Problem]:
        """The first held-out problems, the same for every run."""

    def reset(self, problem: Problem, seed: int) -> Episode:
        """A new episode; `seed`, in [0, 2^63), is all that chance may follow from, and is one for a whole group."""

    def correct(self, parts: Mapping[str, Sequence[float]]) -> list[bool]:
        """Which episodes solve their problem, from all parts of the environment's reward."""

    def close(self) -> None:
        """End what it has started."""


class Defaults:
    """What an `Environment` need not say."""

    tools: list[dict[str, Any]] | None = None
    stop: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    workers = 8

    def close(self) -> None:
        """Nothing was started."""


class SingleTurn(Defaults):
    """The rest of an `Environment` that asks and is answered."""

    workers = 1

    def reset(self, problem: Problem, seed: int) -> Episode:
        return _Asked()


class _Asked:
    def step(self, turn: Turn) -> Step:
        return Step(done=True)

    def end(self) -> Mapping[str, float]:
        return {}


@dataclass(slots=True)
class Trajectory:
    """What followed a prompt, token by token as it was sampled; what a rank sends to the others.

    Attributes:
        tokens: the model's and the environment's, in order; the last one is the model's.
        written: which of them the model wrote, the tokens that end its turns included.
        logprobs: of those that it wrote, in order; see `model.generate.Event`.
        behaviour_logprobs: theirs at the sampler's temperature, before its filters: what was drawn from is that
            over the probability which the filters kept, and so is what it is compared with (rl/policy.py).
        finish_reason: "stop"; "length" where it was cut, by the limit of what a model may write or of the whole;
            "failed" where it was dropped, and then there are no tokens.
        turns: of the model.
        versions: of the weights that drew each token that the model wrote, as in `Completion`.
    """

    tokens: list[int] = field(default_factory=list)
    written: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    behaviour_logprobs: list[float] = field(default_factory=list)
    finish_reason: End = "length"
    turns: int = 0
    versions: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, completion: Completion) -> "Trajectory":
        """One of a single turn."""
        made = cls()
        made.write(completion)
        return made

    @property
    def length(self) -> int:
        """Tokens that the model wrote."""
        return len(self.behaviour_logprobs)

    def write(self, completion: Completion) -> None:
        """Add a turn of the model's."""
        self.tokens += completion.tokens
        self.written += [True] * len(completion.tokens)
        self.logprobs += completion.logprobs
        drawn, kept = completion.behaviour_logprobs, completion.log_kept
        self.behaviour_logprobs += list(map(add, drawn, kept)) if kept else drawn
        self.versions += completion.versions
        self.finish_reason = completion.finish_reason
        self.turns += 1

    def observe(self, tokens: Sequence[int]) -> None:
        """Add what the environment wrote."""
        self.tokens += tokens
        self.written += [False] * len(tokens)


@dataclass(slots=True)
class Played:
    """A finished episode: its tokens, what rewards judge, and the rewards that its steps gave."""

    trajectory: Trajectory
    sample: Sample
    rewards: dict[str, float]
