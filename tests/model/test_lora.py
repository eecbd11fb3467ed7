"""Adapters in a model, and in PEFT's files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from drivetrain.conf.compose import compose
from drivetrain.conf.errors import CheckpointError, ConfigError
from drivetrain.conf.lora import adapters_of, read_peft_config, targets_of
from drivetrain.conf.schema import LoraConfig, Mlp, ModelConfig, Norm, Positions
from drivetrain.kernels.attention import make_documents
from drivetrain.model.flops import parameter_count, train_flops_per_token, trained_count
from drivetrain.model.hf import fill_from_hf
from drivetrain.model.initialize import initialize
from drivetrain.model.lora import (
    adapter_parameters,
    adapter_shapes,
    add_adapters,
    base_parameters,
    initialize_adapters,
    inject,
    merged_tensors,
)
from drivetrain.model.peft_format import read_peft, write_peft
from drivetrain.model.transformer import Transformer, build_model, logits

SIZES: dict[str, Any] = {
    "dim": 64,
    "layers": 2,
    "heads": 4,
    "head_dim": 16,
    "vocab_size": 130,
    "max_seq_len": 128,
}
LLAMA = ModelConfig(name="small", kv_heads=2, ffn_dim=96, **SIZES)
GPT2 = ModelConfig(
    name="gpt2",
    kv_heads=4,
    ffn_dim=256,
    positions=Positions.learned,
    norm=Norm.layer,
    mlp=Mlp.gelu,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    tie_embeddings=True,
    **SIZES,
)
MODELS: dict[str, tuple[ModelConfig, Callable[[], Any]]] = {
    "llama": (
        LLAMA,
        lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=130,
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=96,
                max_position_embeddings=128,
                rms_norm_eps=LLAMA.norm_eps,
                rope_parameters={"rope_type": "default", "rope_theta": LLAMA.rope_theta},
                tie_word_embeddings=False,
            )
        ),
    ),
    "gpt2": (
        GPT2,
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=130,
                n_embd=64,
                n_layer=2,
                n_head=4,
                n_positions=128,
                layer_norm_epsilon=GPT2.norm_eps,
            )
        ),
    ),
}
CHOICES = {
    "llama": [
        ["all-linear"],
        ["q_proj", "v_proj"],
        ["k_proj", "o_proj", "up_proj"],
        ["gate_proj", "down_proj"],
    ],
    "gpt2": [["all-linear"], ["c_attn"], ["c_proj"], ["attn.c_proj", "c_fc"]],
}
CASES = [(family, targets) for family, choices in CHOICES.items() for targets in choices]


def lora_of(targets: list[str], **changes: Any) -> LoraConfig:
    return LoraConfig(**{"rank": 4, "alpha": 12.0, "targets": targets, **changes})


def adapted(cfg: ModelConfig, lora: LoraConfig) -> Transformer:
    """A model whose adapters do something: B is not zero."""
    model = build_model(cfg, "sdpa")
    inject(model, lora)
    model.materialize(torch.device("cpu"))
    initialize(model, cfg, 0)
    initialize_adapters(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model):
            if name.endswith("lora_B"):
                parameter.normal_(0, 0.2, generator=generator)
    return model


def run(model: Transformer, tokens_T: Tensor) -> Tensor:
    size = len(tokens_T)
    documents = make_documents(torch.tensor([0, size], dtype=torch.int32), size, size, size)
    with torch.no_grad():
        found: Tensor = model(tokens_T, torch.arange(size), documents, logits)
    return found


@pytest.mark.parametrize(("family", "targets"), CASES, ids=str)
def test_peft_loads_what_is_written_and_makes_the_same_logits(
    family: str, targets: list[str], tmp_path: Path
) -> None:
    cfg, theirs = MODELS[family]
    torch.manual_seed(0)
    theirs().save_pretrained(tmp_path / "base")
    lora = lora_of(targets, dropout=0.1)
    model = adapted(cfg, lora)
    fill_from_hf(model, cfg, tmp_path / "base")
    adapters = {name: parameter.detach() for name, parameter in adapter_parameters(model)}
    write_peft(tmp_path / "adapter", adapters, cfg, lora, base=str(tmp_path / "base"))

    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    tokens_T = torch.randint(0, cfg.vocab_size, (50,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = loaded(tokens_T[None]).logits[0]
        untouched = base.get_base_model() if hasattr(base, "get_base_model") else base
        with loaded.disable_adapter():
            without = untouched(tokens_T[None]).logits[0]
    found = run(model, tokens_T)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (found - without).abs().max() > 0.01

    wrapped = [
        name for name, module in loaded.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)
    ]
    assert [name.removeprefix("base_model.model.") for name in wrapped] == [
        s.theirs for s in adapters_of(cfg, lora)
    ]
    again = read_peft(tmp_path / "adapter", cfg, read_peft_config(tmp_path / "adapter", cfg))
    assert again.keys() == adapters.keys()
    assert all(torch.equal(again[name], adapters[name]) for name in adapters)


@pytest.mark.parametrize("family", MODELS)
def test_an_adapter_that_peft_wrote_is_read(family: str, tmp_path: Path) -> None:
    cfg, theirs = MODELS[family]
    torch.manual_seed(0)
    base = theirs()
    base.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    loaded = peft.get_peft_model(base, settings).eval()
    loaded.save_pretrained(tmp_path / "adapter")
    lora = read_peft_config(tmp_path / "adapter", cfg)
    assert (lora.rank, lora.alpha, lora.targets) == (4, 12.0, targets_of(cfg))
    model = build_model(cfg, "sdpa")
    model.materialize(torch.device("cpu"))
    fill_from_hf(model, cfg, tmp_path / "base")
    add_adapters(model, read_peft(tmp_path / "adapter", cfg, lora), cfg, lora)
    tokens_T = torch.randint(0, cfg.vocab_size, (50,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = loaded(tokens_T[None]).logits[0]
    torch.testing.assert_close(run(model, tokens_T), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("family", "targets"), CASES, ids=str)
def test_merged_weights_are_the_adapted_model(family: str, targets: list[str]) -> None:
    cfg, lora = MODELS[family][0], lora_of(targets)
    model = adapted(cfg, lora)
    adapters = {name: parameter.detach() for name, parameter in adapter_parameters(model)}
    base = [(name, parameter.detach()) for name, parameter in base_parameters(model)]
    plain = build_model(cfg, "sdpa", device="cpu").requires_grad_(False)
    assert [name for name, _ in base] == [name for name, _ in plain.named_parameters()]
    merged = dict(merged_tensors(base, adapters, cfg, lora))
    for name, parameter in plain.named_parameters():
        parameter.copy_(merged[name])
    tokens_T = torch.arange(40)
    torch.testing.assert_close(run(plain, tokens_T), run(model, tokens_T), rtol=1e-5, atol=1e-5)
    for name, parameter in plain.named_parameters():
        parameter.copy_(dict(base)[name])
    add_adapters(plain, adapters, cfg, lora)
    assert all(torch.equal(parameter, merged[name]) for name, parameter in plain.named_parameters())


def test_new_adapters_change_nothing_and_do_not_depend_on_one_another() -> None:
    cfg = LLAMA
    model, plain = build_model(cfg, "sdpa"), build_model(cfg, "sdpa")
    inject(model, lora_of(["all-linear"]))
    for each in (model, plain):
        each.materialize(torch.device("cpu"))
        initialize(each, cfg, 0)
    initialize_adapters(model, 0)
    assert torch.equal(run(model, torch.arange(40)), run(plain, torch.arange(40)))
    drawn = dict(adapter_parameters(model))
    assert {name: tuple(p.shape) for name, p in drawn.items()} == adapter_shapes(cfg, model.lora)
    few = build_model(cfg, "sdpa")
    inject(few, lora_of(["k_proj"]))
    few.materialize(torch.device("cpu"))
    initialize_adapters(few, 0)
    for name, parameter in adapter_parameters(few):
        assert torch.equal(parameter, drawn[name])
    a_RD = drawn["blocks.1.mlp.w_down.down_proj.lora_A"]
    assert a_RD.abs().max() <= 96**-0.5 and a_RD.abs().max() > 0.95 * 96**-0.5  # uniform, as PEFT's
    assert all(parameter.requires_grad == (name in drawn) for name, parameter in model.named_parameters())


def test_dropout_scales_what_it_keeps_and_only_where_gradients_are_recorded() -> None:
    lora = lora_of(["o_proj"], dropout=0.5)
    layer = adapted(LLAMA, lora).blocks[0].attn.wo
    x_TD = torch.ones(3000, 64)
    with torch.no_grad():
        base = torch.nn.functional.linear(x_TD, layer.weight)
        whole = layer(x_TD) - base
    torch.manual_seed(0)
    dropped = (layer(x_TD) - base).detach()
    assert not torch.equal(dropped, whole)
    torch.testing.assert_close(dropped.mean(0), whole.mean(0), rtol=0, atol=0.2)


def test_counts_and_operations() -> None:
    for cfg, _ in MODELS.values():
        lora = lora_of(["all-linear"])
        model = build_model(cfg, "sdpa")
        inject(model, lora)
        whole, trained = trained_count(cfg, lora)
        assert whole.total == sum(parameter.numel() for parameter in model.parameters())
        assert trained.total == sum(p.numel() for p in model.parameters() if p.requires_grad)
        frozen = parameter_count(cfg).matmul
        full, some = (train_flops_per_token(cfg, 64, each) for each in (None, lora))
        assert full - some == 2 * frozen - 6 * trained.total
        assert trained_count(cfg, LoraConfig()) == (parameter_count(cfg), parameter_count(cfg))


def test_files_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    lora = lora_of(["q_proj", "down_proj"])
    adapters = {name: torch.zeros(shape) for name, shape in adapter_shapes(LLAMA, lora).items()}
    write_peft(tmp_path, adapters, LLAMA, lora)
    with pytest.raises(
        CheckpointError, match=r"layers.0.self_attn.k_proj.lora_A.weight is missing.*and 9 more"
    ):
        read_peft(tmp_path, LLAMA, lora_of(["q_proj", "k_proj", "up_proj"]))
    with pytest.raises(CheckpointError, match=r"lora_A.weight is \(4, 64\) and not \(8, 64\)"):
        read_peft(tmp_path, LLAMA, lora_of(["q_proj", "down_proj"], rank=8))
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": True}))
    with pytest.raises(ConfigError, match="has use_dora=True, which only PEFT knows; use plain LoRA"):
        read_peft_config(tmp_path, LLAMA)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        read_peft(tmp_path, LLAMA, lora)


ENGINES = {
    "fsdp": ["engine=fsdp"],
    "fsdp fp32 accumulating": ["engine=fsdp", "engine.precision=fp32", "stage.micro_batch=1"],
    "fsdp dropout": ["engine=fsdp", "lora.dropout=0.1"],
    "zero 0": ["engine=zero", "engine.zero_stage=0"],
    "zero 1": ["engine=zero", "engine.zero_stage=1"],
    "zero 2": ["engine=zero", "engine.zero_stage=2"],
    "zero 3": ["engine=zero", "engine.zero_stage=3"],
}


def test_the_memory_plan_knows_frozen_weights(run_ranks: Callable[..., dict[str, Any]]) -> None:
    """State to 10%; the peak of a step from 10% too little to 25% too much. See test_memory.py."""
    words = ["model=tiny", "model.vocab_size=512", "model.dim=256", "model.ffn_dim=768", "model.heads=8"]
    words += ["model.kv_heads=4", "model.head_dim=64", "model.layers=3", "model.tie_embeddings=false"]
    words += ["cluster.nproc=2", "stage.seq_len=64", "stage.tokens_per_step=512", "stage.micro_batch=4"]
    cases = [
        {"name": name, "measure": "engine", "overrides": [*words, "lora.rank=8", *more]}
        for name, more in ENGINES.items()
    ]
    found = run_ranks(Path(__file__).with_name("memory_worker.py"), 2, cases)
    trained = trained_count(compose(words).model, compose([*words, "lora.rank=8"]).lora)[1].total
    said = {}
    for name, numbers in found.items():
        # What stays between steps: DeepSpeed's bucket, and with ZeRO-3 a part of the gradients.
        stay = {"zero 1": 4, "zero 3": 4 / 2 + 4}.get(name, 0) * trained
        said[name] = (
            round((numbers["planned_state"] + stay) / numbers["state"], 3),
            round(numbers["planned_peak"] / numbers["peak"], 3),
        )
    assert all(abs(state - 1) < 0.1 and 0.9 <= peak <= 1.25 for state, peak in said.values()), said
