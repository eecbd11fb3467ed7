"""What GRPO adds to the demo's fine-tuned model: accuracy on held-out sums before and after, on three seeds.

Each seed fine-tunes the model that `make demo` pretrained (experiment=demo_sft), and has it practise
(experiment=demo_grpo), both on two CPU ranks. Held-out sums are in no text, conversation or rollout, and the same
for every seed; answers are greedy. `--staleness 0,2` also runs stage.rollout.max_staleness=2, from the same
fine-tuned models. With --runs DIR runs stay, and what is complete there is not run again.
"""

import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common

PICTURE = common.BENCH.parent / "docs" / "grpo_learning.png"
QUICK = {
    "demo_sft": ["stage.steps=2", "stage.eval_every=0", "stage.save_every=2", "optim.warmup_steps=0"],
    "demo_grpo": [
        "stage.steps=2",
        "stage.eval_every=1",
        "stage.save_every=2",
        "stage.prompts_per_step=2",
        "stage.eval_problems=8",
        "stage.eval_samples=0",
        "optim.warmup_steps=0",
    ],
}


def launch(experiment: str, run_dir: Path, words: list[str], quick: bool) -> str | None:
    """Run it, unless it is complete there; what went wrong, if anything did."""
    summary = run_dir / "summary.json"
    if summary.is_file() and json.loads(summary.read_text())["status"] == "completed":
        return None
    command = [str(Path(sys.executable).parent / "drivetrain"), "launch", f"experiment={experiment}"]
    command += [*words, f"run_dir={run_dir}", "tracker=none", *(QUICK[experiment] if quick else [])]
    print(" ".join(command), file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return next((line for line in lines if line.startswith("error:")), lines[-1])[:300]


def row_of(run_dir: Path) -> common.Row:
    """Accuracy at every evaluation; the first is that of the fine-tuned model."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    evaluated = [row for row in rows if "eval/accuracy" in row]
    summary = run_dir / "summary.json"
    finished = datetime.datetime.fromtimestamp(summary.stat().st_mtime, datetime.UTC)
    first, last = evaluated[0]["eval/accuracy"], evaluated[-1]["eval/accuracy"]
    return {
        "before": round(first, 4),
        "after": round(last, 4),
        "gain_points": round(100 * (last - first), 1),
        "accuracy": [[row["step"], round(row["eval/accuracy"], 4)] for row in evaluated],
        "pass@1": [[row["step"], round(row["eval/pass@1"], 4)] for row in evaluated if "eval/pass@1" in row],
        "completion_tokens": [round(row["eval/completion_tokens_mean"], 1) for row in evaluated],
        "staleness_mean": round(sum(row.get("rl/staleness", 0.0) for row in rows) / len(rows), 3),
        "steps": rows[-1]["step"],
        "seconds": round(json.loads(summary.read_text())["wall_seconds"], 1),
        "finished": finished.isoformat(timespec="seconds"),
    }


def begun_with_a_step(run: Path) -> float:
    """The share of held-out sums that the fine-tuned model solves if its answer is made to begin with `4+`, as its
    answers with steps do."""
    from drivetrain.data.chat import Chat
    from drivetrain.launch.demo import HELD_OUT, held_out_sums, mark
    from drivetrain.model.generate import Request, Sampling
    from drivetrain.train.serve import open_model

    opened = open_model(run)
    chat = Chat(opened.tokenizer_dir)
    stop = chat.stop_id()
    greedy = Sampling(max_tokens=48, temperature=0, stop_tokens=() if stop is None else (stop,))
    asked = held_out_sums(HELD_OUT)
    starts = [opened.tokenizer.encode(each.steps[:2], add_special_tokens=False).ids for each in asked]
    prompts = [chat.prompt([{"role": "user", "content": each.question}]) for each in asked]
    requests = [Request(prompt + start, greedy) for prompt, start in zip(prompts, starts, strict=True)]
    found = opened.generator(max_batch=64).generate(requests)
    answers = [opened.tokenizer.decode(completions[0].tokens) for completions in found]
    right = [mark(answer, each.result) == "right" for answer, each in zip(answers, asked, strict=True)]
    return sum(right) / len(right)


def measure(demo: Path, runs: Path, seed: int, staleness: int, quick: bool) -> common.Row:
    tuned = runs / f"sft_{seed}"
    words = [f"seed={seed}", f"data.path={demo / 'chat' / 'shards'}", f"model.init_from={demo / 'run'}"]
    if failed := launch("demo_sft", tuned, words, quick):
        return {"error": failed}
    practised = runs / f"grpo_{seed}_{staleness}"
    words = [f"seed={seed}", f"model.init_from={tuned}"]
    words += [f"stage.rollout.max_staleness={staleness}"] if staleness else []
    if failed := launch("demo_grpo", practised, words, quick):
        return {"error": failed}
    seconds = json.loads((tuned / "summary.json").read_text())["wall_seconds"]
    begun = round(begun_with_a_step(tuned), 4)
    return {**row_of(practised), "before_begun_with_a_step": begun, "sft_seconds": round(seconds, 1)}


def draw(rows: list[common.Row], path: Path) -> None:
    """Accuracy over steps, a line a run."""
    from drivetrain.launch.charts import LIGHT, Chart, draw
    from drivetrain.launch.report import Run

    runs = [
        Run(
            name=f"seed {row['seed']}" + (f", staleness {row['staleness']}" if row["staleness"] else ""),
            rows=[{"step": step, "eval/accuracy": share} for step, share in row["accuracy"]],
        )
        for row in rows
        if "accuracy" in row
    ]
    chart = Chart(
        slug="grpo_learning",
        title="Held-out sums solved, greedy answers",
        unit="share",
        evaluation="eval/accuracy",
        from_zero=True,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(chart, runs, LIGHT, titled=True).savefig(path, dpi=160)


def line_of(row: common.Row) -> list[str]:
    name = [str(row["seed"]), str(row["staleness"])]
    if "error" in row:
        return [*name, f"not measured: {row['error']}", "", "", "", "", ""]
    shares = [f"{row[key]:.1%}" for key in ("before", "before_begun_with_a_step", "after")]
    shares.append(f"{row['gain_points']:+.1f}")
    return [*name, *shares, str(row["steps"]), f"{row['seconds']:.0f}"]


def main(arguments: list[str] | None = None) -> int:
    made = common.parser(__doc__ or "", "grpo_learning", repeats=1)
    made.add_argument("--demo", type=Path, default=Path("demo"), help="what `make demo` made")
    made.add_argument("--seeds", default="0,1,2")
    made.add_argument("--staleness", default="0,2", help="of rollouts, in updates; 0: synchronous")
    made.add_argument("--runs", type=Path, default=None, help="keep the runs there, and use what is complete")
    made.add_argument("--picture", type=Path, default=None, help=f"default {PICTURE.name} in docs")
    options = made.parse_args(arguments)
    found_on = common.device()
    with tempfile.TemporaryDirectory() as folder:
        runs = (options.runs or Path(folder)).resolve()
        rows: list[dict[str, Any]] = []
        for staleness in map(int, options.staleness.split(",")):
            for seed in map(int, options.seeds.split(",")):
                if common.wanted(f"{seed}/{staleness}", options.only):
                    found = measure(options.demo.resolve(), runs, seed, staleness, options.quick)
                    rows.append({"seed": seed, "staleness": staleness, **found})
    header = ["seed", "staleness", "before", "begun with a step", "after", "points", "steps", "seconds"]
    common.show("held-out sums solved", header, [line_of(row) for row in rows], options.markdown)
    if options.out or not options.quick:
        seen = common.versions("drivetrain", "torch", "reasoning_gym")
        common.write_result(options.out or common.RESULTS / "grpo_learning.json", found_on, seen, rows)
    if any("accuracy" in row for row in rows) and (options.picture or not options.quick):
        draw(rows, options.picture or PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
