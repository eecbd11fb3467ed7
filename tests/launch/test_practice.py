"""What stage=grpo names is made once before a run is: each mistake in it gets one sentence and no run directory."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drivetrain.conf.compose import compose
from drivetrain.conf.errors import ConfigError
from drivetrain.launch import cli, practice
from drivetrain.launch.practice import check_practice
from drivetrain.train.rl import check, sandbox

SUM = "reasoning_gym:chain_sum"
PLAIN = "{% for message in messages %}{{ message.role }}: {{ message.content }}<|im_end|>{% endfor %}"
# stage.environment and other words -> part of the only sentence.
WRONG: dict[str, str] = {
    "reasoning_gym:no_such_task": "no_such_task",
    f"{SUM}?no_such_setting=3": "no_such_setting",
    f"{SUM}?seed=3": "seed and size follow from the run's seed",
    f"{SUM}?tools=hammer": "there is no tool hammer; there is calculator, python, search",
    f"{SUM}?tools=": "name each tool once",
    f"{SUM}?tools=calculator&calls=smoke": "calls=smoke; use one of template, tags",
    f"{SUM}?tools=python&walls=paper": "walls=paper; use one of auto, namespaces, filters, none",
    f"{SUM}?tools=calculator&max_turns=1": "max_turns=1 of an environment with tools; use 2 or more",
    f"{SUM}?tools=calculator&max_turns=x": "max_turns=x is no number",
    f"{SUM}?tools=search&calls=tags": "tools=search needs documents=PATH",
    "questions:{here}/empty.jsonl": "holds no problem",
    "questions:{here}/wrong.jsonl": 'no "question" and no "prompt"',
    "questions:{here}/good.jsonl?held_out={here}/empty.jsonl": "holds no problem",
    "questions:{here}/good.jsonl?judge=me": "judge=me of an environment is not known",
    "questions:{here}/long.jsonl": "leaves room for 768; raise stage.seq_len",
    "custom:no_such_module:thing": "no_such_module:thing cannot be imported",
    "custom:{module}:nothing": "nothing cannot be imported",
    "custom:{module}:refuses": "ValueError: not today",
    f"{SUM} stage.rewards.custom.weight=1 stage.rewards.custom.target=no_such_module:f": (
        "stage.rewards.custom.target='no_such_module:f' cannot be imported"
    ),
    f"{SUM} stage.rewards.rubric.weight=1 stage.rewards.rubric.model=m "
    "stage.rewards.rubric.criteria=[{name:a,asks:b,weight:-1}]": "no weight is positive",
    f"{SUM} stage.rewards.reward_model.weight=1 stage.rewards.reward_model.run={{here}}": "holds no checkpoint",
}


@pytest.fixture
def start(talker: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Overrides of a job in which `words` are wrong."""
    (folder / "empty.jsonl").write_text("")
    (folder / "wrong.jsonl").write_text('{"text": "a"}\n')
    questions = [f'{{"question": "what is {n}?", "answer": "{n}"}}\n' for n in range(200)]
    (folder / "good.jsonl").write_text("".join(questions))
    (folder / "long.jsonl").write_text("".join(line.replace("what", "the cat " * 900) for line in questions))
    (folder / "practice_module.py").write_text(
        "def refuses(**settings):\n    raise ValueError('not today')\n"
    )
    monkeypatch.syspath_prepend(str(folder))

    def words(typed: str) -> list[str]:
        filled = typed.replace("{here}", str(folder)).replace("{module}", "practice_module")
        environment, *more = filled.split(" ")
        made = ["stage=grpo", "model=auto", f"model.init_from={talker}", "cluster.device=cpu"]
        made += ["stage.seq_len=1024", "stage.max_completion=256", f"stage.environment='{environment}'"]
        return [*made, *more]

    return words


def findings(words: list[str], tokenizer: Path, here: bool = True) -> check.Findings:
    stage: Any = compose(words).stage
    return check.check(stage, 0, tokenizer, here)


