"""Plays episodes: the model's turns from a sampler, the environment's answers, tokens kept as they were sampled."""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import xxhash

from drivetrain.conf.errors import ConfigError
from drivetrain.data.chat import Chat
from drivetrain.data.conversations import Message
from drivetrain.model.generate import Completion, Request, Sampling
from drivetrain.train.rl.calls import CallForm
from drivetrain.train.rl.episodes import (
    Environment,
    Episode,
    EpisodeError,
    Played,
    Problem,
    Step,
    Trajectory,
    Turn,
)
from drivetrain.train.rl.guard import GivenUp, together
from drivetrain.train.rl.rewards import Sample
from drivetrain.train.rl.turns import Turns

T = TypeVar("T")
# One list for each request, of as many as its `samples`; None: this one failed and is given up.
Generate = Callable[[Sequence[Request]], Sequence[Sequence[Completion | None]]]


@dataclass(frozen=True, slots=True)
class Task:
    """`samples` episodes about one problem. `sampling.max_tokens` are all that the model may write in an episode;
    `sampling.seed` is that of the first turn, and those of later turns follow from it."""

    problem: Problem
    sampling: Sampling
    samples: int


class Player:
    """Plays episodes of an environment with whatever samples.

    Args:
        eos_ids: tokens that end a turn.
        seq_len: tokens that a trajectory has at most, its prompt included.
        limit: seconds in which the environment answers a turn, of all episodes together; so for their ends.

    Raises:
        ConfigError: the chat template cannot show the environment's tools, or the model cannot call them.
    """

    def __init__(
        self,
        environment: Environment,
        chat: Chat,
        eos_ids: Sequence[int],
        seq_len: int,
        limit: float = math.inf,
    ) -> None:
        self.environment, self.chat, self.seq_len, self.limit = environment, chat, seq_len, limit
        self.eos_ids = frozenset(eos_ids)
        self.turns = Turns(chat, environment.tools)
        self.calls = CallForm(chat, environment.tools) if environment.tools else None
        self.seconds = 0.0  # that the environment has taken so far
        self._said: set[str] = set()

    def prompt(self, problem: Problem) -> list[int]:
        return self.chat.prompt(problem.messages, self.environment.tools)

    def play(
        self,
        tasks: Sequence[Task],
        generate: Generate,
        any_rank: Callable[[bool], bool] | None = None,
    ) -> list[list[Played]]:
        """All episodes of all tasks, [task][sample].

        All that are not over take their next turn in one call of `generate`; in the first one a task is one request
        for all its samples.

        Args:
            any_rank: where `generate` is collective: whether any rank says True. Both are then called as often on
                every rank, `generate` if need be with no request.

        Raises:
            ConfigError: a prompt leaves no room for what the model may write.
        """
        groups = [self._begin(task) for task in tasks]
        asked = [(replace(group[0].request(), samples=len(group)), group) for group in groups]
        while any_rank(bool(asked)) if any_rank else asked:
            given = generate([request for request, _ in asked])
            pairs = [
                (one, completion)
                for (_, members), completions in zip(asked, given, strict=True)
                for one, completion in zip(members, completions, strict=True)
            ]
            self._step(pairs)
            asked = [(one.request(), [one]) for one, _ in pairs if not one.over]
        self._end([one for group in groups for one in group])
        return [[self._played(one) for one in group] for group in groups]

    def _begin(self, task: Task) -> list["_Playing"]:
        prompt = self.prompt(task.problem)
        if len(prompt) > (room := self.seq_len - task.sampling.max_tokens):
            raise ConfigError(
                f"a prompt has {len(prompt)} tokens, and stage.seq_len={self.seq_len} with "
                f"stage.max_completion={task.sampling.max_tokens} leaves room for {room}; raise stage.seq_len"
            )
        stop = (*task.sampling.stop, *self.environment.stop)
        task = replace(task, sampling=replace(task.sampling, stop=stop))
        seed = task.sampling.seed
        return [
            _Playing(
                task,
                number,
                prompt,
                self.seq_len,
                self.environment.reset(task.problem, seed),
                rewards=dict.fromkeys(self.environment.parts, 0.0),
                transcript=list(task.problem.messages),
            )
            for number in range(task.samples)
        ]

    def _step(self, pairs: list[tuple["_Playing", Completion | None]]) -> None:
        """Take in what the model wrote, and let the environment answer."""
        began = time.perf_counter()
        for one, completion in pairs:
            if completion is None:
                one.fail()
            else:
                self._write(one, completion)
        alive = [one for one, _ in pairs if not one.over]
        steps = self._answers("step", [partial(one.episode.step, one.said) for one in alive])
        for one, step in zip(alive, steps, strict=True):
            if step is None:
                one.fail()
            else:
                self._observe(one, step)
        self.seconds += time.perf_counter() - began

    def _answers(self, what: str, asked: list[Callable[[], T]]) -> list[T | None]:
        """What the environment answers within `limit`, all together; None: that episode cannot go on."""
        found: list[T | None] = []
        for answer in together(asked, self.environment.workers, self.limit):
            if isinstance(answer, EpisodeError | GivenUp):
                self._warn(f"its {what}: {answer}" if isinstance(answer, GivenUp) else str(answer))
                found.append(None)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                found.append(answer)
        return found

    def _write(self, one: "_Playing", completion: Completion) -> None:
        one.trajectory.write(completion)
        one.last = completion.tokens
        ended = one.last[-1] in self.eos_ids
        tokens = one.last[:-1] if ended else one.last
        text = self.chat.tokenizer.decode(tokens, skip_special_tokens=False)
        calls = self.calls.read(text) if self.calls else ()
        beside = self.calls.beside(text) if self.calls else text
        one.said = Turn(text, completion.finish_reason == "length", calls, beside)

    def _observe(self, one: "_Playing", step: Step) -> None:
        self._add(one, step.rewards)
        if step.done or one.said.cut:
            one.over = True
            return
        if isinstance(step.observation, str):
            tokens = self.turns.continued(step.observation)
            shown: list[Message] = [{"role": "tool", "content": step.observation}]
        else:
            one.rounds.append(step.observation)
            tokens = self.turns.after(one.rounds, one.task.problem.messages, one.last[-1])
            shown = step.observation
        if one.room() <= len(tokens) or one.left() < 1:
            one.over, one.trajectory.finish_reason = True, "length"
            return
        one.trajectory.observe(tokens)
        one.transcript += [{"role": "assistant", "content": one.said.text}, *shown]

    def _add(self, one: "_Playing", rewards: Mapping[str, float]) -> None:
        for name, value in rewards.items():
            if name not in one.rewards:
                raise ConfigError(
                    f"the environment rewards {name!r}, which is not in its `parts`; add it to them"
                )
            one.rewards[name] += float(value)

    def _end(self, playing: list["_Playing"]) -> None:
        began = time.perf_counter()
        for one, last in zip(
            playing, self._answers("end", [one.episode.end for one in playing]), strict=True
        ):
            if last is None:
                one.fail()
            else:
                self._add(one, last)
        self.seconds += time.perf_counter() - began

    def _played(self, one: "_Playing") -> Played:
        sample = Sample(
            messages=one.transcript,
            completion=self.chat.tokenizer.decode(one.last),
            tokens=one.trajectory.length,
            finish_reason=one.trajectory.finish_reason,
            reference=one.task.problem.reference,
            turns=one.trajectory.turns,
        )
        return Played(one.trajectory, sample, one.rewards)

    def _warn(self, why: str) -> None:
        if why not in self._said:
            self._said.add(why)
            print(f"warning: an episode is left out: {why}", file=sys.stderr)


