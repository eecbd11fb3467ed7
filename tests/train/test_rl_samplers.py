"""Samplers that other threads call, and work that fails or never ends."""

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from drivetrain.conf.errors import ConfigError, DataError, DrivetrainError
from drivetrain.conf.schema import ModelConfig
from drivetrain.model.generate import Generator, Request, Sampling
from drivetrain.model.initialize import initialize
from drivetrain.model.transformer import Transformer, build_model, unique_parameters
from drivetrain.train.rl.background import Background
from drivetrain.train.rl.episodes import Defaults, EpisodeError, Problem, Step, Turn
from drivetrain.train.rl.guard import (
    GivenUp,
    GuardedEnvironment,
    GuardedEpisode,
    Warnings,
    bounded,
    each_or_none,
    together,
)
from drivetrain.train.rl.samplers.local import Local
from drivetrain.train.rl.samplers.shared import Shared

CPU = torch.device("cpu")
CFG = ModelConfig(
    name="small",
    vocab_size=40,
    dim=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    ffn_dim=48,
    max_seq_len=64,
    init_std=0.5,
)
REQUESTS = [Request([5, 6, place], Sampling(max_tokens=6 + place, seed=place), 2) for place in range(3)]


def built(seed: int) -> Transformer:
    model = build_model(CFG, "sdpa")
    model.materialize(CPU)
    initialize(model, CFG, seed)
    return model


class Weights:
    """As much of an engine as gives its weights."""

    def __init__(self, seed: int) -> None:
        self.model = built(seed)

    def full_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from ((name, each.detach()) for name, each in unique_parameters(self.model))


@pytest.fixture
def local() -> Iterator[Local]:
    model = built(1)
    sampler = Local(model, Generator(model, CFG, CPU), seconds=20)
    sampler.start()
    yield sampler
    sampler.close()


def tokens(found: Sequence[Sequence[Any]]) -> list[list[list[int]]]:
    return [[one.tokens for one in group] for group in found]


def test_calls_from_many_threads_get_what_they_would_get_alone(local: Local) -> None:
    expected = tokens(Generator(built(1), CFG, CPU).generate(REQUESTS))
    found: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: local.generate([REQUESTS[i]])}))
        for i in range(len(REQUESTS))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [tokens(found[i])[0] for i in range(len(REQUESTS))] == expected
    assert local.generate([]) == []


def test_new_weights_are_taken_between_two_tokens(local: Local) -> None:
    """A completion that is under way goes on, and tells which weights drew each of its tokens."""
    steps, go_on = threading.Semaphore(0), threading.Semaphore(0)
    plain = local.generator.step

    def step() -> list[Any]:
        go_on.acquire()
        steps.release()
        return plain()

    local.generator.step = step  # type: ignore[method-assign]
    found: list[Any] = []
    request = Request([5, 6], Sampling(max_tokens=8, temperature=0.0))
    thread = threading.Thread(target=lambda: found.extend(local.generate([request])))
    thread.start()
    for _ in range(3):
        go_on.release()
        steps.acquire()
    other = Weights(2)
    sync = threading.Thread(target=local.sync, args=(other, 7))
    sync.start()
    time.sleep(0.2)
    for _ in range(8):
        go_on.release()
    thread.join()
    sync.join()
    (one,) = found[0]
    old = one.versions.count(0)
    assert 3 <= old <= 4 and one.versions == [0] * old + [7] * (8 - old)
    before = Generator(built(1), CFG, CPU).generate([request])[0][0]
    assert one.tokens[:old] == before.tokens[:old] and one.logprobs[old:] != before.logprobs[old:]
    go_on.release(20)
    assert tokens(local.generate([request])) == tokens(Generator(other.model, CFG, CPU).generate([request]))