@pytest.mark.parametrize("typed", WRONG)
def test_one_mistake_is_one_sentence(typed: str, start: Callable[[str], list[str]], talker: Path) -> None:
    found = findings(start(typed), talker)
    assert found.warnings == [] and len(found.problems) == 1, found
    assert WRONG[typed] in found.problems[0]


def test_nothing_is_found_where_nothing_is_wrong(start: Callable[[str], list[str]], talker: Path) -> None:
    words = start(f"{SUM}?tools=calculator,python&calls=tags")
    words += [
        f"stage.rewards.{part}.weight=1" for part in ("gym", "exact", "format", "math", "overlong", "code")
    ]
    assert findings(words, talker) == check.Findings()


@pytest.mark.parametrize(
    ("template", "typed", "sentence"),
    [
        (None, SUM, "has no chat template"),
        (PLAIN, f"{SUM}?tools=calculator", "does not show the model its tools"),
        (PLAIN, f"{SUM}?tools=calculator&calls=tags", None),
    ],
)
def test_the_tokenizer_must_chat_and_show_tools(
    template: str | None,
    typed: str,
    sentence: str | None,
    start: Callable[[str], list[str]],
    folder: Path,
    talker: Path,
) -> None:
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    shutil.copy(talker / "tokenizer.json", tokenizer)
    if template is not None:
        (tokenizer / "chat_template.jinja").write_text(template)
    problems = findings(start(typed), tokenizer).problems
    assert len(problems) == bool(sentence), problems
    assert not sentence or sentence in problems[0]


@pytest.mark.parametrize(
    ("typed", "library"),
    [
        (SUM, "reasoning_gym"),
        (f"{SUM}?tools=search&calls=tags&documents=good.jsonl", "bm25s"),
        ("verifiers:x", "verifiers"),
        (f"{SUM} stage.rewards.rubric.weight=1", "httpx"),
    ],
)
def test_a_missing_library_is_named(
    typed: str, library: str, start: Callable[[str], list[str]], talker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (library, f"{library}.v1"):
        monkeypatch.setitem(sys.modules, name, None)
    (problem,) = findings(start(typed), talker).problems
    assert "run `pip install 'drivetrain[" in problem


def test_walls_that_other_machines_may_have_are_a_warning(
    start: Callable[[str], list[str]], talker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacks(walls: object) -> None:
        raise sandbox.NoWalls("code cannot be shut in on this machine")

    monkeypatch.setattr(sandbox, "_choose", lacks)
    words = [*start(f"{SUM}?tools=python&calls=tags"), "stage.rewards.code.weight=1"]
    here, there = findings(words, talker), findings(words, talker, here=False)
    assert here.warnings == there.problems == []
    assert len(here.problems) == len(there.warnings) == 2
    assert all("code cannot be shut in on this machine" in each for each in here.problems + there.warnings)


def test_all_mistakes_are_said_before_anything_is_made(
    start: Callable[[str], list[str]],
    folder: Path,
    talker: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*start("reasoning_gym:no_such_task"), "stage.rewards.custom.weight=1", "run_dir=r"]
    words += ["stage.rewards.custom.target=no_such_module:f", "stage.rewards.format.weight=1"]
    before = sorted(folder.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["drivetrain", "launch", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    first, second = err.strip().split("\n")
    assert "no_such_module:f' cannot be imported" in first and "no_such_task" in second
    assert sorted(folder.rglob("*")) == before


def test_what_hangs_or_dies_is_ended(
    start: Callable[[str], list[str]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "sleeps.py").write_text("import time\ntime.sleep(1000)\n")
    (folder / "leaves.py").write_text("import os\nprint('noise')\nos.write(2, b'bye')\nos._exit(3)\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    with pytest.raises(ConfigError, match=r"ends the process that makes it: .*bye; correct it"):
        check_practice(compose(start("custom:leaves:make")))
    monkeypatch.setattr(practice, "SECONDS", 2.0)
    with pytest.raises(ConfigError, match="is not made within 2 s; correct what hangs"):
        check_practice(compose(start("custom:sleeps:make")))


def test_other_stages_start_nothing(folder: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(practice.subprocess, "Popen", None)
    assert check_practice(compose(words)) == []
