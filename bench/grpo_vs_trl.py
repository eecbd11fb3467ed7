"""GRPO beside TRL's GRPOTrainer: seconds a step, generated tokens/s, peak memory, and what reward it comes to.

A Llama with random weights learns to write digits: the reward is the share of a completion's characters that are
digits. The same weights, tokenizer, prompts (sums by reasoning-gym, as a chat), group size, lengths, learning rate
and optimizer; both draw at temperature 1 and take one update of GRPO for each rollout. fp32, or bf16 on a GPU. Each
row in a fresh process: `drivetrain launch` with one rank, and GRPOTrainer.train(). Seconds are the median over the
steps after the warm-up; the reward is the mean over the last ten steps.

TRL runs in an environment of its own: --peers-python PYTHON.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common

S = 512
ENVIRONMENT = "reasoning_gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1"
KINDS = {"drivetrain": "Drivetrain", "trl": "TRL GRPOTrainer"}


@dataclass(frozen=True, slots=True)
class Case:
    """A model's shape, and what a step takes."""

    shape: dict[str, int]
    prompts: int
    group: int
    new: int
    lr: float
    steps: int


CASES = {
    "3.4M": Case(
        {
            "hidden_size": 192,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "intermediate_size": 512,
            "vocab_size": 4096,
        },
        prompts=8,
        group=8,
        new=32,
        lr=1e-3,
        steps=60,
    ),
    "135M": Case(
        {
            "hidden_size": 576,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "intermediate_size": 1536,
            "vocab_size": 49152,
        },
        prompts=2,
        group=4,
        new=32,
        lr=1e-4,
        steps=12,
    ),
}


def digits(text: str) -> float:
    return sum(letter.isdigit() for letter in text) / max(1, len(text))


def drivetrain_reward(samples: list[Any]) -> list[float]:
    """`stage.rewards.custom.target`."""
    return [digits(sample.completion) for sample in samples]


