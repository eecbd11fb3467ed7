"""A LoRA run's adapter for PEFT, through the command line."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

Cli = Any
SFT = "stage=sft stage.seq_len=64 stage.tokens_per_step=1024 stage.micro_batch=8 stage.steps=4 stage.eval_every=0"
LORA = (
    "lora.rank=4 optim.lr=2e-2 optim.schedule=constant optim.warmup_steps=0 engine=zero engine.zero_stage=2"
)
TOKENS = torch.arange(1, 40)[None]


def base_model(folder: Path, tokenizer: Path) -> Path:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    config = transformers.LlamaConfig(**sizes, max_position_embeddings=128, initializer_range=0.1)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(TOKENS).logits
    return found


def test_peft_computes_what_the_merged_export_does(cli: Cli) -> None:
    base = base_model(cli.folder / "base", cli.shards / "tokenizer")
    turns = [
        [{"role": "user", "content": f"import {i}?"}, {"role": "assistant", "content": "return"}]
        for i in range(99)
    ]
    (cli.folder / "chat.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns))
    cli("data", "build", "chat.jsonl", "--chat", "--tokenizer", "base", "--out", "chat", "--workers", "1")
    words = f"{SFT} {LORA} model=auto model.init_from=base data.path=chat run_dir=run cluster.nproc=2"
    cli("launch", *words.split(), "cluster.device=cpu", "engine.precision=fp32")
    cli("export", "run", "adapter", "--adapter")
    cli("export", "run", "merged", "--dtype", "fp32")

    load = transformers.AutoModelForCausalLM.from_pretrained
    plain, merged = load(base, dtype=torch.float32), load(cli.folder / "merged", dtype=torch.float32)
    before, wanted = logits(plain), logits(merged)
    adapted = peft.PeftModel.from_pretrained(plain, cli.folder / "adapter")
    torch.testing.assert_close(logits(adapted), wanted, atol=1e-4, rtol=1e-4)
    assert (wanted - before).abs().max() > 0.1  # the adapter was trained
    assert adapted.peft_config["default"].r == 4
