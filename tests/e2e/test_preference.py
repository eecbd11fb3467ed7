"""From pairs of answers to a model that prefers, and to one that judges, through the command line."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drivetrain.conf.errors import ConfigError
from drivetrain.conf.rewards import ModelReward, RewardsConfig
from drivetrain.train.rl.reward_model_reward import RewardModelReward
from drivetrain.train.rl.rewards import Sample, build_rewards

Cli = Any


def build_pairs(cli: Cli, tokenizer: Path) -> None:
    """In every pair the chosen answer has the word `return`."""
    draw = random.Random(0)
    lines = []
    for number in range(200):
        ends = [" ".join(draw.choices(["self", "if", "not"], k=draw.randint(1, 3))) for _ in range(2)]
        chosen, rejected = f"return {ends[0]}", f"import {ends[1]}"
        lines.append(json.dumps({"prompt": f"def f{number}", "chosen": chosen, "rejected": rejected}))
    (cli.folder / "pairs.jsonl").write_text("\n".join([*lines, '{"chosen": "a"}']) + "\n")
    words = (
        "--pairs",
        "--tokenizer",
        str(tokenizer),
        "--out",
        "pairs",
        "--held-out",
        "0.2",
        "--workers",
        "1",
    )
    built = cli("data", "build", "pairs.jsonl", *words)
    assert " pairs" in built.stdout and "line 201: no rejected answer" in built.stderr
    cli("data", "verify", "pairs")


def test_pairs_to_preferences(undisturbed: Cli, cli: Cli) -> None:
    build_pairs(cli, undisturbed.folder / "whole" / "tokenizer")
    words = [*cli.overrides, "data.path=pairs", f"model.init_from={undisturbed.folder / 'whole'}"]
    words += ["stage.seq_len=64", "stage.tokens_per_step=512", "optim.lr=1e-2", "optim.schedule=constant"]
    words += ["stage.eval_every=8", "stage.steps=16"]

    run = ["launch", "stage=dpo", *words, "stage.sample_prompts=['def f7']", "stage.sample_tokens=4"]
    cli(*run, "run_dir=whole")
    rows = cli.rows("whole")
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert rows[-1]["eval/accuracy"] > 0.95 and rows[-1]["rewards/margin"] > 0
    assert cli.summary("whole")["best"]["eval/accuracy"] == max(row.get("eval/accuracy", 0) for row in rows)

    # Interrupted after step 8, and gone on with one rank: the reference is the same, and so is the curve.
    cli(*run, "run_dir=half", "stage.steps=8", "stage.save_every=8")
    cli("resume", "half", "stage.steps=16", "cluster.nproc=1")
    whole, half = cli.curve("whole"), cli.curve("half")
    assert {step: half[step][1] for step in half} == {step: whole[step][1] for step in half}
    assert half[16][0] == pytest.approx(whole[16][0], rel=1e-3)
    (cli.folder / "half" / "reference" / "data_train.npy").unlink()
    assert "has been trained since; restore it" in cli("resume", "half", "stage.steps=20", status=1).stderr


def test_pairs_to_a_judge(undisturbed: Cli, cli: Cli) -> None:
    build_pairs(cli, undisturbed.folder / "whole" / "tokenizer")
    words = [*cli.overrides, "data.path=pairs", f"model.init_from={undisturbed.folder / 'whole'}"]
    words += ["stage.seq_len=64", "stage.tokens_per_step=512", "optim.lr=1e-2", "optim.schedule=constant"]
    words += ["stage.eval_every=8", "stage.save_every=8"]

    cli("launch", "stage=reward_model", *words, "run_dir=judge", "stage.steps=16")
    cli("resume", "judge", "stage.steps=20", "cluster.nproc=1", "engine=zero")
    cli(
        "launch",
        "stage=reward_model",
        *words,
        "run_dir=lora",
        "stage.steps=8",
        "lora.rank=8",
        "optim.lr=3e-2",
    )
    cli("resume", "lora", "stage.steps=16", "cluster.nproc=1")
    for run in ("judge", "lora"):
        assert cli.rows(run)[-1]["eval/accuracy"] > 0.9
        judge(RewardModelReward(cli.folder / run, batch_tokens=64))
        assert "is a reward model's" in cli("export", run, f"{run}_hf", status=1).stderr
    rewards = build_rewards(
        RewardsConfig(reward_model=ModelReward(weight=2, run=str(cli.folder / "judge"))), 8
    )
    sample = Sample([{"role": "user", "content": "def f1"}], "return if", 2, "stop")
    (score,) = RewardModelReward(cli.folder / "judge").score([sample])["reward_model"]
    assert rewards.score([sample]) == {"reward_model": [2 * score]}
    with pytest.raises(ConfigError, match="holds no reward model"):
        RewardModelReward(undisturbed.folder / "whole")
    for run in ("judge", "lora"):
        assert "is a reward model's" in cli("generate", run, "--prompt", "a", status=1).stderr


def judge(reward: RewardModelReward) -> None:
    """The planted preference, and scores that company in a pass does not change."""
    asked = [{"role": "user", "content": "def f300"}]
    answers = [
        Sample(asked, f"{word} {'if ' * n}", 1, "stop") for n in range(4) for word in ("return", "import")
    ]
    scores = np.array(reward.score(answers)["reward_model"]).reshape(-1, 2)
    assert (scores[:, 0] > scores[:, 1]).all()
    alone = [reward.score([answer])["reward_model"][0] for answer in answers]
    assert alone == pytest.approx(scores.flatten().tolist(), abs=1e-4)
    unreadable = Sample([{"role": "nobody", "content": None}], "a", 1, "stop")
    assert reward.score([]) == {"reward_model": []}
    (score,) = reward.score([unreadable])["reward_model"]
    assert isinstance(score, float)
