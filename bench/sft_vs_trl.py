"""Fine-tuning on conversations beside TRL's SFTTrainer: real tokens/s and peak memory.

SmolLM2's 135M shape with random weights, fp32 or bf16; conversations of very mixed length made of the Python
standard library (a function's source, then its docstring), at most 512 tokens each; about 4 x 512 tokens a step,
AdamW. Both get the same JSONL, tokenizer and chat template; each row in a fresh process. A real token is one of a
conversation, not padding. The rate is over the steps after the warm-up.

TRL runs in an environment of its own: --peers-python PYTHON.
"""

import ast
import inspect
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common

VOCAB, S, ROWS = 8192, 512, 4
KINDS = {
    "drivetrain": "Drivetrain, packed",
    "trl-packed": "TRL SFTTrainer, packing",
    "trl-padded": "TRL SFTTrainer, padding",
}
SHAPE = {"hidden_size": 576, "layers": 30, "heads": 9, "kv_heads": 3, "ffn": 1536, "vocab": 49152}


def conversations() -> Iterator[dict[str, Any]]:
    """Every documented function of the standard library's top folder."""
    for path in sorted(Path(json.__file__).parent.parent.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef) or not (said := ast.get_docstring(node)):
                continue
            code = ast.get_source_segment(source, node) or node.name
            question = f"What does this do?\n\n{inspect.cleandoc(code)[:1200]}"
            yield {
                "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": said}]
            }


def prepare(folder: Path) -> None:
    """conversations.jsonl of those that fit, a tokenizer with a chat template, and shards."""
    from drivetrain.data.build import build
    from drivetrain.data.chat import Chat
    from drivetrain.data.tokenizer import train_tokenizer

    every = list(conversations())
    text = folder / "text.jsonl"
    text.write_text(
        "".join(
            json.dumps({"text": message["content"]}) + "\n" for row in every for message in row["messages"]
        )
    )
    train_tokenizer([text], VOCAB, folder / "tokenizer")
    chat = Chat(folder / "tokenizer")
    fitting = [row for row in every if len(chat.prompt(row["messages"])) < S - 8]
    jsonl = folder / "conversations.jsonl"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in fitting))
    build([jsonl], folder / "tokenizer", folder / "shards", held_out=0.0, workers=1, chat=True)


def drivetrain(folder: Path, bf16: bool, steps: int) -> list[tuple[float, int]]:
    """Seconds and real tokens of each step."""
    from drivetrain.conf.compose import compose
    from drivetrain.conf.schema import FsdpConfig, TooLong
    from drivetrain.data.loader import share_of
    from drivetrain.data.sft import SftSource
    from drivetrain.model.backend import backend_of
    from drivetrain.model.initialize import initialize
    from drivetrain.model.transformer import build_model
    from drivetrain.train.engine.fsdp import FsdpEngine
    from drivetrain.train.losses import next_token_loss
    from drivetrain.train.mesh import init_world

    words = [
        "model=smollm2_135m",
        f"engine.precision={'bf16' if bf16 else 'fp32'}",
        f"data.path={folder}/shards",
    ]
    config = compose(words)
    assert isinstance(config.engine, FsdpConfig)
    world = init_world(config.cluster.device)
    backend = backend_of(config.kernels, world.device)
    model = build_model(config.model, backend)
    engine = FsdpEngine(
        config.engine, config.optim, config.model, model, world, lambda m: initialize(m, config.model, 0)
    )
    source = SftSource(config.data, S, TooLong.drop, share_of(ROWS, ROWS, 0, 1), 0)
    found, before = [], 0
    for _ in range(steps):
        began = time.perf_counter()
        engine.accumulate(
            source.next_step(), lambda m, batch: next_token_loss(m, batch, config.model, backend)
        )
        engine.step(1.0)
        real = int(source.state()["tokens"])
        found.append((time.perf_counter() - began, real - before))
        before = real
    return found


