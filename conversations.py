"""Read conversations from files: four shapes go in, one comes out.

    records = open_records("data/train.jsonl")        # JSON, JSON Lines, .gz, Parquet, CSV or a hub dataset
    conversation = to_conversation(records[0], records.where(0))

A conversation is a dict with `messages`, a list of `{"role", "content"}` dicts whose roles are system, user, assistant
or tool, and, where the file has them, `tools`. A message may also carry `tool_calls`, `reasoning_content` and
`train` (False: this assistant turn is context only).

Nothing here keeps a file's text in memory: text files are indexed by byte offset and read record by record, Parquet
and CSV files are memory-mapped by `datasets`.
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

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant",
    "tool": "tool", "observation": "tool",
}  # fmt: skip
SHAPES = {  # the fields that identify each shape, in the order they are tried
    "messages": ("messages",),
    "conversations": ("conversations",),
    "instruction/output": ("instruction", "output"),
    "prompt/completion": ("prompt", "completion"),
}
TABLES = {  # what `datasets` reads: its name for the kind of file, and what such a file must be
    ".parquet": ("parquet", "a whole Parquet file with at least one row"),
    ".csv": ("csv", "UTF-8 text, a line of column names, and texts with commas in quotes"),
}


class UserError(Exception):
    """A mistake in the user's files or flags, told in one sentence; the scripts print it and exit with code 2."""


def shape_of(record, where):
    """Name of the shape of one record; raises UserError that lists what was found and what is accepted."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object with a conversation, found {_kind(record)}.")
    for shape, fields in SHAPES.items():
        if all(record.get(field) is not None for field in fields):
            return shape
    accepted = ", ".join(f"'{shape}'" for shape in SHAPES)
    named = ", ".join(reprlib.repr(key) + (" (null)" if record[key] is None else "") for key in list(record)[:8])
    found = f"the fields {named}" if named else "no fields"
    raise UserError(f"{where}: found {found}; expected one of the shapes {accepted}, so rename or fill in the fields.")


def to_conversation(record, where):
    """Turn one record of any accepted shape into a conversation.

    Args:
        record: dict as read from the file.
        where: words that name the file and the record, for error messages.
    Returns:
        dict with `messages` (non-empty list of dicts with `role` and a string `content`) and possibly `tools`.
    Raises:
        UserError: one sentence with file, record, turn, what was found and what was expected.
    """
    shape = shape_of(record, where)
    if shape == "instruction/output":
        turns = _alpaca_turns(record, where)
    elif shape == "prompt/completion":
        turns = _completion_turns(record)
    else:
        turns = record[shape]
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: '{shape}' must be a non-empty list of turns, found {_kind(turns)}.")
    messages = [_message(turn, f"{where}, turn {number}") for number, turn in enumerate(turns, 1)]
    has_system = record.get("system") not in (None, "")
    for number, message in enumerate(messages, 1):
        if message["role"] == "system" and (has_system or number > 1):
            raise UserError(
                f"{where}, turn {number}: found a system message; expected at most one, as the first turn or as the "
                "record's 'system', so move or remove it."
            )
    if has_system:  # only now, so that turns were counted as in the file
        messages.insert(0, _message({"role": "system", "content": record["system"]}, f"{where}, 'system'"))
    conversation = {"messages": messages}
    tools = record.get("tools") and _tools(record["tools"], where)
    if tools:
        conversation["tools"] = tools
    return conversation


def _alpaca_turns(record, where):
    """instruction, optional input, output; `history` is a list of [question, answer] pairs that came before."""
    for field in ("instruction", "input", "output"):
        if not isinstance(record.get(field), (str, type(None))):
            raise UserError(f"{where}: '{field}' must be a string, found {_kind(record[field])}.")
    history = record.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise UserError(f"{where}: 'history' must be a list of [question, answer] pairs, found {_kind(pair)}.")
    question = record["instruction"]
    if record.get("input"):
        question = f"{question}\n\n{record['input']}"
    pairs = [*history, (question, record["output"])]
    return [turn for q, a in pairs for turn in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]


def _completion_turns(record):
    """prompt and completion, each a string or a list of messages (as TRL has them)."""
    parts = []
    for field, role in (("prompt", "user"), ("completion", "assistant")):
        value = record[field]
        parts.extend(value if isinstance(value, list) else [{"role": role, "content": value}])
    return parts


def _message(turn, where):
    if not isinstance(turn, dict):
        raise UserError(f"{where}: expected an object with a role and a text, found {_kind(turn)}.")
    said = turn.get("role", turn.get("from"))
    role = ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        found = "no role" if said is None else f"the role {reprlib.repr(said)}"
        raise UserError(f"{where}: found {found}; expected 'role' or 'from' to be one of {', '.join(ROLES)}.")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list) and all(_is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    message = {"role": role, "content": content}
    calls = turn.get("tool_calls") and _tool_calls(turn["tool_calls"], where)
    if calls:
        message["tool_calls"] = calls
        message["content"] = content = "" if content is None else content
    if not isinstance(content, str):
        raise UserError(
            f"{where}: the text of this {role} turn ('content' or 'value') must be a string or a list of text parts, "
            f"found {_kind(content)}."
        )
    for field in ("reasoning_content", "name", "tool_call_id"):
        if turn.get(field) is not None:
            if not isinstance(turn[field], str):
                raise UserError(f"{where}: '{field}' must be a string, found {_kind(turn[field])}.")
            message[field] = turn[field]
    flag = turn.get("train", turn.get("weight"))
    if flag is not None:
        if flag not in (True, False):  # 0 and 1 compare equal to them
            raise UserError(f"{where}: 'train' (or 'weight') must be true or false, found {_kind(flag)}.")
        message["train"] = bool(flag)
    _check_unicode(message, where)
    return message


def _is_text_part(part):
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _check_unicode(value, where):
    """JSON can write half of a surrogate pair, which no tokenizer takes."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise UserError(
            f"{where}: found {half!r}, half of a character cut in two; expected whole characters, so remove it."
        ) from None


