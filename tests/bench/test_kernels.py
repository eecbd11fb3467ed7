"""The kernels' benchmark on the CPU: its logic, not its times."""

import importlib.util
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """bench/kernels.py under a name of its own: a `kernels` on the path may be another package."""
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("bench_kernels", BENCH / "kernels.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before
    for name in ("kernels_peers", "kernels_attention", "common"):
        sys.modules.pop(name, None)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", str(BENCH / "kernels.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("arguments", [(), ("--quick",), ("--device", "cpu")])
def test_without_a_gpu_it_says_so_in_one_sentence(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "GPU" in done.stderr


def test_a_quick_run_on_the_cpu_writes_rows_and_tables(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    wanted = "rms_norm,decode_attention,token_logprob/tiny"
    done = run("--quick", "--device", "cpu", "--markdown", "--only", wanted, "--out", str(out))
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["device"]["bytes"] > 0 and result["device"]["flops"] > 0
    ops = {"rms_norm", "add_rms_norm", "decode_attention", "token_logprob"}
    assert {row["op"] for row in result["rows"]} == ops
    for row in result["rows"]:
        assert "error" not in row
        assert row["ours"]["ms"] > 0 and row["ours"]["share"] > 0
        assert row["peers"] and all(peer["ms"] > 0 for peer in row["peers"].values())
        assert ("backward_ms" in row["ours"]) == (
            row["direction"] == "forward+backward" and row["op"] in {"rms_norm", "add_rms_norm"}
        )
        assert not any("differs" in why for why in row["not_measured"].values())
    for op in ops:
        assert f"### {op}" in done.stdout
    assert "| tiny 24x32, forward+backward |" in done.stdout
    assert "- not measured: torch.compile: compiled on a GPU only" in done.stdout


def case(bench: Any, ours: Any, **peers: Any) -> Any:
    return bench.Case(
        op="double",
        shape="4",
        draw=lambda: (torch.randn(4),),
        gradients=1,
        ours=ours,
        peers={name: (lambda _, peer=peer: peer) for name, peer in peers.items()},
        bound="bytes",
        work={"forward": 32.0, "forward+backward": 64.0},
    )


def measured(bench: Any, case_: Any, direction: str = "forward+backward", seconds: float = 60) -> Any:
    return bench.measure(case_, direction, bench.place_of("cpu"), True, time.monotonic() + seconds)


def double(x: Tensor) -> Tensor:
    return 2 * x


def failing(x: Tensor) -> Tensor:
    raise RuntimeError("no kernel image\nmore")


def test_an_operation_that_fails_is_a_row_and_its_peers_are_measured(bench: Any) -> None:
    row = measured(bench, case(bench, failing, torch=double))
    assert row["error"] == "RuntimeError: no kernel image" and "ours" not in row
    assert row["peers"]["torch"]["ms"] > 0
    bench.with_shares([row], {"bytes": 1e9, "flops": 1e9})
    assert bench.line_of(row, ["torch"])[1] == "failed: RuntimeError: no kernel image"


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_a_peer_that_computes_something_else_is_not_compared(bench: Any, direction: str) -> None:
    row = measured(bench, case(bench, double, torch=double, other=lambda x: 3 * x, broken=failing), direction)
    assert set(row["peers"]) == {"torch"} and row["peers"]["torch"]["difference"] == 0
    assert row["not_measured"]["other"] == "differs from ours by 0.5 of the largest value"
    assert row["not_measured"]["broken"] == "RuntimeError: no kernel image"


def test_a_wrong_gradient_is_seen(bench: Any) -> None:
    row = measured(bench, case(bench, double, other=lambda x: 2 * x.detach() + 0 * x))
    assert "differs" in row["not_measured"]["other"]


def test_peers_past_the_deadline_are_left_out_and_ours_is_not(bench: Any) -> None:
    row = measured(bench, case(bench, double, torch=double), seconds=-1)
    assert row["ours"]["ms"] > 0 and row["not_measured"] == {"torch": "out of time"}


def test_shares_are_of_the_measured_rates_and_backward_is_what_is_left(bench: Any) -> None:
    common_part = {"op": "a", "shape": "s", "bound": "bytes", "backward_apart": True}
    rows = [
        {**common_part, "direction": "forward", "work": 1e6, "ours": {"ms": 2.0}},
        {**common_part, "direction": "forward+backward", "work": 3e6, "ours": {"ms": 4.5}},
    ]
    bench.with_shares(rows, {"bytes": 1e9})
    assert rows[0]["ours"]["share"] == 0.5
    assert rows[1]["ours"]["backward_ms"] == 2.5
    assert math.isclose(rows[1]["ours"]["backward_share"], 0.8)


def test_mixed_documents_fill_the_batch(bench: Any) -> None:
    document_lengths = importlib.import_module("kernels_attention").document_lengths
    lengths = document_lengths(32768)
    assert sum(lengths) == 32768 and min(lengths) >= 1 and len(lengths) > 16
    assert lengths == document_lengths(32768) and max(lengths) > 4 * sorted(lengths)[len(lengths) // 2]
