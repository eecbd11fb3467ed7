"""Rotary embedding: what turns by how much, and in Triton at any shape, against the definition and float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from drivetrain.kernels.op import INTERPRETED
from drivetrain.kernels.rope import rope, rope_frequencies, rope_ref, rope_tables, rope_triton

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 8192}

# --- the definition -----------------------------------------------------------------------------------------


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


# --- the kernel ---------------------------------------------------------------------------------------------


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def tables(tokens: int, rotary_dim: int, seed: int = 0, **scaling: Any) -> tuple[Tensor, Tensor]:
    """Of positions up to 128k in no order."""
    positions_T = torch.randint(0, 1 << 17, (tokens,), generator=torch.Generator().manual_seed(seed))
    cos_Th, sin_Th = rope_tables(positions_T, rope_frequencies(rotary_dim, 500000.0, **scaling))
    return cos_Th.to(DEVICE), sin_Th.to(DEVICE)


def parts_of_one_buffer(q_TNH: Tensor, k_TKH: Tensor) -> tuple[Tensor, ...]:
    return torch.cat([q_TNH, k_TKH, k_TKH], dim=1).split((q_TNH.shape[1], *[k_TKH.shape[1]] * 2), dim=1)[:2]


def heads_first(*inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs)


def channels_apart(*inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs)


ARRANGEMENTS = [lambda *inputs: inputs, parts_of_one_buffer, heads_first, channels_apart]


@settings(max_examples=25)
@given(
    tokens=st.integers(0, 7) | st.integers(8, 25),
    heads=st.tuples(st.integers(1, 9), st.integers(1, 4)) | st.sampled_from([(17, 1), (2, 33)]),
    half=st.integers(1, 12) | st.sampled_from([32, 40, 64, 128]),
    kept=st.just(0) | st.integers(1, 40) | st.sampled_from([64, 192]),
    scaling=st.sampled_from([{}, LLAMA3]),
    arrange=st.sampled_from(ARRANGEMENTS),
    seed=st.integers(0, 2**32),
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_heads_err_no_more_than_the_definition(
    assert_no_worse: Callable[..., None],
    dtype: torch.dtype,
    tokens: int,
    heads: tuple[int, int],
    half: int,
    kept: int,
    scaling: dict[str, Any],
    arrange: Callable[..., tuple[Tensor, ...]],
    seed: int,
) -> None:
    inputs = [draw(tokens, n, 2 * half + kept, dtype=dtype, seed=seed + n) for n in heads]
    turns = tables(tokens, 2 * half, seed, **scaling)
    assert_no_worse(
        lambda q, k: rope_triton(*arrange(q, k), *turns),
        lambda q, k: rope_ref(q, k, *turns),
        inputs,
        [1.0] * 4,  # cos a - sin b may cancel to nothing
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_beyond_the_rotary_ones_keep_their_bits(dtype: torch.dtype) -> None:
    q_TNH, k_TKH = draw(21, 5, 13, dtype=dtype), draw(21, 2, 13, dtype=dtype, seed=1)
    turned = rope_triton(q_TNH, k_TKH, *tables(21, 6))
    for before, after in zip((q_TNH, k_TKH), turned, strict=True):
        assert torch.equal(after[..., 6:], before[..., 6:])
        assert not (after[..., :6] == before[..., :6]).all(-1).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary_dim", [16, 10])
def test_backward_turns_the_gradients_back(dtype: torch.dtype, rotary_dim: int) -> None:
    leaves = [draw(37, heads, 16, dtype=dtype, seed=heads).requires_grad_() for heads in (6, 2)]
    grads = [draw(37, heads, 16, dtype=dtype, seed=10 + heads) for heads in (6, 2)]
    cos_Th, sin_Th = tables(37, rotary_dim)
    turned = rope_triton(*leaves, cos_Th, sin_Th)
    found = torch.autograd.grad(turned, leaves, grads)
    for mine, expected in zip(found, rope_triton(*grads, cos_Th, -sin_Th), strict=True):
        assert torch.equal(mine, expected)
    there_and_back = torch.autograd.grad(rope_triton(*leaves, cos_Th, sin_Th), leaves, turned)
    for mine, leaf in zip(there_and_back, leaves, strict=True):
        torch.testing.assert_close(mine, leaf.detach(), rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_one_of_two_outputs_may_go_unused() -> None:
    leaves = [draw(5, heads, 8, seed=heads).requires_grad_() for heads in (3, 1)]
    turns = tables(5, 8)
    for unused in (0, 1):
        turned = rope_triton(*leaves, *turns)
        grads = torch.autograd.grad(turned[1 - unused].square().sum(), leaves, materialize_grads=True)
        assert (grads[unused] == 0).all()
        # A rotation keeps lengths, so that the gradient of the squared length is twice the input.
        torch.testing.assert_close(grads[1 - unused], 2 * leaves[1 - unused].detach())


def test_gradients_broadcast_along_channels_are_read_right() -> None:
    leaves = [draw(5, heads, 8, seed=heads).requires_grad_() for heads in (3, 1)]
    turns = tables(5, 8)
    expanded = [torch.ones(1, device=DEVICE).expand(leaf.shape) for leaf in leaves]
    found = torch.autograd.grad(rope_triton(*leaves, *turns), leaves, expanded)
    dense = torch.autograd.grad(rope_triton(*leaves, *turns), leaves, [x.contiguous() for x in expanded])
    assert all(torch.equal(mine, expected) for mine, expected in zip(found, dense, strict=True))


def wrong(**changes: Tensor) -> dict[str, Tensor]:
    table_Th = torch.ones(6, 4)
    right = {
        "q_TNH": torch.zeros(6, 4, 8),
        "k_TKH": torch.zeros(6, 2, 8),
        "cos_Th": table_Th,
        "sin_Th": table_Th,
    }
    return right | changes


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (wrong(k_TKH=torch.zeros(6, 2, 10)), r"they are \(6, 4, 8\) and \(6, 2, 10\)"),
        (wrong(k_TKH=torch.zeros(5, 2, 8)), r"they are \(6, 4, 8\) and \(5, 2, 8\)"),
        (wrong(q_TNH=torch.zeros(1, 6, 4, 8)), r"queries \[T, N, H\]"),
        (wrong(k_TKH=torch.zeros(6, 2, 8).half()), "torch.float32 and torch.float16"),
        (wrong(q_TNH=torch.zeros(6, 4, 8).double()), "fp32, bf16 or fp16, not torch.float64"),
        (wrong(sin_Th=torch.ones(6, 4).half()), "one shape in fp32"),
        (wrong(sin_Th=torch.ones(6, 3)), "one shape in fp32"),
        (wrong(cos_Th=torch.ones(6, 5), sin_Th=torch.ones(6, 5)), r"\[6, 1 to 4\], not \(6, 5\)"),
        (wrong(cos_Th=torch.ones(7, 4), sin_Th=torch.ones(7, 4)), r"\[6, 1 to 4\], not \(7, 4\)"),
    ],
)
def test_what_does_not_fit_is_named(inputs: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rope(**inputs, backend="triton")
