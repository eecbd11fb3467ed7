"""A whole bf16 training step on one GPU: Drivetrain beside transformers with Liger-Kernel and torch.compile.

gpt2_xl at 1,024 and llama3_1b at 4,096 tokens a sequence, 16,384 tokens a micro-batch, AdamW with fp32 weights and
moments, gradients clipped to norm 1, the same random tokens. Each in a fresh process, one after the other. MFU is
`model.flops.train_flops_per_token` over the data sheet's dense bf16 rate; the rate of a large matmul measured
beside it says what the card really does.
"""

import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common

SHAPES = {"gpt2_xl": (1024, 16), "llama3_1b": (4096, 4), "tiny": (256, 2)}  # tokens and number of sequences
KINDS = {
    "triton": "Drivetrain, kernels=triton",
    "triton-compiled": "Drivetrain, kernels=triton engine.compile=true",
    "sdpa": "Drivetrain, kernels=sdpa",
    "sdpa-compiled": "Drivetrain, kernels=sdpa engine.compile=true",
    "transformers": "transformers",
    "transformers-compiled": "transformers, torch.compile",
    "liger": "transformers, Liger-Kernel",
    "liger-compiled": "transformers, Liger-Kernel, torch.compile",
}
OVERRIDES = ["data.path=none", "engine.precision=bf16", "optim.grad_clip=1.0"]


def windows(model: str, vocab_size: int) -> Iterator[Tensor]:
    """Random tokens, int64 [sequences, S + 1] a step, never 0, which would end a document."""
    seq_len, sequences = SHAPES[model]
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(1, vocab_size, (sequences, seq_len + 1), generator=generator)


