"""LoRA on every engine against a plain loop, and its checkpoints."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch.func import functional_call

from drivetrain.conf.compose import compose
from drivetrain.conf.errors import CheckpointError
from drivetrain.data.loader import PretrainSource, share_of
from drivetrain.data.shard_writer import ShardWriter
from drivetrain.data.shards import Manifest
from drivetrain.kernels.attention import make_documents
from drivetrain.model.transformer import build_model, fused_rows, logits
from drivetrain.train import adapters
from drivetrain.train.build import fill_from
from drivetrain.train.checkpoint import load_tensors
from drivetrain.train.optim import lr_factor

STEPS = 12
RANK, ALPHA = 4, 8.0
# Our matrix, which of its parts have adapters, and the order of all its parts.
TARGETS = {
    "attn.wqkv": (("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj")),
    "attn.wo": (("o_proj",), ("o_proj",)),
    "mlp.w_gate_up": (("up_proj",), ("gate_proj", "up_proj")),
    "mlp.w_down": (("down_proj",), ("down_proj",)),
}

Found = dict[str, Any]
Run = Callable[[int, list[Found]], dict[str, Found]]
Case = Callable[..., Found]


@pytest.fixture(scope="module")
def run_ranks(run_ranks: Callable[..., dict[str, Found]]) -> Run:
    return partial(run_ranks, Path(__file__).with_name("lora_worker.py"))


@pytest.fixture(scope="module")
def whole(small: list[str], shards: Path) -> list[str]:
    """Overrides of full training."""
    return [
        *small,
        "model.vocab_size=96",
        f"stage.steps={STEPS}",
        "stage.eval_every=0",
        f"data.path={shards}",
    ]


@pytest.fixture(scope="module")
def base(whole: list[str], run_ranks: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    words = [*whole, "stage.micro_batch=8", "optim.lr=1e-2"]
    run_ranks(1, [{"name": "base", "overrides": words, "steps": STEPS, "save": str(folder)}])
    return folder / f"step_{STEPS:08d}"


@pytest.fixture(scope="module")
def backwards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents that count down where those of the base count up: something new to learn."""
    folder = tmp_path_factory.mktemp("backwards")
    rng = np.random.default_rng(3)
    shards = []
    for split in ("train", "held_out"):
        writer = ShardWriter(folder, f"{split}_00000", split, "uint16")
        for _ in range(60):
            steps = -rng.integers(1, 4, int(rng.integers(1, 120)))
            writer.add(np.append(np.cumsum(steps) % 95 + 1, 0).astype(np.uint16))
        shards.append(writer.close())
    Manifest(dtype="uint16", vocab_size=96, eos_id=0, tokenizer_hash="made", shards=shards).write(folder)
    return folder


@pytest.fixture(scope="module")
def overrides(whole: list[str], base: Path, backwards: Path) -> list[str]:
    names = ",".join(name for chosen, _ in TARGETS.values() for name in chosen)
    return [
        *(word for word in whole if not word.startswith("data.path")),
        f"data.path={backwards}",
        f"model.init_from={base}",
        f"lora.rank={RANK}",
        f"lora.alpha={ALPHA}",
        f"lora.targets=[{names}]",
        "optim.lr=2e-2",
    ]


@pytest.fixture(scope="module")
def case(overrides: list[str]) -> Case:
    def make(name: str, *words: str, **more: Any) -> Found:
        return {"name": name, "overrides": [*overrides, *words], "steps": STEPS, **more}

    return make


def zero(stage: int) -> tuple[str, str]:
    return "engine=zero", f"engine.zero_stage={stage}"


ENGINES = {"fsdp": ("engine=fsdp",), **{f"zero{n}": zero(n) for n in range(4)}}


