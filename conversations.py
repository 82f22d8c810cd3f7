"""Read conversations from files: four shapes go in, one comes out.

    records = open_records("data/train.jsonl")        # JSON, JSON Lines, .gz, Parquet, CSV or a hub dataset
    conversation = to_conversation(records[0], records.where(0))

A conversation is a dict with `messages`, a list of `{"role", "content"}` dicts whose roles are system, user, assistant
or tool, and, where the file has them, `tools`. A message may also carry `tool_calls`, `reasoning_content` and
`train` (False: this assistant turn is context only).

Nothing here keeps a file's text in memory: text files are indexed by byte offset and read record by record, Parquet
and CSV files are memory-mapped by `datasets`.
"""

import gzip
import json
import os
import shutil
import tempfile
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
    found = ", ".join(repr(key) for key in list(record)[:8]) or "no fields"
    raise UserError(f"{where}: found the fields {found}; expected one of the shapes {accepted}. Rename the fields.")


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
    if shape == "messages":
        turns = record["messages"]
    elif shape == "conversations":
        turns = _with_system(record.get("system"), record["conversations"])
    elif shape == "instruction/output":
        turns = _alpaca_turns(record, where)
    else:
        turns = _completion_turns(record)
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: '{shape}' must be a non-empty list of turns, found {_kind(turns)}.")
    messages = [_message(turn, f"{where}, turn {number}") for number, turn in enumerate(turns, 1)]
    for number, message in enumerate(messages[1:], 2):
        if message["role"] == "system":
            raise UserError(f"{where}, turn {number}: a system message can only be the first turn; move it there.")
    conversation = {"messages": messages}
    tools = record.get("tools")
    if tools:
        conversation["tools"] = _tools(tools, where)
    return conversation


def _with_system(system, turns):
    return [{"role": "system", "content": system}, *turns] if system and isinstance(turns, list) else turns


