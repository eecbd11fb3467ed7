"""Every way a Triton kernel may be compiled, compiled for sm_90; no GPU is needed."""

import json
import os
import subprocess
import sys

from drivetrain.kernels.compile_check import SHARED_LIMIT, Compiled, load_ops


def test_every_variant_fits_an_sm_without_spills() -> None:
    # In a process of its own: one that interprets kernels cannot compile them.
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "drivetrain.kernels.compile_check", "--json"]
    done = subprocess.run(command, env={**env, "PYTHONSAFEPATH": "1"}, capture_output=True, text=True)
    assert done.stdout, done.stderr[-3000:]
    rows = [Compiled(**row) for row in json.loads(done.stdout)]
    print(*rows, sep="\n")
    variants = {name: sum(1 for _ in op.variants()) for name, op in load_ops().items() if "triton" in op.fast}
    assert all(variants.values()), f"ops that say nothing of what they compile: {variants}"
    assert len(rows) == sum(variants.values())
    spilling = [row for row in rows if row.spills]
    large = [row for row in rows if row.shared > SHARED_LIMIT]
    assert not spilling and not large
