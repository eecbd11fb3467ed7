"""`drivetrain eval` as a user types it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drivetrain.data.build import build
from drivetrain.launch import cli
from drivetrain.launch.evaluate import draw, render
from drivetrain.launch.job import launch
from drivetrain.launch.words import console as terminal

Run = Callable[..., tuple[int, str, str]]
RECORDS = [
    {"question": "the cat", "choices": ["sat", "ran"], "answer": 0},
    {"question": "the mat", "choices": ["sat", "[red]ran"], "answer": 1},
]


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(*words)` -> status, standard output, standard error of `drivetrain eval words...`."""
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["drivetrain", "eval", *map(str, words)])
        monkeypatch.setattr(terminal, "width", 200, raising=False)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def text_shards(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    made = tmp_path_factory.mktemp("text")
    lines = [json.dumps({"text": f"the cat number {i} sat on the mat; " * 3}) + "\n" for i in range(60)]
    (made / "a.jsonl").write_text("".join(lines))
    build([made / "a.jsonl"], tiny_tokenizer, made / "out", workers=1, held_out=0.3)
    return made / "out"


@pytest.fixture(scope="module")
def source(tiny_hf: Callable[..., Path]) -> Path:
    return tiny_hf()


@pytest.fixture
def questions(folder: Path) -> Path:
    (folder / "q.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return folder / "q.jsonl"


def test_everything_at_once(run: Run, source: Path, text_shards: Path, questions: Path, folder: Path) -> None:
    words = [source, "--data", text_shards, "--seq-len", 24, "--tasks", questions]
    words += ["--memorisation", "--documents", 6, "--prefix", 4, "--suffix", 4]
    outputs = ["--out", folder / "o.json", "--examples", folder / "e.jsonl", "--plot", folder / "p.png"]
    status, out, err = run(*words, "--json", *outputs)
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found == json.loads((folder / "o.json").read_text())
    assert set(found) == {"source", "precision", "data", "tasks", "memorisation"}
    assert found["data"]["tokens"] > 0 and found["data"]["perplexity"] > 1 and found["precision"] == "fp32"
    task = found["tasks"][str(questions)]
    assert task["questions"] == 2 and set(task["metrics"]) == {"accuracy", "accuracy_norm"}
    assert found["memorisation"]["train"]["documents"] == 6
    lines = [json.loads(line) for line in (folder / "e.jsonl").read_text().splitlines()]
    assert [line["task"] for line in lines] == [str(questions)] * 2
    assert (folder / "p.png").read_bytes().startswith(b"\x89PNG")

    status, out, err = run(*words)
    assert (status, err) == (0, "")
    assert f"{found['data']['loss']:.4f}" in out and f"{found['data']['bits_per_byte']:.4f}" in out
    assert "accuracy norm" in out and "memorisation: given 4 tokens" in out and "held out" in out


def test_a_run_is_evaluated_as_it_evaluated_itself(
    run: Run, small: list[str], text_shards: Path, folder: Path, console: Any
) -> None:
    words = [
        *small,
        "model.vocab_size=272",
        "optim.warmup_steps=1",
        "stage.steps=2",
        "stage.eval_every=2",
        "stage.save_every=2",
    ]
    words += ["stage.eval_tokens=640", f"data.path={text_shards}", "run_dir=run", "cluster.nproc=1", "seed=3"]
    assert launch(words, console).exit_status == 0, str(console)
    logged = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    expected = next(line for line in reversed(logged) if "eval/loss" in line)
    for source in (folder / "run", folder / "run" / "checkpoints" / "step_00000002"):
        status, out, err = run(source, "--json")
        assert (status, err) == (0, "")
        data = json.loads(out)["data"]
        assert data["loss"] == pytest.approx(expected["eval/loss"], abs=1e-6)
        assert data["bits_per_byte"] == pytest.approx(expected["eval/bits_per_byte"], abs=1e-6)
    status, out, _ = run(folder / "run", "--data", text_shards, "--json")
    assert json.loads(out)["data"]["loss"] == data["loss"]
    status, out, _ = run(folder / "run", "--memorisation", "--prefix", 4, "--suffix", 2, "--json")
    found = json.loads(out)
    assert "data" not in found and found["memorisation"]["directory"] == str(text_shards)


WRONG = {
    "nowhere --tasks q.jsonl": (2, "nowhere is no directory; pass a run directory"),
    "{source}": (2, "there is nothing to evaluate {source} on; name shards with --data DIR"),
    "{source} --memorisation": (2, "{source} does not say what it was trained on; name the shards"),
    "{source} --tasks no.jsonl": (2, "the input no.jsonl does not exist; check the path"),
    "{source} --tasks broken.jsonl": (1, "broken.jsonl, line 2: no answer"),
    "{source} --tasks q.jsonl --shots 2": (2, "--shots 2 is more than the 1 other questions of q.jsonl"),
    "{source} --tasks reasoning_gym:nope": (2, "reasoning_gym:nope"),
    "{source} --data nowhere": (1, "nowhere is no finished data directory"),
    "{source} --data {shards} --seq-len 400": (2, "use a shorter --seq-len"),
    "{source} --data {shards} --split test": (2, "'--split': test is neither held_out nor train"),
    "{source} --tasks q.jsonl --precision fp64": (2, "'--precision': fp64 is neither bf16 nor fp32"),
    "{source} --tasks q.jsonl --extract (": (2, "'--extract': ( is no regular expression"),
    "{source} --memorisation --plot p.png": (2, "'--plot': it draws tasks; name some with --tasks"),
    "{source} --tasks q.jsonl --out no/o.json": (2, "no/o.json cannot be written: its folder does not exist"),
}


@pytest.mark.parametrize("typed", WRONG)
def test_a_mistake_is_one_sentence(
    typed: str, run: Run, source: Path, text_shards: Path, questions: Path, folder: Path
) -> None:
    (folder / "broken.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n')
    status, said = WRONG[typed]
    named = {"source": source, "shards": text_shards}
    found = run(*(word.format(**named) for word in typed.split(" ")))
    assert found[:2] == (status, "") and found[2].count("\n") == 1
    assert found[2].startswith("error: ") and said.format(**named) in found[2]


def test_without_the_harness_its_tasks_are_refused(
    run: Run, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    status, _, err = run(source, "--tasks", "lm_eval:hellaswag,arc_easy")
    assert status == 2 and "pip install 'drivetrain[eval]'" in err


def test_a_perplexity_beyond_any_float_is_shown(console: Any) -> None:
    data = {"paths": {"data": "d"}, "split": "train", "seq_len": 8, "tokens": 9}
    data |= {"loss": 800.0, "perplexity": None, "bits_per_byte": 1.0}
    console.print(render({"data": data}))
    assert "800.0000" in str(console) and " inf " in str(console)


def test_the_picture_has_a_bar_for_every_share() -> None:
    number = {"value": 0.5, "stderr": 0.1}
    metrics = {"accuracy": number, "bits": {"value": 3.0, "stderr": None}}
    axes = draw({"a$b$": {"metrics": metrics, "chance": 0.25}, "b": {"metrics": {"acc": number}}}).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a$b$\naccuracy", "b\nacc"]
    assert [bar.get_width() for bar in axes.patches] == [0.5, 0.5]
