"""LoRA's settings: what they choose, and what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from drivetrain.conf.changes import check_resume
from drivetrain.conf.compose import compose
from drivetrain.conf.errors import ConfigError
from drivetrain.conf.lora import adapters_of, lora_problems, read_peft_config, targets_of
from drivetrain.conf.validate import validate

NAMES = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"


def said(*words: str) -> list[str]:
    return list(lora_problems(compose(list(words))))


def test_all_matrices_of_the_blocks_are_adapted_by_default() -> None:
    config = compose(["lora.rank=16"])
    assert (config.lora.alpha, config.lora.dropout, config.lora.targets) == (32.0, 0.0, ["all-linear"])
    specs = adapters_of(config.model, config.lora)
    assert ", ".join(targets_of(config.model)) == NAMES
    assert len(specs) == 7 * config.model.layers
    value = next(spec for spec in specs if spec.name == "blocks.1.attn.wqkv.v_proj")
    assert value.theirs == "model.layers.1.self_attn.v_proj"
    assert (value.first, value.rows, value.columns) == (384, 192, 192)
    assert adapters_of(config.model, compose([]).lora) == []


PROBLEMS = {
    "lora.rank=8": "lora.rank=8 adapts weights that exist already; pass them with model.init_from=DIR",
    "lora.rank=8 model.init_from=DIR optim=muon": (
        "optim=muon is for whole matrices and not for LoRA's factors of them; use optim=adamw"
    ),
    "lora.rank=8 model.init_from=DIR lora.targets=[w_proj,q_proj]": (
        f"lora.targets has w_proj, which model=tiny has not; use all-linear or some of {NAMES}"
    ),
    "lora.rank=8 model.init_from=DIR lora.targets=[]": (
        f"lora.targets is empty; use all-linear or some of {NAMES}"
    ),
    "lora.init_from=DIR": "lora.init_from=DIR needs adapters and lora.rank=0 has none; set lora.rank",
}


@pytest.mark.parametrize("words", PROBLEMS)
def test_settings_that_do_not_fit(words: str) -> None:
    assert said(*words.split()) == [PROBLEMS[words]]


def test_a_run_without_a_base_is_refused(shards: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"pass them with model.init_from=DIR"):
        validate(compose([f"data.path={shards()}", "lora.rank=4"]))
    with pytest.raises(
        ConfigError, match=r"lora.dropout=1.0 is out of range; it must be at least 0 and below 1"
    ):
        validate(compose([f"data.path={shards('b')}", "lora.dropout=1"]))


def test_an_adapter_to_start_from_has_to_be_the_configured_one(tmp_path: Path) -> None:
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["v_proj", "q_proj"]}
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(settings))
    words = ["model.init_from=DIR", f"lora.init_from={tmp_path}"]
    assert said(*words, "lora.rank=8", "lora.alpha=16", "lora.targets=[q_proj,v_proj]") == []
    assert said(*words, "lora.rank=4") == [
        f"lora.rank=4 and the adapter in {tmp_path} has 8; use lora.rank=8",
        f"lora.alpha=32.0 and the adapter in {tmp_path} has 16.0; use lora.alpha=16.0",
        f"lora.targets is not what the adapter in {tmp_path} has; use lora.targets=[q_proj,v_proj]",
    ]
    model = compose([]).model
    for change, what in (
        ({"use_rslora": True}, "use_rslora=True"),
        ({"peft_type": "IA3"}, "peft_type=IA3"),
        ({"target_modules": ["q_proj", "experts"]}, "target_modules with experts"),
        ({"target_modules": ".*q_proj"}, r"target_modules=\.\*q_proj"),
    ):
        path.write_text(json.dumps(settings | change))
        with pytest.raises(ConfigError, match=f"has {what}, which only PEFT knows"):
            read_peft_config(tmp_path, model)
    path.write_text(json.dumps(settings | {"target_modules": ["layers.1.self_attn.q_proj"]}))
    (one,) = adapters_of(model, read_peft_config(tmp_path, model))
    assert one.name == "blocks.1.attn.wqkv.q_proj"


def test_a_resume_keeps_the_adapters_and_may_find_the_base_elsewhere() -> None:
    old = compose(["lora.rank=8", "model.init_from=a"])
    check_resume(old, replace(old, lora=replace(old.lora, dropout=0.1)))
    check_resume(old, replace(old, model=replace(old.model, init_from="b")))
    with pytest.raises(ConfigError) as caught:
        check_resume(old, replace(old, lora=replace(old.lora, rank=4)))
    assert str(caught.value) == (
        "lora.rank cannot change at a resume (8; now 4): the checkpoint holds adapters of the old settings; "
        "keep it, or start a new run"
    )
