"""What opening a model takes, in a process of its own: one copy in the dtype that is asked for."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from drivetrain.launch.weights import import_hf

MB = 1 << 20
PARAMETERS = 27_000_000  # 104 MiB in fp32, of which the largest tensor has 16
SLACK = 24 * MB  # the largest tensor, the tokenizer, what the allocator keeps
WORKER = """
import json, sys, threading, time
from pathlib import Path
import torch
from drivetrain.train.serve import open_model

def private():  # of files that are mapped the kernel takes back what it needs
    (line,) = [line for line in open("/proc/self/status") if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024

def watch():
    while True:
        peaks.append(private())
        time.sleep(0.001)

open_model(Path(sys.argv[1]), torch.device("cpu"))  # imports what is imported on use
peaks = [0]
threading.Thread(target=watch, daemon=True).start()
for source in sys.argv[2:]:
    before, peaks = private(), [0]
    model = open_model(Path(source), torch.device("cpu"), torch.bfloat16).model
    peak, weights = max(peaks) - before, list(model.parameters())
    sums = [float(each.double().sum()) for each in weights]
    print(json.dumps([peak, sum(each.nbytes for each in weights), sums]))
    del model, weights
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    folder = tmp_path_factory.mktemp("models")
    sizes = {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=False))
    assert model.dtype == torch.float32
    model.save_pretrained(folder / "hf", max_shard_size="30MB")
    shutil.copytree(tiny_tokenizer, folder / "hf", dirs_exist_ok=True)
    import_hf(folder / "hf", folder / "run", 30 * MB)
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc says what a process holds")
def test_the_peak_is_one_copy_in_the_dtype_that_is_asked_for(
    source: Path, tiny_hf: Callable[..., Path]
) -> None:
    env = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    folders = [tiny_hf(), source / "hf", source / "run"]
    command = [sys.executable, "-c", WORKER, *map(str, folders)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (*_, sums), (*_, same) = found = [json.loads(line) for line in done.stdout.splitlines()]
    assert sums == same
    for peak, size, _ in found:
        assert size == pytest.approx(2 * PARAMETERS, rel=0.02)
        assert size - SLACK < peak < size + SLACK
