"""The token that texts begin with: the one that transformers puts there, in shards and in what is scored."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, processors

from drivetrain.conf.errors import ConfigError, DataError
from drivetrain.data.build import build
from drivetrain.data.inspect import inspect
from drivetrain.data.shards import MANIFEST, Manifest, map_lengths, map_tokens
from drivetrain.data.tokenizer import (
    bos_id,
    eos_id,
    load_tokenizer,
    text_ids,
    train_tokenizer,
)

BOS, EOS, MASK = "<|begin|>", "<|endoftext|>", "<|mask|>"
TEXTS = ["the cat sat on the mat", "", "a <|begin|> in a text is text", "äöü"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    (folder / "a.txt").write_text("the cat sat on the mat; " * 50)
    train_tokenizer([folder / "a.txt"], 268, folder / "tok")
    return folder / "tok"


@pytest.fixture
def made(plain: Path, tmp_path: Path) -> Callable[..., Path]:
    """`made(processor, **config)`: the tokenizer with two more control tokens, a post-processor made of their ids,
    and changes in its tokenizer_config.json."""

    def make(processor: Callable[[dict[str, int]], Any] | None = None, **config: Any) -> Path:
        tokenizer = load_tokenizer(plain)
        tokenizer.add_special_tokens([AddedToken(BOS, special=True), AddedToken(MASK, special=True)])
        ids = {token: int(tokenizer.token_to_id(token)) for token in (BOS, EOS, MASK)}
        if processor is not None:
            tokenizer.post_processor = processor(ids)
        folder = tmp_path / "tokenizer"
        folder.mkdir()
        tokenizer.save(str(folder / "tokenizer.json"))
        settings = json.loads((plain / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": BOS} | config))
        return folder

    return make


def template(single: str) -> Callable[[dict[str, int]], Any]:
    return lambda ids: processors.TemplateProcessing(single=single, special_tokens=list(ids.items()))


PROCESSORS: dict[str, tuple[Callable[[dict[str, int]], Any] | None, str | None]] = {
    "Llama 2's": (template(f"{BOS} $A"), BOS),
    "one that ends a text too": (template(f"{BOS} $A {EOS}"), BOS),
    "Llama 3's": (
        lambda ids: processors.Sequence(
            [processors.ByteLevel(trim_offsets=False), template(f"{BOS} $A")(ids)]
        ),
        BOS,
    ),
    "RoBERTa's": (lambda ids: processors.RobertaProcessing((EOS, ids[EOS]), (BOS, ids[BOS])), BOS),
    "one that ends a text only": (template(f"$A {EOS}"), None),
    "GPT-2's": (lambda ids: processors.ByteLevel(), None),
    "none": (None, None),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_it_is_what_transformers_puts_before_a_text(name: str, made: Callable[..., Path]) -> None:
    import transformers

    processor, expected = PROCESSORS[name]
    folder = made(processor)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours, bos = load_tokenizer(folder), bos_id(folder)
    assert bos == (None if expected is None else theirs.convert_tokens_to_ids(expected))
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert text_ids(ours, bos, text) == (ids[:-1] if ids[-1:] == [eos_id(folder)] else ids)
    assert text_ids(ours, bos, f"{BOS}the cat") == text_ids(ours, None, f"{BOS}the cat")  # never twice


def test_without_a_template_the_config_says_so(made: Callable[..., Path]) -> None:
    folder = made(add_bos_token=True)
    assert bos_id(folder) == load_tokenizer(folder).token_to_id(BOS)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    for named in (None, "<nowhere>"):
        path.write_text(json.dumps(settings | {"bos_token": named}))
        with pytest.raises(ConfigError, match=r"which tokenizer\.json does not have; correct it"):
            bos_id(folder)


def test_several_are_refused(made: Callable[..., Path]) -> None:
    folder = made(template(f"{MASK} {BOS} $A"))
    ids = [load_tokenizer(folder).token_to_id(token) for token in (MASK, BOS)]
    with pytest.raises(ConfigError) as caught:
        bos_id(folder)
    assert str(caught.value) == (
        f"{folder / 'tokenizer.json'} puts 2 tokens before a text, {ids}, and one is supported; leave one in its "
        "post_processor"
    )


def documents(directory: Path) -> tuple[Manifest, list[list[int]]]:
    manifest = Manifest.read(directory)
    (shard,) = manifest.split("train")
    ends = np.cumsum(map_lengths(directory, shard))
    tokens = map_tokens(directory, shard, manifest.dtype).astype(int)
    return manifest, [part.tolist() for part in np.split(tokens, ends[:-1])]


def build_texts(folder: Path, tokenizer: Path, **options: Any) -> Path:
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS if text]
    (folder / "a.jsonl").write_text("".join(lines))
    build([folder / "a.jsonl"], tokenizer, folder / "out", 1, held_out=0, progress=False, **options)
    return folder / "out"


def test_every_document_of_shards_begins_with_it(
    made: Callable[..., Path], plain: Path, tmp_path: Path
) -> None:
    folder = made(template(f"{BOS} $A"))
    out = build_texts(tmp_path, folder)
    manifest, found = documents(out)
    tokenizer: Tokenizer = load_tokenizer(folder)
    bos = tokenizer.token_to_id(BOS)
    assert manifest.bos_id == bos == inspect(out)["bos_id"]
    texts = [text for text in TEXTS if text]
    assert [(row[0], row.count(bos), row[-1]) for row in found] == [(bos, 1, manifest.eos_id)] * len(texts)
    assert [tokenizer.decode(row[1:-1]) for row in found] == texts  # what spells it is text
    assert inspect(out)["splits"]["train"]["samples"][0] == f"{BOS}{TEXTS[0]}"


@pytest.mark.parametrize("config", [{}, {"add_bos_token": True, "bos_token": EOS}], ids=["none", "the end's"])
def test_shards_without_it_are_as_they_were(
    config: dict[str, Any], made: Callable[..., Path], tmp_path: Path
) -> None:
    """Nor do documents begin with the token that ends them: they are cut after it."""
    folder = made(**config)
    manifest, found = documents(build_texts(tmp_path, folder))
    tokenizer = load_tokenizer(folder)
    assert manifest.bos_id is None
    assert found[0] == [*tokenizer.encode(TEXTS[0]).ids, manifest.eos_id]


def test_of_conversations_the_template_writes_it(made: Callable[..., Path], tmp_path: Path) -> None:
    folder = made(template(f"{BOS} $A"))
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
    )
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    build([tmp_path / "c.jsonl"], folder, tmp_path / "out", 1, held_out=0, progress=False, chat=True)
    manifest, (row,) = documents(tmp_path / "out")
    bos = bos_id(folder)
    assert manifest.bos_id is None and row[0] == bos and row.count(bos) == 1


def test_a_manifest_may_lack_it_and_not_misstate_it(made: Callable[..., Path], tmp_path: Path) -> None:
    out = build_texts(tmp_path, made())
    path = out / MANIFEST
    written = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in written.items() if key != "bos_id"}))
    assert Manifest.read(out).bos_id is None
    path.write_text(json.dumps(written | {"bos_id": "<s>"}))
    with pytest.raises(DataError, match="bos_id is '<s>'"):
        Manifest.read(out)
