"""Hugging Face directories in and out: every architecture, both ways, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from drivetrain.conf.compose import compose
from drivetrain.conf.hf_config import hf_from_model, model_from_hf
from drivetrain.conf.hf_tensors import layout
from drivetrain.kernels.attention import make_documents
from drivetrain.model.hf import HfWeights, fill_from_hf, to_hf
from drivetrain.model.transformer import Transformer, build_model, logits, unique_parameters

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 61,
    "max_position_embeddings": 64,
}
GPT2_SIZES = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 61}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}
# Architecture, and what its configuration says beyond the sizes.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": False}),
    "llama_biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "smollm2": ("Llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2, "pad_token_id": None}),
    "mistral": ("Mistral", {"sliding_window": 9, "num_key_value_heads": 1, "head_dim": 12}),
    "mistral_no_window": ("Mistral", {"sliding_window": None}),
    "qwen2": (
        "Qwen2",
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "qwen2_window": ("Qwen2", WINDOW),
    "qwen3": ("Qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
    "qwen3_biases": ("Qwen3", {"head_dim": 8, "attention_bias": True, **WINDOW}),
    "gpt2": ("GPT2", {}),
    "gpt2_wide_untied": ("GPT2", {"n_inner": 80, "tie_word_embeddings": False}),
}
SHARDED = ("qwen3", "gpt2", "llama_biases")


def theirs(name: str, seed: int = 0) -> Any:
    """A random model of transformers; norms and biases are random too."""
    architecture, changes = MODELS[name]
    sizes = GPT2_SIZES if architecture == "GPT2" else SIZES
    config = getattr(transformers, f"{architecture}Config")(
        **{**sizes, **changes}, attn_implementation="eager"
    )
    torch.manual_seed(seed)
    kind = "GPT2LMHeadModel" if architecture == "GPT2" else f"{architecture}ForCausalLM"
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in key or ".ln_" in key else 0.0, std=0.2)
    return model


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    model = theirs(name).to(dtype)
    model.save_pretrained(folder, max_shard_size="20KB" if name in SHARDED else "5GB")
    assert (len(list(folder.glob("*.safetensors"))) > 1) is (name in SHARDED)
    return model


def ours(folder: Path) -> Transformer:
    cfg = compose(["model=auto", f"model.init_from={folder}"]).model
    model = build_model(cfg, "sdpa")
    model.materialize(torch.device("cpu"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    fill_from_hf(model, cfg, folder)
    return model


def our_logits(model: Transformer, tokens_T: Tensor) -> Tensor:
    T = len(tokens_T)
    documents = make_documents(torch.tensor([0, T], dtype=torch.int32), T, T, T, model.cfg.sliding_window)
    with torch.no_grad():
        return model(tokens_T, torch.arange(T), documents, logits)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {
        key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()
    }


TOKENS_T = torch.randint(0, 61, (50,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    other = saved(name, tmp_path)
    with torch.no_grad():
        expected = other(TOKENS_T[None]).logits[0]
    assert float(expected.std()) > 0.1  # logits that say something
    assert (our_logits(ours(tmp_path), TOKENS_T) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_a_config_goes_out_as_it_came_in(name: str, tmp_path: Path) -> None:
    """Except that a Mistral without a window is a Llama."""
    saved(name, tmp_path / "in")
    model = model_from_hf(tmp_path / "in")
    written = hf_from_model(model, "float32")
    expected = json.loads((tmp_path / "in" / "config.json").read_text())["architectures"]
    assert written["architectures"] == (["LlamaForCausalLM"] if name == "mistral_no_window" else expected)
    (tmp_path / "out" / "in").mkdir(parents=True)  # the name is the folder's
    (tmp_path / "out" / "in" / "config.json").write_text(json.dumps(written))
    assert model_from_hf(tmp_path / "out" / "in") == model


@pytest.mark.parametrize("name", MODELS)
def test_tensors_go_out_as_they_came_in(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path, torch.bfloat16)
    cfg = model_from_hf(tmp_path)
    with HfWeights(tmp_path, cfg) as weights:
        found = dict(pair for key, parts in layout(cfg).items() for pair in to_hf(parts, weights.whole(key)))
        shapes = {key: tuple(weights.whole(key).shape) for key in weights.parts}
        assert {weights.dtype_of(key) for key in weights.parts} == {"BF16"}
    expected = tensors_in(tmp_path)
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert found[key].dtype == torch.bfloat16 and torch.equal(found[key], value)
    model = build_model(cfg, "sdpa")
    assert shapes == {key: tuple(p.shape) for key, p in unique_parameters(model)}
