"""DeepSpeed's ZeRO-0, 1, 2 and 3, used directly.

Its own checkpoint refuses another world size and another stage, so the neutral one is written and read through
its full-parameter accessors, one parameter at a time.
"""

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from drivetrain.conf.errors import ConfigError
from drivetrain.conf.schema import AdamWConfig, ModelConfig, OptimConfig, Precision, ZeroConfig
from drivetrain.kernels.attention import make_documents
from drivetrain.model.memory_engines import BUCKET
from drivetrain.model.parallelize import recompute_and_compile
from drivetrain.model.transformer import Transformer
from drivetrain.train.engine.base import Engine, Fill, StepResult
from drivetrain.train.mesh import World
from drivetrain.train.optim import build_adamw, decay_groups, set_lr, trainable_parameters

MOMENTS = ("exp_avg", "exp_avg_sq")


def _import_deepspeed(on_cpu: bool) -> Any:
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed reads it once, at import
    import logging

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    if on_cpu:
        # Shared-memory collectives would be compiled for half a minute; gloo does the same work.
        __compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def deepspeed_config(cfg: ZeroConfig, optim: OptimConfig, world_size: int, parameters: int) -> dict[str, Any]:
    """The dictionary that `deepspeed.initialize` takes. Accumulation and batch sizes are ours, not its."""
    zero: dict[str, Any] = {
        "stage": cfg.zero_stage,
        "reduce_bucket_size": min(BUCKET, parameters),  # allocated whole, however small the model
        "contiguous_gradients": True,
        "overlap_comm": False,
        "round_robin_gradients": False,
    }
    if cfg.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world_size,
        "zero_optimization": zero,
        "bf16": {"enabled": cfg.precision is Precision.bf16 and cfg.zero_stage > 0},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "gradient_clipping": optim.grad_clip if cfg.zero_stage > 0 else 0.0,  # stage 0: ours
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 62,  # its own report of progress; ours is enough
        "wall_clock_breakdown": False,
    }