def _alpaca_turns(record, where):
    """instruction, optional input, output; `history` is a list of [question, answer] pairs that came before."""
    history = record.get("history") or []
    if not isinstance(history, list) or any(not isinstance(pair, (list, tuple)) or len(pair) != 2 for pair in history):
        raise UserError(f"{where}: 'history' must be a list of [question, answer] pairs.")
    question = record["instruction"]
    if record.get("input"):
        question = f"{question}\n\n{record['input']}"
    pairs = [*history, (question, record["output"])]
    turns = [turn for q, a in pairs for turn in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
    return _with_system(record.get("system"), turns)


def _completion_turns(record):
    """prompt and completion, each a string or a list of messages (as TRL has them)."""
    parts = []
    for field, role in (("prompt", "user"), ("completion", "assistant")):
        value = record[field]
        parts.extend(value if isinstance(value, list) else [{"role": role, "content": value}])
    return _with_system(record.get("system"), parts)


def _message(turn, where):
    if not isinstance(turn, dict):
        raise UserError(f"{where}: expected an object with a role and a text, found {_kind(turn)}.")
    said = turn.get("role", turn.get("from"))
    role = ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise UserError(f"{where}: found the role {said!r}; expected one of {', '.join(ROLES)}.")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    message = {"role": role, "content": content}
    if turn.get("tool_calls"):
        message["tool_calls"] = _tool_calls(turn["tool_calls"], where)
        message["content"] = content = content or ""
    if not isinstance(content, str):
        raise UserError(f"{where}: the text of this {role} turn must be a string, found {_kind(content)}.")
    for field in ("reasoning_content", "name", "tool_call_id"):
        if turn.get(field) is not None:
            message[field] = turn[field]
    flag = turn.get("train", turn.get("weight"))
    if flag is not None:
        if flag not in (True, False):  # 0 and 1 compare equal to them
            raise UserError(f"{where}: 'train' must be true or false, found {flag!r}.")
        message["train"] = bool(flag)
    return message


def _tools(tools, where):
    tools = _parsed(tools, f"{where}: 'tools'")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{where}: 'tools' must be a list of function descriptions, found {_kind(tools)}.")
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
            raise UserError(f"{where}: a tool call needs a function with a 'name' and 'arguments', found {call!r:.80}.")
        arguments = _parsed(function.get("arguments") or {}, f"{where}: the arguments of {function['name']!r}")
        result.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return result


def _parsed(value, where):
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is a string that is not valid JSON ({error.msg}): {value:.60}") from None


def _kind(value):
    names = {dict: "an object", list: "a list", str: "a string", type(None): "nothing (null)", bool: "true or false"}
    kind = names.get(type(value), "a number")
    return f"an empty {kind[2:].strip()}" if isinstance(value, (list, str)) and not value else kind


class TextRecords:
    """Records of a JSON or JSON Lines file, found by content rather than by name, read one at a time.

    Keeps two 8-byte offsets a record and an open file, never the text; `os.pread` makes it safe in forked workers.
    """

    def __init__(self, path):
        self.name = path
        try:
            source = open(path, "rb")
            if source.read(2) == b"\x1f\x8b":  # gzip: unpacked once to a file that vanishes with this process
                source, packed = tempfile.TemporaryFile(), gzip.open(path, "rb")
                shutil.copyfileobj(packed, source)
        except (OSError, EOFError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{path}: cannot be read ({reason}); check the path given to --data_path.") from None
        self._file = source
        self._fd = source.fileno()
        start = os.pread(self._fd, 1 << 16, 0)
        if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(f"{path}: is UTF-16; save it as UTF-8.")
        skip = 3 if start.startswith(b"\xef\xbb\xbf") else 0
        if not start[skip:].strip():
            raise UserError(f"{path}: is empty; expected JSON or JSON Lines with one conversation a record.")
        self.lines = self._first_line_is_an_object(skip)
        starts, ends = self._index_lines(skip) if self.lines else self._index_values(skip)
        self._starts, self._ends = starts, ends
        if not len(starts):
            raise UserError(f"{path}: holds no record; expected at least one conversation.")

    def _first_line_is_an_object(self, skip):
        with open(self._fd, "rb", closefd=False) as file:
            file.seek(skip)
            for line in file:
                if line.strip():
                    break
        if not line.lstrip().startswith(b"{"):
            return not line.lstrip().startswith(b"[")  # neither: report the bad record as a line of JSON Lines
        try:
            json.loads(line)
            return True
        except ValueError:
            # Broken JSON in the first line of many is a bad line, a lone "{" is the start of an indented object.
            return len(line.strip()) > 1 and b'"' in line

    def _index_lines(self, skip):
        import numpy as np

        ends, offset = [], 0
        while chunk := os.pread(self._fd, 1 << 24, offset):
            ends.append(np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == 10) + offset)
            offset += len(chunk)
        ends = np.concatenate(ends)
        if not len(ends) or ends[-1] != offset - 1:  # the last line may lack its newline
            ends = np.append(ends, offset)
        starts = np.concatenate([[skip], ends[:-1] + 1])
        kept = ends > starts
        for i in np.flatnonzero(kept & (ends - starts < 8)):  # lines of spaces only
            kept[i] = bool(os.pread(self._fd, int(ends[i] - starts[i]), int(starts[i])).strip())
        self._line_numbers = None if kept.all() else np.flatnonzero(kept) + 1
        return starts[kept], ends[kept]

    def _index_values(self, skip):
        """Offsets of the elements of a JSON array, or of JSON values written one after the other.

        The text is in memory only while it is indexed.
        """
        size = os.fstat(self._fd).st_size
        try:
            text = os.pread(self._fd, size, skip).decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.name}: is not UTF-8 (byte {error.start + skip}); save it as UTF-8.") from None
        starts, ends = array("q"), array("q")
        decode, position, done, byte = json.JSONDecoder().raw_decode, 0, 0, skip
        in_array = text.lstrip().startswith("[")
        if in_array:
            position = text.index("[") + 1
        while True:
            while position < len(text) and text[position] in " \t\r\n,":
                position += 1
            if position >= len(text) or (in_array and text[position] == "]"):
                break
            try:
                _, end = decode(text, position)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{self.name}: record {len(starts) + 1} (line {error.lineno}): not valid JSON: {error.msg}."
                ) from None
            byte += len(text[done:position].encode())
            starts.append(byte)
            byte += len(text[position:end].encode())
            ends.append(byte)
            position = done = end
        if in_array and position >= len(text):
            raise UserError(f"{self.name}: the list is cut off after record {len(starts)}; expected a closing ']'.")
        return starts, ends

    def __len__(self):
        return len(self._starts)

    def __getitem__(self, index):
        start, end = int(self._starts[index]), int(self._ends[index])
        text = os.pread(self._fd, end - start, start)
        try:
            return json.loads(text)
        except UnicodeDecodeError:
            raise UserError(f"{self.where(index)}: is not UTF-8; save the file as UTF-8.") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{self.where(index)}: not valid JSON: {error.msg} at column {error.colno}.") from None

    def where(self, index):
        """Words that name record `index` (from 0): the file, the record counted from 1 and, for lines, the line."""
        line = ""
        if self.lines:
            line = f" (line {index + 1 if self._line_numbers is None else self._line_numbers[index]})"
        return f"{self.name}: record {index + 1}{line}"


class TableRecords:
    """Records of a Parquet or CSV file or of a dataset on the hub, memory-mapped by `datasets`."""

    def __init__(self, name):
        import datasets

        self.name = name
        builder = {".parquet": "parquet", ".csv": "csv"}.get(os.path.splitext(name)[1].lower())
        try:
            if builder:
                self._rows = datasets.load_dataset(builder, data_files=name, split="train")
            else:
                self._rows = datasets.load_dataset(name, split="train")
        except Exception as error:  # every reader behind `datasets` has its own exceptions
            detail = str(error).splitlines()[0] if str(error) else type(error).__name__
            if builder:
                raise UserError(f"{name}: cannot be read as {builder}: {detail}") from None
            raise UserError(f"{name}: no such file, and no dataset of that name could be loaded: {detail}") from None
        if not len(self._rows):
            raise UserError(f"{name}: holds no record; expected at least one conversation.")

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, index):
        return _without_nulls(self._rows[int(index)])

    def where(self, index):
        """Words that name record `index` (from 0)."""
        return f"{self.name}: record {index + 1}"


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
        return TableRecords(path) if path.lower().endswith((".parquet", ".csv")) else TextRecords(path)
    looks_like_a_file = path.startswith((".", "/", "~")) or os.path.splitext(path)[1] or path.count("/") != 1
    if looks_like_a_file:
        raise UserError(f"{path}: no such file; check the path (relative paths start at {os.getcwd()}).")
    return TableRecords(path)
