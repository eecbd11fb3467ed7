import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from drivetrain.conf.errors import ConfigError, DataError
from drivetrain.data import tokenizer as subject

TEXT = (
    "The cat sat on the mat; the dog didn't. 1234 cats, naïve façade, 日本語 and 😀!\n\n"
    "\tdef f(x):\n        return x\n"
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(4):
        (folder / f"{index}.txt").write_text(TEXT * (index + 1), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizers") / "bpe"
    subject.train_tokenizer([corpus], 320, out)
    return out


def save(tokenizer: Tokenizer, directory: Path, **config: object) -> Path:
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def llama3_like(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level, whole words first, a begin-of-text token by template, eos in special_tokens_map.json."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    tokenizer.add_tokens([AddedToken("    ", normalized=False), AddedToken("<think>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 300)]
    )
    directory = save(tokenizer, tmp_path_factory.mktemp("tokenizers") / "llama3")
    names = {"eos_token": {"content": "<|end_of_text|>", "special": True}}
    (directory / "special_tokens_map.json").write_text(json.dumps(names))
    return directory


def test_a_trained_tokenizer_has_its_size_and_special_tokens(trained: Path) -> None:
    tokenizer = subject.load_tokenizer(trained)
    assert tokenizer.get_vocab_size() == subject.vocab_size(trained) == 320
    special = [*subject.CONTROL_TOKENS, *subject.TAG_TOKENS]
    assert [tokenizer.token_to_id(token) for token in special] == list(range(310, 320))
    assert tokenizer.encode("".join(special)).ids == list(range(310, 320))
    assert subject.eos_id(trained) == tokenizer.token_to_id("<|endoftext|>")


