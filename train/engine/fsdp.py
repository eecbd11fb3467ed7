"""FSDP2, used directly. One rank takes the same path as a thousand."""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from drivetrain.conf.schema import AdamWConfig, FsdpConfig, ModelConfig, MuonConfig, OptimConfig
from drivetrain.model.parallelize import recompute_and_compile, shard
from drivetrain.model.transformer import Transformer
from drivetrain.train.engine.base import Engine, Fill, StepResult
from drivetrain.train.mesh import World, shard_mesh
from drivetrain.train.muon import MuonWithAdamW
from drivetrain.train.optim import build_adamw, decay_groups, set_lr, trainable_parameters


class FsdpEngine(Engine):
    """`Engine` on torch's fully_shard; see the protocol for what each method promises."""

    def __init__(
        self,
        cfg: FsdpConfig,
        optim: OptimConfig,
        model_cfg: ModelConfig,
        model: Transformer,
        world: World,
        fill: Fill,
    ) -> None:
        self.world, self.optim_cfg, self.replicas = world, optim, cfg.replicas
        self.mesh = shard_mesh(world, cfg.replicas)
        recompute_and_compile(model, cfg)
        self.sharded = shard(model, cfg, self.mesh)  # the same object, seen as FSDP sees it
        self.model: nn.Module = model
        self.transformer = model
        model.materialize(world.device)
        fill(model)
        match optim:
            case MuonConfig():
                self.optimizer: torch.optim.Optimizer = MuonWithAdamW(model, optim, model_cfg)
            case AdamWConfig():
                self.optimizer = build_adamw(decay_groups(model, optim), optim)
            case _:
                raise TypeError(f"no optimizer for {type(optim).__name__}")
        self.moments = moment_names(self.optimizer)

    def _before_forward(self, last: bool) -> None:
        # Every pass reduces into shards: accumulating whole gradients would cost 4 bytes a parameter on each rank.
        # Only the sum over HSDP's replicas waits for the last pass.
        if self.replicas > 1:
            self.sharded.set_requires_all_reduce(last)

    def _backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def step(self, lr_factor: float) -> StepResult:
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = self._clip([g.to_local() if isinstance(g, DTensor) else g for g in grads])
        finite = torch.isfinite(torch.tensor(norm)).item()
        if finite:
            set_lr(self.optimizer, lr_factor)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(grad_norm=norm, skipped=not finite)

    def _clip(self, grads: list[Tensor]) -> float:
        """Scale local gradient shards by the global L2 norm, which is returned; non-finite stays as it is."""
        squares = torch.stack(torch._foreach_norm(grads)).square().sum(dtype=torch.float64)
        dist.all_reduce(squares, group=self.mesh.get_group("shard"))
        norm = float(squares.sqrt())
        limit = self.optim_cfg.grad_clip
        if limit > 0 and limit < norm < float("inf"):
            torch._foreach_mul_(grads, limit / norm)
        return norm

    def _reshard(self) -> None:
        """Put shards back in place of whole weights, which a pass without gradients leaves gathered."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def tensors(self) -> dict[str, Tensor]:
        self._reshard()
        found: dict[str, Tensor] = {}
        for name, parameter in trainable_parameters(self.model):
            found[f"model.{name}"] = parameter.detach()
            for moment, value in self._moments_of(name, parameter).items():
                found[f"optim.{name}.{moment}"] = value
        return found

    def _moments_of(self, name: str, parameter: Tensor) -> dict[str, Tensor]:
        """Zeros before the first update. They stay out of the optimizer: AdamW takes a parameter that has any state
        for one that has all of it, its step count too."""
        state = self.optimizer.state.get(parameter, {})
        return {
            moment: state[moment] if moment in state else torch.zeros_like(parameter.detach())
            for moment in self.moments(name, parameter)
        }

    def optimizer_steps(self) -> int:
        steps = [int(state["step"]) for state in self.optimizer.state.values() if "step" in state]
        return max(steps, default=0)

    def load_optimizer(self, read: Callable[[dict[str, Tensor]], None], steps: int) -> None:
        self._reshard()
        tensors: dict[str, Tensor] = {}
        for name, parameter in trainable_parameters(self.model):
            moments = self._moments_of(name, parameter)
            step = torch.tensor(float(steps), device=parameter.device)
            self.optimizer.state[parameter] = {"step": step, **moments}
            tensors |= {f"optim.{name}.{moment}": value for moment, value in moments.items()}
        read(tensors)

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        self._reshard()
        return super().full_weights()

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        return whole.detach().float().cpu()


def moment_names(optimizer: torch.optim.Optimizer) -> Callable[[str, Tensor], tuple[str, ...]]:
    """Which optimizer state a parameter has, by name."""
    if isinstance(optimizer, MuonWithAdamW):
        return optimizer.moment_names
    return lambda name, parameter: ("exp_avg", "exp_avg_sq")
