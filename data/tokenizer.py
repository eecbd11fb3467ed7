"""Tokenizers: train a byte-level BPE, and read that or any Hugging Face tokenizer directory.

A directory holds `tokenizer.json` (the `tokenizers` library's format) beside `tokenizer_config.json` or
`special_tokens_map.json`, which name the special tokens. Transformers is not needed to read it.
"""

import importlib.resources
import itertools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from drivetrain.conf.errors import ConfigError, DataError
from drivetrain.conf.tokenizer_file import TOKENIZER, tokenizer_definition, tokenizer_path
from drivetrain.conf.tokenizer_file import tokenizer_hash as tokenizer_hash
from drivetrain.data.readers import Reader
from drivetrain.data.shards import hash_file, sync_directory

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
CONTROL_TOKENS = [END_OF_TEXT, PAD, "<|im_start|>", "<|im_end|>"]
# Not "special" in Hugging Face's sense, so that decoding with skip_special_tokens keeps them: what parses
# reasoning and tool calls out of a completion looks for them in its text.
TAG_TOKENS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
CHAT_TEMPLATE = "chat_template.jinja"  # of ours, and the name under which transformers looks for any
MIN_VOCAB = 256 + len(CONTROL_TOKENS) + len(TAG_TOKENS)

# What a merge never crosses: contractions, a word with one leading non-letter, up to three digits,
# punctuation with its newlines, white space (the split that GPT-4's and Llama 3's tokenizers use).
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The files of a directory that belong to its tokenizer; a model's directory holds weights too.
TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    CHAT_TEMPLATE,
    "vocab.json",
    "merges.txt",
]


def train_tokenizer(
    inputs: Sequence[Path], vocab_size: int, out: Path, text_key: str = "text", progress: bool = False
) -> Tokenizer:
    """Train a byte-level BPE with exactly `vocab_size` tokens, special ones included, and save it in `out`.

    The same inputs give the same tokenizer. Ids: 256 bytes, merges, `CONTROL_TOKENS`, `TAG_TOKENS`. The
    directory loads with `transformers.AutoTokenizer.from_pretrained`, and its chat template is ChatML with
    marks for tool calls and reasoning.

    Raises:
        ConfigError: the vocabulary is too small, an input cannot be read, or `out` is not empty.
        DataError: the text is too small for so many tokens.
    """
    if vocab_size < MIN_VOCAB:
        raise ConfigError(
            f"a vocabulary of {vocab_size} is too small for 256 bytes and {MIN_VOCAB - 256} special tokens; "
            f"use --vocab-size {MIN_VOCAB} or more"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty directory; give another --out or remove it")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(CONTROL_TOKENS) - len(TAG_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    reader = Reader(inputs, text_key=text_key)
    tokenizer.train_from_iterator(iter(reader), trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in CONTROL_TOKENS]
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in TAG_TOKENS])
    found = tokenizer.get_vocab_size()
    if found < vocab_size:
        raise DataError(
            f"the {reader.documents} documents given have pieces for {found} tokens only, not {vocab_size}; "
            f"give more text or --vocab-size {found}"
        )
    _save(tokenizer, out)
    return tokenizer


