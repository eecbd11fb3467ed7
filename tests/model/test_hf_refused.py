"""What is wrong with a Hugging Face directory is said by name, before anything starts where that can be."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from drivetrain.conf.compose import compose
from drivetrain.conf.errors import CheckpointError, ConfigError
from drivetrain.conf.hf_config import ARCHITECTURES, architecture_of, model_from_hf
from drivetrain.conf.schema import Mlp, ModelConfig, Norm, RopeScaling
from drivetrain.conf.source import Kind, kind_of, model_of, tokenizer_of
from drivetrain.conf.validate import validate
from drivetrain.model.hf import HfWeights

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
LLAMA = {"vocab_size": 40, "max_position_embeddings": 4096, "num_key_value_heads": 1, **SIZES}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 1024, "vocab_size": 40, "eos_token_id": 1}
SMOLLM3 = {"pad_token_id": None, **LLAMA}


def saved(folder: Path, kind: str = "Llama", **changes: Any) -> Path:
    sizes = {"GPT2": GPT2, "SmolLM3": SMOLLM3}.get(kind, LLAMA)
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes | changes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def rewrite_config(folder: Path, **changes: Any) -> None:
    """`None` takes a key away."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def rewrite_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# --- config.json --------------------------------------------------------------------------------------------

ALL = ", ".join(ARCHITECTURES)
CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "architecture": (
        "Llama",
        {"architectures": ["MambaForCausalLM"]},
        f"describes MambaForCausalLM, which is not supported; supported are {ALL}",
    ),
    "type alone": (
        "Llama",
        {"architectures": None, "model_type": "bert"},
        f"describes bert, which is not supported; supported are {ALL}",
    ),
    "activation": ("Llama", {"hidden_act": "relu"}, "says hidden_act='relu'; supported is 'silu'"),
    "gelu": (
        "GPT2",
        {"activation_function": "gelu"},
        "says activation_function='gelu'; supported is 'gelu_new' or 'gelu_pytorch_tanh'",
    ),
    "gpt2 scale": (
        "GPT2",
        {"scale_attn_by_inverse_layer_idx": True},
        "says scale_attn_by_inverse_layer_idx=True; supported is False",
    ),
    "rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
        "says rope_type='yarn'; supported is 'default' or 'llama3'",
    ),
    "old rope": (
        "Llama",
        {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}},
        "says rope_type='linear'; supported is 'default' or 'llama3'",
    ),
    "torn rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0}},
        "has no rope_parameters.low_freq_factor; copy it again",
    ),
    "quantised": (
        "Llama",
        {"quantization_config": {"bits": 4}},
        "says quantization_config={'bits': 4}; supported is None",
    ),
    "missing": ("Llama", {"hidden_size": None}, "has no hidden_size; copy it again"),
    "theta": (
        "Llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": "big"}},
        "says rope_parameters.rope_theta='big', which is no float; copy it again",
    ),
    "wrong type": ("Llama", {"hidden_size": "x"}, "says hidden_size='x', which is no int; copy it again"),
    "some layers": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 8,
        },
        "has a sliding window in some layers only; supported is one in all layers or in none",
    ),
    "uneven nope": (
        "SmolLM3",
        {"no_rope_layers": [0, 1]},
        "has no_rope_layers that are not every n-th layer, which is not supported",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_cannot_be_read_as_ours_says_why(name: str, tmp_path: Path) -> None:
    kind, changes, reason = CONFIGS[name]
    saved(tmp_path, kind)
    rewrite_config(tmp_path, **changes)
    with pytest.raises(ConfigError) as caught:
        model_from_hf(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'config.json'} {reason}"
    with pytest.raises(ConfigError) as caught:
        compose(["model=auto", f"model.init_from={tmp_path}"])
    assert str(caught.value) == f"model.init_from: {tmp_path / 'config.json'} {reason}"


def test_both_spellings_of_a_config_mean_the_same(tmp_path: Path) -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 16, "rope_type": "llama3"}
    saved(tmp_path, rope_parameters={"rope_theta": 5e5, **scaling})
    new = model_from_hf(tmp_path)
    rewrite_config(tmp_path, rope_parameters=None, rope_theta=5e5, rope_scaling=scaling)
    assert model_from_hf(tmp_path) == new
    assert (new.rope_theta, new.rope_scaling) == (5e5, RopeScaling(original_max_seq_len=16))
    rewrite_config(tmp_path, architectures=None)
    assert model_from_hf(tmp_path) == new


def test_a_model_that_transformers_has_not_is_refused_by_what_differs() -> None:
    small = ModelConfig(
        name="a", vocab_size=8, dim=8, layers=1, heads=2, kv_heads=2, head_dim=4, ffn_dim=8, max_seq_len=8
    )
    assert architecture_of(small) == "LlamaForCausalLM"
    small.mlp, small.norm = Mlp.gelu, Norm.rms
    with pytest.raises(
        ConfigError, match=r"the nearest, LlamaForCausalLM, differs in model\.mlp; the others are"
    ):
        architecture_of(small)


