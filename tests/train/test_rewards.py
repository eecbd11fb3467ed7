"""Rewards against values worked by hand, and against what people try in order to be rewarded."""

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from drivetrain.conf.errors import ConfigError, DataError
from drivetrain.conf.rewards import CodeReward, Extract, FormatReward, RewardsConfig, SandboxConfig, Share
from drivetrain.train.rl import checkers, sandbox
from drivetrain.train.rl.extract import answer_in, last_block
from drivetrain.train.rl.programs import Programs
from drivetrain.train.rl.rewards import (
    Exact,
    Format,
    Overlong,
    Regex,
    Reward,
    Rewards,
    Sample,
    build_rewards,
    overlong,
    total,
)


def sample(completion: str, tokens: int = 1, **reference: Any) -> Sample:
    return Sample([{"role": "user", "content": "?"}], completion, tokens, "stop", reference)


def one(reward: Reward, completion: str, **reference: Any) -> float:
    """The only part of one sample."""
    (values,) = reward.score([sample(completion, **reference)]).values()
    return values[0]


# Extraction


@pytest.mark.parametrize(
    ("extract", "text", "answer"),
    [
        (Extract.boxed, r"\boxed{1} and \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (Extract.boxed, r"\boxed 5.", "5"),
        (Extract.boxed, r"\fbox{ x }", "x"),
        (Extract.boxed, r"\boxed{1} then \boxed{2", "1"),
        (Extract.boxed, "5", None),
        (Extract.boxed, r"\boxed{}", None),
        (Extract.answer, "Answer: 3\nthen\n**Answer:** 4.", "4"),
        (Extract.answer, "So the answer is 12 apples", "12 apples"),
        (Extract.answer, "12 + 1 = 13\n#### 13", "13"),
        (Extract.answer, "an answer", None),
        (Extract.tag, "<answer>1</answer> <answer>\n2 </answer>", "2"),
        (Extract.number, "first 12, then -1,234.5!", "-1234.5"),
        (Extract.number, "10-3 is 7", "7"),
        (Extract.number, "7 or −.5e3", "-.5e3"),
        (Extract.number, "none", None),
        (Extract.all, "<think>5</think> 6 ", "6"),
        (Extract.all, "<think>5", None),
        (Extract.auto, r"<answer>1</answer> \boxed{2} answer: 3", "1"),
        (Extract.auto, r"\boxed{2} answer: 3", "2"),
        (Extract.auto, "the answer is: 3", "3"),
        (Extract.auto, " blue 3 ", "blue 3"),
        (Extract.auto, r"<think>\boxed{1}</think> <think>", None),
    ],
)
def test_answer_in(extract: Extract, text: str, answer: str | None) -> None:
    expected = "<think>" if answer is None and text.endswith("<think>") else answer
    assert answer_in(text, extract) == expected


@given(st.text(), st.sampled_from(list(Extract)))
def test_extraction_takes_any_text(text: str, extract: Extract) -> None:
    answer = answer_in(text, extract)
    assert answer is None or answer.strip() == answer != ""


@given(st.text(st.characters(exclude_characters="{}"), min_size=1).filter(lambda text: text.strip()))
def test_what_is_boxed_comes_out(text: str) -> None:
    if "<think>" not in text and "</think>" not in text and "\\boxed" not in text and "\\fbox" not in text:
        assert answer_in(f"so \\boxed{{{text}}} indeed", Extract.boxed) == text.strip()


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("```python\na\n```\nthen\n```\nb\n```", "b\n"),
        ("~~~\na\n~~~", "a\n"),
        ("````md\n```\na\n```\n````", "```\na\n```\n"),
        ("```python\na", None),
        ("a", None),
        ("<think>\n```\na\n```\n</think>\nno", None),
        ("```\n```", ""),
    ],
)
def test_last_block(text: str, block: str | None) -> None:
    assert last_block(text) == block


