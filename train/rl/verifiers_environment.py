"""Environments of the library `verifiers` (0.4), as `verifiers:NAME?SETTING=VALUE`.

There an episode drives a model, here a model's turns drive an episode. So the episode runs in a thread of its own,
and whatever it sends to its model is held until the model has taken its turn:

    Player -> step(turn) -> answer to the request that waits -> verifiers: tools, checks -> its next request -> Step

The model's side is a chat with the tools of the task (`verifiers_chat.py`, as the library's harness "null", but in
this process: no program has to be installed and started for each episode). Traces, rewards and limits are the
library's own.
"""

import asyncio
import itertools
import json
import queue
import sys
import threading
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import AsyncExitStack, suppress
from typing import Any

import numpy as np

from drivetrain.conf.errors import ConfigError
from drivetrain.data.conversations import Message
from drivetrain.data.permutation import Permutation
from drivetrain.train.rl.episodes import EpisodeError, Problem, Step, Turn
from drivetrain.train.rl.rewards import Sample

_HARNESS = "drivetrain_chat"  # the library finds harnesses as modules of a top-level name
_SESSION = "X-Session-ID"  # the header in which it says which episode a request is of
_REST = "reward"  # rewards whose names a task gives only as it scores
_END_SECONDS = 20.0  # that episodes which nobody has ended may take to end
_START_SECONDS = 300.0  # of servers, and of the first episode
_OWN = {"max_turns": None, "solved": 1.0}
_NO_ROOM = {"error": {"message": "no room is left", "code": "context_length_exceeded"}}


class VerifiersEnvironment:
    """A taskset of `verifiers` with one agent.

    Args:
        name: an installed taskset's. settings: of its configuration, `task.NAME` for its tasks'; or `max_turns` of
            the model, and `solved`, the least total reward of an episode that counts as solved.
        held_out: how many tasks are held out.

    Raises:
        ConfigError: verifiers or the taskset is not installed, a setting is wrong, it has several agents, it cannot
            be played, or nothing is left to train on.
    """

    stop: tuple[str, ...] = ()
    workers = 64

    def __init__(self, name: str, settings: Mapping[str, Any], seed: int, held_out: int) -> None:
        own = {key: settings.get(key, value) for key, value in _OWN.items()}
        self.solved = float(own["solved"])
        self._loop = _Loop()
        try:
            self._env = _load(name, {k: v for k, v in settings.items() if k not in _OWN}, own["max_turns"])
            self._service = _Service(self._env, self._loop)
            self._tasks = _Tasks(self._env.taskset, name, seed, held_out)
            task = self._tasks[0]
            self.parts = (*_reward_names(task), _REST)
            self.tools = _first_request(self._service, task).get("tools") or None
        except ConfigError:
            self.close()
            raise
        except Exception as error:  # a taskset's own code
            self.close()
            raise ConfigError(
                f"verifiers:{name} cannot be played: {type(error).__name__}: {error}"
            ) from error
        self.reward = _Nothing()

    def problem(self, number: int) -> Problem:
        return self._problem(self._tasks.place(number))

    def held_out(self, count: int) -> list[Problem]:
        return [self._problem(place) for place in self._tasks.held_out[:count]]

    def _problem(self, place: int) -> Problem:
        from drivetrain.train.rl.verifiers_chat import first_messages

        try:
            return Problem(first_messages(self._tasks[place].data), {"task": place})
        except EpisodeError as error:
            raise ConfigError(f"task {place} of stage.environment cannot be shown: {error}") from error

    def reset(self, problem: Problem, seed: int) -> "_Episode":
        return _Episode(self._service, self._tasks[problem.reference["task"]], self.parts, problem.messages)

    def correct(self, parts: Mapping[str, Sequence[float]]) -> list[bool]:
        return [
            sum(values) >= self.solved for values in zip(*(parts[name] for name in self.parts), strict=True)
        ]

    def close(self) -> None:
        if hasattr(self, "_service"):
            self._service.close()
        self._loop.close()


class _Nothing:
    """All rewards come from the episodes."""

    def score(self, samples: Sequence[Sample]) -> Mapping[str, list[float]]:
        return {}


def _load(name: str, settings: Mapping[str, Any], max_turns: int | None) -> Any:
    """The library's environment."""
    try:
        import verifiers.v1 as vf
        from verifiers.v1.utils.loaders import load_environment, resolve_env_config

        from drivetrain.train.rl import verifiers_chat
    except ImportError as error:
        raise ConfigError(
            f"verifiers:{name} needs verifiers 0.4 ({error}); run `pip install 'drivetrain[verifiers]'`"
        ) from error
    sys.modules[_HARNESS] = verifiers_chat
    taskset: dict[str, Any] = {"id": name}
    for key, value in settings.items():
        *path, last = key.split(".")
        inner = taskset
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    agent = {"harness": {"id": _HARNESS}, "runtime": {"type": "subprocess"}, "max_turns": max_turns}
    try:
        config = resolve_env_config({"taskset": taskset, "agent": agent})
        made = load_environment(config)
    except Exception as error:  # plugins raise what they like
        raise ConfigError(f"verifiers:{name} cannot be made: {type(error).__name__}: {error}") from error
    if not isinstance(made, vf.SingleAgentEnv):
        raise ConfigError(f"verifiers:{name} has several agents, and one is trained; use a plain taskset")
    return made


