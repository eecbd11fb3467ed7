import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drivetrain.conf.schema import AdamWConfig, ModelConfig, OptimConfig, Schedule
from drivetrain.model.transformer import build_model, unique_parameters
from drivetrain.train.optim import build_adamw, decay_groups, is_block_matrix, lr_factor, set_lr


def config(**changes: Any) -> OptimConfig:
    return AdamWConfig(**{"name": "adamw", "lr": 1e-3, **changes})


def model_config(**changes: Any) -> ModelConfig:
    sizes = {
        "dim": 16,
        "layers": 2,
        "heads": 2,
        "kv_heads": 1,
        "head_dim": 8,
        "ffn_dim": 24,
        "vocab_size": 30,
    }
    biases = {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "qk_norm": True}
    return ModelConfig(name="small", max_seq_len=16, **(sizes | biases | changes))


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        # Ten steps of warm-up, then 90; each at its 1st, 46th and 90th.
        (Schedule.constant, {10: 1.0, 55: 1.0, 99: 1.0}),
        (Schedule.linear, {10: 1 - 0.8 / 90, 54: 0.6, 99: 0.2}),
        (Schedule.cosine, {10: 0.2 + 0.4 * (1 + math.cos(math.pi / 90)), 54: 0.6, 99: 0.2}),
        # The last 30 of 100 steps fall.
        (Schedule.wsd, {10: 1.0, 69: 1.0, 70: 1 - 0.8 / 30, 84: 0.6, 99: 0.2}),
    ],
)
def test_schedules_at_their_key_points(schedule: Schedule, factors: dict[int, float]) -> None:
    cfg = config(warmup_steps=10, schedule=schedule, min_lr_ratio=0.2, decay_ratio=0.3)
    factors = {0: 0.1, 4: 0.5, 9: 1.0, **factors}
    for step, factor in factors.items():
        assert lr_factor(cfg, step, 100) == pytest.approx(factor, abs=1e-12), step
    if schedule is not Schedule.constant:
        assert lr_factor(cfg, 150, 100) == pytest.approx(0.2)  # past the end it stays


@settings(max_examples=150, deadline=None)
@given(
    schedule=st.sampled_from(list(Schedule)),
    warmup=st.integers(0, 60),
    steps=st.integers(1, 200),
    floor=st.floats(0, 1),
    decay=st.floats(0, 1),
)
def test_any_schedule_rises_once_and_then_never_again(
    schedule: Schedule, warmup: int, steps: int, floor: float, decay: float
) -> None:
    cfg = config(warmup_steps=warmup, schedule=schedule, min_lr_ratio=floor, decay_ratio=decay)
    factors = [lr_factor(cfg, step, steps) for step in range(steps)]
    assert all(0 <= factor <= 1 + 1e-12 for factor in factors)
    rising, falling = factors[:warmup], factors[warmup:]
    assert rising == sorted(rising) and all(factor > 0 for factor in rising)
    assert all(late <= early + 1e-12 for early, late in itertools.pairwise(falling))
    decays = schedule in (Schedule.cosine, Schedule.linear) or (
        schedule is Schedule.wsd and round(decay * steps) > 0
    )
    if falling and decays:
        assert factors[-1] == pytest.approx(floor, abs=1e-9)


def test_set_lr_scales_what_each_group_began_with() -> None:
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[:1], "lr": 0.5}, {"params": weights[1:], "lr": 2.0}])
    for factor in (0.1, 1.0, 0.25):
        set_lr(optimizer, factor)
        assert [group["lr"] for group in optimizer.param_groups] == [0.5 * factor, 2.0 * factor]


@pytest.mark.parametrize("tied", [False, True])
def test_matrices_decay_and_norms_and_biases_do_not(tied: bool) -> None:
    model = build_model(model_config(tie_embeddings=tied), "sdpa")
    groups = decay_groups(model, config(weight_decay=0.3))
    found = {id(p): group["weight_decay"] for group in groups for p in group["params"]}  # type: ignore[attr-defined]
    named = dict(unique_parameters(model))
    assert len(found) == len(named) == sum(len(group["params"]) for group in groups)  # type: ignore[arg-type]
    for name, parameter in named.items():
        matrix = "norm" not in name and not name.endswith("bias")
        assert found[id(parameter)] == (0.3 if matrix else 0.0), name


def test_muons_matrices_are_those_of_the_blocks() -> None:
    model = build_model(model_config(), "sdpa")
    found = {name for name, p in unique_parameters(model) if is_block_matrix(name, p)}
    kinds = ("attn.wqkv", "attn.wo", "mlp.w_gate_up", "mlp.w_down")
    assert found == {f"blocks.{layer}.{kind}.weight" for layer in range(2) for kind in kinds}


def test_adamw_is_the_papers_update() -> None:
    """Loshchilov and Hutter 2019, algorithm 2, by hand in float64."""
    cfg = config(lr=0.1, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.5)
    weight = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
    optimizer = build_adamw([{"params": [weight], "weight_decay": 0.5}], cfg)
    x, m, v = [1.0, -2.0], [0.0, 0.0], [0.0, 0.0]
    for step, grad in enumerate([[0.5, -1.0], [2.0, 0.1], [-1.0, 0.0]], start=1):
        weight.grad = torch.tensor([grad])
        optimizer.step()
        for i, g in enumerate(grad):
            m[i], v[i] = 0.8 * m[i] + 0.2 * g, 0.9 * v[i] + 0.1 * g * g
            update = (m[i] / (1 - 0.8**step)) / (math.sqrt(v[i] / (1 - 0.9**step)) + 1e-3)
            x[i] -= 0.1 * (update + 0.5 * x[i])
        torch.testing.assert_close(weight.detach(), torch.tensor([x]))