def test_what_takes_too_long_is_given_up_and_makes_room(local: Local) -> None:
    local.seconds = 0.3
    plain, go_on = local.generator.step, threading.Event()

    def step() -> list[Any]:
        go_on.wait()
        return plain()

    local.generator.step = step  # type: ignore[method-assign]
    with pytest.raises(GivenUp, match=r"the sampler stands still since 0\.3 s"):
        local.generate([Request([5], Sampling(max_tokens=40))])
    go_on.set()
    local.seconds = 20
    assert tokens(local.generate(REQUESTS)) == tokens(Generator(built(1), CFG, CPU).generate(REQUESTS))
    assert not local.generator.busy and local.generator.cache.used == 0  # type: ignore[attr-defined]


def test_an_error_reaches_who_waits_and_the_sampler_goes_on(local: Local) -> None:
    plain, broken = local.generator.step, [True]

    def step() -> list[Any]:
        if broken[0]:
            raise FloatingPointError("not a number")
        return plain()

    local.generator.step = step  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match="not a number"):
        local.generate(REQUESTS)
    broken[0] = False
    assert len(local.generate(REQUESTS)) == 3
    with pytest.raises(ConfigError, match="a prompt has"):
        local.generate([Request([], Sampling())])
    local.close()
    with pytest.raises(DrivetrainError, match="has been closed"):
        local.generate(REQUESTS)


def test_what_cannot_be_completed_at_all_is_a_sentence(local: Local) -> None:
    """With shared weights as with a copy of them."""
    shared = Shared(lambda: Generator(built(0), CFG, CPU, vocab_size=CFG.vocab_size))
    long = [Request([1] * CFG.max_seq_len, Sampling(max_tokens=1))]
    for sampler in (shared, local):
        with pytest.raises(ConfigError, match="tokens"):
            sampler.generate(long)


def hang() -> None:
    threading.Event().wait()


def test_a_call_that_never_returns_is_given_up() -> None:
    began = time.monotonic()
    with pytest.raises(GivenUp, match=r"nothing came within 0\.2 s"):
        bounded(hang, 0.2)
    assert time.monotonic() - began < 5
    with pytest.raises(KeyError):
        bounded(lambda: {}["a"], 5)
    assert bounded(lambda: 3, 5) == 3


@pytest.mark.parametrize("fault", [hang, lambda: 1 / 0], ids=["hangs", "raises"])
def test_one_bad_item_costs_itself_alone(fault: Callable[[], Any], capfd: pytest.CaptureFixture[str]) -> None:
    tries: list[int] = []

    def judge(items: Sequence[int]) -> list[int]:
        tries.append(len(items))
        if 3 in items:
            fault()
        return [item * 10 for item in items]

    found = each_or_none(judge, [1, 2, 3, 4], seconds=1.5, retries=2, warnings=Warnings())
    assert found == [10, 20, None, 40]
    assert tries == [4, 1, 1, 1, 1, 1]  # all together, then each, and what failed once more
    assert "warning: completions could not be scored" in capfd.readouterr().err
    assert each_or_none(judge, [1, 3], 1.5, 0, Warnings()) == [None, None]


def test_what_a_user_has_to_mend_is_told_at_once() -> None:
    def judge(items: Sequence[int]) -> list[int]:
        raise ConfigError("mend this")

    with pytest.raises(ConfigError, match="mend this"):
        each_or_none(judge, [1], 1.0, 3, Warnings())


@pytest.mark.parametrize("hung", [0, 3, 9])
def test_what_hangs_keeps_nobody_else_from_their_share(hung: int) -> None:
    """Three at a time, twelve in all: four rounds of half a second each."""
    functions = [hang] * hung + [lambda: time.sleep(0.05)] * (11 - hung) + [lambda: 1 / 0]
    began = time.monotonic()
    found = together(functions, 3, 2.0)
    assert time.monotonic() - began < (2.5 if hung else 1.5)
    assert [type(each) for each in found] == [GivenUp] * hung + [type(None)] * (11 - hung) + [
        ZeroDivisionError
    ]
    assert together([lambda: 3], 8, math.inf) == [3] and together([], 8, 1.0) == []