# --- tensors ------------------------------------------------------------------------------------------------

LAYER = "model.layers.1.self_attn"
TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda t: t.pop(f"{LAYER}.k_proj.weight"), f"lacks {LAYER}.k_proj.weight"),
    "headless": (lambda t: t.pop("lm_head.weight"), "lacks lm_head.weight"),
    "extra": (
        lambda t: t.update({f"{LAYER}.k_proj.bias": torch.zeros(8)}),
        f"has, and the model of its config.json has not, {LAYER}.k_proj.bias",
    ),
    "misshapen": (
        lambda t: t.update({"model.norm.weight": torch.zeros(15)}),
        "has in another shape model.norm.weight (15, not 16)",
    ),
    "dtype": (
        lambda t: t.update({"model.norm.weight": torch.zeros(16, dtype=torch.float64)}),
        "has in another dtype than F32, BF16, F16 model.norm.weight (F64)",
    ),
    "several": (
        lambda t: [t.pop(name) for name in sorted(t) if ".mlp." in name],
        "lacks model.layers.0.mlp.gate_proj.weight, model.layers.0.mlp.up_proj.weight, "
        "model.layers.0.mlp.down_proj.weight, model.layers.1.mlp.gate_proj.weight and 2 more",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_wrong_tensors_are_named(name: str, tmp_path: Path) -> None:
    change, reason = TENSORS[name]
    saved(tmp_path)
    rewrite_tensors(tmp_path, change)
    with pytest.raises(CheckpointError) as caught:
        HfWeights(tmp_path, model_from_hf(tmp_path))
    assert str(caught.value) == f"{tmp_path} {reason}"
    with pytest.raises(ConfigError) as refused:  # before anything is allocated
        validate(compose(["model=auto", f"model.init_from={tmp_path}"]), data=False)
    assert str(refused.value) == f"model.init_from={tmp_path}: {tmp_path} {reason}"


def test_two_faults_make_one_sentence(tmp_path: Path) -> None:
    saved(tmp_path)
    rewrite_tensors(tmp_path, lambda t: t.update({"odd": t.pop("model.norm.weight")}))
    with pytest.raises(CheckpointError) as caught:
        HfWeights(tmp_path, model_from_hf(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path} lacks model.norm.weight; it has, and the model of its config.json has not, odd"
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [("dtype", None), ("shape", None), ("dtype", 4), ("shape", "16"), ("shape", [16.0]), ("shape", [-16])],
)
def test_a_header_without_a_tensors_dtype_or_shape_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    """`None`: the key is missing."""
    saved(tmp_path)
    cfg, file = model_from_hf(tmp_path), tmp_path / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["model.norm.weight"][key] = value
    if value is None:
        del header["model.norm.weight"][key]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(CheckpointError) as caught:
        HfWeights(tmp_path, cfg)
    entry = {"dtype": "F32", "shape": [16], key: value}
    assert str(caught.value) == (
        f"{file} says of the tensor model.norm.weight dtype={entry['dtype']!r} and shape={entry['shape']!r}, and "
        "they are a word and a list of sizes; copy it again"
    )


def test_files_that_are_missing_or_torn_are_named(tmp_path: Path) -> None:
    saved(tmp_path)
    cfg, file = model_from_hf(tmp_path), tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for content, reason in (
        (whole[:-7], f"{file} has {len(whole) - 7} bytes and not {len(whole)}; copy it again"),
        (b"\x10", f"{file} is no safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\n", f"{file} is no safetensors file"),
    ):
        file.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            HfWeights(tmp_path, cfg)
        assert str(caught.value).startswith(reason)
    file.unlink()
    with pytest.raises(
        CheckpointError, match=r"has no model\.safetensors and no model\.safetensors\.index\.json"
    ):
        HfWeights(tmp_path, cfg)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle, which is never opened"):
        HfWeights(tmp_path, cfg)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        CheckpointError, match=r"model-00001-of-00002\.safetensors is missing; copy the model again"
    ):
        HfWeights(tmp_path, cfg)


def test_a_tied_head_may_be_there_if_it_is_the_embedding(tmp_path: Path) -> None:
    saved(tmp_path, tie_word_embeddings=True)
    cfg = model_from_hf(tmp_path)
    rewrite_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    with HfWeights(tmp_path, cfg) as weights:
        assert weights.whole("embed.weight").shape == (40, 16)
    rewrite_tensors(tmp_path, lambda t: t["lm_head.weight"][7].add_(1))
    with HfWeights(tmp_path, cfg) as weights:
        list(weights.rows("embed.weight", 0, 7))
        with pytest.raises(
            CheckpointError, match=r"lm_head\.weight that is not its model\.embed_tokens\.weight"
        ):
            list(weights.rows("embed.weight", 7, 8))