def _save(tokenizer: Tokenizer, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": PAD,
        "additional_special_tokens": [token for token in CONTROL_TOKENS if token not in (END_OF_TEXT, PAD)],
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    template = importlib.resources.files("drivetrain.data") / CHAT_TEMPLATE
    (out / CHAT_TEMPLATE).write_text(template.read_text(encoding="utf-8"), encoding="utf-8")
    temporary = out / "tokenizer.json.tmp"  # renamed last: a directory without tokenizer.json is none
    temporary.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    temporary.replace(out / "tokenizer.json")


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer as its author made it: special tokens written in a text become special tokens. It neither cuts
    nor pads, whatever it was saved with.

    Raises:
        ConfigError: the directory is missing, or holds no readable `tokenizer.json`.
    """
    path = tokenizer_path(directory)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"{path} is not a tokenizer ({error}); copy or train it again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def load_text_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer for text from outside: no text becomes a control token, whatever is written in it.

    Args:
        directory: a tokenizer directory.

    Raises:
        ConfigError: as `load_tokenizer`.
    """
    load_tokenizer(directory)  # refuses what is no tokenizer
    definition = tokenizer_definition(directory)
    for token in _control_tokens(definition):
        token["special"] = True  # what encode_special_tokens, below, goes by
    definition.update(truncation=None, padding=None, post_processor=None)
    tokenizer = Tokenizer.from_str(json.dumps(definition, ensure_ascii=False))
    tokenizer.encode_special_tokens = True  # encode them as the characters that they are written with
    return tokenizer


def load_template_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer for what a chat template wrote: its control tokens count, and it adds and cuts nothing itself.

    Offsets are characters of the text, spaces included.

    Raises:
        ConfigError: as `load_tokenizer`.
    """
    load_tokenizer(directory)
    definition = tokenizer_definition(directory)
    definition.update(truncation=None, padding=None, post_processor=None)
    return Tokenizer.from_str(json.dumps(definition, ensure_ascii=False))


def chat_templates(directory: Path) -> dict[str, str]:
    """The directory's chat templates by name, "default" the usual one; empty where there is none.

    `chat_template.jinja` goes before "chat_template" in `tokenizer_config.json`, which may be a list of
    {"name", "template"}.

    Raises:
        ConfigError: the file cannot be read.
    """
    path = directory / CHAT_TEMPLATE
    try:
        if path.is_file():
            return {"default": path.read_text(encoding="utf-8")}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); copy the tokenizer again") from error
    found = _settings(directory, "tokenizer_config.json").get("chat_template")
    if isinstance(found, str):
        return {"default": found}
    return {str(item["name"]): str(item["template"]) for item in found or []}


def require_chat_template(directory: Path) -> None:
    """Raise ConfigError where there is none, or no tokenizer at all."""
    if not chat_templates(directory):
        tokenizer_path(directory)
        raise ConfigError(
            f"the tokenizer in {directory} has no chat template; add {CHAT_TEMPLATE} to it, or use the tokenizer "
            "of a chat model"
        )


def special_tokens(directory: Path) -> dict[str, str]:
    """What chat templates call `bos_token`, `eos_token` and so on."""
    found = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        for name, token in _settings(directory, file).items():
            content = token.get("content") if isinstance(token, dict) else token
            if name.endswith("_token") and isinstance(content, str):
                found[name] = content
    return found


def _settings(directory: Path, name: str) -> dict[str, Any]:
    """A JSON object beside the tokenizer; empty where the file is missing."""
    path = directory / name
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no keys in it")
    except ValueError as error:
        raise ConfigError(f"{path} is not a JSON object ({error}); copy the tokenizer again") from error
    return found


def _control_tokens(definition: dict[str, Any]) -> list[dict[str, Any]]:
    """Added tokens that only a template may write.

    All that are marked special, and tags such as Qwen's <think>, <tool_call> and <|fim_prefix|>, which are
    not marked. Not GPT-NeoX's runs of spaces, nor Gemma's HTML tags, which its own vocabulary has.
    """
    vocab = definition["model"].get("vocab", {})
    return [
        token
        for token in definition["added_tokens"]
        if token["special"]
        or (
            token["content"].startswith("<")
            and token["content"].endswith(">")
            and token["content"] not in vocab
        )
    ]


def vocab_size(directory: Path) -> int:
    """Rows that an embedding needs: the largest id plus one."""
    return max(load_tokenizer(directory).get_vocab(with_added_tokens=True).values()) + 1


def eos_id(directory: Path) -> int:
    """The token that ends a document.

    Raises:
        ConfigError: neither `tokenizer_config.json` nor `special_tokens_map.json` names one that exists.
    """
    tokenizer = load_tokenizer(directory)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = directory / name
        token = _settings(directory, name).get("eos_token")
        if token is None:
            continue
        content = token["content"] if isinstance(token, dict) else token
        found = tokenizer.token_to_id(content)
        if found is None:
            raise ConfigError(
                f"{path} says eos_token {content!r}, which tokenizer.json does not have; correct it"
            )
        return found
    raise ConfigError(
        f"the tokenizer in {directory} names no eos_token, which documents end with; "
        'add "eos_token" to its tokenizer_config.json'
    )


def bos_id(directory: Path) -> int | None:
    """The token that a text begins with, as transformers encodes it; None where it adds none.

    What the post-processor of `tokenizer.json` puts before a text; where it puts nothing, `bos_token` if
    `tokenizer_config.json` says `add_bos_token: true`.

    Raises:
        ConfigError: the tokenizer cannot be read, puts several tokens before a text, or names a bos_token that it
            has not.
    """
    before = _put_before(tokenizer_definition(directory).get("post_processor"))
    if len(before) > 1:
        raise ConfigError(
            f"{directory / TOKENIZER} puts {len(before)} tokens before a text, {before}, and one is supported; "
            "leave one in its post_processor"
        )
    if before:
        return before[0]
    if _settings(directory, "tokenizer_config.json").get("add_bos_token") is not True:
        return None
    named = special_tokens(directory).get("bos_token", "")
    found = load_tokenizer(directory).token_to_id(named)
    if found is None:
        raise ConfigError(
            f"{directory / 'tokenizer_config.json'} says add_bos_token and bos_token {named!r}, which {TOKENIZER} "
            "does not have; correct it"
        )
    return found


def _put_before(processor: Any) -> list[int]:
    """Ids that a post-processor puts before a text; its kinds are those of the `tokenizers` library."""
    match processor:
        case {"type": "Sequence", "processors": [*inner]}:
            return [token for each in reversed(inner) for token in _put_before(each)]
        case {"type": "TemplateProcessing", "single": [*pieces], "special_tokens": dict(known)}:
            specials = itertools.takewhile(lambda piece: "SpecialToken" in piece, pieces)
            return [token for piece in specials for token in known[piece["SpecialToken"]["id"]]["ids"]]
        case {"type": "BertProcessing" | "RobertaProcessing", "cls": [str(), int(token)]}:
            return [token]
    return []


def text_ids(tokenizer: Tokenizer, bos: int | None, text: str) -> list[int]:
    """A text as documents begin: `bos`, unless there is none or the text spells it, and the text's tokens, special
    ones included. Nothing is put after it.

    Args:
        tokenizer: of `load_tokenizer`. bos: of `bos_id`.
    """
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def copy_tokenizer(source: Path, target: Path) -> dict[str, str]:
    """Copy the files of a tokenizer, and no weights beside them, into a new directory; xxh3_64 by name."""
    target.mkdir()
    digests = {}
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
            with (target / name).open("rb") as file:
                os.fsync(file.fileno())
            digests[name] = hash_file(target / name)
    sync_directory(target)
    return digests


def token_byte_lengths(directory: Path) -> np.ndarray:
    """Bytes of text that each token stands for, int32 [vocab_size]; 0 for control tokens and unused ids.

    Exact for byte-level BPE: over the tokens of a document the lengths add up to its UTF-8 bytes. For
    SentencePiece models with byte fallback the space that they put before a text counts too.

    Raises:
        ConfigError: the tokenizer is of another kind (WordPiece ...).
    """
    definition = tokenizer_definition(directory)
    kinds = _decoder_kinds(definition.get("decoder"))
    if not kinds & {"ByteLevel", "ByteFallback"}:
        raise ConfigError(
            f"the tokenizer in {directory} is neither byte-level nor has byte fallback, so its tokens have "
            "no length in bytes; use another tokenizer"
        )
    vocab = load_tokenizer(directory).get_vocab(with_added_tokens=True)
    lengths = np.zeros(max(vocab.values()) + 1, dtype=np.int32)
    for token, index in vocab.items():
        if "ByteLevel" in kinds:
            lengths[index] = len(token)  # one character of the byte alphabet stands for one byte
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            lengths[index] = 1
        else:
            lengths[index] = len(token.replace("▁", " ").encode())
    control = {token["content"] for token in _control_tokens(definition)}
    for added in definition["added_tokens"]:
        lengths[added["id"]] = 0 if added["content"] in control else len(added["content"].encode())
    return lengths


def _decoder_kinds(decoder: dict[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*(_decoder_kinds(part) for part in decoder.get("decoders", [])))