@pytest.fixture(scope="module")
def plain(overrides: list[str], base: Path, whole: list[str]) -> list[Found]:
    """One process, torch's AdamW, and W + alpha/rank · B A written out: no engine and no adapter module."""
    from drivetrain.model.initialize import fill_uniform

    config = compose([*overrides, "stage.micro_batch=8"])
    model = build_model(config.model, "sdpa", device="cpu").requires_grad_(False)
    load_tensors(base, {f"model.{name}": p for name, p in model.named_parameters()})
    weights = dict(model.named_parameters())
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for layer in range(config.model.layers):
        for module, (chosen, parts) in TARGETS.items():
            name = f"blocks.{layer}.{module}"
            weight = weights[f"{name}.weight"]
            rows = fused_rows(config.model, f"{name}.weight") or [weight.shape[0]]
            for part, count in zip(parts, rows, strict=True):
                if part in chosen:
                    a_RD = torch.empty(RANK, weight.shape[1])
                    fill_uniform(a_RD, weight.shape[1] ** -0.5, config.seed, f"{name}.{part}.lora_A")
                    factors[f"{name}.{part}"] = (
                        a_RD.requires_grad_(),
                        torch.zeros(count, RANK, requires_grad=True),
                    )

    def merged() -> dict[str, torch.Tensor]:
        found = dict(weights)
        for layer in range(config.model.layers):
            for module, (_, parts) in TARGETS.items():
                name = f"blocks.{layer}.{module}"
                weight = weights[f"{name}.weight"]
                rows = fused_rows(config.model, f"{name}.weight") or [weight.shape[0]]
                added = []
                for part, count in zip(parts, rows, strict=True):
                    a_RD, b_OR = factors.get(
                        f"{name}.{part}", (torch.zeros(1, weight.shape[1]), torch.zeros(count, 1))
                    )
                    added.append(b_OR @ a_RD * (ALPHA / RANK))
                found[f"{name}.weight"] = weight + torch.cat(added)
        return found

    cfg = config.optim
    trained = [tensor for pair in factors.values() for tensor in pair]
    optimizer = torch.optim.AdamW(
        trained, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, weight_decay=cfg.weight_decay
    )
    source = PretrainSource(config.data, config.stage.seq_len, share_of(8, 8, 0, 1), config.seed)
    rows = []
    for step in range(STEPS):
        (batch,) = source.next_step()
        documents = make_documents(batch.cu_seqlens, batch.max_seqlen, batch.tokens, batch.row_len)
        logits_TV = functional_call(
            model, merged(), (batch.tokens_T, batch.positions_T, documents, logits), tie_weights=True
        )
        nll_T = torch.nn.functional.cross_entropy(logits_TV, batch.targets_T, reduction="none")
        loss = (nll_T * batch.loss_weights_T).sum() / batch.loss_weights_T.sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, cfg.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * lr_factor(cfg, step, STEPS)
        optimizer.step()
        rows.append({"loss": loss.item(), "norm": float(norm)})
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1
    sums = {name: weight.detach().double().sum().item() for name, weight in merged().items()}
    return [*rows, {"sums": sums}]


def check(name: str, rows: list[Found], expected: list[Found]) -> None:
    for key, bar in (("loss", 1e-5), ("norm", 2e-4)):
        np.testing.assert_allclose([r[key] for r in rows], [r[key] for r in expected], rtol=bar, err_msg=name)


