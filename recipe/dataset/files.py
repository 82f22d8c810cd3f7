"""Read records from files: JSON, JSON Lines, .gz of these, Parquet, CSV, or a dataset of the hub.

    records = open_records("data/train.jsonl")
    records[0], records.where(0)

No text is kept in memory: text files are indexed by byte offset and read record by record, Parquet and CSV files are
memory-mapped by `datasets`.
"""

import bisect
import gzip
import itertools
import json
import os
import reprlib
import shutil
import tempfile
import zlib
from array import array
from typing import Any, BinaryIO, Protocol

from recipe.console import UserError

FIRST_OBJECT = 1 << 24  # bytes that are read to recognise an object over several lines; no record is as long

TABLES = {  # what `datasets` reads: its name for the kind of file, and what such a file must be
    ".parquet": ("parquet", "a whole Parquet file with at least one row"),
    ".csv": ("csv", "UTF-8 text, a line of column names, and texts with commas in quotes"),
}


class Records(Protocol):
    """What a file or a dataset of the hub looks like to the rest: a sequence of records, as JSON values."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def where(self, index: int) -> str:
        """Name the file and the record, counted from 1."""

    def fingerprint(self) -> str:
        """Return a text that changes with the content."""


class TextRecords:
    """Records of a JSON or JSON Lines file, recognised by content rather than by name, read one at a time.

    Keeps two 8-byte offsets a record and an open file, never the text; `os.pread` makes it safe in forked workers.

    Raises:
        UserError: the file cannot be read, is no UTF-8, no JSON, or holds no record.
    """

    def __init__(self, path: str):
        self.name = path
        try:
            self._file: BinaryIO = open(path, "rb")
            self._stat = os.fstat(self._file.fileno())
            if (
                self._file.read(2) == b"\x1f\x8b"
            ):  # gzip: unpacked once, to a file without a name, which ends with this process
                self._file = tempfile.TemporaryFile()
                with gzip.open(path, "rb") as packed:
                    shutil.copyfileobj(packed, self._file)
                self._file.flush()
            self._fd = self._file.fileno()
            start = os.pread(self._fd, 4, 0)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path}: is a damaged gzip file ({error}); copy or compress it again.") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path.") from None
        if start[:2] in (b"\xff\xfe", b"\xfe\xff") or 0 in start:
            raise UserError(f"{path}: is not UTF-8 but looks like UTF-16; save it as UTF-8.")
        self._skip = 3 if start.startswith(b"\xef\xbb\xbf") else 0
        with self._read() as file:
            first, second = itertools.islice(
                itertools.chain((line.strip() for line in file if not line.isspace()), [b"", b""]), 2
            )
        if not first:
            raise UserError(f"{path}: is empty; expected JSON or JSON Lines with one conversation a record.")
        self.lines = self._is_json_lines(first, second)
        self._starts, self._ends, self._blanks = self._index_lines() if self.lines else self._index_values()
        if not len(self._starts):
            raise UserError(f"{path}: holds no record; expected at least one conversation.")
        if first.startswith(b"[") and not self.lines and _is_turn(self[0]):  # the list is one conversation
            self._starts, self._ends = array("q", [self._skip]), array("q", [os.fstat(self._fd).st_size])

    def _read(self) -> BinaryIO:
        """Open the text again, after a byte order mark."""
        file = open(self._fd, "rb", closefd=False)
        file.seek(self._skip)
        return file

    def _is_json_lines(self, first: bytes, second: bytes) -> bool:
        """Return whether each line is a record; if not, the file is a JSON array or a series of JSON values.

        Args:
            first, second: the first two lines that are not blank.
        """
        if not first.startswith((b"{", b"[")):
            return True  # reports the bad record as a line
        is_list = first.startswith(b"[")
        if is_list and not second.startswith(b"["):
            return False
        try:
            json.loads(first.decode(errors="replace"))
            return True
        except (ValueError, RecursionError):
            pass
        if first == b"{" or is_list:
            return False
        try:  # the beginning of an object over several lines, or a broken line of JSON Lines
            start = os.pread(self._fd, FIRST_OBJECT, self._skip).decode(errors="replace").lstrip()
            json.JSONDecoder().raw_decode(start)
            return False
        except (ValueError, RecursionError):
            return True

    def _index_lines(self) -> tuple[array, array, array]:
        """Return offsets of the lines that are not blank and, for each blank line, the number of records before it."""
        starts, ends, blanks, offset = array("q"), array("q"), array("q"), self._skip
        with self._read() as file:
            for line in file:
                if line.isspace():
                    blanks.append(len(starts))
                else:
                    starts.append(offset)
                    ends.append(offset + len(line))
                offset += len(line)
        return starts, ends, blanks

    def _index_values(self) -> tuple[array, array, array]:
        """Return offsets of the elements of a JSON array, or of a series of JSON values; there are no blank lines.

        The text is in memory only while it is indexed.
        """
        with self._read() as file:
            data = file.read()
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise UserError(f"{self.name}: line {line}: is not UTF-8; save the file as UTF-8.") from None
        del data
        starts, ends = array("q"), array("q")
        decode, position, done, byte = json.JSONDecoder().raw_decode, 0, 0, self._skip
        in_array = text.lstrip().startswith("[")
        if in_array:
            position = text.index("[") + 1
        while True:
            while position < len(text) and text[position] in " \t\r\n,\ufeff":
                position += 1
            if position >= len(text) or (in_array and text[position] == "]"):
                break
            try:
                _, end = decode(text, position)
            except (ValueError, RecursionError) as error:
                line = getattr(error, "lineno", text.count("\n", 0, position) + 1)
                where = f"{self.name}: record {len(starts) + 1} (line {line})"
                raise UserError(f"{where}: not valid JSON: {json_problem(error)}.") from None
            byte += len(text[done:position].encode())
            starts.append(byte)
            byte += len(text[position:end].encode())
            ends.append(byte)
            position = done = end
        if in_array and position >= len(text):
            raise UserError(f"{self.name}: the list is cut off after record {len(starts)}; expected a closing ']'.")
        if in_array and text[position + 1 :].strip():
            line = text.count("\n", 0, position) + 1
            raise UserError(f"{self.name}: found more text after the list that ends in line {line}; expected one list.")
        return starts, ends, array("q")

    def __reduce__(self) -> tuple:
        return TextRecords, (self.name,)  # a process that was not forked opens the file again

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Any:
        start, end = int(self._starts[index]), int(self._ends[index])
        data = os.pread(self._fd, end - start, start)
        try:
            return json.loads(data.decode("utf-8-sig").rstrip())
        except UnicodeDecodeError:
            raise UserError(f"{self.where(index)}: is not UTF-8; save the file as UTF-8.") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.where(index)}: not valid JSON: {json_problem(error)}.") from None

    def where(self, index: int) -> str:
        """Name the file, the record counted from 1 and, for JSON Lines, the line."""
        line = f" (line {index + 1 + bisect.bisect_right(self._blanks, index)})" if self.lines else ""
        return f"{self.name}: record {index + 1}{line}"

    def fingerprint(self) -> str:
        """Return the file's path, size and time of its last change."""
        return f"{os.path.abspath(self.name)} {self._stat.st_size} {self._stat.st_mtime_ns}"