@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
def test_old_files_without_the_first_word_and_with_derived_tensors_are_read(
    kind: str, tmp_path: Path
) -> None:
    saved(tmp_path, kind, tie_word_embeddings=True)
    cfg = model_from_hf(tmp_path)
    with HfWeights(tmp_path, cfg) as weights:
        expected = {name: weights.whole(name) for name in weights.parts}

    def strip(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.partition(".")[2]] = tensors.pop(name)
        mask = {"h.0.attn.bias": torch.ones(1, 1, 8, 8)}
        tensors.update(mask if kind == "GPT2" else {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})

    rewrite_tensors(tmp_path, strip)
    with HfWeights(tmp_path, cfg) as weights:
        assert all(torch.equal(weights.whole(name), value) for name, value in expected.items())


# --- model.init_from ----------------------------------------------------------------------------------------


def problem(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(compose([*words]), data=False)
    return str(caught.value)


def test_auto_takes_everything_and_words_go_above_it(tmp_path: Path) -> None:
    folder = saved(tmp_path / "Small-1B", tie_word_embeddings=True)
    source = f"model.init_from={folder}"
    model = compose(["model=auto", source]).model
    assert (model.name, model.dim, model.kv_heads, model.max_seq_len) == ("Small-1B", 16, 1, 4096)
    longer = compose(["model=auto", source, "model.rope_theta=5e6", "model.max_seq_len=8192"])
    assert (longer.model.rope_theta, longer.model.max_seq_len, longer.model.dim) == (5e6, 8192, 16)
    validate(longer, data=False)
    assert problem("model=auto", source, "model.dim=32", "model.qk_norm=true") == (
        f"{source} is another model: dim is 16 there and 32 here, qk_norm is false there and true here; "
        "use model=auto to take all of it from there"
    )
    assert "is another model: vocab_size is 40 there and 2048 here, dim is 16" in problem(
        "model=tiny", source
    )
    assert compose([]).model.name == "tiny"  # nothing of it stays behind


def test_a_preset_must_be_the_whole_model(tmp_path: Path) -> None:
    """Same shapes and another angle would load, and talk nonsense."""
    folder = saved(tmp_path / "a")
    words = [
        "model=tiny",
        f"model.init_from={folder}",
        "model.vocab_size=40",
        "model.dim=16",
        "model.layers=2",
    ]
    words += [
        "model.heads=2",
        "model.kv_heads=1",
        "model.head_dim=8",
        "model.ffn_dim=24",
        "model.norm_eps=1e-6",
    ]
    words += ["model.tie_embeddings=false"]
    validate(compose(words), data=False)
    assert "is another model: rope_theta is 10000.0 there and 500.0 here" in problem(
        *words, "model.rope_theta=500"
    )


def test_learned_positions_are_as_many_as_there_are(tmp_path: Path) -> None:
    source = f"model.init_from={saved(tmp_path, 'GPT2')}"
    validate(compose(["model=auto", source]), data=False)
    longer = ["model=auto", source, "model.max_seq_len=2048"]
    assert "max_seq_len is 1024 there and 2048 here" in problem(*longer)
    assert problem("model=auto", source, "model.nope_every=2").startswith("model.nope_every is about rotary")


def test_auto_needs_something_to_start_from(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"model=auto takes its sizes from what it starts from: add model\.init_from"
    ):
        compose(["model=auto"])
    with pytest.raises(
        ConfigError, match=r"model\.init_from: .* has no config\.json and no config\.yaml; pass a run"
    ):
        compose(["model=auto", f"model.init_from={tmp_path}"])
    assert "has neither a checkpoint nor a config.json" in problem(f"model.init_from={tmp_path}")


def test_kinds_of_sources(tmp_path: Path) -> None:
    hugging_face = saved(tmp_path / "hf")
    assert kind_of(hugging_face) is Kind.hugging_face and tokenizer_of(hugging_face) is None
    (hugging_face / "tokenizer.json").touch()
    assert tokenizer_of(hugging_face) == hugging_face
    run = tmp_path / "run"
    step = run / "checkpoints" / "step_00000001"
    step.mkdir(parents=True)
    (step / "complete.json").touch()
    assert (kind_of(run), kind_of(step), kind_of(tmp_path)) == (Kind.run, Kind.checkpoint, None)
    (run / "config.yaml").write_text("model: {name: a, dimm: 3}\n")
    with pytest.raises(ConfigError, match=r"config\.yaml does not say what the model is \(.*dimm"):
        model_of(run)
