"""Two ranks that start from a directory, on FSDP2 and ZeRO-3: the same weights, each rank its own rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from drivetrain.conf.hf_config import model_from_hf
from drivetrain.launch.weights import import_hf
from drivetrain.model.hf import HfWeights

ENGINES = {"fsdp": ["engine=fsdp"], "zero3": ["engine=zero", "engine.zero_stage=3"]}
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
MODELS = {
    "llama": transformers.LlamaConfig(intermediate_size=40, vocab_size=51, **SIZES),
    "gpt2": transformers.GPT2Config(n_embd=24, n_layer=2, n_head=4, n_positions=32, vocab_size=51),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def found(folder: Path, run_ranks: Callable[..., dict[str, Any]]) -> tuple[dict[str, Any], dict[str, int]]:
    """What the ranks found, and the bytes of each model's weights."""
    cases, sizes = [], {}
    for name, config in MODELS.items():
        torch.manual_seed(0)
        source = folder / name
        transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(source)
        with HfWeights(source, model_from_hf(source)) as weights:
            whole = {key: weights.whole(key).float() for key in weights.parts}
            sizes[name] = sum(value.nbytes for value in whole.values()) // 2
        save_file(whole, folder / f"{name}.safetensors")
        import_hf(source, folder / f"{name}_imported", 10**9)
        common = ["model=auto", "engine.precision=fp32", "cluster.nproc=2", "optim.lr=1e-2"]
        cases += [
            {
                "name": f"{name}{kind} {engine}",
                "overrides": [*common, *words, f"model.init_from={source}{kind}"],
                "expected": str(folder / f"{name}.safetensors"),
            }
            for kind in ("", "_imported")
            for engine, words in ENGINES.items()
        ]
    return run_ranks(Path(__file__).with_name("hf_worker.py"), 2, cases), sizes


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["", "_imported"])
@pytest.mark.parametrize("model", MODELS)
def test_every_engine_starts_from_the_same_weights(
    model: str, kind: str, engine: str, found: tuple[dict[str, Any], dict[str, int]]
) -> None:
    case = found[0][f"{model}{kind} {engine}"]
    assert not case["wrong"] and not case["missing"]


@pytest.mark.parametrize("model", MODELS)
def test_the_loss_is_that_of_transformers_and_falls(
    model: str, found: tuple[dict[str, Any], dict[str, int]], folder: Path
) -> None:
    other = transformers.AutoModelForCausalLM.from_pretrained(folder / model, dtype=torch.float32)
    tokens = torch.arange(1, 18)[None]
    with torch.no_grad():
        expected = float(other(tokens, labels=tokens).loss)
    runs = [found[0][f"{model}{kind} {engine}"]["losses"] for kind in ("", "_imported") for engine in ENGINES]
    for before, after in runs:
        assert before == pytest.approx(expected, abs=1e-5)
        assert after == pytest.approx(runs[0][1], abs=1e-5) and after < before - 1e-3


@pytest.mark.parametrize("model", MODELS)
def test_an_fsdp_rank_reads_its_own_rows_only(
    model: str, found: tuple[dict[str, Any], dict[str, int]]
) -> None:
    """Together the whole, once; each half of it, up to a row of each matrix; at once half of the largest matrix."""
    runs, sizes = found
    totals, largest = zip(*runs[f"{model} fsdp"]["read"], strict=True)
    assert sum(totals) == sizes[model]
    assert max(totals) < 0.55 * sizes[model]
    assert max(largest) <= 4 * 24 * 24 * 2 / 2