class TableRecords:
    """Records of a Parquet or CSV file or of a dataset on the hub, memory-mapped by `datasets`.

    Raises:
        UserError: it cannot be loaded or holds no record.
    """

    def __init__(self, name: str):
        import datasets

        self.name = name
        ending = os.path.splitext(name)[1].lower()
        builder, expected = TABLES.get(ending, (None, "a file or a hub dataset of this name"))
        try:
            if builder is None:
                self._rows = datasets.load_dataset(name, split="train")
            else:
                options = _csv_options(name) if builder == "csv" else {}
                self._rows = datasets.load_dataset(builder, data_files=name, split="train", **options)
        except UserError:
            raise
        except Exception as error:  # every reader behind `datasets` has its own exceptions
            detail = str(error.__cause__ or error).strip() or type(error).__name__
            raise UserError(f"{name}: cannot be loaded ({detail.splitlines()[0]}); expected {expected}.") from None
        if not len(self._rows):
            raise UserError(f"{name}: holds no record; expected at least one conversation.")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        return _without_filled_in(self._rows[int(index)], self._rows.features)

    def where(self, index: int) -> str:
        """Name the file and the record, counted from 1."""
        return f"{self.name}: record {index + 1}"

    def fingerprint(self) -> str:
        """Return what `datasets` computes from the file's content or the hub's commit."""
        return self._rows._fingerprint


def _is_turn(record: Any) -> bool:
    return isinstance(record, dict) and ("role" in record or "from" in record)


def _csv_options(name: str) -> dict[str, Any]:
    """Read all columns of a CSV file as text, so that an answer such as 42, 007 or NA stays what was written."""
    import datasets
    import pandas

    head = pandas.read_csv(name, nrows=1)
    if head.empty:
        raise UserError(f"{name}: holds no record; expected a line of column names and a line for each conversation.")
    if not isinstance(head.index, pandas.RangeIndex):  # pandas would take the first field for a row label
        raise UserError(f"{name}: record 1: has more fields than the {len(head.columns)} columns; quote its commas.")
    features = datasets.Features({column: datasets.Value("string") for column in head.columns})
    return {"features": features, "keep_default_na": False, "na_values": [""]}


def _without_filled_in(value: Any, feature: Any) -> Any:
    """Remove the nulls with which Arrow fills the fields that an object lacks; those of JSON columns were written."""
    if isinstance(feature, dict) and isinstance(value, dict):
        kept = {name: item for name, item in value.items() if item is not None}
        return {name: _without_filled_in(item, feature.get(name)) for name, item in kept.items()}
    if isinstance(value, list):
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return [_without_filled_in(item, inner) for item in value]
    return value


def open_records(path: str) -> Records:
    """Open a data file, or a dataset of the hub by name.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder; name the files in it, --data_path takes several.")
    if os.path.exists(path):
        return TableRecords(path) if path.lower().endswith(tuple(TABLES)) else TextRecords(path)
    looks_like_a_file = path.startswith((".", "/", "~")) or os.path.splitext(path)[1] or path.count("/") != 1
    if looks_like_a_file:
        raise UserError(f"{path}: no such file; check the path (relative paths start at {os.getcwd()}).")
    return TableRecords(path)


def json_problem(error: Exception) -> str:
    """Say why the json module refused a text: bad JSON, a number that is too long, or lists too deep."""
    return f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else str(error)


def value_in_words(value: Any) -> str:
    """Describe a value in an error message: its kind and, shortened, the value."""
    if value is None:
        return "nothing (null)"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value"}
    return f"{names.get(type(value), 'a number')} ({reprlib.repr(value)})"