# The parts


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("Answer: 1,000", "1000", 1.0),
        ("answer:  New   YORK.", "new york", 1.0),
        (r"\boxed{3}", [2, 3], 1.0),
        (r"\boxed{3}", 4, 0.0),
        ("<think>4", 4, 0.0),
        ("4", 0, 0.0),
        ("0", 0, 1.0),
    ],
)
def test_exact(completion: str, answer: Any, score: float) -> None:
    assert one(Exact(Extract.auto), completion, answer=answer) == score


def test_exact_without_a_reference_is_not_scored() -> None:
    assert math.isnan(one(Exact(Extract.auto), "4"))


def test_regex() -> None:
    assert one(Regex(r"\bcat\b", Extract.all), "a cat\nsat") == 1
    assert one(Regex(r"\bcat\b", Extract.all), "<think>a cat</think> a dog") == 0
    assert one(Regex(None, Extract.all), "abc", pattern="^a.c$") == 1
    assert math.isnan(one(Regex(None, Extract.all), "abc"))
    with pytest.raises(ConfigError, match="no regular expression"):
        Regex("(", Extract.all)


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("<think>so\nso</think>\nfour", 1.0),
        ("  <think></think>4\n", 1.0),
        ("<think>so</think>", 0.0),
        ("<think>so</think>  \n", 0.0),
        ("<think>so", 0.0),
        ("four", 0.0),
        ("well <think>so</think> four", 0.0),
        ("<think>a</think><think>b</think> four", 0.0),
        ("<think><think>a</think> four", 0.0),
    ],
)
def test_format(completion: str, score: float) -> None:
    assert one(Format(FormatReward().pattern), completion) == score


def test_format_is_quick_on_long_completions() -> None:
    began = time.monotonic()
    one(Format(FormatReward().pattern), "<think>" + "a " * 50000)
    one(Format(FormatReward().pattern), "<think></think>" + " \n" * 50000)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("tokens", "punished"), [(1, 0), (80, 0), (85, -0.25), (90, -0.5), (100, -1), (200, -1)]
)
def test_overlong(tokens: int, punished: float) -> None:
    """L_max = 100, L_cache = 20: 0 up to 80, then (80 - tokens) / 20, then -1."""
    assert overlong(tokens, 100, 20) == punished
    assert Overlong(100, 20).score([sample("", tokens)]) == {"overlong": [punished]}


def test_overlong_buffer() -> None:
    assert Overlong(100, 0).buffer == 25
    with pytest.raises(ConfigError, match=r"overlong\.buffer=200"):
        Overlong(100, 200)


# Sums


class Given:
    def __init__(self, **parts: list[float]) -> None:
        self.parts = parts

    def score(self, samples: Any) -> dict[str, list[float]]:
        return self.parts


def test_total_leaves_out_what_could_not_be_scored() -> None:
    nan = math.nan
    found = total({"a": [1.0, 2.0, nan, nan], "b": [0.5, nan, -1.0, nan]})
    assert found.rewards[:3] == [1.5, 2.0, -1.0]
    assert math.isnan(found.rewards[3])
    assert found.unscored == {"a": 2, "b": 2}
    found = total({"a": [1.0, math.inf], "b": [-math.inf, nan]})
    assert found.rewards[0] == 1 and math.isnan(found.rewards[1]) and found.unscored == {"a": 1, "b": 2}


@given(
    st.lists(
        st.lists(st.floats(-1e3, 1e3) | st.just(math.nan), min_size=3, max_size=3), min_size=1, max_size=4
    )
)
def test_total_is_the_same_in_any_order(columns: list[list[float]]) -> None:
    parts = {str(number): column for number, column in enumerate(columns)}
    there, back = total(parts).rewards, total(dict(reversed(parts.items()))).rewards
    assert all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(there, back, strict=True))


def test_weights_and_names() -> None:
    parts = Rewards({"own": (2.0, Given(own=[1.0])), "many": (0.5, Given(a=[1.0], b=[-1.0]))}).score(
        [sample("")]
    )
    assert parts == {"own": [2.0], "many/a": [0.5], "many/b": [-0.5]}
    with pytest.raises(ConfigError, match="reward own gave 1 numbers for 2 samples"):
        Rewards({"own": (1.0, Given(own=[1.0]))}).score([sample(""), sample("")])


