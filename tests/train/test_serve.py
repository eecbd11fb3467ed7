"""A Hugging Face directory as something that talks, in Python and on the command line."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from drivetrain.conf.errors import ConfigError
from drivetrain.data.tokenizer import load_tokenizer, train_tokenizer
from drivetrain.launch import cli
from drivetrain.model.generate import Sampling
from drivetrain.train.serve import Sampler, TextStream, open_model

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


Cli = Callable[..., str]


@pytest.fixture
def generate(source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    def call(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["drivetrain", "generate", str(source), *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert ended.value.code == 0, err
        return out

    return call


def test_a_source_is_opened_with_all_its_end_tokens(source: Path) -> None:
    opened = open_model(source)
    tokenizer = load_tokenizer(source)
    assert [tokenizer.id_to_token(token) for token in opened.eos_ids] == ["<|endoftext|>", "<|im_end|>"]
    assert opened.model.embed.weight.dtype == torch.float32
    assert opened.generator().vocab_size == 290
    assert open_model(source, dtype=torch.bfloat16).model.embed.weight.dtype == torch.bfloat16


def test_what_is_no_source_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no config"):
        open_model(tmp_path)
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(ConfigError, match="no tokenizer"):
        open_model(tmp_path)


def test_text_comes_in_whole_characters(source: Path) -> None:
    tokenizer = load_tokenizer(source)
    for text in (WORDS, " a  b", "🙂🙂", "naïve\n\n 北"):
        stream = TextStream(tokenizer)
        pieces = [stream.push(token) for token in tokenizer.encode(text).ids]
        assert "".join(pieces) + stream.finish() == text
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["the dog"], "the cat sat on the mat, and "),
        (["never", "t on", "mat"], "the cat sa"),
        (["it; naïve façades — 北京 東京 🙂 x"], WORDS),
        (["🙂 "], WORDS[:-2]),
    ],
)
def test_text_ends_before_a_stop_text(source: Path, stop: list[str], expected: str) -> None:
    tokenizer = load_tokenizer(source)
    stream = TextStream(tokenizer, stop)
    told = ""
    for token in tokenizer.encode(WORDS).ids:
        told += stream.push(token)
        assert expected.startswith(told)
    assert told + stream.finish() == expected


def test_streams_and_completions_are_the_same(sampler: Sampler) -> None:
    first = sampler.complete(sampler.request("the", Sampling(max_tokens=30)))[0]["text"]
    stop = first[10:12]
    for sampling in (Sampling(max_tokens=30), Sampling(max_tokens=30, stop=(stop,))):
        request = sampler.request("the", sampling)
        pieces = list(sampler.stream(request))
        (whole,) = sampler.complete(request)
        assert "".join(piece.text for piece in pieces) == whole["text"]
        assert [piece.token for piece in pieces] == whole["tokens"]
        assert pieces[-1].finish_reason == whole["finish_reason"]
    assert whole["text"] == first[: first.index(stop)] and whole["finish_reason"] == "stop"


def test_special_tokens_count_as_stop_texts(sampler: Sampler) -> None:
    token = sampler.tokenizer.token_to_id("<|im_start|>")
    request = sampler.request("a", Sampling(stop=("<|im_start|>", "b")))
    assert request.sampling.stop_tokens == (token,)


def test_a_chat_request_ends_with_the_turn(sampler: Sampler) -> None:
    request = sampler.chat_request([{"role": "user", "content": "the cat"}], Sampling())
    text = sampler.tokenizer.decode(list(request.prompt), skip_special_tokens=False)
    assert text.startswith("<|im_start|>user\nthe cat<|im_end|>") and text.endswith("<|im_start|>assistant\n")
    assert sampler.tokenizer.token_to_id("<|im_end|>") in request.sampling.stop_tokens


def test_the_command_line(generate: Cli) -> None:
    words = ("--prompt", "the cat", "--max-tokens", "9", "--seed", "3")
    lines = generate(*words, "--samples", "3", "--json").splitlines()
    found = [json.loads(line) for line in lines]
    assert len({tuple(each["tokens"]) for each in found}) == 3
    assert all(set(each) == {"text", "tokens", "logprobs", "finish_reason"} for each in found)
    assert generate(*words) == f"the cat{found[0]['text']}\n"
    filtered = generate(*words, "--top-k", "1", "--top-p", "0.9", "--min-p", "0.1")
    assert filtered == generate(*words, "--temperature", "0")
    stop = found[0]["text"][3]
    assert generate(*words, "--stop", stop) == f"the cat{found[0]['text'].split(stop)[0]}\n"
    assert not generate(*words, "--chat").startswith("the cat")
    assert generate(*words, "--samples", "2").count("sample") == 2
