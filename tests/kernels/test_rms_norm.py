"""RMSNorm in Triton, alone and after a residual sum: any width, any rows, against the definition and float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from drivetrain.kernels import rms_norm as module
from drivetrain.kernels.op import INTERPRETED
from drivetrain.kernels.rms_norm import (
    WIDE,
    add_rms_norm,
    add_rms_norm_ref,
    add_rms_norm_triton,
    rms_norm,
    rms_norm_ref,
    rms_norm_triton,
)

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = {
    "contiguous": lambda x: x,
    "every other row": lambda x: torch.stack([x, x], dim=-2)[..., 0, :],
    "part of a wider row": lambda x: torch.cat([x, x], dim=-1)[..., : x.shape[-1]],
    "columns apart": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "first two dimensions exchanged": lambda x: (
        x.transpose(0, 1).contiguous().transpose(0, 1) if x.ndim > 2 else x
    ),
}


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def unit(x_TD: Tensor, weight_D: Tensor, eps: float) -> float:
    """A gradient of x is a difference, of up to 4 |weight| / rms each."""
    if not x_TD.numel():
        return 0.0
    return float(4 * weight_D.abs().max() * (x_TD.double().square().mean(-1) + eps).rsqrt().max())


def unit_of_weight(x_TD: Tensor, eps: float) -> float:
    """A gradient of the weight is a sum over rows of what may cancel, added up in fp32: what its terms come to, in
    units of the dtype."""
    if not x_TD.numel():
        return 0.0
    rows_TD = x_TD.double().reshape(-1, x_TD.shape[-1])
    sizes_TD = rows_TD.abs() * (rows_TD.square().mean(-1, keepdim=True) + eps).rsqrt()
    return float(sizes_TD.sum(0).max()) * torch.finfo(torch.float32).eps / torch.finfo(x_TD.dtype).eps


@st.composite
def cases(draw_: st.DrawFn) -> dict[str, Any]:
    return {
        "leading": draw_(st.lists(st.integers(1, 7), max_size=3) | st.just([0]) | st.just([150])),
        "width": draw_(st.integers(1, 40) | st.integers(60, 300) | st.sampled_from([1023, 1025])),
        "eps": draw_(st.sampled_from([1e-6, 1e-5, 1e-2])),
        "loudness": draw_(st.sampled_from([1e-3, 1.0, 100.0])),
        "layout": draw_(st.sampled_from(list(LAYOUTS))),
        "seed": draw_(st.integers(0, 2**32)),
    }


def compare(check: Callable[..., None], dtype: torch.dtype, residual: bool, case: dict[str, Any]) -> None:
    arrange, eps = LAYOUTS[case["layout"]], case["eps"]
    shape = *case["leading"], case["width"]
    x_TD = case["loudness"] * draw(*shape, dtype=dtype, seed=case["seed"])
    weight_D = draw(case["width"], dtype=dtype, seed=case["seed"] + 1)
    if not residual:
        check(
            lambda x, weight: rms_norm_triton(arrange(x), weight, eps),
            lambda x, weight: rms_norm_ref(x, weight, eps),
            [x_TD, weight_D],
            [0.0, unit(x_TD, weight_D, eps), unit_of_weight(x_TD, eps)],
        )
        return
    residual_TD = draw(*shape, dtype=dtype, seed=case["seed"] + 2)
    sum_TD = x_TD + residual_TD
    check(
        lambda x, more, weight: add_rms_norm_triton(arrange(x), arrange(more), weight, eps),
        lambda x, more, weight: add_rms_norm_ref(x, more, weight, eps),
        [x_TD, residual_TD, weight_D],
        [0.0, 0.0, *[unit(sum_TD, weight_D, eps)] * 2, unit_of_weight(sum_TD, eps)],
    )


@settings(max_examples=30)
@given(case=cases())
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "after a sum"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_rows_err_no_more_than_the_definition(
    assert_no_worse: Callable[..., None], dtype: torch.dtype, residual: bool, case: dict[str, Any]
) -> None:
    compare(assert_no_worse, dtype, residual, case)


@pytest.mark.parametrize("width", [4096, 5000, WIDE, WIDE + 1, 16_383, 16_384])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "after a sum"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_rows_err_no_more_than_the_definition(
    assert_no_worse: Callable[..., None], dtype: torch.dtype, residual: bool, width: int
) -> None:
    case = {"leading": [7], "width": width, "eps": 1e-5, "loudness": 1.0, "layout": "contiguous", "seed": 0}
    compare(assert_no_worse, dtype, residual, case)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_how_rows_lie_changes_no_bit(
    values_and_gradients: Callable[..., list[Tensor]], layout: str, width: int = 24
) -> None:
    inputs = [draw(4, 5, width), draw(width, seed=1)]
    plain = values_and_gradients(lambda x, weight: rms_norm_triton(x, weight, 1e-5), inputs)
    arranged = values_and_gradients(
        lambda x, weight: rms_norm_triton(LAYOUTS[layout](x), weight, 1e-5), inputs
    )
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(arranged, plain, strict=True))


@pytest.mark.parametrize("copied", ["columns apart", "three strides"])
def test_rows_of_two_strides_are_read_in_place(copied: str) -> None:
    """The heads of queries in one buffer of queries, keys and values, and any two leading dimensions exchanged."""
    fused_TNH = draw(6, 5, 8)
    for view in (fused_TNH[:, 1:3], fused_TNH.transpose(0, 1), fused_TNH[::2], fused_TNH[:1].expand(3, 5, 8)):
        assert module._rows_of(view)[0] is view
    apart = (
        LAYOUTS["columns apart"](fused_TNH) if copied == "columns apart" else draw(4, 3, 6, 8)[::2, :2, :5]
    )
    assert module._rows_of(apart)[0] is not apart
    ones_D = torch.ones(8, device=DEVICE)
    assert torch.equal(
        rms_norm_triton(apart, ones_D, 1e-5), rms_norm_triton(apart.contiguous(), ones_D, 1e-5)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_zeros_stay_zeros_with_a_slope(dtype: torch.dtype, eps: float = 1e-4) -> None:
    """There the norm is x · weight / sqrt(eps)."""
    x_TD = draw(5, 12, dtype=dtype)
    x_TD[1:4] = 0
    leaves = [x_TD.requires_grad_(), draw(12, dtype=dtype, seed=1).requires_grad_()]
    out_TD = rms_norm_triton(*leaves, eps)
    assert (out_TD[1:4] == 0).all() and (out_TD[[0, 4]] != 0).all()
    cotangent_TD = draw(5, 12, dtype=dtype, seed=2)
    cotangent_TD[[0, 4]] = 0
    grad_x_TD, grad_weight_D = torch.autograd.grad(out_TD, leaves, cotangent_TD)
    assert (grad_weight_D == 0).all() and (grad_x_TD[[0, 4]] == 0).all()
    slope_TD = cotangent_TD[1:4].float() * leaves[1].float() / eps**0.5
    torch.testing.assert_close(grad_x_TD[1:4].float(), slope_TD, rtol=torch.finfo(dtype).eps * 2, atol=0)


@pytest.mark.parametrize("width", [24, WIDE + 8])
@pytest.mark.parametrize("used", ["norm", "sum", "both"])
def test_either_output_may_go_unused(used: str, width: int) -> None:
    leaves = [draw(3, width, seed=seed).requires_grad_() for seed in range(2)]
    leaves.append(draw(width, seed=2).requires_grad_())
    found = []
    for run in (add_rms_norm_triton, add_rms_norm_ref):
        normed_TD, sum_TD = run(*leaves, 1e-5)
        loss = {"norm": normed_TD, "sum": sum_TD, "both": normed_TD * sum_TD}[used].square().sum()
        found.append(torch.autograd.grad(loss, leaves, allow_unused=True))
    for mine, theirs in zip(*found, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_the_sum_is_rounded_before_it_is_normed() -> None:
    """What the next block adds to and what this one normed are one tensor."""
    x_TD, residual_TD = (draw(9, 40, dtype=torch.bfloat16, seed=seed) for seed in range(2))
    weight_D = draw(40, dtype=torch.bfloat16, seed=2)
    normed_TD, sum_TD = add_rms_norm(x_TD, residual_TD, weight_D, eps=1e-5, backend="triton")
    assert torch.equal(normed_TD, rms_norm(sum_TD, weight_D, eps=1e-5, backend="triton"))


def test_the_weights_gradient_is_the_same_bits_each_time() -> None:
    x_TD, weight_D, grad_TD = draw(300, 33), draw(33, seed=1).requires_grad_(), draw(300, 33, seed=2)
    first, again = (
        torch.autograd.grad(rms_norm_triton(x_TD, weight_D, 1e-5), weight_D, grad_TD)[0] for _ in range(2)
    )
    assert torch.equal(first, again)


ZEROS = {width: torch.zeros(2, width) for width in (8, 16_385)}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((ZEROS[8].double(), torch.ones(8).double()), "fp32, bf16 and fp16, not torch.float64"),
        ((ZEROS[8], torch.ones(8).bfloat16()), "one dtype; x is torch.float32, weight torch.bfloat16"),
        ((ZEROS[8], torch.ones(7)), r"rows of 8 needs a weight of shape \(8,\), not \(7,\)"),
        ((ZEROS[16_385], torch.ones(16_385)), "rows of 1 to 16,384, not 16,385"),
        ((ZEROS[8], torch.zeros(3, 8), torch.ones(8)), r"x is \(2, 8\) .* residual \(3, 8\)"),
        ((ZEROS[8], ZEROS[8].half(), torch.ones(8)), "residual .* torch.float16"),
    ],
)
def test_what_does_not_fit_is_named(inputs: tuple[Tensor, ...], message: str) -> None:
    run: Callable[..., Any] = rms_norm if len(inputs) == 2 else add_rms_norm
    with pytest.raises(ValueError, match=message):
        run(*inputs, eps=1e-5, backend="triton")
