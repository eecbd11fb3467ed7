"""Muon (Jordan et al. 2024): momentum whose matrices are orthogonalised, for the blocks' matrices; AdamW for
embeddings, head, norms and biases."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from drivetrain.conf.schema import ModelConfig, MuonConfig
from drivetrain.model.transformer import Transformer, fused_rows, unique_parameters
from drivetrain.train.optim import is_block_matrix

# Coefficients of the quintic Newton-Schulz iteration, from Jordan's post: steep at 0, values near 1 after 5.
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix_MN: Tensor, steps: int) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: U Vᵀ of the singular value decomposition.

    Runs in bf16 on a GPU and in fp32 on a CPU; returns fp32.
    """
    a, b, c = QUINTIC
    x_MN = matrix_MN.to(torch.bfloat16 if matrix_MN.is_cuda else torch.float32)
    tall = x_MN.shape[0] > x_MN.shape[1]
    if tall:
        x_MN = x_MN.T
    x_MN = x_MN / (x_MN.norm() + 1e-7)
    for _ in range(steps):
        gram_MM = x_MN @ x_MN.T
        x_MN = a * x_MN + (b * gram_MM + c * gram_MM @ gram_MM) @ x_MN
    return (x_MN.T if tall else x_MN).float()


class MuonWithAdamW(torch.optim.Optimizer):
    """One optimizer, two rules. Sharded matrices are gathered one at a time to be orthogonalised."""

    def __init__(self, model: Transformer, cfg: MuonConfig, model_cfg: ModelConfig) -> None:
        self.cfg = cfg
        named = list(unique_parameters(model))
        matrices = [(name, p) for name, p in named if is_block_matrix(name, p)]
        self.rows = {p: fused_rows(model_cfg, name) for name, p in matrices}
        others = [p for name, p in named if not is_block_matrix(name, p)]
        groups: list[dict[str, Any]] = [
            {"params": [p for _, p in matrices], "lr": cfg.matrix_lr, "weight_decay": cfg.weight_decay},
            {"params": [p for p in others if p.dim() >= 2], "lr": cfg.lr, "weight_decay": cfg.weight_decay},
            {"params": [p for p in others if p.dim() < 2], "lr": cfg.lr, "weight_decay": 0.0},
        ]
        super().__init__([group for group in groups if group["params"]], defaults={"lr": cfg.lr})
        # The AdamW inside shares this optimizer's groups and state, so one checkpoint layout serves both.
        self.adamw = torch.optim.AdamW(
            self.param_groups[1:], lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True
        )
        self.adamw.param_groups = self.param_groups[1:] = self.adamw.param_groups
        self.adamw.state = self.state

    @staticmethod
    def moment_names(name: str, parameter: Tensor) -> tuple[str, ...]:
        return ("momentum",) if is_block_matrix(name, parameter) else ("exp_avg", "exp_avg_sq")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.adamw.step()
        group = self.param_groups[0]
        for parameter in group["params"]:
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            state["step"] = state.get("step", 0) + 1
            momentum: Tensor = state["momentum"]
            momentum.lerp_(parameter.grad, 1 - self.cfg.momentum)
            blend = parameter.grad.lerp(momentum, self.cfg.momentum)  # Nesterov
            update = self._orthogonal(blend, self.rows[parameter])
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.sub_(update, alpha=group["lr"])

    def _orthogonal(self, blend: Tensor, rows: list[int] | None) -> Tensor:
        """Orthogonalise each of the stacked matrices, scaled by sqrt(max(1, rows / columns))."""
        whole = blend.full_tensor() if isinstance(blend, DTensor) else blend
        parts = whole.split(rows) if rows is not None else (whole,)
        done = torch.cat(
            [
                orthogonalize(part, self.cfg.ns_steps) * max(1, part.shape[0] / part.shape[1]) ** 0.5
                for part in parts
            ]
        )
        if isinstance(blend, DTensor):
            return distribute_tensor(done, blend.device_mesh, blend.placements, src_data_rank=None)
        return done
