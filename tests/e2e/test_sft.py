"""From conversations to a model that answers, through the command line."""

import json
from pathlib import Path
from typing import Any

Cli = Any


def test_conversations_to_answers(undisturbed: Cli, cli: Cli) -> None:
    """Fine-tunes the pretrained run; every answer is the same word, which the model learns."""
    same = {"role": "assistant", "content": "return"}
    asked = [{"role": "user", "content": f"import {i}?"} for i in range(300)]
    lines = [json.dumps({"messages": [question, same]}) for question in asked]
    (cli.folder / "chat.jsonl").write_text("\n".join([*lines, '{"messages": 1}']) + "\n")
    tokenizer = str(undisturbed.folder / "whole" / "tokenizer")
    words = ("--chat", "--tokenizer", tokenizer, "--out", "shards", "--held-out", "0.1", "--workers", "1")
    built = cli("data", "build", "chat.jsonl", *words)
    assert "conversations" in built.stdout and "of them learned" in built.stdout
    assert "chat.jsonl, line 301: messages is not a list of objects" in built.stderr
    cli("data", "verify", "shards")

    run = ["launch", "stage=sft", *cli.overrides, "data.path=shards", "run_dir=run", "stage.seq_len=64"]
    run += [
        f"model.init_from={undisturbed.folder / 'whole'}",
        "stage.sample_prompts=['import 7?']",
        *("optim.lr=2e-2", "optim.schedule=constant", "stage.tokens_per_step=1024", "stage.micro_batch=8"),
    ]
    said = cli(*run, "stage.save_every=8").stdout
    assert "conversations in rows of 64 tokens that are" in said
    rows = cli.rows("run")
    assert rows[-1]["loss"] < 0.5 < rows[0]["loss"] and rows[-1]["data/utilisation"] > 0.7
    samples = [json.loads(line) for line in (cli.folder / "run" / "samples.jsonl").read_text().splitlines()]
    assert samples[-1] == {"step": 24, "prompt": "import 7?", "completion": "return"}

    generate = ("generate", "run", "--chat", "--prompt", "import 9?", "--temperature", "0", "--json")
    answer = json.loads(cli(*generate).stdout)
    assert answer["text"] == "return" and answer["finish_reason"] == "stop"

    # Interrupted after step 8, and gone on with one rank: the same rows, and the same curve to rounding.
    whole = cli.curve("run")
    cli(*[word.replace("run_dir=run", "run_dir=half") for word in run], "stage.steps=8", "stage.save_every=8")
    cli("resume", "half", "stage.steps=24", "cluster.nproc=1")
    half = cli.curve("half")
    assert {step: half[step][1] for step in half} == {step: whole[step][1] for step in half}
    assert Path(cli.folder / "half" / "summary.json").is_file()
