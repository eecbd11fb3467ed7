"""Each kernel beside what else computes the same on this GPU: torch, torch.compile, Liger, FlexAttention, cuDNN.

Shapes of llama3_8b and gpt2_xl in bf16; forward alone (under no_grad) and forward with backward. A time is the
median of many runs between CUDA events, after a warm-up, on random inputs that rotate through more memory than any
cache holds; the GPU is kept busy before each run until its launches are queued, so that no launch is timed. The
roofline is this GPU's own: bytes against a large copy, FLOPs against a large matrix product, both measured first.
Each operation runs in a process of its own, so that one that crashes costs its own rows only.
"""

import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common
from kernels_attention import attention_case, decode_attention_case
from kernels_peers import (
    GPT2,
    LLAMA,
    PRODUCTS,
    TINY,
    Case,
    NotMeasured,
    Place,
    Run,
    Sizes,
    add_rms_norm_case,
    linear_cross_entropy_case,
    rms_norm_case,
    rope_case,
    swiglu_case,
    token_logprob_case,
)

CASES: dict[str, Callable[[Sizes, Place], Iterator[Case]]] = {
    "rms_norm": rms_norm_case,
    "add_rms_norm": add_rms_norm_case,
    "rope": rope_case,
    "swiglu": swiglu_case,
    "attention": attention_case,
    "decode_attention": decode_attention_case,
    "linear_cross_entropy": linear_cross_entropy_case,
    "token_logprob": token_logprob_case,
}

ROTATE_BYTES = 512 << 20  # several times the 50 MiB of a Hopper's L2
SPIN_CYCLES = 2_000_000  # about 1 ms, longer than it takes to launch a backward pass
MEASURE_MS = 200.0  # a measurement's share of GPU time, within these numbers of runs
LEAST_RUNS, MOST_RUNS = 10, 100
DISAGREES = 0.1  # relative to the largest value: past it, a peer computes something else
# Seconds for the peers of an operation: a run ends within 8 minutes whatever they take to compile.
SECONDS = {"attention": 150, "decode_attention": 45, "linear_cross_entropy": 50, "token_logprob": 40}
OTHERS_SECONDS = 30


class Clock:
    """Milliseconds and peak memory of calls on one device."""

    def __init__(self, device: torch.device, quick: bool) -> None:
        self.cuda = device.type == "cuda"
        self.quick = quick

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def runs(self, call: Callable[[int], object]) -> int:
        """How many runs make a measurement, after a warm-up."""
        for i in range(1 if self.quick else 3):
            call(i)
        self.wait()
        if self.quick:
            return 2
        began = time.perf_counter()
        for i in range(3):
            call(i)
        self.wait()
        each_ms = 1e3 * (time.perf_counter() - began) / 3
        return int(max(LEAST_RUNS, min(MOST_RUNS, MEASURE_MS / each_ms)))

    def median_ms(self, call: Callable[[int], object]) -> float:
        count = self.runs(call)
        if not self.cuda:
            ticks = []
            for i in range(count):
                began = time.perf_counter()
                call(i)
                ticks.append(1e3 * (time.perf_counter() - began))
            return statistics.median(ticks)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for i, (began_event, ended_event) in enumerate(events):
            torch.cuda._sleep(SPIN_CYCLES)
            began_event.record()
            call(i)
            ended_event.record()
        self.wait()
        return statistics.median(before.elapsed_time(after) for before, after in events)

    def extra_mb(self, call: Callable[[int], object]) -> float | None:
        """Memory that one run takes beyond its inputs, its outputs included, in MB."""
        if not self.cuda:
            return None
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(0)
        self.wait()
        return round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)


def outputs_of(returned: Any) -> list[Tensor]:
    parts = returned if isinstance(returned, tuple | list) else [returned]
    return [part for part in parts if isinstance(part, Tensor)]


