"""A Hugging Face directory as something that talks."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from drivetrain.conf.errors import ConfigError
from drivetrain.data.tokenizer import load_tokenizer, train_tokenizer
from drivetrain.launch.weights import import_hf
from drivetrain.model.generate import Sampling
from drivetrain.train.serve import Sampler, open_model

WORDS = "the cat sat on the mat, and the dog saw it; naïve façades — 北京 東京 🙂 "


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    (folder / "a.txt").write_text(WORDS * 20)
    tokenizer = train_tokenizer([folder / "a.txt"], 290, folder / "model")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=320,  # more rows than tokens
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
        eos_token_id=tokenizer.token_to_id("<|im_end|>"),
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def sampler(source: Path) -> Sampler:
    return Sampler(source)


def test_a_source_is_opened_with_all_its_end_tokens(source: Path) -> None:
    opened = open_model(source)
    tokenizer = load_tokenizer(source)
    assert [tokenizer.id_to_token(token) for token in opened.eos_ids] == ["<|endoftext|>", "<|im_end|>"]
    assert opened.model.embed.weight.dtype == torch.float32
    assert opened.generator().vocab_size == 290
    assert open_model(source, dtype=torch.bfloat16).model.embed.weight.dtype == torch.bfloat16


def test_an_imported_run_keeps_its_end_tokens(source: Path, tmp_path: Path) -> None:
    ends = open_model(source).eos_ids
    assert len(ends) == 2
    import_hf(source, tmp_path / "run", 10**9)
    for place in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "step_00000000"):
        assert open_model(place).eos_ids == ends


@pytest.mark.parametrize("wrong", [[[1]], "x", 999_999, True], ids=repr)
@pytest.mark.parametrize("kind", ["source", "run"])
def test_wrong_end_tokens_are_one_sentence(kind: str, wrong: object, source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "source")
    import_hf(source, tmp_path / "run", 10**9)
    file = tmp_path / ("source" if kind == "source" else "run/hf") / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": wrong}))
    with pytest.raises(ConfigError) as caught:
        open_model(tmp_path / kind)
    assert str(caught.value).startswith(f"{file} says eos_token_id={wrong!r}, which is ")


def test_what_is_no_source_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no config"):
        open_model(tmp_path)
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(ConfigError, match="no tokenizer"):
        open_model(tmp_path)


def test_streams_and_completions_are_the_same(sampler: Sampler) -> None:
    prompts = sampler.prompts
    first = sampler.complete(prompts.continued("the", Sampling(max_tokens=30)))[0]["text"]
    stop = first[10:12]
    for sampling in (Sampling(max_tokens=30), Sampling(max_tokens=30, stop=(stop,))):
        request = prompts.continued("the", sampling)
        pieces = list(sampler.stream(request))
        (whole,) = sampler.complete(request)
        assert "".join(piece.text for piece in pieces) == whole["text"]
        assert [piece.token for piece in pieces] == whole["tokens"]
        assert pieces[-1].finish_reason == whole["finish_reason"]
    assert whole["text"] == first[: first.index(stop)] and whole["finish_reason"] == "stop"


def test_a_text_and_its_completion_are_one_text(sampler: Sampler) -> None:
    """Whether it streams or not, as the tokenizer decodes prompt and completion together."""
    tokenizer = sampler.tokenizer
    for seed in range(5):
        request = sampler.prompts.continued("the cat", Sampling(max_tokens=20, temperature=2.0, seed=seed))
        (found,) = sampler.complete(request)
        whole = tokenizer.decode([*request.prompt, *found["tokens"]]).rstrip("\N{REPLACEMENT CHARACTER}")
        assert "the cat" + found["text"] == whole
        assert "".join(piece.text for piece in sampler.stream(request)) == found["text"]


@pytest.fixture(scope="module")
def spaced(tmp_path_factory: pytest.TempPathFactory) -> Sampler:
    """With a tokenizer as SentencePiece makes them: words begin with a space, but for the first of a text."""
    folder = tmp_path_factory.mktemp("spaced")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=["</s>"], show_progress=False)
    tokenizer.train_from_iterator([WORDS * 20], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    torch.manual_seed(0)
    sizes = {"vocab_size": tokenizer.get_vocab_size(), "hidden_size": 32, "intermediate_size": 48}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 64}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    return Sampler(folder)


def test_a_space_at_the_beginning_is_told_and_may_begin_a_stop_text(spaced: Sampler) -> None:
    begun = 0
    for seed in range(30):
        request = spaced.prompts.continued("the cat", Sampling(max_tokens=6, temperature=2.0, seed=seed))
        (found,) = spaced.complete(request)
        whole = spaced.tokenizer.decode([*request.prompt, *found["tokens"]])
        assert "".join(piece.text for piece in spaced.stream(request)) == found["text"]
        assert "the cat" + found["text"] == whole
        if found["text"].startswith(" ") and len(found["text"]) > 2:
            begun += 1
            stopping = dataclasses.replace(request.sampling, stop=(found["text"][:2],))
            (stopped,) = spaced.complete(dataclasses.replace(request, sampling=stopping))
            assert (stopped["text"], stopped["finish_reason"]) == ("", "stop")
            assert len(stopped["tokens"]) <= 2
    assert begun > 3
