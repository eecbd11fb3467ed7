"""One process's training step beside plain PyTorch, torch.compile and transformers' Trainer.

A 10.5M Llama (8 layers, width 256, 4 heads of 64, FF 688, vocabulary 8,192, untied), 8 x 512 tokens a step, AdamW,
gradients clipped to norm 1, in fp32 and in bf16 (the others: fp32 weights under autocast). Each in a fresh process,
one after the other, on the same random tokens. The rate is the median over the steps after the warm-up.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
import itertools

import common

V, D, LAYERS, N, H, FF = 8192, 256, 8, 4, 64, 688
B, S = 8, 512  # sequences and tokens of a sequence in a step
LR, CLIP = 3e-4, 1.0
# Multiplications and additions a token: 6 for each weight in a matrix product; attention over S/2 keys on average.
FLOPS = 6 * (LAYERS * (4 * D * N * H + 3 * D * FF) + D * V) + 6 * LAYERS * S * N * H


def windows() -> Iterator[Tensor]:
    """Random tokens, int64 [B, S + 1] a step, never 0."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(1, V, (B, S + 1), generator=generator)


# A peer yields after every optimizer step: the loss, when it was asked for.
Steps = Iterator[Any]


def drivetrain(bf16: bool, compiled: bool) -> Steps:
    from drivetrain.conf.schema import AdamWConfig, Device, FsdpConfig, ModelConfig, Precision
    from drivetrain.data.batch import Batch, batch_from_windows
    from drivetrain.kernels.linear_cross_entropy import linear_cross_entropy
    from drivetrain.model.initialize import initialize
    from drivetrain.model.transformer import build_model
    from drivetrain.train.engine.fsdp import FsdpEngine
    from drivetrain.train.evaluate import documents_of
    from drivetrain.train.mesh import init_world

    shape = {
        "vocab_size": V,
        "dim": D,
        "layers": LAYERS,
        "heads": N,
        "kv_heads": N,
        "head_dim": H,
        "ffn_dim": FF,
    }
    model_cfg = ModelConfig(name="bench", max_seq_len=S, **shape)
    cfg = FsdpConfig(name="fsdp", precision=Precision.bf16 if bf16 else Precision.fp32, compile=compiled)
    optim = AdamWConfig(name="adamw", lr=LR, grad_clip=CLIP)
    model = build_model(model_cfg, "sdpa")
    engine = FsdpEngine(
        cfg, optim, model_cfg, model, init_world(Device.cpu), lambda m: initialize(m, model_cfg, 0)
    )

    def loss(module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        def read(hidden_TD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
            return linear_cross_entropy(hidden_TD, weight_VD, batch.targets_T, batch.loss_weights_T)

        minimise, nll = module(batch.tokens_T, batch.positions_T, documents_of(batch, None, "sdpa"), read)
        return minimise, {"loss": nll}

    for window in windows():
        stats = engine.accumulate([batch_from_windows(window.numpy(), eos_id=0)], loss)
        engine.step(1.0)
        yield stats["loss"]


class PlainBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(D, eps=1e-5) for _ in range(2))
        self.q, self.k, self.v = (nn.Linear(D, N * H, bias=False) for _ in range(3))
        self.o = nn.Linear(N * H, D, bias=False)
        self.gate, self.up = (nn.Linear(D, FF, bias=False) for _ in range(2))
        self.down = nn.Linear(FF, D, bias=False)

    def forward(self, x_BSD: Tensor, cos_SH: Tensor, sin_SH: Tensor) -> Tensor:
        y_BSD = self.norms[0](x_BSD)
        q, k, v = (f(y_BSD).view(*y_BSD.shape[:2], N, H).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = _rotate(q, cos_SH, sin_SH), _rotate(k, cos_SH, sin_SH)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BSD = x_BSD + self.o(out.transpose(1, 2).flatten(2))
        y_BSD = self.norms[1](x_BSD)
        return x_BSD + self.down(F.silu(self.gate(y_BSD)) * self.up(y_BSD))  # type: ignore[no-any-return]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-right, left), dim=-1) * sin.to(x.dtype)


class Plain(nn.Module):
    """The same network as people write it for PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.blocks = nn.ModuleList(PlainBlock() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(D, eps=1e-5)
        self.head = nn.Linear(D, V, bias=False)
        angles = torch.outer(torch.arange(S), 10000.0 ** (-torch.arange(0, H, 2) / H)).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens_BS: Tensor, targets_BS: Tensor) -> Tensor:
        x_BSD = self.embed(tokens_BS)
        for block in self.blocks:
            x_BSD = block(x_BSD, self.cos, self.sin)
        logits = self.head(self.norm(x_BSD))
        return F.cross_entropy(logits.view(-1, V).float(), targets_BS.reshape(-1))


def plain(bf16: bool, compiled: bool) -> Steps:
    model = Plain()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    run: Callable[[Tensor, Tensor], Tensor] = torch.compile(model) if compiled else model
    for window in windows():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = run(window[:, :-1], window[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield loss.item()


def trainer(bf16: bool, steps: int) -> list[float]:
    """Seconds of each step of transformers' Trainer, its own data loading included."""
    import transformers
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    transformers.logging.set_verbosity_error()
    cfg = LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=LAYERS,
        num_attention_heads=N,
        num_key_value_heads=N,
        head_dim=H,
        intermediate_size=FF,
        max_position_embeddings=S,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        use_cache=False,
    )
    source = windows()
    rows = [row[:S] for _ in range(steps) for row in next(source)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=B,
            max_steps=steps,
            learning_rate=LR,
            adam_beta2=0.95,
            weight_decay=0.1,
            max_grad_norm=CLIP,
            optim="adamw_torch_fused",
            bf16=bf16,
            use_cpu=not torch.cuda.is_available(),
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        data: Any = [{"input_ids": row, "labels": row} for row in rows]
        Trainer(LlamaForCausalLM(cfg), arguments, train_dataset=data, callbacks=[Clock()]).train()
    return [after - before for before, after in itertools.pairwise(ends)]


def matmul_rate(bf16: bool) -> float:
    """FLOP/s of a 2048 x 2048 x 2048 product, the best of a few."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        began = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - began)
    return 2 * 2048**3 / best


KINDS = {
    "drivetrain": "Drivetrain",
    "drivetrain-compiled": "Drivetrain, engine.compile=true",
    "plain": "plain PyTorch",
    "plain-compiled": "plain PyTorch, torch.compile",
    "trainer": "transformers Trainer",
}


def work(kind: str, precision: str, steps: int, warmup: int) -> common.Row:
    bf16, compiled = precision == "bf16", kind.endswith("-compiled")
    # Zero would be an end of text to our loss and a plain token to the others'; `windows` never draws it.
    if kind == "trainer":
        seconds = trainer(bf16, steps + warmup + 1)
    else:
        running = (drivetrain if kind.startswith("drivetrain") else plain)(bf16, compiled)
        seconds = []
        for _ in range(steps + warmup):
            began = time.perf_counter()
            next(running)
            seconds.append(time.perf_counter() - began)
    peak = common.status_kb("VmHWM")  # before the large product
    rate = B * S / statistics.median(seconds[warmup:])
    return {
        "tokens_per_second": round(rate),
        "tokens_per_second_best_step": round(B * S / min(seconds[warmup:])),
        "first_step_seconds": round(seconds[0], 2),
        "share_of_matmul": round(rate * FLOPS / matmul_rate(bf16), 3),
        "peak_memory_mb": round(peak / 1e3),
        "steps": steps,
        "threads": torch.get_num_threads(),
    }


def main(arguments: list[str] | None = None) -> int:
    made = common.parser(__doc__ or "", "step_vs_torch", repeats=1)
    made.add_argument("--steps", type=int, default=12)
    made.add_argument("--warmup", type=int, default=3)
    made.add_argument("--worker", nargs=2, metavar=("KIND", "PRECISION"))
    made.add_argument("--to", type=Path)
    options = made.parse_args(arguments)
    if options.quick:
        options.steps, options.repeats = 3, 1
    if options.worker:
        options.to.write_text(json.dumps(work(*options.worker, options.steps, options.warmup)))
        return 0

    found_on = common.device()
    script = str(Path(__file__).resolve())
    pace = ["--steps", str(options.steps), "--warmup", str(options.warmup)]
    picked = [
        (kind, precision)
        for precision in ("fp32", "bf16")
        for kind in KINDS
        if common.wanted(kind, options.only)
    ]
    best: dict[tuple[str, str], common.Row] = {}
    for _ in range(options.repeats):  # in rounds, so that a busy minute does not fall on one of them alone
        for kind, precision in picked:
            row = common.run_worker([script, "--worker", kind, precision, *pace])
            kept = best.get((kind, precision), row)
            faster = row.get("tokens_per_second", 0) >= kept.get("tokens_per_second", 0)
            best[kind, precision] = row if faster else kept
    rows = [
        {"kind": kind, "title": KINDS[kind], "precision": precision, **best[kind, precision]}
        for kind, precision in picked
    ]
    header = ["", "precision", "tokens/s", "share of matmul", "peak memory MB", "first step s"]
    common.show("Training step, 10.5M parameters", header, [line_of(row) for row in rows], options.markdown)
    if options.out or not options.quick:
        seen = common.versions("drivetrain", "torch", "transformers", "numpy")
        common.write_result(options.out or common.RESULTS / "step_vs_torch.json", found_on, seen, rows)
    return 0


def line_of(row: common.Row) -> list[str]:
    if "error" in row:
        return [row["title"], row["precision"], f"failed: {row['error']}", "", "", ""]
    return [
        row["title"],
        row["precision"],
        f"{row['tokens_per_second']:,}",
        f"{100 * row['share_of_matmul']:.0f}%",
        f"{row['peak_memory_mb']:,}",
        f"{row['first_step_seconds']:.1f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
