"""One configuration, two engines, any number of ranks and micro-batches: the same numbers."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from drivetrain.conf.compose import compose
from drivetrain.data.loader import PretrainSource, share_of
from drivetrain.kernels.attention import make_documents
from drivetrain.model.initialize import initialize
from drivetrain.model.transformer import build_model, logits
from drivetrain.train.optim import lr_factor

STEPS = 20

Rows = list[dict[str, Any]]
Run = Callable[[int, list[dict[str, Any]]], dict[str, Rows]]
Case = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def run_ranks(run_ranks: Callable[..., dict[str, Rows]]) -> Run:
    return partial(run_ranks, Path(__file__).with_name("parity_worker.py"))


@pytest.fixture(scope="module")
def overrides(small: list[str], shards: Path) -> list[str]:
    more = ["model.vocab_size=96", f"stage.steps={STEPS}", "stage.eval_every=0"]
    return [*small, *more, f"data.path={shards}"]


@pytest.fixture(scope="module")
def case(overrides: list[str]) -> Case:
    """`case(name, *words, **more)`: one for the parity worker."""

    def make(name: str, *words: str, **more: Any) -> dict[str, Any]:
        return {"name": name, "overrides": [*overrides, *words], "steps": STEPS, **more}

    return make


def zero(stage: int) -> tuple[str, str]:
    return "engine=zero", f"engine.zero_stage={stage}"


@pytest.fixture(scope="module")
def plain(overrides: list[str]) -> Rows:
    """A loop that anybody would write: one process, full logits, torch's cross-entropy and AdamW; none of the
    engines, kernels or chunking of this project."""
    config = compose([*overrides, "stage.micro_batch=8"])
    model = build_model(config.model, "sdpa")
    model.materialize(torch.device("cpu"))
    initialize(model, config.model, config.seed)
    cfg = config.optim
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(cfg.beta1, cfg.beta2),
        eps=cfg.eps,
    )
    source = PretrainSource(config.data, config.stage.seq_len, share_of(8, 8, 0, 1), config.seed)
    rows = []
    for step in range(STEPS):
        (batch,) = source.next_step()
        documents = make_documents(batch.cu_seqlens, batch.max_seqlen, batch.tokens, batch.row_len)
        logits_TV = model(batch.tokens_T, batch.positions_T, documents, logits)
        nll_T = torch.nn.functional.cross_entropy(logits_TV, batch.targets_T, reduction="none")
        loss = (nll_T * batch.loss_weights_T).sum() / batch.loss_weights_T.sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * lr_factor(cfg, step, config.stage.steps)
        optimizer.step()
        optimizer.zero_grad()
        rows.append({"loss": loss.item(), "digest": batch.digest, "norm": float(norm)})
    assert (
        rows[-1]["loss"] < rows[0]["loss"] - 0.2
    )  # it learns: equal losses are not equal for standing still
    return rows


def check(name: str, rows: Rows, expected: Rows) -> None:
    assert [row["digest"] for row in rows] == [row["digest"] for row in expected], name
    losses, wanted = ([row["loss"] for row in some] for some in (rows, expected))
    np.testing.assert_allclose(losses, wanted, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(
        [row["norm"] for row in rows], [row["norm"] for row in expected], rtol=2e-4, err_msg=name
    )


def test_two_ranks_every_engine_and_micro_batch(plain: Rows, case: Case, run_ranks: Run) -> None:
    engines = {"fsdp": ("engine=fsdp",), **{f"zero{n}": zero(n) for n in range(4)}}
    cases = [
        case(f"{name}, micro-batch {size}", *words, f"stage.micro_batch={size}")
        for name, words in engines.items()
        for size in (1, 2, 4)
    ]
    cases.append(case("fsdp, no reshard", "stage.micro_batch=2", "engine.reshard_after_forward=false"))
    cases += [
        case(f"checkpointing {kind}", "stage.micro_batch=2", f"engine.checkpointing={kind}")
        for kind in ("block", "selective")
    ]
    cases.append(case("reference kernels", "stage.micro_batch=4", "kernels=reference"))
    for name, rows in run_ranks(2, cases).items():
        check(name, rows, plain)


def test_one_rank(plain: Rows, case: Case, run_ranks: Run) -> None:
    cases = [case(f"fsdp, micro-batch {size}", f"stage.micro_batch={size}") for size in (1, 2, 4, 8)]
    cases += [case(f"zero{n}", *zero(n), "stage.micro_batch=4") for n in range(4)]
    cases += [case(f"zero{n}, micro-batch 1", *zero(n), "stage.micro_batch=1") for n in (0, 2)]
    for name, rows in run_ranks(1, cases).items():
        check(name, rows, plain)


def test_compiled_blocks(plain: Rows, case: Case, run_ranks: Run) -> None:
    cases = [case("fsdp, compiled", "stage.micro_batch=4", "engine.compile=true")]
    for name, rows in run_ranks(1, cases).items():
        check(name, rows, plain)


def test_optimizer_on_the_cpu(plain: Rows, case: Case, run_ranks: Run, tmp_path: Path) -> None:
    """ZeRO's offload keeps the moments elsewhere; the numbers and the checkpoint stay the same."""
    words = ("engine.offload=true", "stage.micro_batch=2")
    cases = [case(f"zero{n}, offload", *zero(n), *words) for n in (1, 2, 3)]
    for name, rows in run_ranks(2, cases).items():
        check(name, rows, plain)
    first = {**case("first", *zero(2), *words), "steps": 10, "save": str(tmp_path)}
    second = {
        **case("second", *zero(3), *words),
        "steps": 10,
        "load": str(tmp_path / "step_00000010"),
    }
    found = run_ranks(2, [first, second])
    check("offloaded, saved and loaded", found["first"] + found["second"], plain)


