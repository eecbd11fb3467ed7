"""A tokenizer that begins texts with a token: shards, tasks and the probe begin with it, and it is never scored."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import processors

from drivetrain.data.build import build
from drivetrain.data.shards import TRAIN, Manifest
from drivetrain.data.tokenizer import load_tokenizer
from drivetrain.model.generate import Request
from drivetrain.train.evaluation import tasks
from drivetrain.train.evaluation.loss import Shards, held_out_loss
from drivetrain.train.evaluation.memorisation import Probe, draw_documents, memorisation
from drivetrain.train.evaluation.score import Pair, Scorer, Texts
from drivetrain.train.evaluation.tasks import TaskOptions, load_task, run_task
from drivetrain.train.serve import Sampler

BEGIN, END = "<|im_start|>", "<|endoftext|>"  # in the tiny tokenizer's vocabulary


@pytest.fixture(scope="module")
def sampler(tiny_hf: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Sampler:
    """Its post-processor begins a text, and ends it too."""
    folder = tmp_path_factory.mktemp("bos") / "model"
    shutil.copytree(tiny_hf(), folder)
    tokenizer = load_tokenizer(folder)
    ids = [(token, tokenizer.token_to_id(token)) for token in (BEGIN, END)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A {END}", special_tokens=ids)
    tokenizer.save(str(folder / "tokenizer.json"))
    return Sampler(folder)


@pytest.fixture(scope="module")
def bos(sampler: Sampler) -> int:
    return int(sampler.tokenizer.token_to_id(BEGIN))


@pytest.fixture(scope="module")
def shards(sampler: Sampler, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    lines = [json.dumps({"text": f"the cat {'sat ' * (i % 9)}on mat {i}"}) + "\n" for i in range(80)]
    (folder / "a.jsonl").write_text("".join(lines))
    directory = sampler.opened.tokenizer_dir
    build([folder / "a.jsonl"], directory, folder / "out", workers=1, held_out=0.3, progress=False)
    return folder / "out"


def test_pairs_begin_with_it(sampler: Sampler, bos: int) -> None:
    texts, tokenizer = Texts(sampler.opened), sampler.tokenizer

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False).ids)

    assert texts.pair("the cat", " sat") == Pair((bos, *ids("the cat")), ids(" sat"))
    assert texts.pair("", "a") == Pair((bos,), ids("a"))
    assert texts.pair(f"{BEGIN}the cat", " sat") == texts.pair("the cat", " sat")


def test_choices_and_free_answers_follow_it(
    sampler: Sampler, bos: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[Pair] = []
    asked: list[Request] = []
    score, complete = Scorer.score, tasks.complete
    monkeypatch.setattr(
        Scorer, "score", lambda self, pairs, *more: scored.extend(pairs) or score(self, pairs)
    )
    monkeypatch.setattr(
        tasks, "complete", lambda s, requests, *more: asked.extend(requests) or complete(s, requests)
    )
    end = sampler.tokenizer.token_to_id(END)
    for record in ({"question": "a", "choices": ["b", "c"], "answer": 0}, {"prompt": "the", "answer": "b"}):
        (tmp_path / "q.jsonl").write_text(json.dumps(record) + "\n")
        options = TaskOptions(max_tokens=4)
        run_task(sampler, load_task(str(tmp_path / "q.jsonl"), options), options)
    prompts = [*(pair.context for pair in scored), *(tuple(request.prompt) for request in asked)]
    assert len(prompts) == 3
    assert [(prompt[0], prompt.count(bos), end in prompt) for prompt in prompts] == [(bos, 1, False)] * 3


def test_the_loss_on_shards_does_not_count_it(sampler: Sampler, bos: int, shards: Path) -> None:
    """All windows once: against one document at a time, whose first token is given."""
    from drivetrain.data.windows import Windows

    opened = sampler.opened
    found = held_out_loss(opened, Shards({"data": shards}, 24, 10**6, 0))
    windows = Windows(shards, "held_out", 24)
    eos, pairs = windows.manifest.eos_id, []
    for window in windows.read(np.arange(len(windows))).tolist():
        begins = [0, *(i + 1 for i, token in enumerate(window[:-1]) if token == eos)]
        for begin, end in zip(begins, [*begins[1:], 25], strict=True):
            assert begin == 0 or window[begin] == bos
            if end - begin > 1:
                pairs.append(Pair((window[begin],), tuple(window[begin + 1 : end])))
    scores = Scorer(opened).score(pairs)
    assert all(bos not in pair.continuation for pair in pairs)
    assert found["tokens"] == sum(score.tokens for score in scores)
    loss = -math.fsum(score.logprob for score in scores) / found["tokens"]
    assert found["loss"] == pytest.approx(loss, abs=1e-5)


def test_the_probe_begins_with_it(sampler: Sampler, bos: int, shards: Path) -> None:
    probe = Probe(documents=10, prefix=4, suffix=3)
    drawn = draw_documents(shards, Manifest.read(shards), TRAIN, probe)
    assert {int(tokens[0]) for tokens in drawn} == {bos}
    found = memorisation(sampler, shards, probe)
    assert found["train"]["documents"] == 10 and found["prefix"] == 4
