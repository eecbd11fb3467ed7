import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from drivetrain.kernels.rope import rope, rope_frequencies, rope_tables


def test_rope_multiplies_complex_numbers_by_a_phase() -> None:
    generator = torch.Generator().manual_seed(0)
    q_TNH = torch.randn(11, 3, 16, generator=generator, dtype=torch.float64)
    k_TKH = torch.randn(11, 1, 16, generator=generator, dtype=torch.float64)
    positions_T = torch.tensor([0, 1, 2, 3, 0, 1, 0, 4095, 8191, 70_000, 131_071])
    frequencies_h = 500000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
    phase_Th = positions_T[:, None] * frequencies_h
    turned = rope(q_TNH, k_TKH, phase_Th.cos(), phase_Th.sin())
    for before, after in zip((q_TNH, k_TKH), turned, strict=True):
        numbers = torch.complex(before[..., :8], before[..., 8:]) * torch.exp(1j * phase_Th)[:, None]
        torch.testing.assert_close(after, torch.cat((numbers.real, numbers.imag), dim=-1))


def test_the_tables_hold_the_angles_of_each_position() -> None:
    positions_T = torch.tensor([0, 1, 5, 0, 1000], dtype=torch.int32)
    cos_Th, sin_Th = rope_tables(positions_T, rope_frequencies(8, 10000.0))
    angles_Th = positions_T.double()[:, None] * 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    assert cos_Th.dtype == sin_Th.dtype == torch.float32
    # An angle of 1,000 in fp32 is right to 1000 * 2^-24.
    torch.testing.assert_close(cos_Th.double(), angles_Th.cos(), rtol=0, atol=2e-4)
    torch.testing.assert_close(sin_Th.double(), angles_Th.sin(), rtol=0, atol=2e-4)


def test_scores_depend_on_the_distance_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    q_1NH, k_1KH = (torch.randn(1, 1, 32, generator=generator).expand(5, 1, 32) for _ in range(2))
    frequencies_h = rope_frequencies(32, 10000.0)
    here, _ = rope(q_1NH, k_1KH, *rope_tables(torch.arange(7, 12), frequencies_h))
    _, there = rope(q_1NH, k_1KH, *rope_tables(torch.arange(5), frequencies_h))
    scores = (here * there).sum(-1)
    torch.testing.assert_close(scores, scores[:1].expand(5, 1))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("factor", "low", "high", "original"),
    [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (4.0, 2.0, 8.0, 256)],
)
def test_scaling_is_that_of_transformers(
    head_dim: int, factor: float, low: float, high: float, original: int
) -> None:
    config = LlamaConfig(
        hidden_size=head_dim * 2,
        num_attention_heads=2,
        max_position_embeddings=int(original * factor),
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        },
    )
    theirs, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    ours = rope_frequencies(
        head_dim,
        500000.0,
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_seq_len=original,
    )
    assert attention_factor == 1.0
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    plain = rope_frequencies(head_dim, 500000.0)
    assert ours[0] == plain[0] and ours[-1] == pytest.approx(float(plain[-1] / factor))