def _tools(tools, where):
    tools = _parsed(tools, f"{where}: 'tools'")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{where}: 'tools' must be a list of function descriptions (objects), found {_kind(tools)}.")
    _check_unicode(tools, f"{where}: 'tools'")
    return tools


def _tool_calls(calls, where):
    """Tool calls with their arguments as objects: the templates write them as JSON themselves."""
    calls = _parsed(calls, f"{where}: 'tool_calls'")
    if not isinstance(calls, list):
        raise UserError(f"{where}: 'tool_calls' must be a list, found {_kind(calls)}.")
    result = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"{where}: a tool call needs a function with 'name' and 'arguments', found {_kind(call)}.")
        of_this = f"{where}: the arguments of {reprlib.repr(function['name'])}"
        arguments = _parsed(function.get("arguments") or {}, of_this)
        if not isinstance(arguments, dict):
            raise UserError(f"{of_this} must be an object, found {_kind(arguments)}.")
        result.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return result


def _parsed(value, where):
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} must be valid JSON, found {_kind(value)}: {_reason(error)}.") from None


def _reason(error):
    """Why the json module refused a text: bad JSON, an endless number, or lists too deep."""
    return f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else str(error)


def _kind(value):
    """Words for a value in an error message: its kind and, in short, the value."""
    if value is None:
        return "nothing (null)"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value"}
    return f"{names.get(type(value), 'a number')} ({reprlib.repr(value)})"


