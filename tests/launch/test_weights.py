"""`drivetrain import` and `drivetrain export`; `tests/model/test_hf.py` has each architecture's numbers."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from drivetrain.conf.compose import compose, load, to_yaml
from drivetrain.conf.errors import ConfigError, DrivetrainError
from drivetrain.conf.hf_values import generation_ends
from drivetrain.conf.schema import LoraConfig, ModelConfig
from drivetrain.conf.source import Kind, kind_of, model_of
from drivetrain.conf.validate import validate
from drivetrain.data.shards import hash_file
from drivetrain.data.tokenizer import load_tokenizer, train_tokenizer
from drivetrain.launch import weights as module
from drivetrain.launch.run_dir import make_run_dir
from drivetrain.launch.weights import export_hf, import_hf
from drivetrain.model.lora import adapter_shapes
from drivetrain.model.transformer import Transformer, build_model, unique_parameters
from drivetrain.train.adapters import digest_of
from drivetrain.train.build import fill_from
from drivetrain.train.checkpoint import origin
from drivetrain.train.serve import open_model

GB = 10**9
TOKENS = torch.arange(1, 30)[None]
CASES = {
    "llama": ("Llama", {"tie_word_embeddings": True}, torch.bfloat16),
    "mistral": ("Mistral", {"sliding_window": None}, torch.float16),
    "qwen3": ("Qwen3", {"head_dim": 12}, torch.float32),
    "gpt2": ("GPT2", {}, torch.float32),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "a.txt").write_text("the cat sat on the mat; " * 50)
    train_tokenizer([folder / "a.txt"], 268, folder / "tok")
    return folder / "tok"


def theirs(name: str) -> Any:
    kind, changes, dtype = CASES[name]
    sizes: dict[str, Any] = {"vocab_size": 272, "bos_token_id": 0, "eos_token_id": [3, 5], "pad_token_id": 1}
    if kind == "GPT2":
        sizes |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    else:
        sizes |= {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
        }
        sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes | changes)
    return getattr(transformers, f"{kind}{'LMHeadModel' if kind == 'GPT2' else 'ForCausalLM'}")(config).to(
        dtype
    )


def saved(name: str, folder: Path, tokenizer: Path) -> Path:
    theirs(name).save_pretrained(folder, max_shard_size="50KB")
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    return folder


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {
        key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()
    }


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return set(first) == set(second) and all(
        first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]) for key in first
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shard_bytes", [GB, 40_000])
def test_import_and_export_give_back_every_bit(
    name: str, shard_bytes: int, tokenizer: Path, tmp_path: Path
) -> None:
    source = saved(name, tmp_path / "source", tokenizer)
    written = import_hf(source, tmp_path / "run", shard_bytes)
    assert (written.files > 1) is (shard_bytes < GB)
    assert kind_of(tmp_path / "run") is Kind.run and model_of(tmp_path / "run") == load_model(
        tmp_path / "run"
    )
    again = export_hf(tmp_path / "run", tmp_path / "out", None, shard_bytes)
    assert (again.files > 1) is (shard_bytes < GB) and again.bytes == written.bytes
    assert equal(tensors_in(source), tensors_in(tmp_path / "out"))
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out")
    )
    assert after == before
    generation = "generation_config.json"
    assert (tmp_path / "out" / generation).read_bytes().strip() == (source / generation).read_bytes().strip()
    for file in tokenizer.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    assert not list(tmp_path.glob("*.tmp"))


def load_model(run_dir: Path) -> Any:
    return load(run_dir / "config.yaml").model


@pytest.mark.parametrize("name", CASES)
def test_transformers_loads_what_was_exported(name: str, tokenizer: Path, tmp_path: Path) -> None:
    source = saved(name, tmp_path / "source", tokenizer)
    import_hf(source, tmp_path / "run", 40_000)
    shutil.rmtree(tmp_path / "run" / "hf")  # so that config.json is ours
    export_hf(tmp_path / "run", tmp_path / "out", "fp32", 40_000)
    first, second = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (source, tmp_path / "out")
    )
    with torch.no_grad():
        assert torch.equal(first(TOKENS).logits, second(TOKENS).logits)
    assert type(second) is type(first) or name == "mistral"
    text = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    turn = [{"role": "user", "content": "the cat"}]
    assert text.decode(text.encode("the mat")) == "the mat"
    assert "the cat" in text.apply_chat_template(turn, tokenize=False)
    # eos and the end of a chat's turn
    assert second.generation_config.eos_token_id == [
        text.eos_token_id,
        text.convert_tokens_to_ids("<|im_end|>"),
    ]
    assert second.generation_config.pad_token_id == text.pad_token_id


# --- a trained run ------------------------------------------------------------------------------------------


def test_a_model_is_downloaded_trained_on_and_handed_on(tokenizer: Path, tmp_path: Path) -> None:
    """As a user types it: from a Hugging Face directory to shards, two ranks, an export, and transformers."""
    source = saved("qwen3", tmp_path / "source", tokenizer)
    theirs = json.loads((source / "generation_config.json").read_text())["eos_token_id"]
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number}.txt").write_text(f"the cat sat on the mat; {number} " * 20)
    drivetrain = [str(Path(sys.executable).parent / "drivetrain")]
    env = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1"}

    def run(line: str) -> str:
        command, where = [*drivetrain, *line.split()], {"cwd": tmp_path, "env": env}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **where)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("data build text --tokenizer source --out shards --held-out 0.2 --workers 1")
    job = "stage.steps=2 stage.seq_len=16 stage.tokens_per_step=64 stage.save_every=2 stage.eval_every=0"
    job += " optim.lr=1e-3 optim.warmup_steps=0 engine.precision=fp32 cluster.device=cpu cluster.nproc=2"
    run(f"launch model=auto model.init_from=source data.path=shards run_dir=run {job}")
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.json").is_file()
    assert not list((tmp_path / "run" / "tokenizer").glob("*.safetensors"))
    source.rename(tmp_path / "gone")  # a run is complete in itself
    run("resume run stage.steps=3")
    said = run("export run out --max-shard-gb 0.001")
    assert "-> out" in said
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["architectures"], config["torch_dtype"]) == (["Qwen3ForCausalLM"], "bfloat16")
    # Generation stops where the tokenizer says, at the end of a turn, and where the model did that it began from.
    words = [load_tokenizer(tokenizer).token_to_id(token) for token in ("<|endoftext|>", "<|im_end|>")]
    ends = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert ends == config["eos_token_id"] == [*words, *theirs] and theirs == [3, 5]
    assert set(open_model(tmp_path / "run").eos_ids) == {words[0], *theirs}

    trained = fill(load_model(tmp_path / "run"), tmp_path / "run")
    exported = fill(model_of(tmp_path / "out"), tmp_path / "out")
    begun = fill(model_of(tmp_path / "gone"), tmp_path / "gone")
    for name, value in unique_parameters(trained):
        assert torch.equal(value.bfloat16().float(), exported.get_parameter(name)), name
        assert not torch.equal(value, begun.get_parameter(name)), name
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert other.dtype == torch.bfloat16
    assert other(TOKENS).logits.isfinite().all()

    export_hf(tmp_path / "run" / "checkpoints" / "step_00000002", tmp_path / "earlier", "bf16", GB)
    assert not equal(tensors_in(tmp_path / "earlier"), tensors_in(tmp_path / "out"))
    export_hf(tmp_path / "out", tmp_path / "again", None, GB)  # from there in other files, too
    assert equal(tensors_in(tmp_path / "again"), tensors_in(tmp_path / "out"))


def test_a_run_keeps_the_ends_of_what_it_began_from(tokenizer: Path, tmp_path: Path) -> None:
    """Through an imported run and a run that began from that; none of a base with another tokenizer."""
    source = saved("llama", tmp_path / "source", tokenizer)
    import_hf(source, tmp_path / "imported", GB)
    begun = tmp_path / "imported"
    for name in ("first", "second"):
        config = compose(["model=auto", f"model.init_from={begun}"])
        make_run_dir(config, [], begun := tmp_path / name)
        assert generation_ends(begun / "hf", 272) == [3, 5]
    shutil.copytree(tokenizer, other := tmp_path / "other")
    definition = json.loads((other / "tokenizer.json").read_text())
    definition["added_tokens"][0]["content"] = "<|other|>"
    (other / "tokenizer.json").write_text(json.dumps(definition))
    words = ["model=auto", f"model.init_from={source}", f"tokenizer={other}"]
    make_run_dir(compose(words), words, tmp_path / "third")
    assert not (tmp_path / "third" / "hf").exists()


def test_wrong_ends_of_a_base_are_refused_before_training(tokenizer: Path, tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "source", tokenizer)
    (source / "generation_config.json").write_text('{"eos_token_id": 999999}')
    with pytest.raises(ConfigError, match=r"eos_token_id=999999, which is beyond the model's 272 tokens"):
        validate(compose(["model=auto", f"model.init_from={source}"]), data=False)


@pytest.mark.parametrize("kind", ["source", "run"])
def test_adapters_are_merged(kind: str, tokenizer: Path, tmp_path: Path) -> None:
    """A checkpoint with adapters alone, as a LoRA run saves it, on a Hugging Face directory and on a run."""
    source = saved("gpt2", tmp_path / "source", tokenizer)
    import_hf(source, tmp_path / "run", GB)
    base = source if kind == "source" else tmp_path / "run" / "checkpoints" / "step_00000000"
    model, lora = model_of(source), LoraConfig(rank=2, alpha=3.0, targets=["c_attn", "c_proj"])
    step = tmp_path / "lora" / "checkpoints" / "step_00000005"
    step.mkdir(parents=True)
    torch.manual_seed(1)
    adapters = {f"model.{name}": torch.randn(shape) for name, shape in adapter_shapes(model, lora).items()}
    save_file(adapters, step / "model.safetensors")
    config = replace(compose([]), model=replace(model, init_from=str(base)), lora=lora)
    state = {"step": 5, "base": {"path": str(base), "digest": digest_of(base)}, **origin(config)}
    (step / "state.json").write_text(json.dumps(state))
    digests = {file.name: hash_file(file) for file in step.iterdir()}
    (step / "complete.json").write_text(json.dumps({"files": digests}))
    (tmp_path / "lora" / "config.yaml").write_text(to_yaml(config))

    export_hf(tmp_path / "lora", tmp_path / "out", "fp32", 40_000)
    merged, plain = fill(model, tmp_path / "lora"), fill(model, source)
    exported = fill(model_of(tmp_path / "out"), tmp_path / "out")
    moved = set()
    for name, value in unique_parameters(merged):
        torch.testing.assert_close(exported.get_parameter(name), value)
        if not torch.equal(value, plain.get_parameter(name)):
            moved.add(name.partition(".")[2].partition(".")[2])
    assert moved == {"attn.wqkv.weight", "attn.wo.weight", "mlp.w_down.weight"}


def fill(cfg: ModelConfig, source: Path) -> Transformer:
    model = build_model(cfg, "sdpa")
    model.materialize(torch.device("cpu"))
    fill_from(source, cfg)(model)
    return model


# --- what is refused ----------------------------------------------------------------------------------------


def test_an_imported_directory_that_was_changed_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    import_hf(saved("llama", tmp_path / "source", tokenizer), tmp_path / "run", GB)
    (file,) = (tmp_path / "run" / "checkpoints" / "step_00000000").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"holds no whole checkpoint \(.*is corrupt"):
        export_hf(tmp_path / "run", tmp_path / "out", None, GB)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.tmp"))


def test_a_place_that_is_taken_is_not_touched(tokenizer: Path, tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "source", tokenizer)
    (tmp_path / "out").mkdir()
    import_hf(source, tmp_path / "out", GB)  # an empty directory is no obstacle
    with pytest.raises(ConfigError, match="out exists and is not an empty directory"):
        import_hf(source, tmp_path / "out", GB)
    with pytest.raises(ConfigError, match="out is a run already; import takes a Hugging Face directory"):
        import_hf(tmp_path / "out", tmp_path / "again", GB)
    with pytest.raises(ConfigError, match=r"nowhere has no config\.json"):
        import_hf(tmp_path / "nowhere", tmp_path / "again", GB)
    with pytest.raises(ConfigError, match="nowhere is no directory; pass a run directory"):
        export_hf(tmp_path / "nowhere", tmp_path / "again", None, GB)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


Usage = namedtuple("Usage", ["total", "used", "free"])


@pytest.mark.parametrize("verb", ["import", "export"])
@pytest.mark.parametrize(
    "failure",
    [None, OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left on device")],
)
def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    verb: str, failure: Exception | None, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved("llama", tmp_path / "source", tokenizer)
    import_hf(source, tmp_path / "run", GB)

    def act() -> object:
        if verb == "import":
            return import_hf(source, tmp_path / "out", GB)
        return export_hf(tmp_path / "run", tmp_path / "out", None, GB)

    if failure is None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10, 10, 0))
        with pytest.raises(
            ConfigError, match=r"out needs \S+ KiB, of which its disk lacks \S+ KiB; give another OUT"
        ):
            act()
    else:

        def fail(*_: Any, **__: Any) -> None:
            raise failure

        monkeypatch.setattr(module, "save_file", fail)
        with pytest.raises(
            DrivetrainError, match=r"out cannot be written: No space left on device; nothing of it"
        ):
            act()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "source"]


def test_a_model_that_transformers_has_not_is_refused_before_it_is_read(tmp_path: Path) -> None:
    config = compose(["model=tiny", "model.mlp=gelu"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match=r"no architecture of transformers is this model: .*model\.mlp"):
        export_hf(tmp_path, tmp_path / "out", None, GB)


def test_a_tokenizer_in_an_older_format_is_converted(tmp_path: Path) -> None:
    theirs("gpt2").save_pretrained(tmp_path / "source")
    letters = {token: index for index, token in enumerate([*"abcdefgh", "ab", "<|endoftext|>"])}
    (tmp_path / "source" / "vocab.json").write_text(json.dumps(letters))
    (tmp_path / "source" / "merges.txt").write_text("#version: 0.2\na b\n")
    import_hf(tmp_path / "source", tmp_path / "run", GB)
    read = load_tokenizer(tmp_path / "run" / "tokenizer")
    assert read.encode("abc").ids == [letters["ab"], letters["c"]]


def test_another_dtype_than_those_is_a_wrong_word(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "drivetrain"), "export", "x", "y", "--dtype", "fp8"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONSAFEPATH": "1", "COLUMNS": "200", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "fp8 is none of fp32, bf16, fp16" in done.stderr
