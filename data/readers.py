"""Documents out of files: text, JSON lines (plain, gzip, zstd) and Parquet."""

import gzip
import io
import json
import logging
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Generic, TypeVar

from drivetrain.conf.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow.parquet

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_REPORTED = 10  # problems told one by one; the rest are counted
PARQUET_ROWS = 1024

T = TypeVar("T")

log = logging.getLogger(__name__)


class Unusable(DataError):
    """Why a record is left out; its text follows the record's place."""


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


class Records(ABC, Generic[T]):
    """Iterates over the records of files, in order, in memory for one file's text, line or batch of rows.

    A line of JSON lines is a record, as is a row of Parquet; a text file is one where the subclass takes text.
    Those without content are counted in `empty` and passed over. What cannot be used is counted in `broken`, logged
    with file and line, and kept in `problems` (the first few); with `strict` it raises DataError instead.

    `total_bytes` and `consumed_bytes` count bytes on disk; `documents` what was given out.
    """

    def __init__(self, inputs: Sequence[Path], strict: bool = False) -> None:
        self.files = find_files(inputs)
        self.documents = 0
        self.empty = 0
        self.broken = 0
        self.problems: list[str] = []
        self.total_bytes = sum(path.stat().st_size for path in self.files)
        self.consumed_bytes = 0
        self._strict = strict

    @abstractmethod
    def of_text(self, text: str, path: Path) -> T | None:
        """A text file's content as a record; None: nothing in it."""

    @abstractmethod
    def of_json(self, record: Any, where: str) -> T | None:
        """A parsed line as a record; None: nothing in it. Raises Unusable, or UnicodeEncodeError."""

    @abstractmethod
    def of_parquet(self, file: "pyarrow.parquet.ParquetFile", path: Path) -> Iterator[tuple[int, T | None]]:
        """(row from 1, record) of every row; problems are told to `problem`.

        Raises:
            ConfigError: the file lacks the columns.
        """

    def __iter__(self) -> Iterator[T]:
        for path in self.files:
            before = self.consumed_bytes
            size = path.stat().st_size
            try:
                for record in self._read(path):
                    if record is None:
                        self.empty += 1
                    else:
                        self.documents += 1
                        yield record
            except PermissionError as error:
                raise DataError(f"{path} cannot be read: {error.strerror}; change its permissions") from error
            self.consumed_bytes = before + size

    def _read(self, path: Path) -> Iterator[T | None]:
        name = path.name.lower()
        if name.endswith(TEXT_SUFFIXES):
            yield from self._text_file(path)
        elif name.endswith(".parquet"):
            yield from self._parquet(path)
        else:
            yield from self._json_lines(path)

    def problem(self, where: str, what: str) -> None:
        """Count and name a record that is left out.

        Raises:
            DataError: with `strict`.
        """
        if self._strict:
            raise DataError(f"{where}: {what}; correct it, or build without --strict to leave it out")
        self.broken += 1
        if len(self.problems) < _REPORTED:
            self.problems.append(f"{where}: {what}")
            log.warning("%s: %s; left out", where, what)
        elif self.broken == _REPORTED + 1:
            log.warning("more documents are broken; the rest are counted without being listed")

    def _text_file(self, path: Path) -> Iterator[T | None]:
        raw = path.read_bytes()
        try:
            yield self.of_text(raw.decode("utf-8-sig"), path)
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            self.problem(f"{path}, line {line}", f"not UTF-8 ({error.reason})")

    def _json_lines(self, path: Path) -> Iterator[T | None]:
        before = self.consumed_bytes
        number = 0
        with path.open("rb") as raw:
            try:
                for number, line in enumerate(_decompressed(path, raw), 1):
                    self.consumed_bytes = before + raw.tell()
                    if number == 1:
                        line = line.removeprefix(b"\xef\xbb\xbf")
                    if line.strip():
                        yield from self._json_line(line, f"{path}, line {number}")
            except (EOFError, zlib.error, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # the disk's failure, not the file's
                self.problem(f"{path}, after line {number}", f"damaged archive ({error}), the rest is lost")

    def _json_line(self, line: bytes, where: str) -> Iterator[T | None]:
        """The line's record, if it is one."""
        try:
            found = self.of_json(json.loads(line.decode("utf-8")), where)
        except UnicodeDecodeError as error:
            self.problem(where, f"not UTF-8 ({error.reason})")
        except UnicodeEncodeError:
            self.problem(where, "the text holds half of a surrogate pair")
        except Unusable as error:
            self.problem(where, str(error))
        except (ValueError, RecursionError) as error:
            self.problem(where, f"not JSON ({error})")
        else:
            yield found

    def _parquet(self, path: Path) -> Iterator[T | None]:
        import pyarrow
        import pyarrow.parquet

        before, size = self.consumed_bytes, path.stat().st_size
        row = 0
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                rows = max(file.metadata.num_rows, 1)
                for row, record in self.of_parquet(file, path):
                    yield record
                    self.consumed_bytes = before + size * row // rows
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            self.problem(f"{path}, after row {row}", f"damaged file ({error}), the rest is lost")


class Reader(Records[str]):
    """Texts: a text file, or what JSON lines and Parquet have under `text_key`. White space alone is no content."""

    def __init__(self, inputs: Sequence[Path], text_key: str = "text", strict: bool = False) -> None:
        super().__init__(inputs, strict)
        self._text_key = text_key

    def of_text(self, text: str, path: Path) -> str | None:
        return text if text.strip() else None

    def of_json(self, record: Any, where: str) -> str | None:
        text = record.get(self._text_key) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise Unusable(f"no text under {self._text_key!r} (--text-key)")
        text.encode("utf-8")  # JSON can spell half of a surrogate pair, UTF-8 cannot
        return text if text.strip() else None

    def of_parquet(self, file: "pyarrow.parquet.ParquetFile", path: Path) -> Iterator[tuple[int, str | None]]:
        import pyarrow

        kinds = {field.name: field.type for field in file.schema_arrow}
        kind = kinds.get(self._text_key)
        values = kind.value_type if isinstance(kind, pyarrow.DictionaryType) else kind
        if values not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
            what = "no column" if kind is None else f"no text but {kind}"
            raise ConfigError(
                f"{path} has {what} under {self._text_key!r}; its columns are {', '.join(kinds)}: "
                "name one that holds text with --text-key"
            )
        row = 0
        for batch in file.iter_batches(PARQUET_ROWS, columns=[self._text_key]):
            for value in batch.column(0):
                row += 1
                try:
                    text = value.as_py() or ""  # null is no text
                except UnicodeDecodeError as error:
                    self.problem(f"{path}, row {row}", f"not UTF-8 ({error.reason})")
                    continue
                yield row, text if text.strip() else None


def _decompressed(path: Path, raw: BinaryIO) -> io.BufferedIOBase | BinaryIO:
    name = path.name.lower()
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if name.endswith(".zst"):
        import pyarrow  # its stream reports a truncated file; zstandard's ends as if all were well

        return io.BufferedReader(pyarrow.input_stream(raw, compression="zstd"))
    return raw
