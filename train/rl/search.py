"""A search over documents in a file, by BM25 (Robertson and Zaragoza 2009; the library bm25s)."""

from pathlib import Path
from typing import Any

from drivetrain.conf.errors import ConfigError, DataError
from drivetrain.train.rl.questions import JsonRecords
from drivetrain.train.rl.tools import ToolError

_WORD = r"(?u)\b\w+\b"  # the library's own pattern leaves out words of one letter


class SearchTool:
    """Looks documents up by words.

    Args:
        path: JSON lines, `.gz` and `.zst` too, or Parquet: {"text", and optionally "title"} each.
        found: how many documents a search returns.

    Raises:
        ConfigError: bm25s is not installed, or the file cannot be read.
        DataError: a line is no such object, or there is none.
    """

    name, argument = "search", "query"
    about = "Searches documents for words and returns those that fit best."

    def __init__(self, path: Path, found: int) -> None:
        try:
            import bm25s
        except ImportError as error:
            raise ConfigError("the search needs bm25s; run `pip install 'drivetrain[rl]'`") from error
        if found < 1:
            raise ConfigError(f"found={found} of a search; use 1 or more")
        self.found, self._bm25s = found, bm25s
        self.texts = [_text(record, where) for where, record in JsonRecords([path])]
        if not self.texts:
            raise ConfigError(f"{path} holds no document; give JSON lines with a text each")
        self._index = bm25s.BM25(backend="numpy")
        self._index.index(self._words(self.texts), show_progress=False)

    def _words(self, texts: list[str]) -> Any:
        return self._bm25s.tokenize(texts, token_pattern=_WORD, stopwords=None, show_progress=False)

    def __call__(self, text: str) -> str:
        most = min(self.found, len(self.texts))
        places, scores = self._index.retrieve(
            self._words([text]), k=most, show_progress=False, backend_selection="numpy"
        )
        found = [self.texts[at] for at, score in zip(places[0], scores[0], strict=True) if score > 0]
        if not found:
            raise ToolError("nothing was found; use other words")
        return "\n\n".join(f"[{number}] {each}" for number, each in enumerate(found, 1))


def _text(record: dict[str, Any], where: str) -> str:
    text, title = record.get("text"), record.get("title") or ""
    if not isinstance(text, str) or not isinstance(title, str):
        raise DataError(f'{where}: a document has a "text", and may have a "title"; correct it')
    return f"{title}\n{text}" if title else text
