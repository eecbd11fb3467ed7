"""What a Hugging Face directory's JSON files say: read value by value, and refused by the names of file and key."""

import copy
import json
from pathlib import Path
from typing import Any

from drivetrain.conf.errors import ConfigError
from drivetrain.conf.ranges import ABOVE_ZERO, COUNT, Range

GENERATION = "generation_config.json"


class Values:
    """A JSON object in a file.

    Raises:
        ConfigError: the file cannot be read, or holds no object.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._within = path, ""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be read: {error.strerror}; is its folder a Hugging Face model?"
            ) from error
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON ({error}); copy it again") from error
        if not isinstance(found, dict):
            raise ConfigError(f"{path} is no object of keys and values; copy it again")
        self.values: dict[str, Any] = found

    def inside(self, key: str) -> "Values":
        """The object that a key holds, whose errors name both; an empty one where there is none."""
        inner = copy.copy(self)
        inner._within, inner.values = f"{self._within}{key}.", self.get(key, dict, {})
        return inner

    def refuse(self, what: str) -> ConfigError:
        return ConfigError(f"{self.path} {what}")

    def wrong(self, key: str, value: Any, why: str) -> ConfigError:
        return self.refuse(f"says {self._within}{key}={value!r}, which {why}; copy it again")

    def get(self, key: str, kind: type, default: Any) -> Any:
        """A value of a type; an int will do where a float is asked for, and null is the default."""
        value = self.values.get(key)
        if value is None:
            return default
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise self.wrong(key, value, f"is no {kind.__name__}")
        return value

    def number(self, key: str, kind: type, default: Any, allowed: Range) -> Any:
        """An int or a float in a range; NaN and infinities are in none."""
        value = self.get(key, kind, default)
        if value is not None and value not in allowed:
            raise self.wrong(key, value, f"must be {allowed}")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1.

        Args:
            default: None: the key must be there.
        """
        if default is None and self.values.get(key) is None:
            raise self.refuse(f"has no {self._within}{key}; copy it again")
        return int(self.number(key, int, default, COUNT))

    def above_zero(self, key: str, default: float | None = None) -> float:
        """A finite number above 0.

        Args:
            default: None: the key must be there.
        """
        if default is None and self.values.get(key) is None:
            raise self.refuse(f"has no {self._within}{key}; copy it again")
        return float(self.number(key, float, default, ABOVE_ZERO))

    def must_be(self, key: str, allowed: tuple[Any, ...], default: Any) -> None:
        found = self.values.get(key, default)
        if found not in allowed:
            raise self.refuse(f"says {key}={found!r}; supported is {' or '.join(map(repr, allowed))}")


def generation_ends(directory: Path, vocab_size: int) -> list[int]:
    """`eos_token_id` of generation_config.json, one or several ids; none where there is no such file or key.

    Args:
        vocab_size: of the model.

    Raises:
        ConfigError: the file is no JSON object, or an id is no whole number in [0, vocab_size).
    """
    if not (directory / GENERATION).is_file():
        return []
    values = Values(directory / GENERATION)
    found = values.values.get("eos_token_id")
    ends = found if isinstance(found, list) else [] if found is None else [found]
    for end in ends:
        if not isinstance(end, int) or isinstance(end, bool) or end < 0:
            raise values.wrong("eos_token_id", found, "is no token's number nor a list of such")
        if end >= vocab_size:
            raise values.wrong("eos_token_id", found, f"is beyond the model's {vocab_size} tokens")
    return ends
