"""Muon. This file is its own worker: two ranks call `run_case`, which trains a sharded model; see rank.py."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from drivetrain.conf.schema import FsdpConfig, ModelConfig, MuonConfig, Precision
from drivetrain.model.initialize import initialize, local_rows
from drivetrain.model.parallelize import shard
from drivetrain.model.transformer import Transformer, build_model, unique_parameters
from drivetrain.train.mesh import World
from drivetrain.train.muon import MuonWithAdamW, orthogonalize
from drivetrain.train.optim import set_lr

# Odd row counts, so that two ranks hold shards of different lengths.
MODEL = ModelConfig(
    name="small",
    vocab_size=31,
    dim=15,
    layers=2,
    heads=3,
    kv_heads=1,
    head_dim=10,
    ffn_dim=21,
    max_seq_len=16,
    qkv_bias=True,
)
STEPS = 3


def config(**changes: Any) -> MuonConfig:
    values = {"name": "muon", "lr": 1e-2, "matrix_lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
    return MuonConfig(**(values | changes))


def made() -> Transformer:
    model = build_model(MODEL, "sdpa")
    model.materialize(torch.device("cpu"))
    initialize(model, MODEL, 0)
    return model


def gradient(name: str, shape: torch.Size, step: int) -> Tensor:
    seed = sum(name.encode()) * 100 + step
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def train(model: Transformer, cfg: MuonConfig) -> MuonWithAdamW:
    """A few steps on made-up gradients, which depend on the parameters' names and the step alone."""
    optimizer = MuonWithAdamW(model, cfg, MODEL)
    for step in range(STEPS):
        for name, parameter in unique_parameters(model):
            whole = gradient(name, parameter.shape, step)
            if isinstance(parameter, DTensor):
                local, row = local_rows(parameter)
                mine = whole[row : row + len(local)].clone()
                parameter.grad = DTensor.from_local(
                    mine,
                    parameter.device_mesh,
                    parameter.placements,
                    shape=parameter.shape,
                    stride=parameter.stride(),
                )
            else:
                parameter.grad = whole
        set_lr(optimizer, 1.0 - 0.2 * step)
        optimizer.step()
    return optimizer


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """Jordan's iteration in float64, with the square root of the shape that the update carries."""
    x = matrix.double() / matrix.double().norm()
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x * max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5).float()


