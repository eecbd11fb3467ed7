"""Which widths of attention heads our Triton kernels take; a test holds this to kernels/attention_triton.py."""

from drivetrain.conf.schema import Precision

UNIT = 8
LARGEST = {Precision.bf16: 256, Precision.fp32: 128}  # beyond it, registers spill


def triton_takes(head_dim: int, precision: Precision) -> bool:
    return head_dim % UNIT == 0 and head_dim <= LARGEST[precision]


def head_dim_problem(head_dim: int, precision: Precision) -> str | None:
    """What `kernels=triton` and `kernels=flash_attn` say about a width; None where they take it."""
    if triton_takes(head_dim, precision):
        return None
    return (
        f"takes a model.head_dim that is a multiple of {UNIT} up to {LARGEST[precision]} in {precision.value}, "
        f"not {head_dim}; use kernels=sdpa"
    )
