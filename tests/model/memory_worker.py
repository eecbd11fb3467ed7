"""What training holds on a rank: live bytes of tensor storage, seen through the dispatcher; see rank.py.

Each case: {"name", "measure": "engine" or "block", "overrides"}. Out: measured numbers and planned ones, by name.
"""

import gc
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from drivetrain.conf.compose import compose
from drivetrain.conf.schema import Device, Precision, RunConfig
from drivetrain.data.batch import Batch, batch_from_windows
from drivetrain.kernels.linear_cross_entropy import linear_cross_entropy
from drivetrain.model.flops import parameter_count
from drivetrain.model.initialize import initialize
from drivetrain.model.memory import block_activations, estimate, sequences_per_rank
from drivetrain.model.memory_engines import element_bytes
from drivetrain.model.parallelize import recompute_and_compile
from drivetrain.model.transformer import build_model
from drivetrain.train.build import build_engine
from drivetrain.train.evaluate import documents_of
from drivetrain.train.mesh import World


class LiveBytes(TorchDispatchMode):
    """Sums the storage of every tensor that an operation has returned and that is still alive."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: set[int] = set()
        self.peak = 0

    def live(self) -> int:
        total = 0
        for weak in list(self._storages):
            storage = torch.UntypedStorage._new_with_weak_ptr(weak)
            if storage is None:
                torch.UntypedStorage._free_weak_ref(weak)
                self._storages.remove(weak)
            else:
                total += storage.nbytes()
        return total

    def restart(self) -> int:
        self.peak = self.live()
        return self.peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                weak = getattr(tensor, "_local_tensor", tensor).untyped_storage()._weak_ref()
                if weak in self._storages:
                    torch.UntypedStorage._free_weak_ref(weak)
                self._storages.add(weak)
        self.peak = max(self.peak, self.live())
        return out


def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    def read(hidden_TD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy(hidden_TD, weight_VD, batch.targets_T, batch.loss_weights_T)

    minimise, nll = model(batch.tokens_T, batch.positions_T, documents_of(batch, None, "sdpa"), read)
    return minimise, {"loss": nll}


def draw(config: RunConfig, passes: int, size: int) -> list[Batch]:
    """Windows in two documents each, so that attention is masked."""
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(passes):
        windows = rng.integers(1, config.model.vocab_size, (size, config.stage.seq_len + 1))
        windows[:, config.stage.seq_len // 3] = 0
        batches.append(batch_from_windows(windows, 0))
    return batches


def measure_engine(overrides: list[str], world: World) -> dict[str, float]:
    """The state after a step, and the peak of the next step, offloaded state included."""
    config = compose(overrides)
    size = int(config.stage.micro_batch)
    batches = draw(config, sequences_per_rank(config) // size, size)
    with LiveBytes() as live:
        engine = build_engine(config, world, lambda model: initialize(model, config.model, 0))
        engine.accumulate(batches, loss)
        engine.step(1.0)
        gc.collect()  # what building left behind in cycles
        state = live.restart()
        engine.accumulate(batches, loss)
        engine.step(1.0)
    plan = estimate(config, size, Device.cpu)
    update = plan.by_moment["update"]
    return {
        "parameters": parameter_count(config.model).total,
        "state": state,
        "peak": live.peak,
        "planned_state": update["weights"] + update["optimizer"] + plan.host,
        "planned_gradients": update["gradients"],
        "planned_peak": plan.peak + plan.host,
    }


def measure_block(overrides: list[str], world: World) -> dict[str, float]:
    """What one more block keeps, and the peak of the last block's backward pass above what is kept."""
    kept, peaks = [], []
    for layers in (2, 3):
        config = compose([*overrides, f"model.layers={layers}"])
        (batch,) = draw(config, 1, int(config.stage.micro_batch))
        model = build_model(config.model, "sdpa", device="cpu")
        initialize(model, config.model, 0)
        model.to(torch.bfloat16 if config.engine.precision is Precision.bf16 else torch.float32)
        recompute_and_compile(model, config.engine)
        marks: dict[str, int] = {}
        with LiveBytes() as live:
            for parameter in model.parameters():
                parameter.detach()  # so that they are counted from the beginning

            def entered(_: Any, args: Any, live: LiveBytes = live, marks: dict[str, int] = marks) -> None:
                def left(_: Tensor) -> None:
                    marks.setdefault("peak", live.peak)

                args[0].register_hook(left)

            model.blocks[-1].register_forward_pre_hook(entered)

            def read(hidden_TD: Tensor, _: Tensor, marks: dict[str, int] = marks) -> Tensor:
                marks["kept"] = live.live()
                return hidden_TD.float().mean()

            out = model(batch.tokens_T, batch.positions_T, documents_of(batch, None, "sdpa"), read)
            live.restart()
            out.backward()
        kept.append(marks["kept"])
        peaks.append(marks["peak"] - marks["kept"])
    planned_kept, planned_working = block_activations(config, batch.tokens, on_cpu=True)
    parameters = parameter_count(config.model).block * element_bytes(config.engine.precision)
    return {
        "kept": kept[1] - kept[0] - parameters,
        "working": peaks[1],
        "planned_kept": planned_kept,
        "planned_working": planned_working,
    }


def run_case(case: dict[str, Any], world: World) -> dict[str, float]:
    measure = {"engine": measure_engine, "block": measure_block}[case["measure"]]
    return measure(case["overrides"], world)