def test_four_ranks_and_hsdp(plain: Rows, case: Case, run_ranks: Run) -> None:
    cases = [
        case("fsdp", "stage.micro_batch=1"),
        case("hsdp 2 x 2", "stage.micro_batch=2", "engine.replicas=2"),
        case("zero2", *zero(2), "stage.micro_batch=2"),
        case("zero3", *zero(3), "stage.micro_batch=1"),
    ]
    for name, rows in run_ranks(4, cases).items():
        check(name, rows, plain)


def test_bf16_engines_agree_closely(case: Case, run_ranks: Run) -> None:
    cases = [case("fsdp", "stage.micro_batch=2", "engine.precision=bf16")]
    cases += [case(f"zero{n}", *zero(n), "stage.micro_batch=2", "engine.precision=bf16") for n in range(4)]
    found = run_ranks(2, cases)
    for name, rows in found.items():
        losses = [row["loss"] for row in rows]
        np.testing.assert_allclose(losses, [row["loss"] for row in found["fsdp"]], rtol=5e-3, err_msg=name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_without_a_finite_gradient_is_skipped_everywhere(
    case: Case, run_ranks: Run, precision: str
) -> None:
    """One rank's loss is NaN at step 3: no rank changes its weights, and the run goes on."""
    engines = {"fsdp": ("engine=fsdp",), **{f"zero{n}": zero(n) for n in range(4)}}
    cases = [
        {**case(name, *words, "stage.micro_batch=2", f"engine.precision={precision}"), "poison": [3]}
        for name, words in engines.items()
    ]
    for name, rows in run_ranks(2, cases).items():
        assert [row["skipped"] for row in rows] == [step == 3 for step in range(1, STEPS + 1)], name
        assert all(np.isfinite(row["loss"]) for row in rows), name
        assert rows[-1]["loss"] < rows[0]["loss"] - 0.2, name


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_a_save_before_the_first_update_changes_nothing(
    case: Case, run_ranks: Run, tmp_path: Path, optim: str
) -> None:
    """Every step up to the save was skipped: the moments are zeros in it, and training goes on as without it."""
    engines = {"fsdp": ("engine=fsdp",), **{f"zero{n}": zero(n) for n in range(4)}}
    if optim == "muon":
        engines = {"fsdp": ("engine=fsdp", "optim=muon", "optim.lr=3e-3")}
    cases = []
    for name, words in engines.items():
        base = {**case(name, *words, "stage.micro_batch=2"), "poison": [1, 2], "steps": 6}
        saving = {"name": f"{name}, saved", "save": str(tmp_path / name), "save_after": 2}
        folder = tmp_path / name / "step_00000002"
        cases += [
            base,
            {**base, **saving},
            {**base, "name": f"{name}, loaded", "steps": 4, "load": str(folder)},
        ]
    found = run_ranks(2, cases)
    for name in engines:
        expected = found[name]
        assert [row["skipped"] for row in expected] == [True, True, False, False, False, False], name
        check(f"{name}, saved", found[f"{name}, saved"][2:], expected[2:])
        check(f"{name}, loaded", found[f"{name}, loaded"], expected[2:])
        assert expected[-1]["loss"] < expected[2]["loss"], name


def test_muon_is_the_same_on_one_and_two_ranks(case: Case, run_ranks: Run) -> None:
    words = ("optim=muon", "optim.lr=3e-3", "optim.warmup_steps=4", "stage.micro_batch=2")
    one = run_ranks(1, [case("muon", *words)])["muon"]
    two = run_ranks(2, [case("muon", *words)])["muon"]
    np.testing.assert_allclose([r["loss"] for r in one], [r["loss"] for r in two], rtol=1e-4)
    assert one[-1]["loss"] < one[0]["loss"] - 0.2


def test_checkpoints_cross_engines_and_ranks(case: Case, run_ranks: Run, tmp_path: Path) -> None:
    """FSDP2 -> every ZeRO stage -> FSDP2, on 2, 1, 4 and 2 ranks, against one undisturbed run."""
    more = ("stage.micro_batch=1", "stage.steps=40")
    whole = run_ranks(2, [{**case("whole", *more), "steps": 30}])["whole"]
    plan: list[tuple[int, tuple[str, ...]]] = [
        (2, ("engine=fsdp",)),
        (2, zero(2)),
        (2, ("engine=fsdp",)),
        (1, zero(1)),
        (4, zero(3)),
        (2, zero(0)),
    ]
    rows: Rows = []
    for index, (ranks, words) in enumerate(plan):
        part = {**case("part", *more, *words), "steps": 5, "save": str(tmp_path / str(index))}
        if index:
            part["load"] = str(tmp_path / str(index - 1) / f"step_{5 * index:08d}")
        rows += run_ranks(ranks, [part])["part"]
    check("2 -> 1 -> 4 ranks, FSDP2 and every ZeRO stage", rows, whole)


def test_a_checkpoint_names_weights_not_engines(case: Case, run_ranks: Run, tmp_path: Path) -> None:
    """Saved by FSDP2 and by ZeRO-3 after the same steps, the files hold the same names and values."""
    from safetensors import safe_open

    cases = [
        {**case("fsdp", "stage.micro_batch=2"), "steps": 3, "save": str(tmp_path / "fsdp")},
        {
            **case("zero3", *zero(3), "stage.micro_batch=2"),
            "steps": 3,
            "save": str(tmp_path / "zero3"),
        },
    ]
    run_ranks(2, cases)
    names = {}
    for engine in ("fsdp", "zero3"):
        folder = tmp_path / engine / "step_00000003"
        keys: set[str] = set()
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                keys |= set(file.keys())
        names[engine] = keys
        assert json.loads((folder / "state.json").read_text())["optimizer_steps"] == 3
    assert names["fsdp"] == names["zero3"]
    assert "model.blocks.1.attn.wqkv.weight" in names["fsdp"]
    assert "optim.embed.weight.exp_avg_sq" in names["fsdp"]