@pytest.mark.parametrize("shape", [(32, 32), (64, 16), (16, 64), (100, 99), (1, 7)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_singular_values_become_about_one(shape: tuple[int, int], scale: float) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale
    found = orthogonalize(matrix, 10)
    assert found.dtype == torch.float32 and found.shape == shape
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6 and values.max() < 1.25  # where the quintic's iteration settles
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    exact = left @ right
    assert (found * exact).sum() / (found.norm() * exact.norm()) > 0.97


def test_five_steps_suffice_for_all_but_the_smallest_directions() -> None:
    matrix = torch.randn(48, 96, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalize(matrix, 5))
    assert values.min() > 0.5 and values.max() < 1.25


def test_a_zero_gradient_stays_zero() -> None:
    assert not orthogonalize(torch.zeros(4, 6), 5).any()


def test_two_steps_of_a_matrix_by_hand() -> None:
    model = made()
    name = "blocks.1.attn.wo.weight"
    weight = model.get_parameter(name).detach().clone()
    optimizer = train(model, config())
    momentum = torch.zeros_like(weight)
    for step in range(STEPS):
        grad, lr = gradient(name, weight.shape, step), 0.05 * (1.0 - 0.2 * step)
        momentum = 0.9 * momentum + 0.1 * grad
        update = orthogonal(0.1 * grad + 0.9 * momentum)  # Nesterov
        weight = weight * (1 - lr * 0.1) - lr * update
    torch.testing.assert_close(model.get_parameter(name).detach(), weight, rtol=1e-4, atol=1e-5)
    state = optimizer.state[model.get_parameter(name)]
    torch.testing.assert_close(state["momentum"], momentum)
    assert set(state) == {"momentum", "step"} and state["step"] == STEPS


@pytest.mark.parametrize(
    ("name", "rows"),
    [("blocks.0.attn.wqkv.weight", [30, 10, 10]), ("blocks.0.mlp.w_gate_up.weight", [21, 21])],
)
def test_each_of_the_fused_matrices_is_orthogonalised_by_itself(name: str, rows: list[int]) -> None:
    model = made()
    before = model.get_parameter(name).detach().clone()
    optimizer = MuonWithAdamW(model, config(weight_decay=0.0, momentum=0.0), MODEL)
    for other, parameter in unique_parameters(model):
        parameter.grad = gradient(other, parameter.shape, 0)
    optimizer.step()
    update = (before - model.get_parameter(name).detach()) / 0.05
    grad = gradient(name, before.shape, 0)
    apart = torch.cat([orthogonal(part) for part in grad.split(rows)])
    torch.testing.assert_close(update, apart, rtol=1e-3, atol=1e-4)
    assert (update - orthogonal(grad)).norm() > 0.1 * update.norm()


def test_everything_else_is_adamws() -> None:
    model, plain = made(), made()
    train(model, config())
    named = dict(unique_parameters(plain))
    others = {n: p for n, p in named.items() if p.dim() < 2 or not n.startswith("blocks.")}
    assert len(others) == 3 + 3 * 2  # embedding, head, last norm; in each block two norms and a bias
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in others.values() if p.dim() == 2], "weight_decay": 0.1},
            {"params": [p for p in others.values() if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for step in range(STEPS):
        for name, parameter in others.items():
            parameter.grad = gradient(name, parameter.shape, step)
        set_lr(adamw, 1.0 - 0.2 * step)
        adamw.step()
    for name, parameter in others.items():
        torch.testing.assert_close(model.get_parameter(name), parameter)


def test_moments_have_the_names_that_checkpoints_use() -> None:
    model = made()
    optimizer = train(model, config())
    for name, parameter in unique_parameters(model):
        names = optimizer.moment_names(name, parameter)
        assert set(names) | {"step"} == set(optimizer.state[parameter])
        assert all(optimizer.state[parameter][moment].shape == parameter.shape for moment in names)


def test_a_copy_of_the_state_goes_on_alike() -> None:
    """Momentum and step are all there is: nothing else is carried from step to step."""
    model = made()
    optimizer = train(model, config())
    other = made()
    resumed = MuonWithAdamW(other, config(), MODEL)
    for (name, mine), (_, theirs) in zip(unique_parameters(model), unique_parameters(other), strict=True):
        with torch.no_grad():
            theirs.copy_(mine)
        resumed.state[theirs] = copy.deepcopy(dict(optimizer.state[mine]))
        resumed.state[theirs]["step"] = torch.tensor(float(STEPS))
        mine.grad, theirs.grad = (gradient(name, mine.shape, 9) for _ in range(2))
    set_lr(optimizer, 1.0)
    for each in (optimizer, resumed):
        each.step()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def run_case(_: dict[str, Any], world: World) -> dict[str, list[Any]]:
    """Train under FSDP; the whole weights."""
    model = build_model(MODEL, "sdpa")
    shard(model, FsdpConfig(name="fsdp", precision=Precision.fp32), init_device_mesh("cpu", (world.size,)))
    model.materialize(torch.device("cpu"))
    initialize(model, MODEL, 0)
    train(model, config())
    return {n: p.full_tensor().tolist() for n, p in unique_parameters(model) if isinstance(p, DTensor)}


def test_two_ranks_train_what_one_does(run_ranks: Callable[..., dict[str, Any]]) -> None:
    found = run_ranks(Path(__file__), 2, [{"name": "muon"}])["muon"]
    model = made()
    train(model, config())
    named = dict(unique_parameters(model))
    assert set(found) == set(named)
    for name, parameter in named.items():
        weight = torch.tensor(found[name])
        torch.testing.assert_close(weight, parameter.detach(), rtol=1e-5, atol=1e-6, msg=name)