def plain(message: Mapping[str, Any]) -> Message:
    """A message of text, in the form of `Problem.messages`.

    Raises:
        EpisodeError: it is of something else.
    """
    content = message.get("content")
    if isinstance(content, list) and all(part.get("type") == "text" for part in content):
        content = "\n".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise EpisodeError(
            f"a message of the role {message.get('role')} is no text, and the model sees no other"
        )
    return {"role": message["role"], "content": content}


def _reward_names(task: Any) -> list[str]:
    names = [function.__name__ for function in task.hooks("reward")]
    return [*names, *(judge.reward_name for judge in task.plugged_judges())]


class _Tasks:
    """A taskset's tasks by number; the places of the held-out ones; the others in an order for each epoch."""

    def __init__(self, taskset: Any, name: str, seed: int, held_out: int) -> None:
        self.seed = seed
        self._more: Iterator[Any] = iter(taskset)
        self._known: list[Any] = []
        self._lock = threading.Lock()
        self.bounded = bool(taskset.bounded)
        if not self.bounded:
            self.held_out, self._trained = list(range(held_out)), np.empty(0, dtype=np.int64)
            return
        self._known = list(self._more)
        size = len(self._known)
        if size <= held_out:
            raise ConfigError(
                f"verifiers:{name} has {size} tasks, and stage.eval_problems={held_out} are held out; use fewer"
            )
        order = Permutation(size, "held_out")(np.arange(size))
        self.held_out, self._trained = order[:held_out].tolist(), np.sort(order[held_out:])

    def place(self, number: int) -> int:
        if not self.bounded:
            return len(self.held_out) + number
        epoch, at = divmod(number, len(self._trained))
        order = Permutation(len(self._trained), f"{self.seed}/{epoch}")
        return int(self._trained[order(np.array([at]))[0]])

    def __getitem__(self, place: int) -> Any:
        with self._lock:
            self._known += itertools.islice(self._more, max(0, place + 1 - len(self._known)))
        return self._known[place]


class _Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="verifiers", daemon=True)
        self._thread.start()

    def run(self, what: Coroutine[Any, Any, Any], seconds: float) -> Any:
        return asyncio.run_coroutine_threadsafe(what, self.loop).result(seconds)

    def close(self) -> None:
        if self._thread.is_alive():
            with suppress(TimeoutError):  # the thread ends with the process
                self.run(_cancel_others(), _END_SECONDS)
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()
            self.loop.close()


async def _cancel_others() -> None:
    """End what else is under way in this loop."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


class _Service:
    """What episodes share: the library's servers, and the address at which they find the model."""

    def __init__(self, env: Any, loop: _Loop) -> None:
        self.env, self.loop = env, loop
        self.episodes: dict[str, _Episode] = {}  # by the library's number of a session
        self.running: set[Future[None]] = set()
        self._stack = AsyncExitStack()
        self.context = loop.run(self._start(), _START_SECONDS)

    async def _start(self) -> Any:
        import verifiers.v1 as vf
        from aiohttp import web

        app = web.Application(client_max_size=1 << 30)
        app.router.add_post("/v1/chat/completions", self._answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=5.0)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        await self._stack.enter_async_context(self.env.serving())
        client = vf.EvalClientConfig(base_url=f"http://127.0.0.1:{port}/v1", api_key_var="DRIVETRAIN_NO_KEY")
        return vf.ModelContext(model="policy", client=client)

    async def _answer(self, request: Any) -> Any:
        """Hold a request of the library's until the model has taken its turn."""
        from aiohttp import web

        episode = self.episodes[request.headers[_SESSION]]
        episode.waiting = asyncio.get_running_loop().create_future()
        episode.heard.put(await request.json())
        answer = await episode.waiting
        return web.json_response(answer, status=400 if "error" in answer else 200)

    def close(self) -> None:
        for episode in list(self.episodes.values()):  # those that nobody has ended
            if episode.waiting is not None:
                episode._reply(_NO_ROOM)
        wait(list(self.running), timeout=_END_SECONDS)
        self.loop.run(self._stack.aclose(), _START_SECONDS)


