"""The table of operations: one row an op, which the tests and the benchmark walk through."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Op:
    """An operation, its slow twin in plain PyTorch, and every faster implementation of the same signature."""

    name: str
    ref: Callable[..., Any]
    fast: dict[str, Callable[..., Any]]  # backend name -> implementation
    example_inputs: Callable[[torch.dtype, torch.Generator], tuple[Any, ...]]
    tolerances: dict[torch.dtype, float] = field(default_factory=dict)  # max relative error against float64


OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    OPS[op.name] = op
    return op
