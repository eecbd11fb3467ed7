"""The gate in Triton: any width and any input, against the definition and float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from drivetrain.kernels.op import INTERPRETED
from drivetrain.kernels.swiglu import BLOCK, swiglu, swiglu_ref, swiglu_triton

# exp overflows where a gate is shut; the interpreter's numpy says so.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(tokens: int, width: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(tokens, 2 * width, generator=generator)).to(DEVICE, dtype)


@settings(max_examples=30)
@given(
    tokens=st.integers(0, 9),
    width=st.integers(1, 70) | st.integers(BLOCK - 2, BLOCK + 2) | st.integers(2 * BLOCK + 1, 3 * BLOCK),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=st.integers(0, 2**32),
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_width_errs_no_more_than_the_definition(
    assert_no_worse: Callable[..., None], dtype: torch.dtype, tokens: int, width: int, scale: float, seed: int
) -> None:
    assert_no_worse(swiglu_triton, swiglu_ref, [draw(tokens, width, dtype, scale, seed)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_that_are_shut_or_wide_open_stay_finite(dtype: torch.dtype) -> None:
    """silu is 0 or the gate itself there, with slopes 0 and 1, though exp of the gate overflows."""
    gate_F = torch.tensor([-6e4, -2e3, 0.0, 2e3, 6e4], device=DEVICE).to(dtype)
    up_F = torch.tensor([0.5, -0.25, 0.5, 1.0, -1.0], device=DEVICE).to(dtype)
    leaf = torch.cat([gate_F, up_F])[None].requires_grad_()
    out_1F = swiglu_triton(leaf)
    assert torch.equal(out_1F.detach(), (gate_F.clamp(min=0) * up_F)[None])
    (grad_1G,) = torch.autograd.grad(out_1F, leaf, torch.ones_like(out_1F))
    slope_F = torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0], device=DEVICE).to(dtype)
    assert torch.equal(grad_1G, torch.cat([slope_F * up_F, gate_F.clamp(min=0)])[None])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_it_is_the_gates_sigmoid_times_gate_times_up(backend: str) -> None:
    """The definition and its derivatives once more, in float64."""
    leaf = draw(5, 37, torch.float32).requires_grad_()
    gate_TF, up_TF = leaf.detach().double().split(37, dim=1)
    out_TF = swiglu(leaf, backend=backend)
    grad_TF = torch.randn(5, 37, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    (grad_TG,) = torch.autograd.grad(out_TF, leaf, grad_TF)
    open_TF = 1 / (1 + (-gate_TF).exp())
    slope_TF = open_TF * (1 + gate_TF * (1 - open_TF))
    expected_TG = torch.cat([grad_TF * up_TF * slope_TF, grad_TF * gate_TF * open_TF], dim=1)
    torch.testing.assert_close(out_TF.double(), gate_TF * open_TF * up_TF, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad_TG.double(), expected_TG, rtol=1e-5, atol=1e-5)


def test_strided_inputs_and_gradients_give_the_same_bits() -> None:
    gate_up_TG = draw(6, 20, torch.bfloat16)
    grad_TF = draw(6, 10, torch.bfloat16, seed=1)
    found = []
    for apart in (False, True):
        leaf = gate_up_TG.clone().requires_grad_()
        out_TF = swiglu_triton(leaf.mT.contiguous().mT if apart else leaf)
        cotangent = grad_TF.mT.contiguous().mT if apart else grad_TF
        found.append((out_TF, *torch.autograd.grad(out_TF, leaf, cotangent)))
    for plain, strided in zip(*found, strict=True):
        assert torch.equal(plain, strided)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(3, 7), r"one \[T, 2F\], not \(3, 7\)"),
        (torch.zeros(2, 3, 8), r"one \[T, 2F\], not \(2, 3, 8\)"),
        (torch.zeros(3, 8, dtype=torch.float64), "fp32, bf16 and fp16, not torch.float64"),
    ],
)
def test_what_does_not_fit_is_named(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        swiglu(wrong, backend="triton")