class TextRecords:
    """Records of a JSON or JSON Lines file, found by content rather than by name, read one at a time.

    Keeps two 8-byte offsets a record and an open file, never the text; `os.pread` makes it safe in forked workers.
    """

    def __init__(self, path):
        self.name = path
        try:
            self._file = open(path, "rb")
            self._stat = os.fstat(self._file.fileno())
            if self._file.read(2) == b"\x1f\x8b":  # gzip: unpacked once to a file that vanishes with this process
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
            first = next((line for line in file if not line.isspace()), None)
        if first is None:
            raise UserError(f"{path}: is empty; expected JSON or JSON Lines with one conversation a record.")
        self.lines = self._is_json_lines(first)
        self._starts, self._ends, self._blanks = self._index_lines() if self.lines else self._index_values()
        if not len(self._starts):
            raise UserError(f"{path}: holds no record; expected at least one conversation.")

    def _read(self):
        """A new file object over the text, behind a byte order mark."""
        file = open(self._fd, "rb", closefd=False)
        file.seek(self._skip)
        return file

    def _is_json_lines(self, first):
        """Whether each line is a record; if not, the file is a JSON array or has values one after the other."""
        first = first.strip()
        if not first.startswith(b"{"):
            return not first.startswith(b"[")  # neither: report the bad record as a line of JSON Lines
        try:
            json.loads(first.decode(errors="replace"))
            return True
        except (ValueError, RecursionError):
            pass
        if first == b"{":
            return False
        try:  # the beginning of an object over several lines, or a broken line of JSON Lines
            json.JSONDecoder().raw_decode(os.pread(self._fd, 1 << 24, self._skip).decode(errors="replace").lstrip())
            return False
        except (ValueError, RecursionError):
            return True

    def _index_lines(self):
        """Offsets of the lines that are not blank and, for each blank line, the number of records before it."""
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

    def _index_values(self):
        """Offsets of the elements of a JSON array, or of JSON values written one after the other.

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
                raise UserError(f"{where}: not valid JSON: {_reason(error)}.") from None
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
        return starts, ends, None

    def __reduce__(self):
        return TextRecords, (self.name,)  # a process that was not forked opens the file again

    def __len__(self):
        return len(self._starts)

    def __getitem__(self, index):
        start, end = int(self._starts[index]), int(self._ends[index])
        data = os.pread(self._fd, end - start, start)
        try:
            return json.loads(data.decode("utf-8-sig").rstrip())
        except UnicodeDecodeError:
            raise UserError(f"{self.where(index)}: is not UTF-8; save the file as UTF-8.") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.where(index)}: not valid JSON: {_reason(error)}.") from None

    def where(self, index):
        """Words that name record `index` (from 0): the file, the record counted from 1 and, for lines, the line."""
        line = f" (line {index + 1 + bisect.bisect_right(self._blanks, index)})" if self.lines else ""
        return f"{self.name}: record {index + 1}{line}"

    def fingerprint(self):
        return f"{os.path.abspath(self.name)} {self._stat.st_size} {self._stat.st_mtime_ns}"


class TableRecords:
    """Records of a Parquet or CSV file or of a dataset on the hub, memory-mapped by `datasets`."""

    def __init__(self, name):
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

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, index):
        return _without_nulls(self._rows[int(index)])

    def where(self, index):
        """Words that name record `index` (from 0)."""
        return f"{self.name}: record {index + 1}"

    def fingerprint(self):
        return self._rows._fingerprint  # `datasets` has it from the file's content or the hub's commit


def _csv_options(name):
    """All columns of a CSV file as text, so that an answer such as 42, 007 or NA stays what was written."""
    import datasets
    import pandas

    head = pandas.read_csv(name, nrows=1)
    if head.empty:
        raise UserError(f"{name}: holds no record; expected a line of column names and a line for each conversation.")
    if not isinstance(head.index, pandas.RangeIndex):  # pandas would take the first field for a row label
        raise UserError(f"{name}: record 1: has more fields than the {len(head.columns)} columns; quote its commas.")
    features = datasets.Features({column: datasets.Value("string") for column in head.columns})
    return {"features": features, "keep_default_na": False, "na_values": [""]}


def _without_nulls(value):
    """Tables fill the fields that a row lacks with None; the record as written did not have them."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def open_records(path):
    """Open a data file, or a dataset of the hub by name, as a sequence of records with a method `where(index)`."""
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder; name the files in it, --data_path takes several.")
    if os.path.exists(path):
        return TableRecords(path) if path.lower().endswith(tuple(TABLES)) else TextRecords(path)
    looks_like_a_file = path.startswith((".", "/", "~")) or os.path.splitext(path)[1] or path.count("/") != 1
    if looks_like_a_file:
        raise UserError(f"{path}: no such file; check the path (relative paths start at {os.getcwd()}).")
    return TableRecords(path)


class Conversations:
    """The records of several files as one sequence of conversations.

    Args:
        paths: files or hub datasets.
        indices: which records, in the order of the files (None: all).
    """

    def __init__(self, paths, indices=None):
        self.sources = [open_records(path) for path in paths]
        self._ends = list(itertools.accumulate(len(source) for source in self.sources))
        self.indices = indices

    def __len__(self):
        return self._ends[-1] if self.indices is None else len(self.indices)

    def _locate(self, index):
        index = range(len(self))[index]
        index = int(index if self.indices is None else self.indices[index])
        file = bisect.bisect_right(self._ends, index)
        return self.sources[file], index - (self._ends[file - 1] if file else 0)

    def where(self, index):
        source, record = self._locate(index)
        return source.where(record)

    def __getitem__(self, index):
        source, record = self._locate(index)
        return to_conversation(source[record], source.where(record))

    def fingerprint(self):
        """Text that changes when a file, its place or the choice of records does; for caches of what was made of it."""
        chosen = "all" if self.indices is None else self.indices.tobytes().hex()
        return "|".join([*(source.fingerprint() for source in self.sources), chosen])

    def shapes(self):
        """File name and the shape of its first record, for the log."""
        return {source.name: shape_of(source[0], source.where(0)) for source in self.sources}


def hold_out(paths, ratio, seed):
    """Two disjoint views of the same files: the rows to train on and the share `ratio` held out."""
    total = len(Conversations(paths))
    held_out = round(total * ratio)
    if not 0 < held_out < total:
        raise UserError(f"--eval_ratio {ratio} of {total} rows leaves {held_out} to evaluate; change it or add rows.")
    import numpy as np

    order = np.random.default_rng(seed).permutation(total)
    return Conversations(paths, np.sort(order[held_out:])), Conversations(paths, np.sort(order[:held_out]))