def trl(folder: Path, bf16: bool, packed: bool, steps: int) -> list[tuple[float, int]]:
    import transformers
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    on_cpu = not torch.cuda.is_available()
    cfg = LlamaConfig(
        vocab_size=SHAPE["vocab"],
        hidden_size=SHAPE["hidden_size"],
        num_hidden_layers=SHAPE["layers"],
        num_attention_heads=SHAPE["heads"],
        num_key_value_heads=SHAPE["kv_heads"],
        intermediate_size=SHAPE["ffn"],
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        use_cache=False,
    )
    transformers.logging.set_verbosity_error()
    ends: list[float] = []
    tokens: list[int] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    class Counting(SFTTrainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
            mask = inputs.get("attention_mask")
            tokens.append(int(inputs["input_ids"].numel() if mask is None else (mask > 0).sum()))
            return super().training_step(model, inputs, *rest, **more)

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    arguments = SFTConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=ROWS if packed else 2 * ROWS,  # a conversation fills about half a row
        max_steps=steps + 1,
        max_length=S,
        packing=packed,
        assistant_only_loss=True,
        learning_rate=1e-5,
        optim="adamw_torch_fused",
        bf16=bf16,
        gradient_checkpointing=False,
        use_cpu=on_cpu,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    data = load_dataset("json", data_files=str(folder / "conversations.jsonl"), split="train")
    Counting(
        model=LlamaForCausalLM(cfg),
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[Clock()],
    ).train()
    seconds = [after - before for before, after in itertools.pairwise(ends)]
    return list(zip(seconds, tokens[1:], strict=False))


def work(kind: str, precision: str, folder: Path, steps: int, warmup: int) -> common.Row:
    torch.manual_seed(0)
    bf16 = precision == "bf16"
    if kind == "drivetrain":
        found = drivetrain(folder, bf16, steps + warmup)
    else:
        found = trl(folder, bf16, kind == "trl-packed", steps + warmup)
    counted = found[warmup:]
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 1e6
    else:
        peak = 1024 * common.status_kb("VmHWM") / 1e6
    return {
        "tokens_per_second": round(sum(n for _, n in counted) / sum(s for s, _ in counted), 1),
        "tokens_a_step": round(statistics.mean(n for _, n in counted)),
        "seconds_a_step": round(statistics.median(s for s, _ in counted), 2),
        "peak_memory_mb": round(peak),
        "steps": len(counted),
        "threads": torch.get_num_threads(),
    }


def main(arguments: list[str] | None = None) -> int:
    made = common.parser(__doc__ or "", "sft_vs_trl", repeats=1)
    made.add_argument("--peers-python", default=sys.executable, help="a Python that has trl")
    made.add_argument("--precisions", default="fp32,bf16")
    made.add_argument("--steps", type=int, default=5)
    made.add_argument("--warmup", type=int, default=1)
    made.add_argument("--worker", nargs=3, metavar=("KIND", "PRECISION", "FOLDER"))
    made.add_argument("--to", type=Path)
    options = made.parse_args(arguments)
    if options.quick:
        options.steps = 1
    if options.worker:
        kind, precision, folder = options.worker
        options.to.write_text(json.dumps(work(kind, precision, Path(folder), options.steps, options.warmup)))
        return 0
    found_on = common.device()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for precision, (kind, title) in itertools.product(options.precisions.split(","), KINDS.items()):
            if common.wanted(f"{kind}/{precision}", options.only):
                python = sys.executable if kind == "drivetrain" else options.peers_python
                pace = ["--steps", str(options.steps), "--warmup", str(options.warmup)]
                command = [str(Path(__file__).resolve()), "--worker", kind, precision, folder, *pace]
                rows.append(
                    {
                        "kind": kind,
                        "title": title,
                        "precision": precision,
                        **common.run_worker(command, python),
                    }
                )
    header = ["", "precision", "real tokens/s", "tokens a step", "seconds a step", "peak memory MB"]
    common.show("SFT, 135M parameters, 512 tokens", header, [line_of(row) for row in rows], options.markdown)
    if options.out or not options.quick:
        seen = common.versions("drivetrain", "torch", "transformers", "trl")
        common.write_result(options.out or common.RESULTS / "sft_vs_trl.json", found_on, seen, rows)
    return 0


def line_of(row: common.Row) -> list[str]:
    if "error" in row:
        return [row["title"], row["precision"], f"failed: {row['error']}", "", "", ""]
    return [
        row["title"],
        row["precision"],
        f"{row['tokens_per_second']:,.0f}",
        f"{row['tokens_a_step']:,}",
        f"{row['seconds_a_step']:.1f}",
        f"{row['peak_memory_mb']:,}",
    ]


if __name__ == "__main__":
    sys.exit(main())
