from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drivetrain.data.tokenizer import load_tokenizer, train_tokenizer


def test_ranks_that_disagree_go_on_with_rank_0s_token(
    small: list[str], shards: Path, tmp_path: Path, run_ranks: Callable[..., dict[str, Any]]
) -> None:
    """Rank 1 would stop at once, and rank 0 wait for it in its next forward pass."""
    (tmp_path / "a.txt").write_text("text enough for the bytes alone " * 20)
    train_tokenizer([tmp_path / "a.txt"], 266, tmp_path / "tokenizer")
    words = ["model.vocab_size=266", "stage.sample_prompts=[ab, c]", "stage.sample_tokens=6"]
    case = {
        "name": "samples",
        "overrides": [*small, *words, "stage.micro_batch=1", f"data.path={shards}"],
        "tokenizer": str(tmp_path / "tokenizer"),
    }
    worker = Path(__file__).with_name("samples_worker.py")
    completion = load_tokenizer(tmp_path / "tokenizer").decode([5] * 6)
    found = run_ranks(worker, 2, [case])["samples"]
    assert found == [["ab", completion], ["c", completion]]


@pytest.mark.parametrize("engine", ["fsdp", "zero"])
def test_ranks_with_requests_of_their_own_keep_step(
    small: list[str], engine: str, run_ranks: Callable[..., dict[str, Any]]
) -> None:
    """The weights are sharded: every pass needs all ranks, and one has more and longer requests than the other."""
    stage = ["engine.zero_stage=3"] if engine == "zero" else []
    overrides = [*small, f"engine={engine}", *stage, "data.path=none", "model.vocab_size=300"]
    case = {"name": "own", "overrides": overrides}
    found = run_ranks(Path(__file__).with_name("samples_worker.py"), 2, [case])["own"]
    assert found["tokens"] == 2 * 4 + 3 * 2 * 9
