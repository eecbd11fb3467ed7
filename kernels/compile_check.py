"""Compiles every variant of every Triton kernel for Hopper, on a machine with or without a GPU.

`python -m drivetrain.kernels.compile_check [OP...]` prints registers a thread, shared memory and spills as ptxas
and Triton report them. It cannot run under TRITON_INTERPRET=1.
"""

import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import drivetrain.kernels
from drivetrain.kernels.op import OPS, Op, Variant

SHARED_LIMIT = 227 * 1024  # bytes that one block of threads may use on sm_90
ALIGNMENT = 16  # what Triton's own specialisation looks for: bytes of a pointer, or a factor of an integer


@dataclass(frozen=True, slots=True)
class Compiled:
    """What one variant came to: registers a thread, bytes of shared memory a block, bytes spilled a thread."""

    op: str
    kernel: str
    constants: str
    dtypes: str
    num_warps: int
    num_stages: int
    registers: int
    shared: int
    spills: int
    seconds: float

    @property
    def fits(self) -> bool:
        return self.spills == 0 and self.shared <= SHARED_LIMIT


def load_ops() -> dict[str, Op]:
    """The table, after importing every file of kernels/: each registers its op."""
    for module in pkgutil.iter_modules(drivetrain.kernels.__path__):
        importlib.import_module(f"drivetrain.kernels.{module.name}")
    return OPS


def compile_variant(op: str, variant: Variant) -> Compiled:
    """Compile for sm_90 down to machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    divisible = {
        (place,): [["tt.divisibility", ALIGNMENT]]
        for place, kind in enumerate(variant.signature.values())
        if kind.startswith("*") or kind.endswith(":16")
    }
    signature = {name: kind.removesuffix(":16") for name, kind in variant.signature.items()}
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=variant.constants, attrs=divisible)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    began = time.perf_counter()
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    seconds = time.perf_counter() - began
    registers, spills = _resources(made.asm["ptx"])
    pointers = {kind.lstrip("*") for kind in variant.signature.values() if kind.startswith("*")}
    return Compiled(
        op=op,
        kernel=variant.kernel.__name__.lstrip("_"),
        constants=" ".join(f"{key}={value}" for key, value in variant.constants.items()),
        dtypes=",".join(sorted(pointers & {"bf16", "fp16", "fp32"})),
        num_warps=variant.num_warps,
        num_stages=variant.num_stages,
        registers=registers,
        shared=made.metadata.shared,
        spills=spills,
        seconds=round(seconds, 2),
    )


def _resources(ptx: str) -> tuple[int, int]:
    """Registers and spilled bytes (stores and loads) a thread, from ptxas."""
    import triton.backends.nvidia

    assembler = Path(next(iter(triton.backends.nvidia.__path__))) / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [str(assembler), "-v", "--gpu-name=sm_90a", str(source), "-o", f"{folder}/kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = max(map(int, re.findall(r"Used (\d+) registers", said)))
    return registers, sum(map(int, re.findall(r"(\d+) bytes spill", said)))


def compile_all(names: list[str]) -> Iterator[Compiled]:
    """Every variant of the named ops, of all when none is named."""
    for name, op in load_ops().items():
        if not names or name in names:
            for variant in op.variants():
                yield compile_variant(name, variant)


def main(arguments: list[str]) -> int:
    rows = []
    for row in compile_all([word for word in arguments if word != "--json"]):
        rows.append(row)
        if "--json" not in arguments:
            print(
                f"{row.op:22} {row.kernel:24} {row.dtypes:9} {row.constants:60} warps {row.num_warps} stages "
                f"{row.num_stages} registers {row.registers:3} shared {row.shared:6} spills {row.spills}"
            )
    if "--json" in arguments:
        print(json.dumps([asdict(row) for row in rows]))
    return 0 if all(row.fits for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
