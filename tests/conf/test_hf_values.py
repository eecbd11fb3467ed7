"""What cannot be is refused by the file and the key, not by the weights that would not fit it."""

import json
from pathlib import Path
from typing import Any

import pytest

from drivetrain.conf.errors import ConfigError
from drivetrain.conf.hf_config import model_from_hf
from drivetrain.conf.hf_values import generation_ends

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}
GPT2: dict[str, Any] = {"architectures": ["GPT2LMHeadModel"], "vocab_size": 40, "n_embd": 16, "n_layer": 2}
GPT2 |= {"n_head": 2, "n_positions": 64}
SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALING["original_max_position_embeddings"] = 16
WHOLE, FINITE = "which must be at least 1; copy it again", "which must be above 0; copy it again"

WRONG: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    *(
        (LLAMA, {key: value}, f"says {key}={value}, {WHOLE}")
        for key in LLAMA
        if key != "architectures"
        for value in (0, -3)
    ),
    *((GPT2, {key: 0}, f"says {key}=0, {WHOLE}") for key in GPT2 if key != "architectures"),
    (LLAMA, {"hidden_size": True}, "says hidden_size=True, which is no int; copy it again"),
    (LLAMA, {"hidden_size": 16.0}, "says hidden_size=16.0, which is no int; copy it again"),
    (LLAMA, {"vocab_size": [40]}, "says vocab_size=[40], which is no int; copy it again"),
    (LLAMA, {"hidden_size": float("nan")}, "says hidden_size=nan, which is no int; copy it again"),
    (
        LLAMA,
        {"hidden_size": 18},
        "says hidden_size=18, which num_attention_heads=4 does not divide; copy it again",
    ),
    (GPT2, {"n_head": 3}, "says n_embd=16, which n_head=3 does not divide; copy it again"),
    (
        LLAMA,
        {"num_key_value_heads": 3},
        "says num_attention_heads=4, which num_key_value_heads=3 does not divide; copy it again",
    ),
    (LLAMA, {"head_dim": 5}, "says head_dim=5, and rotary embeddings turn pairs; copy it again"),
    (
        LLAMA,
        {"hidden_size": 12},
        "says hidden_size / num_attention_heads=3, and rotary embeddings turn pairs; copy it again",
    ),
    (LLAMA, {"head_dim": 0}, f"says head_dim=0, {WHOLE}"),
    (LLAMA, {"rms_norm_eps": float("nan")}, f"says rms_norm_eps=nan, {FINITE}"),
    (LLAMA, {"rms_norm_eps": 0}, f"says rms_norm_eps=0, {FINITE}"),
    (LLAMA, {"rms_norm_eps": "1e-5"}, "says rms_norm_eps='1e-5', which is no float; copy it again"),
    (LLAMA, {"initializer_range": float("-inf")}, f"says initializer_range=-inf, {FINITE}"),
    (LLAMA, {"rope_theta": float("inf")}, f"says rope_theta=inf, {FINITE}"),
    (LLAMA, {"rope_theta": 0}, f"says rope_theta=0, {FINITE}"),
    (LLAMA, {"rope_parameters": {"rope_theta": -1}}, f"says rope_parameters.rope_theta=-1, {FINITE}"),
    (LLAMA, {"rope_scaling": "linear"}, "says rope_scaling='linear', which is no dict; copy it again"),
    (LLAMA, {"rope_scaling": SCALING | {"factor": 0.5}}, f"says rope_scaling.factor=0.5, {WHOLE}"),
    (
        LLAMA,
        {"rope_scaling": SCALING | {"factor": "8"}},
        "says rope_scaling.factor='8', which is no float; copy it again",
    ),
    (
        LLAMA,
        {"rope_scaling": SCALING | {"high_freq_factor": 0.5}},
        "says high_freq_factor=0.5, which must be above low_freq_factor=1.0; copy it again",
    ),
    (LLAMA, {"tie_word_embeddings": "no"}, "says tie_word_embeddings='no', which is no bool; copy it again"),
    (GPT2, {"layer_norm_epsilon": -1e-5}, f"says layer_norm_epsilon=-1e-05, {FINITE}"),
    (GPT2, {"n_inner": -1}, f"says n_inner=-1, {WHOLE}"),
    (
        LLAMA,
        {"architectures": ["MistralForCausalLM"], "sliding_window": -1},
        f"says sliding_window=-1, {WHOLE}",
    ),
    (
        LLAMA,
        {"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1, "x"]},
        "says no_rope_layers=[1, 'x'], which is no list of 0 and 1; copy it again",
    ),
    (LLAMA, {"architectures": [["a"]]}, "describes ['a'], which is not supported"),
    (LLAMA, {"architectures": "LlamaForCausalLM"}, "says architectures='LlamaForCausalLM', which is no list"),
]


@pytest.mark.parametrize(("config", "changes", "said"), WRONG, ids=str)
def test_impossible_values_are_refused(
    config: dict[str, Any], changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    model_from_hf(tmp_path)
    path.write_text(json.dumps(config | changes))
    with pytest.raises(ConfigError) as caught:
        model_from_hf(tmp_path)
    assert str(caught.value).startswith(f"{path} {said}")


def test_a_window_that_is_switched_off_may_say_anything(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(LLAMA | {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 0})
    )
    assert model_from_hf(tmp_path).sliding_window is None


@pytest.mark.parametrize(
    ("content", "ends"),
    [
        ("{}", []),
        ('{"eos_token_id": null}', []),
        ('{"eos_token_id": 0}', [0]),
        ('{"eos_token_id": [5, 7]}', [5, 7]),
    ],
)
def test_where_generation_ends(content: str, ends: list[int], tmp_path: Path) -> None:
    assert generation_ends(tmp_path, 8) == []
    (tmp_path / "generation_config.json").write_text(content)
    assert generation_ends(tmp_path, 8) == ends


@pytest.mark.parametrize(
    "value", ["2", True, -1, 2.0, [2, "3"], [2, None], [False], {"a": 1}, [[2]]], ids=repr
)
def test_ends_that_are_no_tokens_are_refused(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ConfigError) as caught:
        generation_ends(tmp_path, 8)
    assert str(caught.value) == (
        f"{path} says eos_token_id={value!r}, which is no token's number nor a list of such; copy it again"
    )
    for broken in ("[2]", "{", "2"):
        path.write_text(broken)
        with pytest.raises(ConfigError, match=r"generation_config\.json is no"):
            generation_ends(tmp_path, 8)


@pytest.mark.parametrize("value", [8, [2, 999_999]], ids=repr)
def test_ends_beyond_the_vocabulary_are_refused(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ConfigError) as caught:
        generation_ends(tmp_path, 8)
    assert str(caught.value) == (
        f"{path} says eos_token_id={value!r}, which is beyond the model's 8 tokens; copy it again"
    )