class CastOnUse(nn.Module):
    """bf16 arithmetic from fp32 weights, cast at every forward pass.

    ZeRO-0 is given this: its own bf16 mode accumulates gradients in bf16, and this one in fp32.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        low = {name: p.to(torch.bfloat16) for name, p in self.inner.named_parameters()}
        return torch.func.functional_call(self.inner, low, args, tie_weights=True)


class ZeroEngine(Engine):
    """`Engine` on `deepspeed.initialize`; see the protocol for what each method promises."""

    def __init__(
        self,
        cfg: ZeroConfig,
        optim: OptimConfig,
        model_cfg: ModelConfig,
        model: Transformer,
        world: World,
        fill: Fill,
    ) -> None:
        if not isinstance(optim, AdamWConfig):
            raise ConfigError(f"engine=zero trains with optim=adamw, not optim={optim.name}; use engine=fsdp")
        self.world, self.optim_cfg = world, optim
        deepspeed = _import_deepspeed(on_cpu=world.device.type == "cpu")
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        # The whole model on every rank before ZeRO splits it, so that the working copy and the fp32 master
        # both start from the same weights.
        model.materialize(world.device)
        fill(model)
        recompute_and_compile(model, cfg)
        self.names = dict(trainable_parameters(model))
        self.transformer = model
        self.plain = cfg.zero_stage == 0  # the optimizer stays torch's: clipping and finite check are ours
        cast = self.plain and cfg.precision is Precision.bf16
        with contextlib.redirect_stdout(sys.stderr):  # it prints memory tables whatever it is told
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=CastOnUse(model) if cast else model,
                optimizer=build_adamw(decay_groups(model, optim), optim),
                config=deepspeed_config(cfg, optim, world.size, sum(p.numel() for p in self.names.values())),
                dist_init_required=False,
            )
        if cast:
            # DeepSpeed takes fp32 weights only, and CastOnUse would cast those that never change at every pass.
            for parameter in model.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)
        self.model: nn.Module = self.engine
        self.steps = 0

    def _before_forward(self, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)

    def _backward(self, loss: Tensor, last: bool) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)
        if not last:
            self.engine.step()  # counts the micro-batch; updates nothing before the boundary

    def step(self, lr_factor: float) -> StepResult:
        set_lr(self._inner(), lr_factor)
        if self.plain:
            limit = self.optim_cfg.grad_clip or float("inf")
            norm = float(torch.nn.utils.clip_grad_norm_(self.engine.module.parameters(), limit))
            skipped = not torch.isfinite(torch.tensor(norm)).item()
            if skipped:
                self.engine.zero_grad()
        self.engine.step()
        if not self.plain:
            skipped = bool(self.optimizer.overflow)
            norm = float("nan") if skipped else float(self.engine.get_global_grad_norm())
        self.steps += not skipped
        return StepResult(grad_norm=norm, skipped=skipped)

    def _inner(self) -> torch.optim.Optimizer:
        return self.optimizer if self.plain else self.optimizer.optimizer

    def tensors(self) -> dict[str, Tensor]:
        """Whole tensors, each held by one rank only: parameter i by rank i modulo the number of ranks."""
        if self.steps > 0:
            self._link_moments()
        found: dict[str, Tensor] = {}
        for index, (name, parameter) in enumerate(self.names.items()):
            whole = {f"model.{name}": self._weight(parameter)}
            for moment in MOMENTS:
                whole[f"optim.{name}.{moment}"] = self._moment(parameter, moment)
            if index % self.world.size == self.world.rank:
                found.update({key: value.detach().float().cpu().clone() for key, value in whole.items()})
        return found

    def _weight(self, parameter: nn.Parameter) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        if parameter.requires_grad and not self.plain:
            return safe_get_full_fp32_param(parameter)
        if hasattr(parameter, "ds_id"):  # frozen and partitioned: it has no master copy
            from deepspeed.runtime.zero import GatheredParameters

            with GatheredParameters([parameter]):
                return parameter.detach().clone()
        return parameter.detach()

    def _moment(self, parameter: Tensor, moment: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        if self.plain:
            state = self.optimizer.state[parameter]
            return state[moment] if moment in state else torch.zeros_like(parameter)
        if self.steps == 0:
            return torch.zeros(_full_shape(parameter))
        return safe_get_full_optimizer_state(parameter, moment)

    def _link_moments(self) -> None:
        """DeepSpeed links moments to parameters in the first group's first update, when the second group has
        none yet; linking again reaches them all."""
        link = getattr(self.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            self.optimizer._hp_optimizer_states_linked = False
            link()

    def optimizer_steps(self) -> int:
        return self.steps

    def load_optimizer(self, read: Callable[[dict[str, Tensor]], None], steps: int) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        self._create_optimizer_state()
        self.steps = steps
        self._link_moments()
        for name, parameter in self.names.items():
            keys = [f"model.{name}", *(f"optim.{name}.{moment}" for moment in MOMENTS)]
            tensors = {key: torch.empty(_full_shape(parameter)) for key in keys}
            read(tensors)
            if not self.plain:  # it made its master copy from weights that it had rounded to bf16
                safe_set_full_fp32_param(parameter, tensors[f"model.{name}"].to(self.world.device))
            for moment in MOMENTS:
                value = tensors[f"optim.{name}.{moment}"].to(self.world.device)
                if self.plain:
                    self.optimizer.state[parameter][moment].copy_(value)
                else:
                    safe_set_full_optimizer_state(parameter, value, moment)
        for state in self._inner().state.values():
            if "step" in state:
                state["step"] = torch.full_like(torch.as_tensor(state["step"]), float(steps))

    def _create_optimizer_state(self) -> None:
        """One update with zero gradients at learning rate and decay 0: ZeRO has no moments to fill before it."""
        inner = self._inner()
        decay = [group["weight_decay"] for group in inner.param_groups]
        set_lr(inner, 0.0)
        for group in inner.param_groups:
            group["weight_decay"] = 0.0
        nothing = torch.zeros(1, dtype=torch.int32, device=self.world.device)
        documents = make_documents(torch.tensor([0, 1], dtype=torch.int32, device=self.world.device), 1, 1, 1)
        self._before_forward(last=True)
        self._backward(self.model(nothing, nothing, documents, _times_zero), last=True)
        self.engine.step()
        for group, value in zip(inner.param_groups, decay, strict=True):
            group["weight_decay"] = value

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        return self._weight(parameter).detach().float().cpu()


def _times_zero(hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
    return (hidden_TD.float().sum() + weight_VD.float().sum()) * 0


def _full_shape(parameter: Tensor) -> torch.Size:
    """The whole shape; ZeRO-3 leaves an empty tensor in place of a partitioned parameter."""
    return getattr(parameter, "ds_shape", parameter.shape)
