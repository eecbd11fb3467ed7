"""The demo's reinforcement learning in short, through the command line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

Cli = Any
FIXED = ("stage.seq_len", "stage.tokens_per_step", "stage.eval_tokens")  # those of pretraining


def practice(cli: Cli, start: Path, *more: str) -> list[str]:
    words = [word for word in cli.overrides if not word.startswith(FIXED)]
    words += [
        "stage.prompts_per_step=4",
        "stage.group_size=4",
        "stage.eval_problems=6",
        "optim.warmup_steps=0",
    ]
    # Every answer is wrong; a letter tells the members of a group apart.
    words += ["stage.rewards.regex.weight=1", "stage.rewards.regex.pattern=e"]
    return ["launch", "experiment=demo_grpo", *words, f"model.init_from={start}", *more]


def test_sigkill_within_a_rollout_then_resume_is_bit_equal(undisturbed: Cli, cli: Cli) -> None:
    """Two ranks, killed when step 3 has just been logged: step 4 is being sampled, and step 2 is the last saved."""
    words = ["stage.steps=5", "stage.eval_every=5", "stage.save_every=2", "stage.max_completion=48"]
    start = undisturbed.folder / "whole"
    cli(*practice(cli, start, *words, "run_dir=whole"))
    launcher = cli.start(*practice(cli, start, *words, "run_dir=run"))
    cli.wait_for_step("run", 3, launcher)
    cli.kill_tree(launcher)
    assert max(row["step"] for row in cli.rows("run")) == 3, "it was not killed while sampling"
    assert "resumed from step_00000002" in cli("resume", "run").stdout
    assert cli.curve("run") == cli.curve("whole")
    numbers = ("rl/reward_mean", "rl/completion_tokens_mean", "rl/entropy", "grad_norm", "tokens")
    found, expected = (
        {row["step"]: [row[name] for name in numbers] for row in cli.rows(run)} for run in ("run", "whole")
    )
    assert found == expected and list(expected) == [1, 2, 3, 4, 5]


def test_the_demos_practice_in_short(undisturbed: Cli, cli: Cli) -> None:
    """A model that knows next to nothing, for three steps: what is logged, evaluated, shown and reported."""
    start = undisturbed.folder / "whole"
    words = ["stage.steps=3", "stage.eval_every=2", "stage.save_every=3", "stage.max_completion=8"]
    said = cli(*practice(cli, start, *words, "stage.eval_samples=2", "run_dir=run")).stdout
    assert "of 6 held-out problems are solved" in said
    rows = cli.rows("run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(0 < row["rl/reward_mean"] < 1 and row["grad_norm"] > 0 for row in rows)
    evaluated = [row for row in rows if "eval/accuracy" in row]
    assert [row["step"] for row in evaluated] == [1, 2, 3]
    assert all(0 <= row["eval/pass@1"] <= row["eval/pass@2"] <= 1 for row in evaluated)
    summary = cli.summary("run")
    assert summary["status"] == "completed" and summary["objective"] == rows[-1]["eval/error"]
    samples = [json.loads(line) for line in (cli.folder / "run" / "samples.jsonl").read_text().splitlines()]
    assert {"step", "prompt", "completion", "reward"} <= set(samples[-1])

    page = Path(cli("report", str(start), "run", "--out", "page").stdout.strip())
    text = (cli.folder / page).read_text(encoding="utf-8")
    assert "Right answers" in text and "(reward " in text and "Accuracy, held out" in text
    gain = [sys.executable, "-P", "-m", "drivetrain.launch.demo", "gain", str(start), "run"]
    done = subprocess.run(gain, cwd=cli.folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "Answers to held-out sums" in done.stdout and done.stdout.count("wrong") == 10
    assert "held-out sums the fine-tuned model solves" in done.stdout