def test_no_more_than_asked_for_run_together_while_they_keep_up() -> None:
    running, most = [0], [0]

    def work() -> None:
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.01)
        running[0] -= 1

    together([work] * 30, 3, 30.0)
    assert most[0] == 3


class Stuck:
    """An episode whose step waits; `log` is what was asked of it."""

    def __init__(self, log: list[str], gate: threading.Event) -> None:
        self.log, self.gate = log, gate

    def step(self, turn: Turn) -> Step:
        self.log.append("step")
        self.gate.wait()
        return Step(done=True)

    def end(self) -> dict[str, float]:
        self.log.append("end")
        raise OSError("gone")


def test_a_hung_episode_is_ended_by_whoever_is_last() -> None:
    log, gate = list[str](), threading.Event()
    episode = GuardedEpisode(lambda: Stuck(log, gate))
    with pytest.raises(GivenUp):
        bounded(lambda: episode.step(Turn("a", False)), 0.2)
    began = time.monotonic()
    assert episode.end() == {} and log == ["step"]  # it is still at it
    assert time.monotonic() - began < 0.1
    gate.set()
    until = time.monotonic() + 5
    while "end" not in log and time.monotonic() < until:
        time.sleep(0.01)
    assert log == ["step", "end"]
    never = GuardedEpisode(lambda: Stuck(log, gate))
    assert never.end() == {} and log == ["step", "end"]  # what never began has no end
    begun = GuardedEpisode(lambda: Stuck(log, gate))
    begun.step(Turn("a", False))
    with pytest.raises(EpisodeError, match="its end failed: OSError: gone"):
        begun.end()


class Sticky(Defaults):
    reward: Any = None

    def problem(self, number: int) -> Problem:
        return hang() if number else [][0]

    def held_out(self, count: int) -> list[Problem]:
        raise DataError("no file")


def test_an_environment_without_problems_ends_the_run_with_a_sentence() -> None:
    guarded = GuardedEnvironment(Sticky(), 0.2)  # type: ignore[arg-type]
    with pytest.raises(
        DrivetrainError, match=r"gives no problem 1: GivenUp: nothing came within 0\.2 s; mend"
    ):
        guarded.problem(1)
    with pytest.raises(DrivetrainError, match="gives no problem 0: IndexError"):
        guarded.problem(0)
    with pytest.raises(DataError, match="no file"):
        guarded.held_out(1)


def waited(work: Background[Any, Any, Any], numbers: set[int]) -> dict[int, Any]:
    until = time.monotonic() + 10
    while set(work.found()) != numbers and time.monotonic() < until:
        time.sleep(0.01)
    return {number: work.take(number) for number in numbers}


def test_the_background_retries_drops_and_scores_together() -> None:
    tries: list[int] = []
    gate = threading.Event()

    def answer(asked: int) -> int:
        tries.append(asked)
        if asked == 2 or (asked == 3 and tries.count(3) == 1):
            raise OSError("no answer")
        return asked + 100

    def score(items: Sequence[tuple[int, int, int]]) -> list[str]:
        gate.wait()
        if any(number == 4 for number, _, _ in items):
            hang()
        return [f"{number}:{answered}" for number, _, answered in items]

    work = Background(answer, score, seconds=1.5, retries=1, warnings=Warnings())
    for number in range(5):
        work.start(number, number)
    time.sleep(0.1)
    gate.set()
    assert waited(work, set(range(5))) == {0: "0:100", 1: "1:101", 2: None, 3: "3:103", 4: None}
    assert tries.count(2) == 2 and tries.count(3) == 2
    mean, _ = work.times()
    assert mean > 0 and work.times() == (0, 0)
    work.close()


def test_the_background_passes_on_what_a_user_has_to_mend() -> None:
    def answer(asked: int) -> int:
        raise ConfigError("the prompt is too long")

    work: Background[int, int, int] = Background(answer, lambda items: [0 for _ in items], 1.0, 1, Warnings())
    work.start(0, 0)
    with pytest.raises(ConfigError, match="too long"):
        waited(work, {0})
    work.close()
