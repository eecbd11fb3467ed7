"""Shards, a folder of one's own, and a console that can be read, for what the launcher does in this process."""

import io
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from drivetrain.conf.compose import compose
from drivetrain.conf.schema import RunConfig
from drivetrain.data.shards import HELD_OUT, TRAIN, Manifest, ShardWriter, dtype_for
from drivetrain.data.tokenizer import train_tokenizer
from drivetrain.launch import job, sweep

VOCAB = 2048  # the vocabulary of model=tiny


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens enough for windows of `small`'s length."""
    folder = tmp_path_factory.mktemp("data") / "shards"
    folder.mkdir()
    infos = []
    for split in (TRAIN, HELD_OUT):
        writer = ShardWriter(folder, f"{split}_00000", split, dtype_for(VOCAB))
        writer.add(np.arange(1000, dtype=np.uint16))
        infos.append(writer.close())
    Manifest(dtype=dtype_for(VOCAB), vocab_size=VOCAB, eos_id=0, tokenizer_hash="made", shards=infos).write(
        folder
    )
    return folder


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory of a random Llama that chats: ChatML, 290 tokens, a context of 4,096. Of two draws
    at temperature 1 no two are likely to agree; the likeliest token is never one that ends an answer."""
    folder = tmp_path_factory.mktemp("talker") / "tiny"
    text = folder.parent / "text.txt"
    text.write_text("the cat sat on the mat; äöü where is the dog? it is here. " * 50)
    tokenizer = train_tokenizer([text], 290, folder)
    ends = [tokenizer.token_to_id(end) for end in ("<|endoftext|>", "<|im_end|>")]
    sizes = {"vocab_size": 290, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": False,
    } | sizes
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    shapes = {"model.embed_tokens": (290, 32), "lm_head": (290, 32), "model.norm": (32,)}
    for layer in range(2):
        block = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32)}
        block |= {"self_attn.o_proj": (32, 32), "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32)}
        block |= {"mlp.down_proj": (32, 48), "input_layernorm": (32,), "post_attention_layernorm": (32,)}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    tensors = {
        f"{name}.weight": torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * 0.3
        for name, shape in shapes.items()
    }
    tensors["lm_head.weight"][ends] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, on a machine without a key for W&B and without a GPU."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for variable in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("drivetrain.launch.fit.local_gpus", lambda: ())
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


@pytest.fixture
def words(small: list[str], shards: Path) -> list[str]:
    """Overrides of a job that can run."""
    return [*small, f"data.path={shards}", "stage.steps=8", "cluster.nproc=2"]


@cache
def _composed(words: tuple[str, ...]) -> RunConfig:
    return compose(words)


@pytest.fixture(autouse=True)
def _compose_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same words are composed once, which takes a quarter of a second; tests/conf has tests of that."""
    for module in (job, sweep):
        monkeypatch.setattr(module, "compose", lambda words, source=None: _composed(tuple(words)))


class Said(Console):
    """A console whose text can be read."""

    def __init__(self) -> None:
        self.text = io.StringIO()
        super().__init__(file=self.text, width=300)

    def __str__(self) -> str:
        return self.text.getvalue()


@pytest.fixture
def console() -> Said:
    return Said()
