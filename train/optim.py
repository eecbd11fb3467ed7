"""Optimizers and learning-rate schedules."""

import math
from collections.abc import Iterator

import torch
from torch import nn

from drivetrain.conf.schema import OptimConfig, Schedule
from drivetrain.model.transformer import unique_parameters


def lr_factor(cfg: OptimConfig, step: int, steps: int) -> float:
    """What the learning rate is multiplied by at `step` (from 0) of `steps`.

    Linear warm-up over `warmup_steps`, then constant, cosine or linear to `min_lr_ratio`, or WSD: constant and
    then linear over the last `decay_ratio` of the steps (MiniCPM, section 4).
    """
    if step < cfg.warmup_steps:
        return (step + 1) / cfg.warmup_steps
    floor = cfg.min_lr_ratio
    if cfg.schedule is Schedule.constant:
        return 1.0
    begin = cfg.warmup_steps
    if cfg.schedule is Schedule.wsd:
        begin = max(begin, steps - round(cfg.decay_ratio * steps))
        if step < begin:
            return 1.0
    done = min(1.0, (step + 1 - begin) / max(1, steps - begin))
    if cfg.schedule is Schedule.cosine:
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
    return 1 - (1 - floor) * done


def trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """`unique_parameters` without the frozen ones."""
    return ((name, parameter) for name, parameter in unique_parameters(model) if parameter.requires_grad)


def is_block_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Muon's domain: matrices inside the blocks; not embeddings, head, norms or biases."""
    return parameter.dim() == 2 and name.startswith("blocks.")


def decay_groups(model: nn.Module, cfg: OptimConfig) -> list[dict[str, object]]:
    """Parameter groups: matrices (embeddings too) decay, norms and biases do not."""
    named = list(trainable_parameters(model))
    groups: list[dict[str, object]] = [
        {"params": [p for _, p in named if p.dim() >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for _, p in named if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_adamw(groups: list[dict[str, object]], cfg: OptimConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Scale every group's learning rate; the first call remembers the unscaled one."""
    for group in optimizer.param_groups:
        group.setdefault("base_lr", group["lr"])
        group["lr"] = group["base_lr"] * factor
