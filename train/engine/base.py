"""What the loop asks of an engine. It owns the backward pass, since DeepSpeed does."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn

from drivetrain.data.batch import Batch
from drivetrain.model.lora import adapter_parameters, base_parameters, merged_tensors
from drivetrain.model.transformer import Transformer, unique_parameters
from drivetrain.train.mesh import World

# Sums over a micro-batch: the number to minimise, then whatever the stage reports, all weighted by the loss
# weights; the engine divides them by the weight of the whole step.
LossSums = tuple[Tensor, dict[str, Tensor]]
Loss = Callable[[nn.Module, Batch], LossSums]

# Fills a materialised model in place: with initial weights, or with those of a checkpoint.
Fill = Callable[[Transformer], None]


@dataclass(frozen=True, slots=True)
class StepResult:
    """`skipped`: the gradient was not finite on some rank, and no rank changed its weights."""

    grad_norm: float
    skipped: bool


class Engine(ABC):
    """One model on all ranks with its optimizer.

    Checkpoint names are the same for every engine: `model.<name>`, `optim.<name>.<moment>`, all fp32. Frozen
    parameters have no moments and are in no checkpoint.
    """

    model: nn.Module  # called like a `Transformer`
    transformer: Transformer  # its parameters have their own names
    world: World
    dropout_seed: int | None = None  # given where the model drops at random

    def accumulate(self, batches: list[Batch], loss: Loss) -> dict[str, float]:
        """Forward and backward over this rank's micro-batches of one step.

        The gradient is that of the summed loss divided by the loss weight of all ranks' batches, so neither
        the number of ranks nor of micro-batches nor uneven documents change it.

        Returns:
            The stage's sums, divided by the same weight and summed over ranks.
        """
        total = self._loss_weight(batches)
        # Both engines average gradients over ranks; the sum is wanted.
        scale = self.world.size / total
        sums: dict[str, Tensor] = {}
        done = self.optimizer_steps() if self.dropout_seed is not None else 0
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            if (
                self.dropout_seed is not None
            ):  # a function of the step and of this rank's tokens, resumed or not
                key = f"{self.dropout_seed}/{done}/{index}/{batch.digest}"
                torch.manual_seed(xxhash.xxh3_64_intdigest(key.encode()) >> 1)
            self._before_forward(last)
            minimise, stats = loss(self.model, batch.to(self.world.device))
            self._backward(minimise * scale, last)
            _add(sums, stats)
        return self._mean(sums, total)

    @torch.no_grad()
    def evaluate(self, batches: list[Batch], loss: Loss) -> dict[str, float]:
        """The stage's sums over all ranks' batches, divided by their loss weight. As many batches on each rank."""
        total = self._loss_weight(batches)
        sums: dict[str, Tensor] = {}
        for batch in batches:
            _add(sums, loss(self.model, batch.to(self.world.device))[1])
        return self._mean(sums, total)

    def _loss_weight(self, batches: list[Batch]) -> float:
        return self.world.sum([sum(float(batch.loss_weights_T.sum()) for batch in batches)])[0]

    def _mean(self, sums: dict[str, Tensor], total: float) -> dict[str, float]:
        names = sorted(sums)
        local = torch.stack([sums[name].double() for name in names])
        dist.all_reduce(local)
        return dict(zip(names, (local / total).tolist(), strict=True))

    @abstractmethod
    def _before_forward(self, last: bool) -> None:
        """Told before each micro-batch whether it is the step's last."""

    @abstractmethod
    def _backward(self, loss: Tensor, last: bool) -> None: ...

    @abstractmethod
    def step(self, lr_factor: float) -> StepResult:
        """Clip by the true global norm and update, with every learning rate times `lr_factor`."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Trained master weights and moments under their neutral names; sharded tensors stay sharded.

        What one rank returns may be its part of the names only. Collective.
        """

    @abstractmethod
    def optimizer_steps(self) -> int:
        """Updates made so far (skipped steps not counted): AdamW's bias correction needs it."""

    @abstractmethod
    def load_optimizer(self, read: Callable[[dict[str, Tensor]], None], steps: int) -> None:
        """Restore the moments: `read` fills a dictionary of tensors by name, in place. Collective."""

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole fp32 weights on the CPU, one at a time, equal on every rank; adapters are merged. Collective."""
        model = self.transformer
        adapters = {name: self._whole(parameter) for name, parameter in adapter_parameters(model)}
        weights = ((name, self._whole(parameter)) for name, parameter in base_parameters(model))
        yield from merged_tensors(weights, adapters, model.cfg, model.lora) if adapters else weights

    @abstractmethod
    def _whole(self, parameter: nn.Parameter) -> Tensor:
        """One whole parameter in fp32 on the CPU. Collective."""


def copy_weights(engine: Engine, model: Transformer) -> None:
    """An engine's whole weights into a plain model of the same shape, in place and in its dtype. Collective.

    For a sampler beside training, in place of sampling on the engine's own sharded model: that gathers all weights
    for every token, this once. It costs a copy of the model on every rank.
    """
    mine = dict(unique_parameters(model))
    for name, whole in engine.full_weights():
        mine[name].detach().copy_(whole)


def _add(sums: dict[str, Tensor], stats: dict[str, Tensor]) -> None:
    for name, value in stats.items():
        sums[name] = sums[name] + value.detach() if name in sums else value.detach()
