"""Every row of the table of operations: each backend, dtype and direction against float64 and the reference."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from drivetrain.kernels.attention import attention
from drivetrain.kernels.compile_check import load_ops
from drivetrain.kernels.op import OPS, Op

load_ops()
NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]
CASES = [
    pytest.param(op, backend, dtype, id=f"{op.name}-{backend}-{str(dtype).removeprefix('torch.')}")
    for op in OPS.values()
    for backend in ("reference", *op.fast)
    if backend != "flash_attn"  # its kernels run on a GPU only, and where it is installed
    for dtype in op.tolerances
]


def on(value: Any, device: str) -> Any:
    """A tensor, or a dataclass of tensors, on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: on(getattr(value, field.name), device) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **parts)
    return value


def widened(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def differentiable_inputs(op: Op) -> list[int]:
    """The places of the inputs that an op draws in whatever dtype it is asked for."""
    if not op.differentiable:
        return []
    wide = op.example_inputs(torch.float64, torch.Generator().manual_seed(0))
    return [i for i, x in enumerate(wide) if isinstance(x, Tensor) and x.dtype == torch.float64]


def run(implementation: Any, inputs: tuple[Any, ...], differentiable: list[int]) -> list[Tensor]:
    """Outputs, then gradients of the differentiable inputs under cotangents that depend on shapes alone."""
    arguments = [
        value.clone().requires_grad_() if place in differentiable else value
        for place, value in enumerate(inputs)
    ]
    returned = implementation(*arguments)
    outputs = list(returned) if isinstance(returned, tuple) else [returned]
    carrying = [out for out in outputs if out.requires_grad]
    if not differentiable:
        return outputs
    generator = torch.Generator().manual_seed(7)
    cotangents = [torch.randn(out.shape, generator=generator).bfloat16().to(out) for out in carrying]
    gradients = torch.autograd.grad(carrying, [arguments[place] for place in differentiable], cotangents)
    return [*(out.detach() for out in outputs), *gradients]


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("op", "backend", "dtype"), CASES)
def test_values_and_gradients_are_close_to_float64(
    op: Op, backend: str, dtype: torch.dtype, device: str
) -> None:
    implementation = op.implementation(backend)
    differentiable = differentiable_inputs(op)
    for seed in range(3):
        drawn = op.example_inputs(dtype, torch.Generator().manual_seed(seed))
        inputs = tuple(on(value, device) for value in drawn)
        exact = run(op.ref, tuple(widened(value) for value in inputs), differentiable)
        plain = run(op.ref, inputs, differentiable)
        found = run(implementation, inputs, differentiable)
        assert len(exact) == len(plain) == len(found)
        for mine, reference, truth in zip(found, plain, exact, strict=True):
            assert mine.shape == reference.shape and mine.dtype == reference.dtype
            assert error(mine, truth) <= op.tolerances[dtype]
            # A correct rounding of the same arithmetic may still differ by one unit in the last place.
            ulp = torch.finfo(mine.dtype).eps
            assert error(mine, truth) <= 2 * error(reference, truth) + ulp


def operators_called(op: Op, dtype: torch.dtype) -> list[tuple[Any, tuple[Any, ...]]]:
    """The operators of ours that the Triton backend calls, forward and backward, with their arguments."""
    called = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "drivetrain":
                called.append((func, tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, args)))
            return func(*args, **(kwargs or {}))

    inputs = op.example_inputs(dtype, torch.Generator().manual_seed(0))
    with Recorder():
        run(op.fast["triton"], inputs, differentiable_inputs(op))
    return called


TRITON = [pytest.param(op, id=op.name) for op in OPS.values() if "triton" in op.fast]


@pytest.mark.parametrize("op", TRITON)
def test_the_operators_keep_torchs_rules(op: Op) -> None:
    """Schema, fake tensors, autograd registration and tracing, as torch.library.opcheck tests them."""
    called = operators_called(op, torch.float32)
    assert called
    for operator, args in called:
        torch.library.opcheck(operator, args)


@pytest.mark.parametrize("op", TRITON)
def test_the_whole_compiles_into_one_graph(op: Op) -> None:
    inputs = op.example_inputs(torch.float32, torch.Generator().manual_seed(0))
    compiled = torch.compile(op.fast["triton"], fullgraph=True, backend="aot_eager")
    plain = run(op.fast["triton"], inputs, differentiable_inputs(op))
    for found, expected in zip(run(compiled, inputs, differentiable_inputs(op)), plain, strict=True):
        torch.testing.assert_close(found, expected)
    torch.compiler.reset()


def test_every_op_has_a_row_and_states_fp32_and_bf16() -> None:
    assert {"attention", "linear_cross_entropy", "rms_norm", "rope", "swiglu"} <= set(OPS)
    for name, op in OPS.items():
        assert op.name == name and {torch.float32, torch.bfloat16} <= set(op.tolerances)


def test_an_unknown_backend_is_an_error() -> None:
    q, k, v, documents = OPS["attention"].example_inputs(torch.float32, torch.Generator())
    with pytest.raises(KeyError, match="no_such"):
        attention(q, k, v, documents, backend="no_such")