def test_transformers_loads_it_and_agrees(trained: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(trained)
    ours = subject.load_tokenizer(trained)
    text = TEXT + "<|im_start|>user\n<think>hm</think><|im_end|>"
    assert theirs(text)["input_ids"] == ours.encode(text).ids
    assert theirs.eos_token_id == subject.eos_id(trained)
    assert theirs.pad_token_id == ours.token_to_id("<|pad|>")
    assert len(theirs) == 320
    assert theirs.decode(ours.encode(text).ids, skip_special_tokens=True) == TEXT + "user\n<think>hm</think>"


def test_its_chat_template_is_saved_as_transformers_does(trained: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(trained)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    text = theirs.apply_chat_template(messages, tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>\n"
    theirs.save_pretrained(tmp_path / "theirs")
    assert subject.chat_templates(tmp_path / "theirs") == subject.chat_templates(trained)
    assert subject.special_tokens(trained)["eos_token"] == "<|endoftext|>"
    assert "chat_template.jinja" in subject.copy_tokenizer(trained, tmp_path / "copy")


def test_training_is_deterministic(corpus: Path, trained: Path, tmp_path: Path) -> None:
    script = "import sys; from pathlib import Path; from drivetrain.data.tokenizer import train_tokenizer; "
    script += "train_tokenizer([Path(sys.argv[1])], 320, Path(sys.argv[2]))"
    for threads in ("1", "3"):
        subprocess.run(
            [sys.executable, "-c", script, str(corpus), str(tmp_path / threads)],
            env={**os.environ, "PYTHONSAFEPATH": "1", "RAYON_NUM_THREADS": threads},
            check=True,
            timeout=60,
        )
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            assert (tmp_path / threads / name).read_bytes() == (trained / name).read_bytes()


texts = st.text(st.characters(codec="utf-8"), max_size=60)
spelled = st.sampled_from(
    ["<|endoftext|>", "<think>", "</tool_call>", "<|im_end|>", "    ", "<|begin_of_text|>"]
)


@settings(max_examples=150, deadline=None)
@given(parts=st.lists(st.one_of(texts, spelled), max_size=6))
def test_any_text_keeps_its_bytes_and_yields_no_control_token(
    trained: Path, llama3_like: Path, parts: list[str]
) -> None:
    text = "".join(parts)
    for directory, control in ((trained, range(310, 320)), (llama3_like, (300, 301, 303))):
        tokenizer, lengths = _loaded(directory)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert not set(ids) & set(control)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert int(lengths[ids].sum()) == len(text.encode())


_cache: dict[Path, tuple[Tokenizer, np.ndarray]] = {}


def _loaded(directory: Path) -> tuple[Tokenizer, np.ndarray]:
    if directory not in _cache:
        _cache[directory] = subject.load_text_tokenizer(directory), subject.token_byte_lengths(directory)
    return _cache[directory]


def test_byte_lengths_of_special_tokens_are_zero(trained: Path, llama3_like: Path) -> None:
    lengths = subject.token_byte_lengths(trained)
    assert lengths.dtype == np.int32 and lengths.shape == (320,)
    assert lengths[310:].tolist() == [0] * 10 and (lengths[:310] > 0).all()
    assert subject.token_byte_lengths(llama3_like)[300:].tolist() == [0, 0, 4, 0]


def test_another_tokenizers_eos_is_found(llama3_like: Path) -> None:
    assert subject.eos_id(llama3_like) == 301
    assert subject.vocab_size(llama3_like) == 304


def test_text_encoding_adds_nothing_and_keeps_runs_of_spaces_whole(llama3_like: Path) -> None:
    plain, text = subject.load_tokenizer(llama3_like), subject.load_text_tokenizer(llama3_like)
    assert plain.encode("a").ids[0] == 300
    assert text.encode("a").ids == plain.encode("a").ids[1:]
    assert 302 in text.encode("x    y").ids  # an added token that is text


def test_sentencepiece_models_with_byte_fallback_have_lengths(tmp_path: Path) -> None:
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁": 256, "a": 257, "▁a": 258, "é": 259}
    tokenizer = Tokenizer(models.BPE(vocab, [("▁", "a")], byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    directory = save(tokenizer, tmp_path / "sp")
    text = "a é 日 a"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert subject.token_byte_lengths(directory)[ids].sum() == len(text.encode()) + 1  # the space put before


def test_a_tokenizer_without_bytes_has_no_lengths(tmp_path: Path) -> None:
    directory = save(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), tmp_path / "words")
    with pytest.raises(ConfigError, match="neither byte-level"):
        subject.token_byte_lengths(directory)


def test_the_hash_goes_by_what_the_tokenizer_does(trained: Path, tmp_path: Path) -> None:
    tokenizer = subject.load_tokenizer(trained)
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    same = save(tokenizer, tmp_path / "same")
    assert (same / "tokenizer.json").read_bytes() != (trained / "tokenizer.json").read_bytes()
    assert subject.tokenizer_hash(same) == subject.tokenizer_hash(trained)
    assert len(subject.load_text_tokenizer(same).encode(TEXT).ids) > 8
    tokenizer.add_tokens(["another"])
    assert subject.tokenizer_hash(save(tokenizer, tmp_path / "other")) != subject.tokenizer_hash(trained)


def test_training_refuses_what_cannot_work(corpus: Path, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"265 is too small .* use --vocab-size 266"):
        subject.train_tokenizer([corpus], 265, tmp_path / "a")
    subject.train_tokenizer([corpus], 266, tmp_path / "least")
    with pytest.raises(DataError, match=r"4 documents given .* --vocab-size \d+"):
        subject.train_tokenizer([corpus], 5000, tmp_path / "b")
    with pytest.raises(ConfigError, match="not an empty directory"):
        subject.train_tokenizer([corpus], 320, trained)
    with pytest.raises(ConfigError, match="does not exist"):
        subject.train_tokenizer([tmp_path / "none.txt"], 320, tmp_path / "c")
    assert {path.name for path in tmp_path.iterdir()} == {"least"}


def test_a_wrong_directory_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none does not exist.*drivetrain tokenizer train"):
        subject.load_tokenizer(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"holds no tokenizer\.json"):
        subject.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    for read in (subject.load_tokenizer, subject.load_text_tokenizer, subject.tokenizer_hash):
        with pytest.raises(ConfigError, match="is not a tokenizer"):
            read(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [("{}", "names no eos_token"), ('{"eos_token": "<none>"}', "does not have"), ("[", "not a JSON object")],
)
def test_a_directory_without_eos_is_refused(trained: Path, tmp_path: Path, config: str, message: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes((trained / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(ConfigError, match=message):
        subject.eos_id(tmp_path)
