"""Kernels on a machine without a GPU: Triton's interpreter, with its bf16 products mended."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from drivetrain.kernels.op import INTERPRETED


def _mend_bf16_dot() -> None:
    """The interpreter keeps bf16 as bits in uint16 and would multiply those: widen the operands of tl.dot."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    multiply = InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return multiply(self, widened(a), widened(b), *rest)

    InterpreterBuilder.create_dot = create_dot


def _mend_bf16_rounding() -> None:
    """The interpreter cuts fp32 to bf16, and makes 2^-126 of 0; a GPU rounds to nearest, ties to even."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    cast = InterpreterBuilder.cast_impl

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        if source.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return cast(self, source, to)
        bits = source.data.astype(np.float32).view(np.uint32)
        nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        quiet = bits >> 16 | 0x40  # of a NaN: rounding might make it infinite
        data = np.where(np.isnan(source.data), quiet, nearest).astype(np.uint16)
        return TensorHandle(data, tl.bfloat16)

    InterpreterBuilder.cast_impl = cast_impl


if INTERPRETED:
    _mend_bf16_dot()
    _mend_bf16_rounding()


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """New memory is filled with NaN, so that what a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def _values_and_gradients(function: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    returned = function(*leaves)
    outputs = list(returned) if isinstance(returned, tuple) else [returned]
    carrying = [out for out in outputs if out.requires_grad]
    generator = torch.Generator().manual_seed(7)
    cotangents = [torch.randn(out.shape, generator=generator).bfloat16().to(out) for out in carrying]
    gradients = torch.autograd.grad(carrying, leaves, cotangents)
    return [*(out.detach() for out in outputs), *gradients]


@pytest.fixture(scope="session")
def values_and_gradients() -> Callable[[Callable[..., Any], Sequence[Tensor]], list[Tensor]]:
    """`values_and_gradients(function, inputs)`: what it returns, then the gradients of all inputs under normal
    cotangents that depend on shapes alone."""
    return _values_and_gradients


def _ulps(dtype: torch.dtype) -> int:
    # In fp32 each step rounds as coarsely as the result, and the order of steps differs.
    return 4 if dtype == torch.float32 else 1


@pytest.fixture(scope="session")
def assert_no_worse() -> Callable[..., None]:
    """`assert_no_worse(ours, reference, inputs, units)`: values and gradients are at most twice as far from float64
    as the reference's at the inputs' dtype, and an ulp of the largest value; of `units` where that is larger, one
    for each result: what a sum's terms come to when they may cancel to nothing."""

    def check(
        ours: Callable[..., Any],
        reference: Callable[..., Any],
        inputs: Sequence[Tensor],
        units: Sequence[float] | None = None,
    ) -> None:
        exact = _values_and_gradients(reference, [x.double() for x in inputs])
        plain = _values_and_gradients(reference, inputs)
        found = _values_and_gradients(ours, inputs)
        for mine, theirs, truth, unit in zip(found, plain, exact, units or [0.0] * len(found), strict=True):
            assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
            if mine.numel():
                error, bar = ((x.double() - truth).abs().max() for x in (mine, theirs))
                size = max(float(truth.abs().max()), unit)
                assert error <= 2 * bar + _ulps(mine.dtype) * torch.finfo(mine.dtype).eps * size

    return check
