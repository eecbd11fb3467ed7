"""Documents out of files: text, JSON lines (plain, gzip, zstd) and Parquet."""

import gzip
import io
import json
import logging
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from drivetrain.conf.errors import ConfigError, DataError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_REPORTED = 10  # problems told one by one; the rest are counted
_PARQUET_ROWS = 1024

log = logging.getLogger(__name__)


def find_files(inputs: Sequence[Path]) -> list[Path]:
    """The files to read, in order: a file stands for itself, a folder for what it holds at any depth, sorted.

    A folder gives the files with a known suffix; hidden files and folders are passed over. A file that is
    named twice is read once.

    Raises:
        ConfigError: an input is missing, a file has a suffix that is not known, or a folder gives nothing.
    """
    known = ", ".join(SUFFIXES)
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            found = sorted(
                entry
                for entry in path.rglob("*")
                if entry.name.lower().endswith(SUFFIXES)
                and entry.is_file()
                and not any(part.startswith(".") for part in entry.relative_to(path).parts)
            )
            if not found:
                raise ConfigError(f"the folder {path} holds no file to read; known suffixes are {known}")
            files += found
        elif not path.exists():
            raise ConfigError(f"the input {path} does not exist; check the path")
        elif not path.name.lower().endswith(SUFFIXES):
            raise ConfigError(f"the input {path} has a suffix that is not known; rename it to one of {known}")
        else:
            files.append(path)
    return list({path.resolve(): path for path in files}.values())


class Reader:
    """Iterates over the documents of files, in order, in memory for one file's text, line or batch of rows.

    A text file is one document, as are a line of JSON lines and a row of Parquet, whose text is under
    `text_key`. Documents without a character other than white space are counted in `empty` and passed over.
    What cannot be read is counted in `broken`, logged with file and line, and kept in `problems` (the first
    few); with `strict` it raises DataError instead.

    `total_bytes` and `consumed_bytes` count bytes on disk; `documents` what was given out.
    """

    def __init__(self, inputs: Sequence[Path], text_key: str = "text", strict: bool = False) -> None:
        self.files = find_files(inputs)
        self.documents = 0
        self.empty = 0
        self.broken = 0
        self.problems: list[str] = []
        self.total_bytes = sum(path.stat().st_size for path in self.files)
        self.consumed_bytes = 0
        self._text_key = text_key
        self._strict = strict

    def __iter__(self) -> Iterator[str]:
        for path in self.files:
            before = self.consumed_bytes
            size = path.stat().st_size
            try:
                for text in self._read(path):
                    if text.strip():
                        self.documents += 1
                        yield text
                    else:
                        self.empty += 1
            except PermissionError as error:
                raise DataError(f"{path} cannot be read: {error.strerror}; change its permissions") from error
            self.consumed_bytes = before + size

    def _read(self, path: Path) -> Iterator[str]:
        name = path.name.lower()
        if name.endswith(TEXT_SUFFIXES):
            yield from self._text_file(path)
        elif name.endswith(".parquet"):
            yield from self._parquet(path)
        else:
            yield from self._json_lines(path)

    def _problem(self, where: str, what: str) -> None:
        if self._strict:
            raise DataError(f"{where}: {what}; correct it, or build without --strict to leave it out")
        self.broken += 1
        if len(self.problems) < _REPORTED:
            self.problems.append(f"{where}: {what}")
            log.warning("%s: %s; left out", where, what)
        elif self.broken == _REPORTED + 1:
            log.warning("more documents are broken; the rest are counted without being listed")

    def _text_file(self, path: Path) -> Iterator[str]:
        raw = path.read_bytes()
        try:
            yield raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            self._problem(f"{path}, line {line}", f"not UTF-8 ({error.reason})")

    def _json_lines(self, path: Path) -> Iterator[str]:
        before = self.consumed_bytes
        number = 0
        with path.open("rb") as raw:
            try:
                for number, line in enumerate(_decompressed(path, raw), 1):
                    self.consumed_bytes = before + raw.tell()
                    text = self._json_text(line, path, number)
                    if text is not None:
                        yield text
            except (EOFError, zlib.error, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # the disk's failure, not the file's
                self._problem(f"{path}, after line {number}", f"damaged archive ({error}), the rest is lost")

    def _json_text(self, line: bytes, path: Path, number: int) -> str | None:
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            return None
        where = f"{path}, line {number}"
        try:
            record = json.loads(line.decode("utf-8"))
            text = record[self._text_key]
            if not isinstance(text, str):
                raise TypeError
            text.encode("utf-8")  # JSON can spell half of a surrogate pair, UTF-8 cannot
        except UnicodeDecodeError as error:
            self._problem(where, f"not UTF-8 ({error.reason})")
        except UnicodeEncodeError:
            self._problem(where, "the text holds half of a surrogate pair")
        except (KeyError, TypeError):
            self._problem(where, f"no text under {self._text_key!r} (--text-key)")
        except (ValueError, RecursionError) as error:
            self._problem(where, f"not JSON ({error})")
        else:
            return text
        return None

    def _parquet(self, path: Path) -> Iterator[str]:
        import pyarrow
        import pyarrow.parquet

        before, size = self.consumed_bytes, path.stat().st_size
        row = 0
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                kinds = {field.name: field.type for field in file.schema_arrow}
                kind = kinds.get(self._text_key)
                values = kind.value_type if isinstance(kind, pyarrow.DictionaryType) else kind
                if values not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
                    what = "no column" if kind is None else f"no text but {kind}"
                    raise ConfigError(
                        f"{path} has {what} under {self._text_key!r}; its columns are {', '.join(kinds)}: "
                        "name one that holds text with --text-key"
                    )
                rows = file.metadata.num_rows
                for batch in file.iter_batches(_PARQUET_ROWS, columns=[self._text_key]):
                    for value in batch.column(0):
                        row += 1
                        try:
                            text = value.as_py()
                        except UnicodeDecodeError as error:
                            self._problem(f"{path}, row {row}", f"not UTF-8 ({error.reason})")
                            continue
                        yield text or ""  # null is no text
                    self.consumed_bytes = before + size * row // max(rows, 1)
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            self._problem(f"{path}, after row {row}", f"damaged file ({error}), the rest is lost")


def _decompressed(path: Path, raw: BinaryIO) -> io.BufferedIOBase | BinaryIO:
    name = path.name.lower()
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if name.endswith(".zst"):
        import pyarrow  # its stream reports a truncated file; zstandard's ends as if all were well

        return io.BufferedReader(pyarrow.input_stream(raw, compression="zstd"))
    return raw
