"""Hugging Face's config.json and our `ModelConfig`, both ways.

The keys are those of transformers' configuration classes, in the spelling of version 4 and of version 5
(`rope_theta` and `rope_scaling`, or both in `rope_parameters`; `torch_dtype` or `dtype`).
"""

import dataclasses
from pathlib import Path
from typing import Any

from drivetrain.conf.errors import ConfigError
from drivetrain.conf.hf_values import Values
from drivetrain.conf.ranges import COUNT, ZERO_OR_MORE
from drivetrain.conf.schema import Mlp, ModelConfig, Norm, Positions, RopeScaling

ARCHITECTURES = {
    "GPT2LMHeadModel": "gpt2",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "SmolLM3ForCausalLM": "smollm3",
}
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")
# What these say about a GPT-2 is another arithmetic than ours; dropout says something about training only.
GPT2_FIXED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


def model_from_hf(directory: Path) -> ModelConfig:
    """The model that a Hugging Face directory's config.json describes, under the directory's name.

    Raises:
        ConfigError: the file is missing or no such description, or says something that the model cannot do.
    """
    values = Values(directory / "config.json")
    name = directory.resolve().name
    kind = _model_type(values)
    values.must_be("quantization_config", (None,), None)
    return _gpt2(values, name) if kind == "gpt2" else _llama_like(values, kind, name)