def drivetrain(model: str, kernels: str, compiled: bool, device: torch.device) -> Iterator[None]:
    from drivetrain.conf.compose import compose
    from drivetrain.conf.schema import Device, PretrainConfig
    from drivetrain.data.batch import Batch, batch_from_windows
    from drivetrain.kernels.linear_cross_entropy import linear_cross_entropy
    from drivetrain.model.initialize import initialize
    from drivetrain.train.build import build_engine
    from drivetrain.train.evaluate import documents_of
    from drivetrain.train.mesh import init_world

    config = compose(
        [*OVERRIDES, f"model={model}", f"kernels={kernels}", f"engine.compile={str(compiled).lower()}"]
    )
    assert isinstance(config.stage, PretrainConfig)
    world = init_world(Device(device.type))
    engine = build_engine(config, world, lambda built: initialize(built, config.model, 0))

    def loss(module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        def read(hidden_TD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
            return linear_cross_entropy(
                hidden_TD, weight_VD, batch.targets_T, batch.loss_weights_T, backend=kernels
            )

        documents = documents_of(batch, config.model.sliding_window, kernels)
        minimise, nll = module(batch.tokens_T, batch.positions_T, documents, read)
        return minimise, {"loss": nll}

    for window in windows(model, config.model.vocab_size):
        engine.accumulate([batch_from_windows(window.numpy(), eos_id=0)], loss)
        engine.step(1.0)
        yield


def transformers_llama(model: str, liger: bool, compiled: bool, device: torch.device) -> Iterator[None]:
    """fp32 weights under bf16 autocast, as transformers' Trainer runs `bf16=True`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from drivetrain.conf.compose import compose

    cfg = compose([*OVERRIDES, f"model={model}"]).model
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    theirs = LlamaConfig(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.dim,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.kv_heads,
        head_dim=cfg.head_dim,
        intermediate_size=cfg.ffn_dim,
        max_position_embeddings=cfg.max_seq_len,
        tie_word_embeddings=cfg.tie_embeddings,
        attn_implementation="sdpa",
        use_cache=False,
    )
    with torch.device(device):
        net = LlamaForCausalLM(theirs)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    run: Any = torch.compile(net) if compiled else net
    for window in windows(model, cfg.vocab_size):
        tokens = window[:, :-1].to(device)  # transformers shifts the labels itself
        with torch.autocast(device.type, torch.bfloat16):
            loss = run(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield


def matmul_rate(device: torch.device, size: int) -> float:
    """bf16 FLOP/s of a square product, the median of ten."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(13):
        wait(device)
        began = time.perf_counter()
        torch.mm(a, b)
        wait(device)
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(seconds[3:])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def work(model: str, kind: str, device: torch.device, steps: int, warmup: int) -> common.Row:
    from drivetrain.conf.compose import compose
    from drivetrain.model.flops import peak_flops, train_flops_per_token

    name, _, compiled = kind.partition("-")
    if name in ("triton", "sdpa"):
        running = drivetrain(model, name, bool(compiled), device)
    else:
        running = transformers_llama(model, name == "liger", bool(compiled), device)
    seconds = []
    for _ in range(warmup + steps):
        began = time.perf_counter()
        next(running)
        wait(device)
        seconds.append(time.perf_counter() - began)
    seq_len, sequences = SHAPES[model]
    rate = seq_len * sequences / statistics.median(seconds[warmup:])
    flops = rate * train_flops_per_token(compose([*OVERRIDES, f"model={model}"]).model, seq_len)
    on_gpu = device.type == "cuda"
    peak = peak_flops(torch.cuda.get_device_name(device), "bf16") if on_gpu else None
    memory = torch.cuda.max_memory_allocated() if on_gpu else 1024 * common.status_kb("VmHWM")
    return {
        "tokens_per_second": round(rate),
        "step_ms": round(1e3 * statistics.median(seconds[warmup:]), 2),
        "mfu": round(flops / peak, 4) if peak else None,
        "share_of_matmul": round(flops / matmul_rate(device, 8192 if on_gpu else 1024), 4),
        "peak_memory_mb": round(memory / 1e6),
        "first_step_seconds": round(seconds[0], 2),
        "steps": steps,
    }


def main(arguments: list[str] | None = None) -> int:
    made = common.parser(__doc__ or "", "step", repeats=1)
    made.add_argument("--steps", type=int, default=15)
    made.add_argument("--warmup", type=int, default=5)
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the tiny model only")
    made.add_argument("--worker", nargs=2, metavar=("MODEL", "KIND"))
    made.add_argument("--to", type=Path)
    options = made.parse_args(arguments)
    device = torch.device(options.device)
    if options.quick:
        options.steps, options.warmup = 2, 1
    if options.worker:
        options.to.write_text(json.dumps(work(*options.worker, device, options.steps, options.warmup)))
        return 0
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            "bench/step.py needs a GPU and torch sees none; --device cpu --quick tries the script",
            file=sys.stderr,
        )
        return 2

    models = ["tiny"] if device.type == "cpu" else ["gpt2_xl", "llama3_1b"]
    pace = ["--device", device.type, "--steps", str(options.steps), "--warmup", str(options.warmup)]
    rows = []
    for model in models:
        for kind, title in KINDS.items():
            if common.wanted(f"{model}/{kind}", options.only):
                row = common.run_worker([__file__, "--worker", model, kind, *pace])
                rows.append({"model": model, "kind": kind, "title": title, **row})
    header = ["", "model", "tokens/s", "MFU", "share of matmul", "peak memory MB", "first step s"]
    common.show("Training step, bf16", header, [line_of(row) for row in rows], options.markdown)
    if options.out or not options.quick:
        found_on = {**common.device(), "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None}
        seen = common.versions("drivetrain", "torch", "triton", "transformers", "liger-kernel")
        common.write_result(options.out or common.RESULTS / "step.json", found_on, seen, rows)
    return 0


def line_of(row: common.Row) -> list[str]:
    if "error" in row:
        return [row["title"], row["model"], f"failed: {row['error']}", "", "", "", ""]
    return [
        row["title"],
        row["model"],
        f"{row['tokens_per_second']:,}",
        "-" if row["mfu"] is None else f"{100 * row['mfu']:.1f}%",
        f"{100 * row['share_of_matmul']:.0f}%",
        f"{row['peak_memory_mb']:,}",
        f"{row['first_step_seconds']:.1f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