class Pass:
    """One implementation in one direction, on sets of inputs that take turns."""

    def __init__(self, run: Run, sets: list[tuple[Tensor, ...]], gradients: int) -> None:
        self.run = run
        self.gradients = gradients
        self.sets = [
            tuple(x.detach().requires_grad_() if i < gradients else x for i, x in enumerate(inputs))
            for inputs in sets
        ]
        self.cotangents: list[Tensor] | None = None

    def __call__(self, turn: int) -> list[Tensor]:
        return self.once(self.sets[turn % len(self.sets)])

    def once(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Outputs, then gradients."""
        if not self.gradients:
            with torch.no_grad():
                return outputs_of(self.run(*inputs))
        outputs = outputs_of(self.run(*inputs))
        carrying = [x for x in outputs if x.requires_grad]
        if self.cotangents is None:
            torch.manual_seed(1)
            self.cotangents = [torch.randn(x.shape, dtype=x.dtype, device=x.device) for x in carrying]
        return [*outputs, *torch.autograd.grad(carrying, inputs[: self.gradients], self.cotangents)]

    def values(self) -> list[Tensor]:
        """Of the first set of inputs, which stays as it is."""
        copies = [x.detach().clone().requires_grad_(x.requires_grad) for x in self.sets[0]]
        # Not a leaf: some peers write into their input.
        found = self.once(tuple(x * 1 if x.requires_grad else x for x in copies))
        return [x.detach() for x in found]


def difference(found: list[Tensor], expected: list[Tensor], gradients: int) -> float:
    """The largest difference, relative to the largest value; a peer may return fewer outputs than we do."""
    if gradients:
        pairs = [
            *zip(found[:-gradients], expected[:-gradients], strict=False),
            *zip(found[-gradients:], expected[-gradients:], strict=True),
        ]
    else:
        pairs = list(zip(found, expected, strict=False))
    worst = 0.0
    for mine, theirs in pairs:
        a, b = mine.reshape(-1).float(), theirs.reshape(-1).float()
        worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp(min=1e-9)))
    return worst


def said(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def measure(case: Case, direction: str, place: Place, quick: bool, deadline: float) -> common.Row:
    """One row: our time and memory, and each peer's or why it has none."""
    clock = Clock(place.device, quick)
    row: common.Row = {
        "op": case.op,
        "shape": case.shape,
        "dtype": str(place.dtype).removeprefix("torch."),
        "direction": direction,
        "bound": case.bound,
        "work": case.work[direction],
        "backward_apart": case.backward_apart,
        "peers": {},
        "not_measured": {},
    }
    gradients = case.gradients if "backward" in direction else 0
    torch.manual_seed(0)
    sets = [case.draw()]
    size = sum(x.numel() * x.element_size() for x in sets[0])
    sets += [case.draw() for _ in range(min(16, -(-ROTATE_BYTES // size)) - 1 if clock.cuda else 1)]
    expected: list[Tensor] | None = None
    try:
        ours = Pass(case.ours, sets, gradients)
        expected = ours.values()
        row["ours"] = {"ms": clock.median_ms(ours), "memory_mb": clock.extra_mb(ours)}
    except Exception as error:
        row["error"] = said(error)
        print(traceback.format_exc(), file=sys.stderr)
    for name, make in case.peers.items():
        try:
            if time.monotonic() > deadline:
                raise NotMeasured("out of time")
            peer = Pass(make(sets[0]), sets, gradients)
            row["peers"][name] = measure_peer(clock, peer, None if name == PRODUCTS else expected)
        except NotMeasured as reason:
            row["not_measured"][name] = str(reason)
        except Exception as error:
            row["not_measured"][name] = said(error)
        peer = None
        if clock.cuda:
            torch.cuda.empty_cache()
    return row


def measure_peer(clock: Clock, peer: Pass, expected: list[Tensor] | None) -> common.Row:
    """Time, memory and difference from `expected` where there is any.

    Raises:
        NotMeasured: the peer computes something else.
    """
    apart = None
    if expected is not None:
        apart = difference(peer.values(), expected, peer.gradients)
        if not apart < DISAGREES:  # NaN included
            raise NotMeasured(f"differs from ours by {apart:.2g} of the largest value")
    return {"ms": clock.median_ms(peer), "memory_mb": clock.extra_mb(peer), "difference": apart}


def rates(place: Place, quick: bool) -> common.Row:
    """Bytes/s of a large copy, read and written, and FLOP/s of a large matrix product."""
    clock = Clock(place.device, quick)
    small = place.device.type == "cpu"
    numbers = 1 << (20 if small else 30)
    source, target = (
        torch.empty(numbers, dtype=torch.uint8, device=place.device).random_() for _ in range(2)
    )
    n = 256 if small else 8192
    a, b = place.draw(n, n), place.draw(n, n)
    copy_ms = clock.median_ms(lambda _: target.copy_(source))
    product_ms = clock.median_ms(lambda _: a @ b)
    found: common.Row = {"bytes": 2 * numbers / copy_ms * 1e3, "flops": 2 * n**3 / product_ms * 1e3}
    if not small:
        gpu = torch.cuda.get_device_properties(place.device)
        found |= {
            "gpu": gpu.name,
            "multiprocessors": gpu.multi_processor_count,
            "l2_mib": gpu.L2_cache_size / 2**20,
            "gpu_memory_gb": round(gpu.total_memory / 1e9, 1),
        }
    return found


def place_of(device: str) -> Place:
    from drivetrain.kernels.op import INTERPRETED

    if device == "cpu":  # fp32: Triton's interpreter multiplies bf16 wrongly
        return Place(torch.device("cpu"), torch.float32, "triton" if INTERPRETED else "sdpa")
    return Place(torch.device("cuda"), torch.bfloat16, "triton")


def work(op: str, device: str, quick: bool, only: str, seconds: float) -> common.Row:
    """All rows of one operation, or the machine's rates."""
    place = place_of(device)
    if op == "rates":
        return rates(place, quick)
    deadline = time.monotonic() + seconds
    rows = []
    for sizes in [TINY] if device == "cpu" else [LLAMA, GPT2]:
        for case in CASES[op](sizes, place):
            for direction in case.work:
                if common.wanted(f"{case.op}/{case.shape}/{direction}", only):
                    rows.append(measure(case, direction, place, quick, deadline))
    return {"rows": rows}


def with_shares(rows: list[common.Row], measured: common.Row) -> None:
    """Add what share of the roofline each time is, and what the backward pass alone comes to by subtraction."""
    forward = {(row["op"], row["shape"]): row for row in rows if row.get("direction") == "forward"}
    for row in rows:
        ours = row.get("ours")
        if not ours:
            continue
        peak = measured[row["bound"]] / 1e3  # per ms
        ours["share"] = row["work"] / peak / ours["ms"]
        alone = forward.get((row["op"], row["shape"]), {})
        if row["direction"] != "forward" and row["backward_apart"] and "ours" in alone:
            left_ms = ours["ms"] - alone["ours"]["ms"]
            ours["backward_ms"] = left_ms
            ours["backward_share"] = (row["work"] - alone["work"]) / peak / left_ms if left_ms > 0 else None


def report(rows: list[common.Row], markdown: bool) -> None:
    """A table an operation, and the reasons for what is missing."""
    for op in dict.fromkeys(row["op"] for row in rows):
        mine = [row for row in rows if row["op"] == op]
        names = list(
            dict.fromkeys(
                name for row in mine for name in (*row.get("peers", {}), *row.get("not_measured", {}))
            )
        )
        names = [name for name in names if any(name in row.get("peers", {}) for row in mine)]
        if markdown:
            print(f"\n### {op}\n")
        header = [
            "shape, direction",
            "ours ms",
            "rate",
            "roofline",
            "backward roofline",
            "extra MB",
            *names,
        ]
        common.show(op, header, [line_of(row, names) for row in mine], markdown)
        reasons = {f"{name}: {why}" for row in mine for name, why in row.get("not_measured", {}).items()}
        for reason in sorted(reasons):
            print(f"- not measured: {reason}" if markdown else f"  not measured: {reason}")


def line_of(row: common.Row, names: list[str]) -> list[str]:
    ours = row.get("ours")
    if ours:
        rate = row["work"] / ours["ms"] / 1e9  # per ms
        told = f"{rate:.0f} TFLOP/s" if row["bound"] == "flops" else f"{1e3 * rate:,.0f} GB/s"
        backward = ours.get("backward_share")
        line = [
            f"{ours['ms']:.3f}",
            told,
            f"{100 * ours['share']:.0f}%",
            "" if backward is None else f"{100 * backward:.0f}%",
            "" if ours["memory_mb"] is None else f"{ours['memory_mb']:,.0f}",
        ]
    else:
        line = [f"failed: {row.get('error', '')}", "", "", "", ""]
    for name in names:
        peer = row.get("peers", {}).get(name)
        if peer is None:
            line.append("not measured")
        elif ours:
            line.append(f"{peer['ms']:.3f} ({peer['ms'] / ours['ms']:.2f}x)")
        else:
            line.append(f"{peer['ms']:.3f}")
    return [f"{row.get('shape', 'all')}, {row.get('direction', '')}", *line]


def main(arguments: list[str] | None = None) -> int:
    made = common.parser(__doc__ or "", "kernels", repeats=1)
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu with --quick only")
    made.add_argument("--worker", metavar="OP")
    made.add_argument("--seconds", type=float, default=0.0, help="for a worker's peers")
    made.add_argument("--to", type=Path)
    options = made.parse_args(arguments)
    if options.device == "cpu" and not options.quick:
        print("kernels.py measures a GPU: on the CPU only --quick runs, with tiny shapes", file=sys.stderr)
        return 2
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "kernels.py needs a CUDA GPU and finds none; --quick --device cpu tries the script",
            file=sys.stderr,
        )
        return 2
    if options.worker:
        found = work(options.worker, options.device, options.quick, options.only, options.seconds)
        options.to.write_text(json.dumps(found))
        return 0

    found_on = common.device()
    script = str(Path(__file__).resolve())
    common_options = ["--device", options.device, *(["--quick"] if options.quick else [])]
    measured = common.run_worker([script, "--worker", "rates", *common_options])
    if "error" in measured:
        print(f"the machine's own rates could not be measured: {measured['error']}", file=sys.stderr)
        return 1
    rows: list[common.Row] = []
    first_words = ",".join(part.partition("/")[0] for part in options.only.split(","))
    for op in [op for op in CASES if common.wanted(op, first_words)] or list(CASES):
        seconds = SECONDS.get(op, OTHERS_SECONDS)
        command = [script, "--worker", op, "--only", options.only, "--seconds", str(seconds), *common_options]
        answer = common.run_worker(command, timeout_s=2 * seconds + 120)
        rows += answer.get("rows", [{"op": op, "error": answer.get("error", "")}])
    with_shares(rows, measured)
    report(rows, options.markdown)
    if options.out or not options.quick:
        seen = common.versions("drivetrain", "torch", "triton", "liger-kernel", "flash-attn")
        path = options.out or common.RESULTS / "kernels.json"
        common.write_result(path, found_on | measured, seen, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