def prepare(folder: Path, case: Case) -> None:
    """HF/: weights and a tokenizer with a chat template; prompts.jsonl for TRL."""
    import transformers

    from drivetrain.data.tokenizer import train_tokenizer
    from drivetrain.train.rl.environments import build_environment

    text = folder / "text.jsonl"
    with text.open("w") as lines:
        for path in sorted(Path(json.__file__).parent.parent.glob("*.py")):
            lines.write(json.dumps({"text": path.read_text(encoding="utf-8", errors="replace")}) + "\n")
    train_tokenizer([text], case.shape["vocab_size"], folder / "HF")
    transformers.set_seed(0)
    cfg = transformers.LlamaConfig(**case.shape, max_position_embeddings=S, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(cfg).save_pretrained(folder / "HF")
    environment = build_environment(ENVIRONMENT, 0, 0, False)
    with (folder / "prompts.jsonl").open("w") as lines:
        for number in range(case.prompts * case.steps):
            lines.write(json.dumps({"prompt": environment.problem(number).messages}) + "\n")


def drivetrain(folder: Path, case: Case, bf16: bool) -> common.Row:
    run = folder / "run"
    command = [
        str(Path(sys.executable).parent / "drivetrain"),
        "launch",
        "model=auto",
        f"model.init_from={folder / 'HF'}",
        "stage=grpo",
        f"stage.environment='{ENVIRONMENT}'",
        "stage.environment_weight=0",
        "stage.rewards.custom={weight: 1.0, target: 'grpo_vs_trl:drivetrain_reward'}",
        f"stage.steps={case.steps}",
        f"stage.seq_len={S}",
        f"stage.prompts_per_step={case.prompts}",
        f"stage.group_size={case.group}",
        f"stage.max_completion={case.new}",
        "stage.eval_every=0",
        "stage.save_every=0",
        "stage.log_every=1",
        f"optim.lr={case.lr}",
        "optim.warmup_steps=0",
        "optim.schedule=constant",
        "optim.weight_decay=0",
        f"engine.precision={'bf16' if bf16 else 'fp32'}",
        "cluster.nproc=1",
        f"run_dir={run}",
    ]
    paths = {"PYTHONPATH": str(Path(__file__).resolve().parent), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, env={**os.environ, **paths}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit((done.stderr or done.stdout)[-500:])
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    peak = json.loads((run / "summary.json").read_text())["peak_memory_bytes"]
    return {
        "seconds": [step["step_seconds"] for step in steps],
        "rewards": [step["rl/reward_mean"] for step in steps],
        "generating": [step["rl/seconds_generate"] for step in steps],
        "tokens": [step["rl/completion_tokens_mean"] * case.prompts * case.group for step in steps],
        "peak_memory_mb": round(peak / 1e6),
    }


def trl(folder: Path, case: Case, bf16: bool) -> common.Row:
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    ends: list[float] = []
    rewards: list[float] = []
    generating: list[float] = []
    tokens: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

        def on_train_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "reward" in logs:
                rewards.append(float(logs["reward"]))
                tokens.append(float(logs["completions/mean_length"]) * case.prompts * case.group)

    class Timed(GRPOTrainer):  # type: ignore[misc]
        def _generate(self, *args: Any, **more: Any) -> Any:
            began = time.perf_counter()
            found = super()._generate(*args, **more)
            generating.append(time.perf_counter() - began)
            return found

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [digits(one[0]["content"]) for one in completions]

    tokenizer = AutoTokenizer.from_pretrained(folder / "HF")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    arguments = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=case.prompts * case.group,
        num_generations=case.group,
        max_completion_length=case.new,
        max_steps=case.steps,
        shuffle_dataset=False,
        loss_type="grpo",
        learning_rate=case.lr,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        adam_beta1=0.9,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=bf16,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    Timed(
        model=AutoModelForCausalLM.from_pretrained(folder / "HF", dtype=torch.float32),
        reward_funcs=reward,
        args=arguments,
        train_dataset=load_dataset("json", data_files=str(folder / "prompts.jsonl"), split="train"),
        processing_class=tokenizer,
        callbacks=[Clock()],
    ).train()
    on_gpu = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if on_gpu else 1024 * common.status_kb("VmHWM")
    return {
        "seconds": [after - before for before, after in itertools.pairwise(ends)],
        "rewards": rewards,
        "generating": generating,
        "tokens": tokens,
        "peak_memory_mb": round(peak / 1e6),
    }


def work(kind: str, case: Case, precision: str, folder: Path, warmup: int) -> common.Row:
    found = (drivetrain if kind == "drivetrain" else trl)(folder, case, precision == "bf16")
    seconds, generating = found["seconds"][warmup:], found["generating"][warmup:]
    return {
        "seconds_a_step": round(statistics.median(seconds), 3),
        "seconds_generating": round(statistics.median(generating), 3),
        "generated_tokens_per_second": round(sum(found["tokens"][warmup:]) / sum(generating)),
        "peak_memory_mb": found["peak_memory_mb"],
        "reward_first": round(found["rewards"][0], 3),
        "reward_last": round(statistics.mean(found["rewards"][-10:]), 3),
        "steps": len(seconds),
    }


def main(arguments: list[str] | None = None) -> int:
    made = common.parser(__doc__ or "", "grpo_vs_trl", repeats=1)
    made.add_argument("--peers-python", default=sys.executable, help="a Python that has trl")
    made.add_argument("--precisions", default="bf16" if torch.cuda.is_available() else "fp32")
    made.add_argument("--warmup", type=int, default=2)
    made.add_argument("--worker", nargs=4, metavar=("KIND", "CASE", "PRECISION", "FOLDER"))
    made.add_argument("--to", type=Path)
    options = made.parse_args(arguments)
    if options.worker:
        kind, name, precision, folder = options.worker
        row = work(kind, CASES[name], precision, Path(folder), options.warmup)
        options.to.write_text(json.dumps(row))
        return 0
    found_on = common.device()
    rows = []
    for (name, case), precision in itertools.product(CASES.items(), options.precisions.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            wanted = [kind for kind in KINDS if common.wanted(f"{kind}/{name}/{precision}", options.only)]
            if wanted:
                prepare(Path(folder), case)
            for kind in wanted:
                python = sys.executable if kind == "drivetrain" else options.peers_python
                command = [str(Path(__file__).resolve()), "--worker", kind, name, precision, folder]
                row = common.run_worker([*command, "--warmup", str(options.warmup)], python)
                task = f"{case.prompts} x {case.group} x {case.new} tokens"
                rows.append({"kind": kind, "model": name, "task": task, "precision": precision, **row})
    header = ["", "model", "a step", "precision", "seconds a step", "of it generating", "generated tokens/s"]
    header += ["peak memory MB", "reward, first step", "last ten"]
    common.show("GRPO, one process", header, [line_of(row) for row in rows], options.markdown)
    if options.out or not options.quick:
        seen = common.versions("drivetrain", "torch", "transformers", "trl", "reasoning-gym")
        common.write_result(options.out or common.RESULTS / "grpo_vs_trl.json", found_on, seen, rows)
    return 0


def line_of(row: common.Row) -> list[str]:
    begin = [KINDS[row["kind"]], row["model"], row["task"], row["precision"]]
    if "error" in row:
        return [*begin, f"failed: {row['error']}", "", "", "", "", ""]
    return [
        *begin,
        f"{row['seconds_a_step']:.2f}",
        f"{row['seconds_generating']:.2f}",
        f"{row['generated_tokens_per_second']:,}",
        f"{row['peak_memory_mb']:,}",
        f"{row['reward_first']:.2f}",
        f"{row['reward_last']:.2f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
