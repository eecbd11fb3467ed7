"""What a directory's tokenizer.json says, read as JSON: which tokenizer it is, and how many tokens it has."""

import json
from pathlib import Path
from typing import Any

import xxhash

from drivetrain.conf.errors import ConfigError

TOKENIZER = "tokenizer.json"


def tokenizer_path(directory: Path) -> Path:
    """Where a directory's tokenizer is.

    Raises:
        ConfigError: it has none.
    """
    path = directory / TOKENIZER
    if not path.is_file():
        what = f"holds no {TOKENIZER}" if directory.is_dir() else "does not exist"
        raise ConfigError(
            f"the tokenizer directory {directory} {what}; make one with `drivetrain tokenizer train` or "
            "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    return path


def tokenizer_definition(directory: Path) -> dict[str, Any]:
    """The content of `directory/tokenizer.json`.

    Raises:
        ConfigError: it is missing, or no tokenizer.
    """
    path = tokenizer_path(directory)
    try:
        definition = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(definition["model"], dict) or not isinstance(definition["added_tokens"], list):
            raise ValueError("no tokenizer in it")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a tokenizer ({error}); copy or train it again") from error
    assert isinstance(definition, dict)
    return definition


def tokenizer_hash(directory: Path) -> str:
    """`hash_of` the tokenizer in a directory; raises as `tokenizer_definition`."""
    return hash_of(tokenizer_definition(directory))


def hash_of(definition: dict[str, Any]) -> str:
    """xxh3_128 of what a tokenizer makes of a text, 32 hex digits.

    Formatting, truncation and padding don't count, nor does the post-processor: it is not asked when shards are
    made of text, and transformers writes an idle one when it saves a tokenizer that has none.
    """
    plain = {**definition, "truncation": None, "padding": None, "post_processor": None}
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return xxhash.xxh3_128_hexdigest(canonical.encode("utf-8", "surrogatepass"))


def size_of(definition: dict[str, Any]) -> int:
    """The largest id plus one.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: the definition is none of a tokenizer.
    """
    vocab = definition["model"]["vocab"]  # a list in Unigram models, whose ids are the positions
    ids = [len(vocab) - 1] if isinstance(vocab, list) else list(vocab.values())
    return 1 + max([*ids, *(token["id"] for token in definition["added_tokens"])])
