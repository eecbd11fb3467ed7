"""Rollouts as GRPO takes them: Drivetrain's sampler beside transformers' `generate`.

SmolLM2's 135M shape with random weights, 16 prompts of 20 to 300 random tokens, 8 samples of exactly 64 tokens of
each, temperature 1, the same weights, prompts, dtype and threads for both. Each row in a fresh process, one after
the other; transformers gets the prompts padded on the left in one batch and copies each 8 times
(`num_return_sequences`), with its usual cache. Seconds are from the prompts to the last token; a first, short call
of each is not counted.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common

PROMPTS, SAMPLES, NEW = 16, 8, 64
SHORTEST, LONGEST = 20, 300
KINDS = {
    "drivetrain": "Drivetrain",
    "transformers": "transformers, generate",
    "transformers-each": "transformers, generate, prompt by prompt (no padding)",
}
Run = Callable[[list[list[int]], int, int], list[list[int]]]  # prompts, samples, new tokens -> completions


def prompts(count: int, vocab_size: int) -> list[list[int]]:
    """Lengths spread evenly, in an order of their own."""
    generator = torch.Generator().manual_seed(0)
    lengths = (
        torch.linspace(SHORTEST, LONGEST, count).round().int()[torch.randperm(count, generator=generator)]
    )
    return [torch.randint(1, vocab_size, (int(n),), generator=generator).tolist() for n in lengths]


def our_model(dtype: torch.dtype) -> tuple[Any, Any]:
    from drivetrain.conf.compose import compose
    from drivetrain.model.initialize import initialize
    from drivetrain.model.transformer import build_model

    cfg = compose(["data.path=none", "model=smollm2_135m"]).model
    model = build_model(cfg, "sdpa")
    model.materialize(torch.device("cpu"))
    initialize(model, cfg, 0)
    return model.to(dtype), cfg


def drivetrain(dtype: torch.dtype) -> Run:
    from drivetrain.model.generate import Generator, Request, Sampling

    model, cfg = our_model(dtype)

    def run(asked: list[list[int]], samples: int, new: int) -> list[list[int]]:
        generator = Generator(model, cfg, torch.device("cpu"))
        sampling = Sampling(max_tokens=new, temperature=1.0)
        found = generator.generate([Request(prompt, sampling, samples) for prompt in asked])
        return [completion.tokens for each in found for completion in each]

    return run


def transformers_model(dtype: torch.dtype) -> Any:
    """Theirs with our weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ours, cfg = our_model(dtype)
    theirs = LlamaConfig(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.dim,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.kv_heads,
        head_dim=cfg.head_dim,
        intermediate_size=cfg.ffn_dim,
        max_position_embeddings=cfg.max_seq_len,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
        rms_norm_eps=cfg.norm_eps,
        tie_word_embeddings=cfg.tie_embeddings,
        attn_implementation="sdpa",
    )
    net = LlamaForCausalLM(theirs).to(dtype).eval()
    with torch.no_grad():
        for name, weight in their_weights(ours, cfg):
            net.get_parameter(name).copy_(weight)
    return net


def their_weights(model: Any, cfg: Any) -> list[tuple[str, Tensor]]:
    heads = [cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim]
    found = [("model.embed_tokens.weight", model.embed.weight), ("model.norm.weight", model.norm.weight)]
    for layer, block in enumerate(model.blocks):
        at = f"model.layers.{layer}."
        qkv = zip("qkv", block.attn.wqkv.weight.split(heads), strict=True)
        gate, up = block.mlp.w_gate_up.weight.chunk(2)
        found += [(f"{at}self_attn.{part}_proj.weight", weight) for part, weight in qkv]
        found += [
            (f"{at}self_attn.o_proj.weight", block.attn.wo.weight),
            (f"{at}mlp.gate_proj.weight", gate),
            (f"{at}mlp.up_proj.weight", up),
            (f"{at}mlp.down_proj.weight", block.mlp.w_down.weight),
            (f"{at}input_layernorm.weight", block.attn_norm.weight),
            (f"{at}post_attention_layernorm.weight", block.mlp_norm.weight),
        ]
    return found


