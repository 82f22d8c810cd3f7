"""Read records from text files: JSON or JSON Lines, also compressed.

    records = TextRecords("data/train.jsonl")
    records[0], records.where(0)

No text is kept in memory: files are indexed by byte offset and read record by record.
"""

import bisect
import bz2
import gzip
import itertools
import json
import lzma
import os
import reprlib
import shutil
import tempfile
import zlib
from array import array
from typing import Any, BinaryIO, NamedTuple, Protocol

from recipe.console import UserError

FIRST_OBJECT = 1 << 24  # bytes that are read to recognise an object over several lines; no record is as long


class Compression(NamedTuple):
    """How a compressed file begins, what it is called, and which module or pyarrow codec unpacks it."""

    magic: bytes
    name: str
    reader: Any


COMPRESSIONS = (
    Compression(b"\x1f\x8b", "gzip", gzip),
    Compression(b"BZh", "bzip2", bz2),
    Compression(b"\xfd7zXZ\x00", "xz", lzma),
    Compression(b"\x28\xb5\x2f\xfd", "Zstandard", "zstd"),
    Compression(b"\x04\x22\x4d\x18", "LZ4", "lz4"),
)
OTHER_FILES = {  # how files begin that hold no text, and what they are
    b"PK\x03\x04": "a zip archive or an Office document; unpack it, or save it as CSV",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive; unpack it",
    b"Rar!": "a RAR archive; unpack it",
    b"SQLite format 3": "an SQLite database; export its table as CSV",
    b"\x89HDF": "an HDF5 file; export its records as JSON Lines",
    b"\x93NUMPY": "a NumPy array; export its records as JSON Lines",
    b"%PDF": "a PDF document; expected JSON Lines with one conversation a record",
    b"PAR1": "a Parquet file inside of a compressed one; unpack it",
    **{bytes([0x80, protocol]): "a Python pickle; export its records as JSON Lines" for protocol in range(2, 6)},
}
TAR = 257, b"ustar"  # where a tar archive says what it is


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
            start = self._file.read(8)
            for compression in COMPRESSIONS:
                if start.startswith(compression.magic):
                    self._file = _unpacked(path, compression)
            self._fd = self._file.fileno()
            start = os.pread(self._fd, 512, 0)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path.") from None
        _refuse_other_files(path, start)
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


def _unpacked(path: str, compression: Compression) -> BinaryIO:
    """Unpack a file into one without a name, which ends with this process."""
    unpacked = tempfile.TemporaryFile()
    try:
        if isinstance(compression.reader, str):
            import pyarrow

            packed = pyarrow.CompressedInputStream(pyarrow.OSFile(path), compression.reader)
        else:
            packed = compression.reader.open(path, "rb")
        with packed:
            shutil.copyfileobj(packed, unpacked)
        unpacked.flush()
    except (EOFError, zlib.error, lzma.LZMAError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # of the disk
            raise
        raise UserError(f"{path}: is a damaged {compression.name} file ({error}); copy or compress it again.") from None
    return unpacked  # type: ignore[return-value]


def _refuse_other_files(path: str, start: bytes) -> None:
    """Refuse a file that holds no UTF-8, by its first bytes."""
    other = next((what for magic, what in OTHER_FILES.items() if start.startswith(magic)), None)
    if start[TAR[0] :].startswith(TAR[1]):
        other = "a tar archive; unpack it"
    if other:
        raise UserError(f"{path}: is {other}.")
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or 0 in start[:4]:
        raise UserError(f"{path}: is not UTF-8 but looks like UTF-16; save it as UTF-8.")


def _is_turn(record: Any) -> bool:
    return isinstance(record, dict) and ("role" in record or "from" in record)


def json_problem(error: Exception) -> str:
    """Say why the json module refused a text: bad JSON, a number that is too long, or lists too deep."""
    return f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else str(error)


def value_in_words(value: Any) -> str:
    """Describe a value in an error message: its kind and, shortened, the value."""
    if value is None:
        return "nothing (null)"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value"}
    return f"{names.get(type(value), 'a number')} ({reprlib.repr(value)})"
