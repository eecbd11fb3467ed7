"""Rollouts that run ahead of training: which prompts a step trains on, alone and on real engines and ranks."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drivetrain.conf.errors import ConfigError, DrivetrainError
from drivetrain.conf.rollout import RolloutConfig
from drivetrain.conf.schema import GrpoConfig
from drivetrain.data.tokenizer import train_tokenizer
from drivetrain.train.mesh import World
from drivetrain.train.rl import ahead
from drivetrain.train.rl.ahead import Ahead
from drivetrain.train.rl.episodes import Trajectory
from drivetrain.train.rl.exchange import columns, rows
from drivetrain.train.rl.guard import Warnings
from drivetrain.train.rl.ledger import Ledger
from drivetrain.train.rl.rollout import Group

RunRanks = Callable[..., dict[str, Any]]
WORKER = Path(__file__).with_name("grpo_worker.py")
P = 3  # prompts of a step


class Scripted:
    """A sampler that does with each prompt what a plan says: seconds, and what comes of it."""

    def __init__(self, k: int, plan: Callable[[int], tuple[float, str]], **words: Any) -> None:
        rollout = RolloutConfig(max_staleness=k, retries=0, timeout_seconds=5)
        self.cfg = GrpoConfig(
            seq_len=32, prompts_per_step=P, group_size=2, max_completion=4, rollout=rollout, **words
        )
        self.world, self.warnings = World(0, 1, 0, torch.device("cpu")), Warnings()
        self.plan, self.version = plan, 0
        self.begun: dict[int, int] = {}

    def task(self, number: int) -> int:
        self.begun[number] = self.version
        return number

    def play(self, tasks: Sequence[int]) -> list[int]:
        seconds, what = self.plan(tasks[0])
        time.sleep(seconds)
        if what == "fails":
            raise OSError("no completion")
        if what == "mend":
            raise ConfigError("mend this")
        return list(tasks)

    def scored(self, items: Sequence[tuple[int, int, int]]) -> list[Group]:
        return [made(number, self.plan(number)[1]) for number, _, _ in items]


def made(number: int, what: str) -> Group:
    drawn = Trajectory([1], [True], [], [-1.0], "stop", 1)
    failed = Trajectory(finish_reason="failed")
    rewards = [0.5, 0.5] if what == "equal" else [0.0, 1.0]
    return Group(
        number, [1], [drawn, failed if what == "half" else drawn], {"a": rewards}, rewards, [True] * 2
    )


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    monkeypatch.setattr(
        torch.distributed, "all_gather_object", lambda found, mine: found.__setitem__(0, mine)
    )
    monkeypatch.setattr(ahead, "POLL", 0.001)
    yield


def run(sampler: Scripted, steps: int, ledger: Ledger) -> list[Any]:
    rollouts = Ahead(sampler, ledger, lambda: sampler.version)  # type: ignore[arg-type]
    found = []
    try:
        for sampler.version in range(steps):
            found.append(rollouts.rollout(P, 1))
            assert len(rollouts.begun) <= P * (sampler.cfg.rollout.max_staleness + 1)
    finally:
        rollouts.close()
    return found


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    k=st.integers(0, 3),
    plans=st.lists(
        st.tuples(st.sampled_from([0.0, 0.0, 0.003, 0.01]), st.sampled_from(["", "", "", "fails", "half"])),
        min_size=1,
        max_size=9,
    ),
    stop=st.integers(1, 4),
)
def test_every_prompt_is_trained_on_once_and_in_time(
    k: int, plans: list[tuple[float, str]], stop: int
) -> None:
    """Also over a restart: what was under way then is begun again. Only those that fail are left out."""

    def plan(number: int) -> tuple[float, str]:
        return (0.0, "") if number % 3 == 0 else plans[number % len(plans)]

    seen: list[int] = []
    state = None
    for steps in (stop, 3):
        sampler, ledger = Scripted(k, plan), Ledger(state)
        for version, rollout in enumerate(run(sampler, steps, ledger)):
            numbers = [group.number for group in rollout.groups]
            assert len(numbers) == P
            seen += numbers
            assert all(version - k <= sampler.begun[number] <= version for number in numbers)
        state = ledger.state()
    assert len(set(seen)) == len(seen)
    lost = {number for number in range(ledger.first) if plan(number)[1] in ("fails", "half")}
    assert set(range(ledger.first)) | ledger.taken >= set(seen)
    assert set(seen) >= set(range(ledger.first)) - lost


def test_the_first_finished_go_first_and_the_oldest_are_waited_for() -> None:
    slow = Scripted(1, lambda number: (0.3 if number in (0, 1) else 0.0, ""))
    first, second = run(slow, 2, Ledger())
    assert [group.number for group in first.groups] == [2, 3, 4] and first.wait_seconds < 0.25
    assert [group.number for group in second.groups] == [0, 1, 5]


def test_groups_without_advantages_give_their_places_away() -> None:
    plan = lambda number: (0.0, "equal" if number < 4 else "")  # noqa: E731
    (found,) = run(Scripted(0, plan, dynamic_sampling=True), 1, Ledger())
    assert [group.number for group in found.groups] == [4, 5, 6]
    assert found.prompts == 7 and found.dropped == 0
    (found,) = run(Scripted(0, lambda _: (0.0, "equal"), dynamic_sampling=True), 1, Ledger())
    assert len(found.groups) == 1  # as few as a step can do with


def test_a_step_for_which_nothing_can_be_made_fails() -> None:
    with pytest.raises(
        DrivetrainError, match=r"of \d+ prompts 0 could be completed and scored, and 1 are needed"
    ):
        run(Scripted(0, lambda _: (0.0, "fails")), 1, Ledger())
    with pytest.raises(ConfigError, match="mend this"):
        run(Scripted(1, lambda _: (0.0, "mend")), 1, Ledger())


def test_groups_arrive_as_they_were_sent() -> None:
    long = Trajectory([7, 8, 9], [True, False, True], [], [-0.5, -0.25], "length", 2, [3, 4])
    mixed = Group(
        5,
        [1, 2],
        [long, Trajectory(finish_reason="failed")],
        {"a": [1.0, float("nan")]},
        [1, 1],
        [True, False],
    )
    other = Group(2, [3], [Trajectory([4], [True], [], [-1.0], "stop", 1)], {"b/c": [2.0]}, [2.0], [False])
    found = rows(columns([mixed, other]))
    assert repr(found) == repr([mixed, other]).replace("[1, 1]", "[1.0, 1.0]")
    assert rows(columns([])) == []


def test_the_ledger_counts_each_prompt_once() -> None:
    ledger = Ledger({"prompts": 3, "taken": [5]})
    assert ledger.upcoming(3) == [3, 4, 6] and ledger.upcoming(2, besides=[3]) == [4, 6]
    ledger.settle([4, 3, 1])
    assert ledger.state() == {"prompts": 6, "taken": []}
    assert Ledger({"prompts": 8}).upcoming(1) == [8]  # of a run that knew no others


# --- on ranks -----------------------------------------------------------------------------------------------

STEPS, K = 4, 2
AHEAD = f"stage.rollout.max_staleness={K}"
ZERO = ("engine=zero", "engine.zero_stage=2")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ahead")
    text = folder / "a.txt"
    text.write_text(" State the final answer to the following arithmetic problem: 1234567890 + - = user" * 30)
    train_tokenizer([text], 280, folder / "tokenizer")
    return folder


def case(name: str, small: list[str], run_dir: Path, *words: str, **more: Any) -> dict[str, Any]:
    general = [word for word in small if not word.startswith(("stage.seq_len", "stage.tokens"))]
    fixed = ["stage=grpo", *general, "model.vocab_size=280", "model.max_seq_len=256"]
    fixed += ["stage.seq_len=192", "stage.prompts_per_step=4", "stage.group_size=4", "stage.max_completion=8"]
    fixed += ["stage.micro_batch=2", "stage.eval_problems=4", "stage.eval_every=0", "stage.steps=100"]
    fixed += ["stage.rewards.custom.weight=1", "stage.rewards.custom.target=grpo_worker:reward"]
    return {"name": name, "overrides": [*fixed, *words], "steps": STEPS, "run_dir": str(run_dir), **more}


def each_once(*runs: dict[str, Any]) -> set[int]:
    seen = [number for found in runs for row in found["rows"] for number in row["prompts"]]
    assert len(set(seen)) == len(seen)
    return set(seen)


def test_two_ranks_of_both_engines_run_ahead_and_resume(
    small: list[str], run_dir: Path, run_ranks: RunRanks, tmp_path: Path
) -> None:
    saved = {"save": str(tmp_path / "saved"), "save_after": 2}
    again = {"load": str(tmp_path / "saved" / "step_00000002"), "steps": 2}
    found = run_ranks(
        WORKER,
        2,
        [
            case("fsdp", small, run_dir, AHEAD, **saved),
            case("rest", small, run_dir, AHEAD, **again),
            case("in turn", small, run_dir, **again),
            case("zero", small, run_dir, AHEAD, *ZERO),
            case("shared", small, run_dir, steps=2),
            case("copy", small, run_dir, "stage.rollout.copy=true", steps=2),
        ],
    )
    for name in ("fsdp", "zero"):
        seen = each_once(found[name])
        assert set(range(4 * (STEPS - K))) <= seen <= set(range(4 * (STEPS + K)))
        stale = [row["rl/staleness_max"] for row in found[name]["rows"]]
        assert stale[0] == 0 and max(stale) <= K and stale[3] > 0
        assert found[name]["rows"][0]["rl/gap_max"] < 1e-4 < found[name]["rows"][3]["rl/gap_max"]
    begun = {"rows": found["fsdp"]["rows"][:2]}
    for name in ("rest", "in turn"):  # as many prompts more, none lost and none twice
        each_once(begun, found[name])
    assert each_once(begun, found["in turn"]) == set(range(16))
    # With k = 0 a copy of the weights samples what the shared ones do.
    for mine, theirs in zip(found["copy"]["rows"], found["shared"]["rows"], strict=True):
        assert mine["rollout"] == theirs["rollout"] and mine["prompts"] == theirs["prompts"]
        assert mine["rl/staleness_max"] == 0 and mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    assert found["copy"]["eval"] == found["shared"]["eval"]


def test_a_reward_that_hangs_costs_its_group(small: list[str], run_dir: Path, run_ranks: RunRanks) -> None:
    """And the ranks go on together: the problem is one of rank 1's."""
    words = ["stage.rewards.custom.target=grpo_worker:hangs_once", "stage.rollout.timeout_seconds=4"]
    warm = case("warm", small, run_dir, steps=1)  # what scoring imports takes its time
    found = run_ranks(
        WORKER,
        2,
        [
            warm,
            case("in turn", small, run_dir, *words, steps=2),
            case("ahead", small, run_dir, *words, AHEAD),
        ],
    )
    for name in ("in turn", "ahead"):
        assert sum(row["rl/dropped"] for row in found[name]["rows"]) == 4  # one group's completions
        assert 1 not in each_once(found[name])
    assert [len(row["prompts"]) for row in found["in turn"]["rows"]] == [3, 4]
    assert [len(row["prompts"]) for row in found["ahead"]["rows"]] == [4] * STEPS
