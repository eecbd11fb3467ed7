"""Shards, a folder of one's own, and a console that can be read, for what the launcher does in this process; a
model that talks, and a server of it with a key."""

import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from drivetrain.conf.compose import compose
from drivetrain.conf.schema import RunConfig
from drivetrain.data.shard_writer import ShardWriter
from drivetrain.data.shards import HELD_OUT, TRAIN, Manifest, dtype_for
from drivetrain.data.tokenizer import train_tokenizer
from drivetrain.launch import job, sweep
from drivetrain.train.serve import Sampler

VOCAB = 2048  # the vocabulary of model=tiny
KEY = "a-key-of-some-length"


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


@dataclass(frozen=True)
class Running:
    """A server's process."""

    url: str
    process: subprocess.Popen[str]
    key: str = KEY

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.key}"} | options.pop("headers", {})
        return httpx.post(f"{self.url}/v1/{path}", json=body, headers=headers, timeout=60, **options)

    def wait_until(self, **wanted: int) -> None:
        """For what /health says."""
        deadline = time.monotonic() + 30
        while True:
            found = httpx.get(f"{self.url}/health").json()
            if wanted.items() <= found.items():
                return
            assert time.monotonic() < deadline, found
            time.sleep(0.02)


def _serve(source: Path, *words: str) -> Running:
    process = subprocess.Popen(
        [sys.executable, "-m", "drivetrain.launch.cli", "serve", str(source), "--port", "0", *words],
        env={**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    said = process.stderr.readline()
    found = re.fullmatch(r"serving tiny on (http://127\.0\.0\.1:\d+) \(Ctrl-C stops it\)\n", said)
    assert found, said + process.communicate()[1]
    return Running(found[1], process)


@pytest.fixture(scope="session")
def serve_tiny() -> Callable[..., Running]:
    """`serve_tiny(source, *words)`: `drivetrain serve`, once it serves. Whoever calls ends it."""
    return _serve


@pytest.fixture(scope="session")
def server(
    talker: Path, tmp_path_factory: pytest.TempPathFactory, kill_tree: Callable[..., None]
) -> Iterator[Running]:
    """Of `talker`, with a key, four answers at once and four requests that may wait."""
    key = tmp_path_factory.mktemp("key") / "key"
    key.write_text(KEY + "\n")
    running = _serve(talker, "--api-key-file", str(key), "--max-batch", "4", "--max-waiting", "4")
    yield running
    kill_tree(running.process)


@pytest.fixture(scope="session")
def client(server: Running) -> openai.OpenAI:
    return server.client()


@pytest.fixture(scope="session")
def sampler(talker: Path) -> Sampler:
    """The server's model in this process."""
    return Sampler(talker, max_batch=4)


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
