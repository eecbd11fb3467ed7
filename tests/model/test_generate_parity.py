"""The sampler beside transformers' own."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from drivetrain.conf.source import model_of
from drivetrain.model.generate import Generator, Request, Sampling
from drivetrain.model.hf import fill_from_hf
from drivetrain.model.transformer import build_model

CPU = torch.device("cpu")
THEIR_SIZES: dict[str, Any] = {
    "vocab_size": 130,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {},
    "Mistral": {"sliding_window": 9},
    "GPT2": {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 128, "vocab_size": 130},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_transformers_token_for_token(family: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    sizes = {"eos_token_id": None, "initializer_range": 0.3} if family == "GPT2" else THEIR_SIZES
    config = getattr(transformers, f"{family}Config")(**{**sizes, **FAMILIES[family]})
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    cfg = model_of(tmp_path)
    model = build_model(cfg, "sdpa")
    model.materialize(CPU)
    fill_from_hf(model, cfg, tmp_path)
    generator = torch.Generator().manual_seed(6)
    prompts = [torch.randint(0, 130, (length,), generator=generator).tolist() for length in (1, 17, 40)]
    greedy = Sampling(max_tokens=30, temperature=0)
    found = Generator(model, cfg, CPU).generate([Request(prompt, greedy, 2) for prompt in prompts])
    for prompt, pair in zip(prompts, found, strict=True):
        tokens = torch.tensor([prompt])
        expected = theirs.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=30, pad_token_id=0
        )
        assert pair[0].tokens == pair[1].tokens == expected[0, len(prompt) :].tolist()
