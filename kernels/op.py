"""The table of operations: one row an op, which the tests and the benchmark walk through.

A Triton kernel becomes one operator of torch (`kernel_op`), so that torch.compile, FSDP2 and activation
checkpointing see a single call. With TRITON_INTERPRET=1, set before anything imports Triton, the same kernels run
on the CPU in Triton's interpreter: slow, exact, for tests.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheels for this system: the kernels' files import all the same, none can be launched

    class _Absent:
        constexpr = object

        @staticmethod
        def jit(kernel: Any) -> Any:
            return kernel

    triton = tl = _Absent

__all__ = [
    "INTERPRETED",
    "OPS",
    "Op",
    "Variant",
    "kernel_op",
    "launch",
    "next_power_of_2",
    "register",
    "tl",
    "triton",
]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read by Triton itself when it sees a kernel
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Variant:
    """One way a kernel may be compiled, for the check that it fits a Hopper SM without spills.

    Attributes:
        kernel: the @triton.jit function. signature: its arguments' Triton types by name: "*bf16", "i32", "i32:16"
            (a multiple of 16), "fp32", "constexpr". constants: the constexpr arguments' values; None for an absent
            pointer.
    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


def _no_variants() -> Iterator[Variant]:
    yield from ()


@dataclass(frozen=True, kw_only=True)
class Op:
    """An operation, its slow twin in plain PyTorch, and every faster implementation of the same signature.

    Attributes:
        fast: implementations by backend name, "sdpa" (torch's own), "triton", "flash_attn".
        example_inputs: arguments for (dtype, generator); a tensor drawn in fp64 for fp64 is differentiable.
        tolerances: by dtype, the largest error against float64, relative to the largest value.
        variants: what the Triton backend may compile.
        differentiable: False for an op without gradients.
    """

    name: str
    ref: Callable[..., Any]
    fast: dict[str, Callable[..., Any]]
    example_inputs: Callable[[torch.dtype, torch.Generator], tuple[Any, ...]]
    tolerances: dict[torch.dtype, float] = field(default_factory=dict)
    variants: Callable[[], Iterator[Variant]] = _no_variants
    differentiable: bool = True

    def implementation(self, backend: str) -> Callable[..., Any]:
        """The function that `backend` means for this op.

        "flash_attn" means flash-attn's attention among Triton's other ops; "sdpa" means torch's own, the reference
        where torch has no faster one.

        Raises:
            KeyError: no such backend.
        """
        match backend:
            case "reference":
                return self.ref
            case "sdpa":
                return self.fast.get("sdpa", self.ref)
            case "flash_attn" if "flash_attn" not in self.fast:
                return self.fast["triton"]
            case _:
                return self.fast[backend]


OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    OPS[op.name] = op
    return op


def kernel_op(name: str) -> Callable[[F], Any]:
    """Make a function that launches Triton kernels the operator `drivetrain::name`; it mutates no argument.

    The result takes `register_fake` and `register_autograd`. Compiled, torch.compile sees through it down to the
    kernels; interpreted, it is opaque, since an interpreted kernel reads real memory.
    """
    make = torch.library.custom_op if INTERPRETED else torch.library.triton_op
    return make(f"drivetrain::{name}", mutates_args=())


def launch(kernel: Any) -> Any:
    """The kernel as it is called inside a `kernel_op`: `launch(kernel)[grid](...)`."""
    return kernel if INTERPRETED else torch.library.wrap_triton(kernel)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, 1 for n = 1."""
    return 1 << (n - 1).bit_length()