def test_a_function_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_reward.py").write_text(
        "def short(samples):\n    return [None if not each.completion else 1 / each.tokens for each in samples]\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    config = config_of({"custom": {"weight": 2, "target": "own_reward:short"}})
    values = build_rewards(config, 10).score([sample("x", 4), sample("")])["custom"]
    assert values[0] == 0.5
    assert math.isnan(values[1])
    for target, said in (
        ("own_reward", "not of the form"),
        ("own_reward:long", "cannot be imported"),
        ("no:f", "no"),
    ):
        with pytest.raises(ConfigError, match=said):
            build_rewards(config_of({"custom": {"weight": 1, "target": target}}), 10)


# Configuration


def config_of(given: dict[str, Any]) -> RewardsConfig:
    merged = OmegaConf.merge(OmegaConf.structured(RewardsConfig), given)
    config = OmegaConf.to_object(merged)
    assert isinstance(config, RewardsConfig)
    return config


def test_only_what_has_a_weight_is_built() -> None:
    assert build_rewards(RewardsConfig(), 10).score([sample("")]) == {}
    config = config_of({"exact": {"weight": 1, "extract": "boxed"}, "overlong": {"weight": 0.5, "buffer": 4}})
    parts = build_rewards(config, 10).score([sample(r"\boxed{1}", 8, answer=1)])
    assert parts == {"exact": [1.0], "overlong": [-0.25]}


def test_a_mistyped_key_is_refused() -> None:
    with pytest.raises(OmegaConfBaseException):
        config_of({"exact": {"wieght": 1}})
    with pytest.raises(OmegaConfBaseException):
        config_of({"exact": {"extract": "box"}})
    with pytest.raises(ConfigError, match=r"stage\.rewards\.exact\.weight=nan"):
        build_rewards(config_of({"exact": {"weight": math.nan}}), 10)


# Answers that a library compares


@pytest.fixture(scope="module")
def mathematics() -> Iterator[checkers.Math]:
    pytest.importorskip("math_verify")
    reward = checkers.Math(2.0, 2)
    yield reward
    reward.close()


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        (r"so \boxed{\frac{1}{2}}", "0.5", 1.0),
        ("it is $x^2+2x+1$", "(x+1)^2", 1.0),
        (r"\boxed{(1,2)}", "(1,2)", 1.0),
        (r"\boxed{7}", ["6", "7"], 1.0),
        (r"\boxed{4}", 5, 0.0),
        ("no idea", "4", 0.0),
        ("<think>4", "4", 0.0),
        ("", "4", 0.0),
    ],
)
def test_math(mathematics: checkers.Math, completion: str, answer: Any, score: float) -> None:
    assert one(mathematics, completion, answer=answer) == score


def test_math_without_a_reference_is_not_scored(mathematics: checkers.Math) -> None:
    assert math.isnan(one(mathematics, "4"))


def test_an_answer_without_end_is_wrong_and_the_next_one_is_judged(mathematics: checkers.Math) -> None:
    began = time.monotonic()
    samples = [sample(text, answer="4") for text in (r"\boxed{9^{9^{9^{9}}}}", r"\boxed{4}", r"\boxed{2+2}")]
    assert mathematics.score(samples) == {"math": [0.0, 1.0, 1.0]}
    assert time.monotonic() - began < 40
    assert mathematics.score(samples[1:]) == {"math": [1.0, 1.0]}


def test_gym() -> None:
    reasoning_gym = pytest.importorskip("reasoning_gym")
    made = reasoning_gym.create_dataset("chain_sum", size=2, seed=1)
    reward = checkers.Gym(Extract.auto, 5.0, 1)
    try:
        entry = made[0]
        right = f"<think>..</think><answer>{entry['answer']}</answer>"
        assert one(reward, right, entry=entry) == 1
        assert one(reward, right, **entry) == 1
        assert one(reward, right, entry=entry, settings={"max_terms": 3}) == 1
        assert one(reward, "no", entry=entry) == made.score_answer("no", entry) < 1
        assert math.isnan(one(reward, "no"))
        with pytest.raises(DataError, match="entry and settings must be those"):
            one(reward, "no", entry={**entry, "metadata": {"source_dataset": "nothing"}})
        assert one(reward, right, entry=entry) == 1
    finally:
        reward.close()


