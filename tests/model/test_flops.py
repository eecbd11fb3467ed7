from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from drivetrain.conf.compose import compose
from drivetrain.conf.schema import Mlp, ModelConfig, Norm, Positions, Precision, options
from drivetrain.kernels.attention import make_documents
from drivetrain.kernels.linear_cross_entropy import linear_cross_entropy_ref
from drivetrain.model.flops import find_gpu, mean_context, parameter_count, peak_flops, train_flops_per_token
from drivetrain.model.transformer import build_model, unique_parameters

PRESETS = [name for name in options("model") if name != "auto"]
GPT2 = {
    "norm": Norm.layer,
    "mlp": Mlp.gelu,
    "positions": Positions.learned,
    "max_seq_len": 64,
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
}
VARIANTS = [
    GPT2,
    {"nope_every": 2},
    {"qk_norm": True},
    {"qkv_bias": True},
    {"out_bias": True, "mlp_bias": True},
    {"tie_embeddings": False, "heads": 4, "kv_heads": 2, "head_dim": 16},
]


def tiny(**changes: object) -> ModelConfig:
    return replace(compose(["model=tiny"]).model, **changes)


@pytest.mark.parametrize("model", [compose([f"model={name}"]).model for name in PRESETS], ids=PRESETS)
def test_presets_have_the_parameters_that_are_counted(model: ModelConfig) -> None:
    assert_counted(model)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_optional_parameters_are_counted(changes: dict[str, object]) -> None:
    assert_counted(tiny(**changes))


def assert_counted(cfg: ModelConfig) -> None:
    named = dict(unique_parameters(build_model(cfg, "sdpa")))
    blocks = {name: p for name, p in named.items() if name.startswith("blocks.")}
    count = parameter_count(cfg)
    assert count.total == sum(p.numel() for p in named.values())
    assert count.blocks == sum(p.numel() for p in blocks.values()) == cfg.layers * count.block
    assert count.block_matrices == sum(p.numel() for p in blocks.values() if p.dim() == 2)
    assert count.embedding == named["embed.weight"].numel()
    assert count.total == count.blocks + count.embedding + count.positions + count.head + count.final_norm
    assert (count.head == 0) is cfg.tie_embeddings


def test_published_sizes() -> None:
    """As their makers state them: 8.03B, 70.6B, 1.24B (Meta), 8.2B (Qwen)."""
    for name, billions in {
        "llama3_8b": 8.03,
        "llama3_70b": 70.55,
        "llama3_1b": 1.236,
        "qwen3_8b": 8.19,
    }.items():
        assert parameter_count(compose([f"model={name}"]).model).total / 1e9 == pytest.approx(
            billions, rel=2e-3
        )


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_flops_are_those_that_torch_counts(changes: dict[str, object]) -> None:
    """The reference attention multiplies all T x T pairs, twice the causal half that the formula counts."""
    cfg, T = tiny(layers=2, vocab_size=256, **changes), 48
    model = build_model(cfg, "reference", device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    documents = make_documents(torch.tensor([0, T], dtype=torch.int32), T, T, T)

    def read(hidden_TD: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        targets_T, loss_weights_T = torch.zeros(T, dtype=torch.int64), torch.ones(T)
        return linear_cross_entropy_ref(hidden_TD, weight_VD, targets_T, loss_weights_T)[0]

    with FlopCounterMode(display=False) as counter:
        model(torch.arange(T), torch.arange(T), documents, read).backward()
    attention = 12 * cfg.layers * cfg.heads * cfg.head_dim * T
    assert counter.get_total_flops() == T * (6 * parameter_count(cfg).matmul + attention)
    assert train_flops_per_token(cfg, T) == 6 * parameter_count(cfg).matmul + attention / 2


@pytest.mark.parametrize("window", [1, 7, 64, 65, 1000, None])
def test_a_sliding_window_shortens_the_context(window: int | None) -> None:
    seq_len = 64
    seen = [min(place + 1, window or seq_len) for place in range(seq_len)]
    # The formula takes a diagonal score for half a score, as S/2 does.
    assert abs(mean_context(tiny(sliding_window=window), seq_len) - sum(seen) / seq_len) <= 0.5
    assert mean_context(tiny(sliding_window=window), seq_len) <= seq_len / 2


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("AMD Instinct MI300X", "MI300X"),
        ("h100 sxm", "H100 SXM"),
        ("NVIDIA A10G", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA L40", None),
        ("cpu", None),
    ],
)
def test_gpus_are_found_by_the_name_their_driver_reports(reported: str, name: str | None) -> None:
    gpu = find_gpu(reported)
    assert (gpu.name if gpu else None) == name
    assert (peak_flops(reported, "bf16") is None) is (name is None)


def test_peaks() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", Precision.bf16) == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", Precision.fp32) == 19.5e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "tf32") == 156e12
    with pytest.raises(ValueError, match="fp8"):
        peak_flops("NVIDIA H100 PCIe", "fp8")
