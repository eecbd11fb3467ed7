"""Initial weights: the right distribution, and the same on any number of ranks.

Ranks are played one after the other in torch's fake process group, whose collectives do nothing: initialising
must not need any.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from drivetrain.conf.schema import FsdpConfig, Mlp, ModelConfig, Norm, Positions, Precision
from drivetrain.model import initialize as module
from drivetrain.model.initialize import fill_normal, initialize, local_rows
from drivetrain.model.parallelize import shard
from drivetrain.model.transformer import Transformer, build_model, unique_parameters


def config(**changes: object) -> ModelConfig:
    values = {
        "dim": 96,
        "layers": 3,
        "heads": 6,
        "kv_heads": 2,
        "head_dim": 16,
        "ffn_dim": 200,
        "vocab_size": 1001,
    }
    biases = {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "qk_norm": True}
    return ModelConfig(name="small", max_seq_len=32, **(values | biases | changes))  # type: ignore[arg-type]


def whole(cfg: ModelConfig, seed: int = 0) -> Transformer:
    model = build_model(cfg, "sdpa")
    model.materialize(torch.device("cpu"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)  # so that what is left out shows
    initialize(model, cfg, seed)
    return model


@contextmanager
def rank_of(rank: int, world_size: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def empty_sharded(shape: tuple[int, ...], mesh: DeviceMesh, placements: list[Placement]) -> DTensor:
    return torch.distributed.tensor.empty(shape, device_mesh=mesh, placements=placements)


GPT2 = {"norm": Norm.layer, "mlp": Mlp.gelu, "positions": Positions.learned, "kv_heads": 6}


@pytest.mark.parametrize("changes", [{}, GPT2], ids=["llama", "gpt2"])
def test_each_matrix_has_its_mean_and_deviation(changes: dict[str, object]) -> None:
    cfg = config(init_std=0.05, **changes)
    for name, parameter in unique_parameters(whole(cfg)):
        if parameter.dim() == 1:
            assert (parameter == name.endswith("norm.weight")).all(), name
            continue
        residual = name.endswith(("wo.weight", "w_down.weight"))
        std = 0.05 / math.sqrt(6) if residual else 0.05
        n = parameter.numel()
        assert abs(parameter.mean()) < 5 * std / math.sqrt(n), name
        assert abs(parameter.std() / std - 1) < 5 / math.sqrt(2 * n), name


def test_draws_are_normal_and_do_not_repeat() -> None:
    drawn = torch.empty(700, 1000)  # three blocks, the last one partly
    fill_normal(drawn, 1.0, 0, "a")
    flat = drawn.flatten()
    assert (
        flat.unique().numel() > 0.97 * flat.numel()
    )  # fp32 collides now and then, a repeated block by thirds
    for sigmas, share in ((1, 0.6827), (2, 0.9545), (3, 0.9973)):
        assert (flat.abs() < sigmas).float().mean() == pytest.approx(share, abs=2.5e-3)
    assert abs((flat[:-1] * flat[1:]).mean()) < 5 / math.sqrt(flat.numel())


def test_weights_depend_on_seed_and_name_alone() -> None:
    first, again, other = (dict(unique_parameters(whole(config(), seed))) for seed in (0, 0, 1))
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name])
        assert parameter.dim() == 1 or not torch.equal(parameter, other[name])
    assert not torch.equal(first["blocks.0.attn.wo.weight"], first["blocks.1.attn.wo.weight"])


def test_a_tied_head_stays_tied() -> None:
    model = whole(config(tie_embeddings=True))
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.embed.weight, whole(config()).embed.weight)


@pytest.mark.parametrize("block", [64, 1000, 1 << 18])
@pytest.mark.parametrize(("shape", "ranks"), [((37, 21), 2), ((37, 21), 5), ((3, 8), 4), ((64, 2, 5), 3)])
def test_shards_are_the_rows_of_the_whole(
    shape: tuple[int, ...], ranks: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    expected = torch.empty(shape)
    fill_normal(expected, 0.3, 5, "w")
    pieces: list[Tensor] = []
    for rank in range(ranks):
        with rank_of(rank, ranks):
            mesh = init_device_mesh("cpu", (ranks,))
            tensor = empty_sharded(shape, mesh, [Shard(0)])
            fill_normal(tensor, 0.3, 5, "w")
            local, row = local_rows(tensor)
            assert local.numel() == 0 or row == sum(len(piece) for piece in pieces)
            pieces.append(local.clone())
    assert torch.equal(torch.cat(pieces), expected)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("replicas", "shards"), [(1, 1), (1, 3), (2, 2)])
def test_a_model_under_fsdp_has_the_weights_of_one_process(replicas: int, shards: int, tied: bool) -> None:
    cfg = config(tie_embeddings=tied)
    expected = dict(unique_parameters(whole(cfg, 3)))
    engine = FsdpConfig(name="fsdp", precision=Precision.fp32)
    for rank in range(replicas * shards):
        with rank_of(rank, replicas * shards):
            # torch caches by mesh, and would take the mesh of the rank before for an equal one.
            names = (f"replicate_{rank}", f"shard_{rank}")
            mesh = init_device_mesh("cpu", (replicas, shards), mesh_dim_names=names)
            model = build_model(cfg, "sdpa")
            shard(model, engine, mesh)
            model.materialize(torch.device("cpu"))
            initialize(model, cfg, 3)
            assert (model.head.weight is model.embed.weight) == tied
            for name, parameter in unique_parameters(model):
                assert isinstance(parameter, DTensor)
                rows = expected[name].chunk(shards)
                assert torch.equal(parameter.to_local(), rows[rank % shards]), name


def test_sharding_by_columns_is_refused_on_every_rank() -> None:
    for rank in range(2):
        with rank_of(rank, 2):
            mesh = init_device_mesh("cpu", (2,))
            with pytest.raises(ValueError, match="by rows"):
                fill_normal(empty_sharded((6, 8), mesh, [Shard(1)]), 1.0, 0, "w")
            replicated = empty_sharded((6, 8), mesh, [Replicate()])
            fill_normal(replicated, 1.0, 0, "w")
            expected = torch.empty(6, 8)
            fill_normal(expected, 1.0, 0, "w")
            assert torch.equal(replicated.to_local(), expected)
