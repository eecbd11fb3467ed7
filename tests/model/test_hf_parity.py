"""The same weights give the same logits as transformers, family by family, whole and packed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from drivetrain.conf.schema import ModelConfig, RopeScaling
from drivetrain.kernels.attention import make_documents
from drivetrain.model.transformer import Transformer, build_model, logits

SIZES: dict[str, int] = {"dim": 64, "layers": 3, "heads": 4, "kv_heads": 2, "ffn_dim": 96, "vocab_size": 130}
THEIR_SIZES: dict[str, int] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 130,
}
LENGTHS = [1, 30, 7, 58]  # documents; the longest passes the sliding window and the scaling's original length


@dataclass(frozen=True)
class Family:
    ours: Callable[[], ModelConfig]
    theirs: Callable[[], Any]


def ours(**changes: Any) -> Callable[[], ModelConfig]:
    return lambda: ModelConfig(**{"name": "small", "head_dim": 16, "max_seq_len": 128, **SIZES, **changes})


def theirs(
    model: str, *, theta: float = 10000.0, scaling: dict[str, Any] | None = None, **changes: Any
) -> Any:
    def build() -> Any:
        config = getattr(transformers, f"{model}Config")(
            max_position_embeddings=128,
            rope_parameters={"rope_type": "default", "rope_theta": theta, **(scaling or {})},
            attn_implementation="eager",
            **(THEIR_SIZES | changes),
        )
        return getattr(transformers, f"{model}ForCausalLM")(config)

    return build


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES = {
    "llama3": Family(
        ours(rope_theta=500.0, rope_scaling=RopeScaling(**LLAMA3, original_max_seq_len=16)),
        theirs(
            "Llama",
            theta=500.0,
            scaling={"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 16},
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
        ),
    ),
    "llama_with_biases": Family(
        ours(qkv_bias=True, out_bias=True, mlp_bias=True, norm_eps=1e-6, kv_heads=4),
        theirs(
            "Llama",
            attention_bias=True,
            mlp_bias=True,
            rms_norm_eps=1e-6,
            num_key_value_heads=4,
            tie_word_embeddings=False,
        ),
    ),
    "qwen2": Family(
        ours(qkv_bias=True, rope_theta=1e6, norm_eps=1e-6, tie_embeddings=True),
        theirs("Qwen2", theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=True),
    ),
    "qwen3": Family(
        ours(head_dim=24, qk_norm=True, rope_theta=1e6, norm_eps=1e-6),
        theirs("Qwen3", theta=1e6, head_dim=24, rms_norm_eps=1e-6, tie_word_embeddings=False),
    ),
    "mistral": Family(
        ours(sliding_window=9, norm_eps=1e-5, kv_heads=1),
        theirs(
            "Mistral", sliding_window=9, rms_norm_eps=1e-5, num_key_value_heads=1, tie_word_embeddings=False
        ),
    ),
    "smollm2": Family(
        ours(tie_embeddings=True, rope_theta=1e5),
        theirs("Llama", theta=1e5, rms_norm_eps=1e-5, tie_word_embeddings=True),
    ),
}


def names_in_transformers(cfg: ModelConfig) -> dict[str, list[str]]:
    """Our parameter -> theirs, whose rows lie one above the other in ours."""
    names = {"embed.weight": ["model.embed_tokens.weight"], "norm.weight": ["model.norm.weight"]}
    if not cfg.tie_embeddings:
        names["head.weight"] = ["lm_head.weight"]
    for layer in range(cfg.layers):
        mine, other = f"blocks.{layer}.", f"model.layers.{layer}."
        names[f"{mine}attn_norm.weight"] = [f"{other}input_layernorm.weight"]
        names[f"{mine}mlp_norm.weight"] = [f"{other}post_attention_layernorm.weight"]
        for kind in ("weight", "bias"):
            if kind == "weight" or cfg.qkv_bias:
                names[f"{mine}attn.wqkv.{kind}"] = [f"{other}self_attn.{p}_proj.{kind}" for p in "qkv"]
            if kind == "weight" or cfg.out_bias:
                names[f"{mine}attn.wo.{kind}"] = [f"{other}self_attn.o_proj.{kind}"]
            if kind == "weight" or cfg.mlp_bias:
                names[f"{mine}mlp.w_gate_up.{kind}"] = [f"{other}mlp.{p}_proj.{kind}" for p in ("gate", "up")]
                names[f"{mine}mlp.w_down.{kind}"] = [f"{other}mlp.down_proj.{kind}"]
        if cfg.qk_norm:
            for part in "qk":
                names[f"{mine}attn.{part}_norm.weight"] = [f"{other}self_attn.{part}_norm.weight"]
    return names


def pair(family: str, seed: int, backend: str = "sdpa") -> tuple[Transformer, nn.Module]:
    """Our model and theirs with the same random weights; norms and biases are random too."""
    cfg = FAMILIES[family].ours()
    torch.manual_seed(seed)
    other = FAMILIES[family].theirs().eval()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.2)
    model = build_model(cfg, backend)
    model.materialize(torch.device("cpu"))
    weights = dict(other.named_parameters())
    names = names_in_transformers(cfg)
    mine = dict(model.named_parameters())
    assert set(mine) == set(names)
    assert sorted(weights) == sorted(name for parts in names.values() for name in parts)
    with torch.no_grad():
        for name, parts in names.items():
            mine[name].copy_(torch.cat([weights[part] for part in parts]))
    return model, other


def our_logits(model: Transformer, documents: list[Tensor]) -> Tensor:
    lengths = [len(document) for document in documents]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    T = sum(lengths)
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    where = make_documents(cu_seqlens, max(lengths), T, T, model.cfg.sliding_window)
    with torch.no_grad():
        return model(torch.cat(documents), positions_T, where, logits)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family: str, seed: int) -> None:
    model, other = pair(family, seed)
    generator = torch.Generator().manual_seed(seed)
    documents = [torch.randint(0, 130, (length,), generator=generator) for length in LENGTHS]
    with torch.no_grad():
        expected = [other(document[None]).logits[0] for document in documents]
    assert min(float(part.std()) for part in expected) > 0.1  # logits that say something
    for document, theirs_TV in zip(documents, expected, strict=True):
        assert (our_logits(model, [document]) - theirs_TV).abs().max() < 1e-4
    assert (our_logits(model, documents) - torch.cat(expected)).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen3"])
def test_the_reference_kernels_give_the_same_logits(family: str) -> None:
    documents = [torch.arange(20) * 6, torch.arange(30) + 60]
    fast, _ = pair(family, 2)
    slow, _ = pair(family, 2, "reference")
    torch.testing.assert_close(our_logits(slow, documents), our_logits(fast, documents), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama3", "qwen3"])
def test_gradients_are_those_of_transformers(family: str) -> None:
    model, other = pair(family, 3)
    tokens_T = torch.randint(0, 130, (40,), generator=torch.Generator().manual_seed(3))
    theirs_loss = other(tokens_T[None], labels=tokens_T[None]).loss
    theirs_loss.backward()
    where = make_documents(torch.tensor([0, 40], dtype=torch.int32), 40, 40, 40)
    ours_TV = model(tokens_T, torch.arange(40), where, logits)
    loss = nn.functional.cross_entropy(ours_TV[:-1], tokens_T[1:])
    loss.backward()
    torch.testing.assert_close(loss, theirs_loss)
    grads = {name: parameter.grad for name, parameter in other.named_parameters()}
    for name, parts in names_in_transformers(model.cfg).items():
        expected = torch.cat([grads[part] for part in parts])
        found = model.get_parameter(name).grad
        assert found is not None and (found - expected).abs().max() < 1e-4 * expected.abs().max()
