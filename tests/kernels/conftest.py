"""Kernels on a machine without a GPU: Triton's interpreter, with its bf16 products mended."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

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


if INTERPRETED:
    _mend_bf16_dot()


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """New memory is filled with NaN, so that what a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