def transformers_generate(dtype: torch.dtype, together: bool) -> Run:
    net = transformers_model(dtype)
    net.generation_config.eos_token_id = None  # the whole token budget, whatever is drawn

    def batch(asked: list[list[int]], samples: int, new: int) -> list[list[int]]:
        longest = max(map(len, asked))
        tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in asked])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in asked])
        found = net.generate(
            input_ids=tokens,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            num_return_sequences=samples,
            min_new_tokens=new,
            max_new_tokens=new,
            pad_token_id=0,
        )
        return found[:, longest:].tolist()  # type: ignore[no-any-return]

    def run(asked: list[list[int]], samples: int, new: int) -> list[list[int]]:
        if together:
            return batch(asked, samples, new)
        return [completion for prompt in asked for completion in batch([prompt], samples, new)]

    return run


def work(kind: str, dtype: str, threads: int, quick: bool) -> common.Row:
    torch.manual_seed(0)
    if threads:
        torch.set_num_threads(threads)
    narrow = getattr(torch, dtype)
    run = (
        drivetrain(narrow) if kind == "drivetrain" else transformers_generate(narrow, kind == "transformers")
    )
    count, samples, new = (4, 2, 8) if quick else (PROMPTS, SAMPLES, NEW)
    asked = prompts(count, 49152)
    run(asked[:2], 2, 4)
    began, used = time.perf_counter(), time.process_time()
    completions = run(asked, samples, new)
    seconds, cpu = time.perf_counter() - began, time.process_time() - used
    assert [len(each) for each in completions] == [new] * (count * samples)
    return {
        "tokens_per_second": round(len(completions) * new / seconds, 1),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "tokens": len(completions) * new,
        "prompt_tokens": sum(map(len, asked)),
        "peak_memory_mb": round(1024 * common.status_kb("VmHWM") / 1e6),
        "threads": torch.get_num_threads(),
    }


def main(arguments: list[str] | None = None) -> int:
    made = common.parser(__doc__ or "", "rollout", repeats=2)
    made.add_argument(
        "--dtypes", default="float32,bfloat16", help="of weights and arithmetic, comma-separated"
    )
    made.add_argument("--threads", type=int, default=0, help="of torch; 0: as many as it takes")
    made.add_argument("--worker", nargs=2, metavar=("KIND", "DTYPE"))
    made.add_argument("--to", type=Path)
    options = made.parse_args(arguments)
    if options.worker:
        options.to.write_text(json.dumps(work(*options.worker, options.threads, options.quick)))
        return 0
    how = ["--threads", str(options.threads), *(["--quick"] if options.quick else [])]
    found_on, rows = common.device(), []
    for dtype in options.dtypes.split(","):
        for kind, title in KINDS.items():
            if common.wanted(f"{kind}/{dtype}", options.only):
                command = [__file__, "--worker", kind, dtype, *how]
                times = 1 if options.quick else options.repeats
                found = [common.run_worker(command, timeout_s=3600) for _ in range(times)]
                best = max(found, key=lambda row: row.get("tokens_per_second", 0))
                rows.append({"kind": kind, "title": title, "dtype": dtype, **best, "runs": found})
    lines = [line_of(row, rows) for row in rows]
    header = ["", "dtype", "tokens/s", "times Drivetrain's", "seconds", "CPU seconds", "peak memory MB"]
    common.show("16 prompts x 8 samples x 64 tokens, 135M parameters", header, lines, options.markdown)
    if options.out or not options.quick:
        seen = common.versions("drivetrain", "torch", "transformers")
        common.write_result(options.out or common.RESULTS / "rollout.json", found_on, seen, rows)
    return 0


def line_of(row: common.Row, rows: list[common.Row]) -> list[str]:
    if "error" in row:
        return [row["title"], row["dtype"], f"failed: {row['error']}", "", "", "", ""]
    ours = [each for each in rows if each["kind"] == "drivetrain" and each["dtype"] == row["dtype"]]
    rate = ours[0].get("tokens_per_second") if ours else None
    return [
        row["title"],
        row["dtype"],
        f"{row['tokens_per_second']:,.0f}",
        f"{row['tokens_per_second'] / rate:.2f}" if rate else "-",
        f"{row['seconds']:.1f}",
        f"{row['cpu_seconds']:.1f}",
        f"{row['peak_memory_mb']:,}",
    ]


if __name__ == "__main__":
    sys.exit(main())