def _model_type(values: Values) -> str:
    named = values.get("architectures", list, [])
    what = named[0] if named else values.values.get("model_type")
    known = ARCHITECTURES if named else {kind: kind for kind in ARCHITECTURES.values()}
    if not isinstance(what, str) or what not in known:
        raise values.refuse(
            f"describes {what}, which is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    return known[what]


def _gpt2(values: Values, name: str) -> ModelConfig:
    values.must_be("activation_function", TANH_GELU, "gelu_new")
    for key, value in GPT2_FIXED.items():
        values.must_be(key, (value,), value)
    dim, heads = values.size("n_embd"), values.size("n_head")
    return ModelConfig(
        name=name,
        vocab_size=values.size("vocab_size"),
        dim=dim,
        layers=values.size("n_layer"),
        heads=heads,
        kv_heads=heads,
        head_dim=_share(values, "n_embd", dim, "n_head", heads),
        ffn_dim=values.size("n_inner", 4 * dim),
        max_seq_len=values.size("n_positions"),
        positions=Positions.learned,
        norm=Norm.layer,
        norm_eps=values.above_zero("layer_norm_epsilon", 1e-5),
        mlp=Mlp.gelu,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tie_embeddings=values.get("tie_word_embeddings", bool, True),
        init_std=values.above_zero("initializer_range", 0.02),
    )


def _llama_like(values: Values, kind: str, name: str) -> ModelConfig:
    values.must_be("hidden_act", ("silu",), "silu")
    dim, heads, layers = map(values.size, ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    rope = _rope(values, default_theta=2e6 if kind == "smollm3" else 1e4)
    biased = kind != "mistral" and values.get("attention_bias", bool, False)
    kv_heads = values.size("num_key_value_heads", heads)
    _share(values, "num_attention_heads", heads, "num_key_value_heads", kv_heads)
    return ModelConfig(
        name=name,
        vocab_size=values.size("vocab_size"),
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_head_dim(values, kind, dim, heads),
        ffn_dim=values.size("intermediate_size"),
        max_seq_len=values.size("max_position_embeddings"),
        rope_theta=rope["rope_theta"],
        rope_scaling=rope["rope_scaling"],
        nope_every=_nope_every(values, layers) if kind == "smollm3" else 0,
        norm_eps=values.above_zero("rms_norm_eps", 1e-6),
        qk_norm=kind == "qwen3",
        qkv_bias=kind == "qwen2" or biased,
        out_bias=kind != "qwen2" and biased,
        mlp_bias=kind in ("llama", "smollm3") and values.get("mlp_bias", bool, False),
        tie_embeddings=values.get("tie_word_embeddings", bool, kind == "smollm3"),
        sliding_window=_sliding_window(values, kind, layers),
        init_std=values.above_zero("initializer_range", 0.02),
    )


def _share(values: Values, key: str, whole: int, of: str, parts: int) -> int:
    """The whole number that each of `parts` has of `whole`."""
    share, rest = divmod(whole, parts)
    if rest:
        raise values.refuse(f"says {key}={whole}, which {of}={parts} does not divide; copy it again")
    return share


def _head_dim(values: Values, kind: str, dim: int, heads: int) -> int:
    if values.values.get("head_dim") is not None or kind == "qwen3":
        head_dim, from_keys = values.size("head_dim", 128), "head_dim"
    else:
        head_dim = _share(values, "hidden_size", dim, "num_attention_heads", heads)
        from_keys = "hidden_size / num_attention_heads"
    if head_dim % 2:
        raise values.refuse(f"says {from_keys}={head_dim}, and rotary embeddings turn pairs; copy it again")
    return head_dim


def _rope(values: Values, default_theta: float) -> dict[str, Any]:
    inner = values.inside("rope_parameters")
    if not inner.values:
        inner = values.inside("rope_scaling")
    given = inner.values
    theta = inner.above_zero("rope_theta", values.above_zero("rope_theta", default_theta))
    kind = given.get("rope_type", given.get("type", "default"))
    share = given.get("partial_rotary_factor", values.values.get("partial_rotary_factor"))
    if share not in (None, 1, 1.0):
        raise values.refuse(f"says partial_rotary_factor={share}; supported is 1.0")
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if kind != "llama3":
        raise values.refuse(f"says rope_type={kind!r}; supported is 'default' or 'llama3'")
    low, high = inner.above_zero("low_freq_factor"), inner.above_zero("high_freq_factor")
    if high <= low:
        raise values.refuse(
            f"says high_freq_factor={high}, which must be above low_freq_factor={low}; copy it again"
        )
    scaling = RopeScaling(
        factor=float(inner.number("factor", float, inner.above_zero("factor"), COUNT)),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_seq_len=inner.size("original_max_position_embeddings"),
    )
    return {"rope_theta": theta, "rope_scaling": scaling}


def _nope_every(values: Values, layers: int) -> int:
    """SmolLM3's list has a 0 for every layer without RoPE."""
    every = values.size("no_rope_layer_interval", 4)
    turning = values.get("no_rope_layers", list, None)
    if turning is None:
        return every
    if any(item not in (0, 1) for item in turning):
        raise values.wrong("no_rope_layers", turning, "is no list of 0 and 1")
    turning = [bool(item) for item in turning[:layers]]
    if all(turning):
        return 0
    every = turning.index(False) + 1
    if turning != [(layer + 1) % every != 0 for layer in range(layers)]:
        raise values.refuse("has no_rope_layers that are not every n-th layer, which is not supported")
    return every


def _sliding_window(values: Values, kind: str, layers: int) -> int | None:
    """Qwen and SmolLM3 switch it by layer; all layers alike is supported."""
    if kind == "llama" or (kind != "mistral" and not values.get("use_sliding_window", bool, False)):
        return None
    window: int | None = values.number("sliding_window", int, None, COUNT)
    if "sliding_window" not in values.values:
        window = 4096  # what transformers takes where it is not said
    if window is None:
        return None
    if kind == "mistral":
        return window
    types = values.get("layer_types", list, None)
    if types is None and kind == "smollm3":
        raise values.refuse("says use_sliding_window=true, which is not supported with layers without RoPE")
    first = int(values.number("max_window_layers", int, 28, ZERO_OR_MORE))
    sliding = (
        [layer >= first for layer in range(layers)]
        if types is None
        else ["sliding" in str(kind) for kind in types[:layers]]
    )
    if all(sliding):
        return window
    if not any(sliding):
        return None
    raise values.refuse("has a sliding window in some layers only; supported is one in all layers or in none")


# What weights don't depend on; the longest sequence is a size of theirs where positions are learned.
FREE = ("name", "max_seq_len", "init_std", "init_from")
# With model=auto a changed value of these is meant, such as another base for a longer context.
RETUNED = ("rope_theta", "rope_scaling", "norm_eps", "sliding_window")


def differences(model: ModelConfig, theirs: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Keys in which a configuration does not fit the weights of another, and both values.

    One that bears the source's own name was read from it (model=auto), so what can be changed in it was.
    """
    free = {*FREE, *(RETUNED if model.name == theirs.name else ())}
    if theirs.positions is Positions.learned:
        free.remove("max_seq_len")
    both = {
        field.name: (getattr(model, field.name), getattr(theirs, field.name))
        for field in dataclasses.fields(ModelConfig)
        if field.name not in free
    }
    return {key: values for key, values in both.items() if values[0] != values[1]}


def architecture_of(model: ModelConfig) -> str:
    """Which of transformers' architectures computes what this model does.

    Raises:
        ConfigError: none does.
    """
    gpt2 = {
        "norm": Norm.layer,
        "mlp": Mlp.gelu,
        "positions": Positions.learned,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "qk_norm": False,
        "sliding_window": None,
        "kv_heads": model.heads,
        "head_dim": model.dim // model.heads,
    }
    plain = {"norm": Norm.rms, "mlp": Mlp.swiglu, "positions": Positions.rope}
    one_bias = {"qkv_bias": model.out_bias}
    no_bias = {"qkv_bias": False, "out_bias": False, "mlp_bias": False}
    rotary_everywhere, everywhere = {"nope_every": 0}, {"sliding_window": None}
    wanted: dict[str, dict[str, Any]] = {
        "LlamaForCausalLM": plain | rotary_everywhere | everywhere | one_bias | {"qk_norm": False},
        "MistralForCausalLM": plain | rotary_everywhere | no_bias | {"qk_norm": False},
        "Qwen2ForCausalLM": plain
        | rotary_everywhere
        | no_bias
        | {"qkv_bias": True, "qk_norm": False, "head_dim": model.dim // model.heads},
        "Qwen3ForCausalLM": plain | rotary_everywhere | one_bias | {"mlp_bias": False, "qk_norm": True},
        "SmolLM3ForCausalLM": plain
        | everywhere
        | one_bias
        | {"qk_norm": False, "head_dim": model.dim // model.heads},
        "GPT2LMHeadModel": gpt2,
    }
    gaps = {
        name: [key for key, value in keys.items() if getattr(model, key) != value]
        for name, keys in wanted.items()
    }
    nearest = min(gaps, key=lambda name: len(gaps[name]))
    if not gaps[nearest]:
        return nearest
    raise ConfigError(
        f"no architecture of transformers is this model: the nearest, {nearest}, differs in "
        f"{', '.join(f'model.{key}' for key in gaps[nearest])}; the others are "
        f"{', '.join(name for name in wanted if name != nearest)}"
    )


def hf_from_model(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json of a model, without the ids of its special tokens.

    Args:
        dtype: torch's name of the weights' dtype, such as bfloat16.

    Raises:
        ConfigError: transformers has no such model.
    """
    architecture = architecture_of(model)
    kind = ARCHITECTURES[architecture]
    common: dict[str, Any] = {"architectures": [architecture], "model_type": kind, "torch_dtype": dtype}
    common |= {"vocab_size": model.vocab_size, "initializer_range": model.init_std, "use_cache": True}
    common["tie_word_embeddings"] = model.tie_embeddings
    if kind == "gpt2":
        return common | {
            "n_embd": model.dim,
            "n_layer": model.layers,
            "n_head": model.heads,
            "n_inner": model.ffn_dim,
            "n_positions": model.max_seq_len,
            "n_ctx": model.max_seq_len,
            "layer_norm_epsilon": model.norm_eps,
            "activation_function": "gelu_new",
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        }
    config: dict[str, Any] = common | {
        "hidden_size": model.dim,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.ffn_dim,
        "max_position_embeddings": model.max_seq_len,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": _scaling(model.rope_scaling),
        "attention_bias": model.out_bias,
        "attention_dropout": 0.0,
        "mlp_bias": model.mlp_bias,
    }
    match kind:
        case "mistral":
            config["sliding_window"] = model.sliding_window
        case "qwen2" | "qwen3":
            window = model.sliding_window
            config |= {"use_sliding_window": window is not None, "sliding_window": window}
            config["max_window_layers"] = 0 if window is not None else model.layers
        case "smollm3":
            every = model.nope_every
            config["no_rope_layers"] = [
                int((layer + 1) % every != 0) if every else 1 for layer in range(model.layers)
            ]
            config["no_rope_layer_interval"] = every or model.layers + 1
    return config


def _scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_seq_len,
    }