@pytest.fixture(scope="module")
def found(case: Case, run_ranks: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """What two ranks do, in one spawn."""
    folder = tmp_path_factory.mktemp("found")
    kinds = [(kind, f"engine.checkpointing={kind}") for kind in ("block", "selective")]
    cases = [case(name, *words, "stage.micro_batch=2") for name, words in ENGINES.items()]
    cases += [case(name, word, "stage.micro_batch=4") for name, word in kinds]
    # Dropout: whole, stopped and resumed, recomputed.
    drop = ("lora.dropout=0.3", "stage.micro_batch=2")
    cases += [
        case("dropout", *drop),
        case("dropout first", *drop, save=str(folder / "dropout")) | {"steps": 5},
        case("dropout second", *drop, load=str(folder / "dropout" / "step_00000005")) | {"steps": STEPS - 5},
        *(case(f"dropout {name}", *drop, word) for name, word in kinds),
        case("dropout zero3", *drop, *zero(3), "engine.checkpointing=block"),
    ]
    for name, words in ENGINES.items():
        bf16 = (*words, "engine.precision=bf16", "stage.micro_batch=4")
        saved = folder / f"bf16 {name}"
        cases += [
            case(f"poison {name}", *words, "stage.micro_batch=4", poison=[2]) | {"steps": 4},
            case(f"bf16 {name}", *bf16),
            case(f"bf16 {name} first", *bf16, save=str(saved)) | {"steps": 5},
            case(f"bf16 {name} second", *bf16, load=str(saved / "step_00000005")) | {"steps": STEPS - 5},
        ]
    return run_ranks(2, cases)


@pytest.mark.parametrize("name", [*ENGINES, "block", "selective"])
def test_two_ranks(name: str, plain: list[Found], found: dict[str, Found]) -> None:
    """The same curve and the same merged weights, whatever shards, recomputes or accumulates."""
    *rows, last = plain
    check(name, found[name]["rows"], rows)
    assert found[name]["sums"].keys() == last["sums"].keys()
    for weight, total in last["sums"].items():
        assert found[name]["sums"][weight] == pytest.approx(total, abs=2e-4), weight


def test_compiled_blocks(plain: list[Found], case: Case, run_ranks: Run) -> None:
    words = ("stage.micro_batch=4", "engine.compile=true")
    compiled = run_ranks(1, [case("compiled", *words), case("dropout", *words, "lora.dropout=0.3")])
    check("compiled", compiled["compiled"]["rows"], plain[:-1])
    rows = compiled["dropout"]["rows"]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1


def test_dropout_is_drawn_again_when_blocks_are_recomputed_and_when_a_run_is_resumed(
    plain: list[Found], found: dict[str, Found]
) -> None:
    expected = found["dropout"]["rows"]
    check("resumed", found["dropout first"]["rows"] + found["dropout second"]["rows"], expected)
    for name in ("block", "selective", "zero3"):
        check(name, found[f"dropout {name}"]["rows"], expected)
    assert abs(expected[-1]["loss"] - plain[STEPS - 1]["loss"]) > 1e-3
    assert expected[-1]["loss"] < expected[0]["loss"] - 0.1


@pytest.mark.parametrize("name", ENGINES)
def test_a_step_without_a_finite_gradient_is_skipped_everywhere(name: str, found: dict[str, Found]) -> None:
    rows = found[f"poison {name}"]["rows"]
    assert [row["skipped"] for row in rows] == [False, True, False, False]
    assert all(np.isfinite(row["loss"]) for row in rows)


@pytest.mark.parametrize("name", ENGINES)
def test_bf16_keeps_frozen_weights_in_bf16_and_adapters_in_fp32(
    name: str, plain: list[Found], found: dict[str, Found]
) -> None:
    whole = found[f"bf16 {name}"]
    assert whole["frozen"] == ["torch.bfloat16"]
    losses, wanted = ([row["loss"] for row in some] for some in (whole["rows"], plain[:-1]))
    np.testing.assert_allclose(losses, wanted, rtol=2e-2)
    # A resume takes adapters and moments up as they were, below bf16's resolution too.
    resumed = found[f"bf16 {name} first"]["rows"] + found[f"bf16 {name} second"]["rows"]
    np.testing.assert_allclose([row["loss"] for row in resumed], losses, rtol=1e-6)
    assert found[f"bf16 {name} second"]["sums"] == pytest.approx(whole["sums"], abs=1e-5)


def test_checkpoints_cross_engines_and_ranks(
    plain: list[Found], case: Case, run_ranks: Run, tmp_path: Path
) -> None:
    """They hold adapters, their moments and the base's digest, and nothing else."""
    rows: list[Found] = []
    last: Path | None = None
    for ranks, engines in ((2, ("fsdp", "zero3", "fsdp")), (1, ("zero1",)), (2, ("zero2", "zero0"))):
        cases = []
        for engine in engines:
            folder = tmp_path / f"{len(rows) + len(cases)}"
            more = {"load": str(last)} if last else {}
            words = (*ENGINES[engine], "stage.micro_batch=2")
            cases.append(case(folder.name, *words, save=str(folder), **more) | {"steps": 2})
            last = folder / f"step_{len(rows) + 2 * len(cases):08d}"
        for part in run_ranks(ranks, cases).values():
            rows += part["rows"]
    check("FSDP2 and every ZeRO stage", rows, plain[:-1])
    names: set[str] = set()
    for path in (tmp_path / "0" / "step_00000002").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    kinds = {name.rpartition("lora_")[2] for name in names}
    assert kinds == {"A", "B", "A.exp_avg", "A.exp_avg_sq", "B.exp_avg", "B.exp_avg_sq"}
    assert all("lora_" in name for name in names)


def test_a_base_that_has_changed_is_refused_and_one_that_has_moved_is_found(
    base: Path, overrides: list[str], tmp_path: Path
) -> None:
    began = adapters.Base(str(base), adapters.digest_of(base))
    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    assert adapters.locate(adapters.Base(str(tmp_path / "gone"), began.digest), moved, Path) == moved
    assert adapters.locate(began, None, Path) == base
    (moved / "complete.json").write_text('{"files": {}}')
    with pytest.raises(CheckpointError) as caught:
        adapters.locate(adapters.Base(str(moved), began.digest), tmp_path / "nothing", Path)
    nothing = tmp_path / "nothing"
    assert str(caught.value) == (
        f"the adapters were trained on the weights in {moved}, and neither that nor {nothing} holds them; "
        "restore them, or pass the directory where they lie as model.init_from"
    )


def test_a_hugging_face_bases_digest_is_of_its_contents(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"12345678")
    before = adapters.digest_of(tmp_path)
    (tmp_path / "README.md").write_text("nothing of the weights")
    assert adapters.digest_of(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"12345679")
    assert adapters.digest_of(tmp_path) != before


def test_a_lora_run_is_a_source_of_merged_weights(
    case: Case, run_ranks: Run, tmp_path: Path, overrides: list[str], whole: list[str]
) -> None:
    """For the sampler and for a next stage, sharded or not."""
    done = run_ranks(2, [case("lora", "stage.micro_batch=4", save=str(tmp_path)) | {"steps": 6}])["lora"]
    folder = tmp_path / "step_00000006"
    model = build_model(compose(overrides).model, "sdpa", device="cpu")
    fill_from(folder, model.cfg)(model)
    for name, weight in model.named_parameters():
        assert weight.detach().double().sum().item() == pytest.approx(done["sums"][name], abs=2e-4), name
    after = {
        "name": "next",
        "overrides": [*whole, f"model.init_from={folder}", "stage.micro_batch=4"],
        "steps": 0,
    }
    found = run_ranks(2, [after])["next"]["sums"]
    assert found == {name: pytest.approx(total, abs=2e-4) for name, total in done["sums"].items()}
