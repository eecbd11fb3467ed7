"""Small models to sample from."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from drivetrain.conf.schema import ModelConfig
from drivetrain.model import cache
from drivetrain.model.initialize import initialize
from drivetrain.model.transformer import Transformer, build_model

Models = dict[int | None, Transformer]


@pytest.fixture(scope="session")
def small_cfg() -> ModelConfig:
    """40 tokens, a context of 64."""
    return ModelConfig(
        name="small",
        vocab_size=40,
        dim=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        ffn_dim=48,
        max_seq_len=64,
        init_std=0.5,  # logits far from each other
    )


@pytest.fixture(scope="session")
def built() -> Callable[..., Transformer]:
    """`built(cfg, backend="sdpa")`: random weights, the same at every call."""

    def build(cfg: ModelConfig, backend: str = "sdpa") -> Transformer:
        model = build_model(cfg, backend)
        model.materialize(torch.device("cpu"))
        initialize(model, cfg, 1)
        return model

    return build


@pytest.fixture(scope="session")
def models(small_cfg: ModelConfig, built: Callable[..., Transformer]) -> Models:
    """By the length of their sliding windows, which are none and 4."""
    return {window: built(replace(small_cfg, sliding_window=window)) for window in (None, 4)}


@pytest.fixture(scope="module")
def short_prompts_are_shared() -> Iterator[None]:
    """On the CPU too, where only long ones are worth it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "WORTH_SHARING", 9)
        yield
