"""The model on each backend: the same curve, over steps of packed documents."""

import itertools

import pytest
import torch

from drivetrain.conf.compose import compose
from drivetrain.kernels.attention import make_documents
from drivetrain.kernels.linear_cross_entropy import linear_cross_entropy
from drivetrain.kernels.op import INTERPRETED
from drivetrain.model.initialize import initialize
from drivetrain.model.transformer import build_model

T, ROW = 48, 24
DEVICE = "cpu" if INTERPRETED else "cuda"


def train(backend: str, steps: int, overrides: list[str]) -> list[float]:
    """Losses a token of AdamW over as many batches, each with other documents."""
    cfg = compose([*overrides, "model.vocab_size=96"]).model
    model = build_model(cfg, backend, device=DEVICE)
    initialize(model, cfg, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    pattern_T = torch.randint(0, cfg.vocab_size, (T + 1,), generator=generator)
    losses = []
    for step in range(steps):
        tokens_T, targets_T = (
            pattern_T.roll(step)[part].to(DEVICE) for part in (slice(0, T), slice(1, T + 1))
        )
        cuts = sorted({0, 1 + step % (ROW - 1), ROW, ROW + 1 + 7 * step % (ROW - 1), T})
        lengths = [end - start for start, end in itertools.pairwise(cuts)]
        documents = make_documents(
            torch.tensor(cuts, dtype=torch.int32, device=DEVICE),
            max(lengths),
            T,
            ROW,
            cfg.sliding_window,
            backend=backend,
        )
        positions_T = torch.cat([torch.arange(length) for length in lengths]).to(DEVICE)
        weights_T = (torch.rand(T, generator=generator) > 0.1).float().to(DEVICE)

        def read(
            hidden_TD: torch.Tensor,
            weight_VD: torch.Tensor,
            targets_T: torch.Tensor = targets_T,
            weights_T: torch.Tensor = weights_T,
        ) -> torch.Tensor:
            return linear_cross_entropy(hidden_TD, weight_VD, targets_T, weights_T, backend=backend)[0]

        loss = model(tokens_T, positions_T, documents, read) / weights_T.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


MORE = ["model.qk_norm=true", "model.kv_heads=4", "model.sliding_window=9", "model.tie_embeddings=false"]


@pytest.mark.parametrize(("steps", "changes"), [(50, []), (10, MORE)], ids=["plain", "qk_norm, window"])
@pytest.mark.parametrize("backend", ["sdpa", "triton"])
def test_fifty_steps_give_the_references_losses(
    backend: str, steps: int, changes: list[str], small: list[str]
) -> None:
    """fp32: differences of rounding, 1e-7 at first, grow with the steps."""
    expected, found = (train(name, steps, [*small, *changes]) for name in ("reference", backend))
    assert expected[-1] < 0.9 * expected[0]
    assert found[:10] == pytest.approx(expected[:10], rel=1e-5)
    assert found == pytest.approx(expected, rel=1e-3)