def test_checkers_are_shut_in() -> None:
    """What a library might be talked into: the process that calls it can open no socket and write no file."""
    pytest.importorskip("math_verify")
    reward = checkers.Math(2.0, 1)
    try:
        pid = reward.checkers.workers[0].process.pid
        status = Path(f"/proc/{pid}/status").read_text()
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        assert "Seccomp:\t2" in status
        assert b"PYTEST_CURRENT_TEST" not in environment
    finally:
        reward.close()


@pytest.mark.parametrize(
    "wrong", [{"math": {"weight": 1, "seconds": 0}}, {"math": {"weight": 1}, "checkers": 0}]
)
def test_wrong_settings_of_checkers(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"stage\.rewards\..*=0"):
        build_rewards(config_of(wrong), 10)


# Programs


@pytest.fixture(scope="module")
def programs() -> Iterator[Programs]:
    try:
        sandbox.describe()
    except ConfigError as error:
        pytest.skip(str(error))
    reward = Programs(CodeReward(weight=1.0, workers=2, sandbox=SandboxConfig(seconds=10.0)))
    yield reward
    reward.close()


def fenced(code: str) -> str:
    return f"Here it is:\n```python\n{code}\n```\nDone."


SQUARES = ["assert f(2) == 4", "assert f(-3) == 9", "assert f(0) == 0", "assert f(1) == 1"]


@pytest.mark.parametrize(
    ("code", "share"),
    [
        ("def f(x):\n    return x * x", 1.0),
        ("def f(x):\n    return 2 * x", 0.5),
        ("def f(x):\n    return x * x if x >= 0 else exit()", 0.75),
        ("def f(x): return", 0.0),
        ("def f(x)", 0.0),
        ("import sys\nsys.exit(0)", 0.0),
        ("import os\nos._exit(0)", 0.0),
        ("raise SystemExit", 0.0),
        ("def f(x):\n    import os\n    os._exit(0)", 0.0),
        ("print('passed\\n1 0\\nok')", 0.0),
        (
            "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\ndef f(x): return A(x).x ** 2",
            1.0,
        ),
        ("def f(x): return x * x\nif __name__ == '__main__':\n    f(int(input()))", 1.0),
    ],
)
def test_share_of_tests(programs: Programs, code: str, share: float) -> None:
    assert one(programs, fenced(code), tests=SQUARES) == share


def test_programs_with_input_and_output(programs: Programs) -> None:
    tests = [
        {"stdin": "2 3\n", "stdout": "5"},
        {"stdin": "1 1", "stdout": "2 \n\n"},
        {"stdin": "x", "stdout": "?"},
    ]
    code = "print(sum(map(int, input().split())), '')"
    assert one(programs, fenced(code), tests=tests) == pytest.approx(2 / 3)


def test_setup_both_kinds_and_no_block(programs: Programs) -> None:
    tests = ["assert f(1) == 3", {"stdin": "", "stdout": "3"}]
    code = "k = globals().get('k', 2)\ndef f(x): return x + k\nif __name__ == '__main__': print(f(1))"
    assert one(programs, fenced(code), tests=tests, setup="k = 2") == 1
    assert one(programs, code, tests=tests) == 0
    assert math.isnan(one(programs, fenced(code)))
    with pytest.raises(DataError, match="a sample's tests"):
        one(programs, fenced(code), tests=[3])


def test_all_or_nothing_and_time() -> None:
    try:
        reward = Programs(CodeReward(weight=1.0, give=Share.all, sandbox=SandboxConfig(seconds=1.0)))
    except ConfigError as error:
        pytest.skip(str(error))
    with_loop = fenced("def f(x):\n    while x == 1: pass\n    return x * x")
    right = fenced("def f(x): return x * x")
    samples = [sample(text, tests=SQUARES) for text in (with_loop, right, fenced("def f(x): return 2 * x"))]
    assert reward.score(samples) == {"code": [0.0, 1.0, 0.0]}
    reward.close()