class _Episode:
    """One episode of the library's. `heard` has its requests, and at last the finished episode."""

    def __init__(self, service: _Service, task: Any, parts: Sequence[str], first: list[Message]) -> None:
        self.service, self.parts = service, parts
        self.known = list(first)
        self.heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.waiting: asyncio.Future[dict[str, Any]] | None = None
        self.finished: Any = None
        self.turns = self.calls = 0
        self._sessions: list[str] = []
        run = asyncio.run_coroutine_threadsafe(self._run(task), service.loop.loop)
        service.running.add(run)
        run.add_done_callback(service.running.discard)

    async def _run(self, task: Any) -> None:
        try:
            done = await self.service.env.run_episode(task, self.service.context, on_trace=self._minted)
        except Exception as error:
            done = error
        for session in self._sessions:
            self.service.episodes.pop(session, None)
        self.heard.put(_Finished(done))

    def _minted(self, trace: Any) -> None:
        self._sessions.append(trace.id)
        self.service.episodes[trace.id] = self

    def step(self, turn: Turn) -> Step:
        if not self.turns and self._listen() is None:
            raise EpisodeError(f"it ended before the model's first turn: {self._why()}")
        self.turns += 1
        self._reply(self._completion(turn))
        messages = self._listen()
        return Step(done=True) if messages is None or turn.cut else Step(messages)

    def _listen(self) -> list[Message] | None:
        """What is new in the next request; None: the episode is over."""
        request = self.heard.get()
        if isinstance(request, _Finished):
            self.finished = request
            return None
        messages = request["messages"]
        if len(messages) < len(self.known):
            raise EpisodeError(
                "the environment leaves out what was said before, so its tokens cannot be kept"
            )
        for said, known in zip(messages, self.known, strict=False):
            kept = said["role"] == known["role"]
            if not kept or (known["role"] != "assistant" and plain(said)["content"] != known["content"]):
                raise EpisodeError(
                    "the environment changes what was said before, so its tokens cannot be kept"
                )
        new = [plain(message) for message in messages[len(self.known) :]]
        self.known += new
        return new

    def _completion(self, turn: Turn) -> dict[str, Any]:
        """The model's turn in OpenAI's form."""
        calls = []
        for call in turn.calls:
            self.calls += 1
            arguments = json.dumps(call.arguments) if not call.error else call.error
            function = {"name": call.name or "unknown", "arguments": arguments}
            calls.append({"id": f"call{self.calls:05d}", "type": "function", "function": function})
        message = {"role": "assistant", "content": turn.beside, **({"tool_calls": calls} if calls else {})}
        self.known.append({"role": "assistant", "content": turn.beside})
        reason = "length" if turn.cut else "tool_calls" if calls else "stop"
        choice = {"index": 0, "message": message, "finish_reason": reason}
        usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        kind = {"id": f"turn{self.turns}", "object": "chat.completion", "created": 0, "model": "policy"}
        return {**kind, "choices": [choice], "usage": usage}

    def _reply(self, answer: dict[str, Any]) -> None:
        waiting = self.waiting
        assert waiting is not None
        self.service.loop.loop.call_soon_threadsafe(_answered, waiting, answer)

    def end(self) -> Mapping[str, float]:
        """The library's rewards, of what there was of the episode."""
        while self.finished is None:
            if self.waiting is not None:
                self._reply(_NO_ROOM)
            request = self.heard.get()
            if isinstance(request, _Finished):
                self.finished = request
        found = self.finished.episode
        if isinstance(found, Exception) or not found.ok:
            raise EpisodeError(f"verifiers could not play it: {self._why()}")
        rewards = dict.fromkeys(self.parts, 0.0)
        for name, reward in found.traces[0].rewards.items():
            rewards[name if name in rewards else _REST] += 0.0 if reward is None else reward.value
        return rewards

    def _why(self) -> str:
        found = self.finished.episode
        if isinstance(found, Exception):
            return f"{type(found).__name__}: {found}"
        errors = [error for trace in found.traces for error in trace.errors] + list(found.errors)
        return f"{errors[0].type}: {errors[0].message}" if errors else "it says no reason"


def _answered(waiting: "asyncio.Future[dict[str, Any]]", answer: dict[str, Any]) -> None:
    if not waiting.done():
        waiting.set_result(answer)


class _Finished:
    """What `run_episode` gave or raised."""

    def __init__(self, episode: Any) -> None:
        self.episode = episode


def _first_request(service: _Service, task: Any) -> dict[str, Any]:
    """What the first task sends to its model, which says what tools there are."""
    probe = _Episode(service, task, (_REST,), [])
    try:
        request = probe.heard.get(timeout=_START_SECONDS)
    except queue.Empty:
        raise ConfigError(
            f"its first task did not ask its model anything within {_START_SECONDS:g} s"
        ) from None
    if isinstance(request, _Finished):
        probe.finished = request
        raise ConfigError(f"its first task cannot be played: {probe._why()}")
    probe._reply(_NO_ROOM)
    while not isinstance(probe.heard.get(), _Finished):
        probe._reply(_NO_ROOM)
    found: dict[str, Any] = request
    return found