@dataclass(slots=True, eq=False)
class _Playing:
    """An episode on its way. `rounds`: its observations. `transcript`: what was said before the last turn, `said`,
    whose tokens are `last`."""

    task: Task
    sample: int
    prompt: list[int]
    seq_len: int
    episode: Episode
    rewards: dict[str, float]
    transcript: list[Message]
    rounds: list[list[Message]] = field(default_factory=list)
    trajectory: Trajectory = field(default_factory=Trajectory)
    last: list[int] = field(default_factory=list)
    said: Turn = field(default_factory=lambda: Turn("", False))
    over: bool = False

    def left(self) -> int:
        """Tokens that the model may still write."""
        return self.task.sampling.max_tokens - self.trajectory.length

    def room(self) -> int:
        """Tokens that the whole may still get."""
        return self.seq_len - len(self.prompt) - len(self.trajectory.tokens)

    def request(self) -> Request:
        """The next turn of this episode alone."""
        sampling, turn = self.task.sampling, self.trajectory.turns
        seed = sampling.seed
        if turn:
            seed = xxhash.xxh3_64_intdigest(f"{seed}/{self.sample}/{turn}".encode()) >> 1
        limit = min(self.left(), self.room())
        return Request(
            [*self.prompt, *self.trajectory.tokens], replace(sampling, seed=seed, max_tokens=limit)
        )

    def fail(self) -> None:
        """Drop it."""
        self.over, self.trajectory = True, Trajectory(finish_reason="failed")
