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
import itertools
import json
import reprlib

from recipe.console import UserError
from recipe.dataset.files import json_problem, open_records, value_in_words

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


def shape_of(record, where):
    """Name of the shape of one record; raises UserError that lists what was found and what is accepted."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object with a conversation, found {value_in_words(record)}.")
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
        raise UserError(f"{where}: '{shape}' must be a non-empty list of turns, found {value_in_words(turns)}.")
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
            raise UserError(f"{where}: '{field}' must be a string, found {value_in_words(record[field])}.")
    history = record.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise UserError(
                f"{where}: 'history' must be a list of [question, answer] pairs, found {value_in_words(pair)}."
            )
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
        raise UserError(f"{where}: expected an object with a role and a text, found {value_in_words(turn)}.")
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
            f"found {value_in_words(content)}."
        )
    for field in ("reasoning_content", "name", "tool_call_id"):
        if turn.get(field) is not None:
            if not isinstance(turn[field], str):
                raise UserError(f"{where}: '{field}' must be a string, found {value_in_words(turn[field])}.")
            message[field] = turn[field]
    flag = turn.get("train", turn.get("weight"))
    if flag is not None:
        if flag not in (True, False):  # 0 and 1 compare equal to them
            raise UserError(f"{where}: 'train' (or 'weight') must be true or false, found {value_in_words(flag)}.")
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
        raise UserError(
            f"{where}: 'tools' must be a list of function descriptions (objects), found {value_in_words(tools)}."
        )
    _check_unicode(tools, f"{where}: 'tools'")
    return tools


def _tool_calls(calls, where):
    """Tool calls with their arguments as objects: the templates write them as JSON themselves."""
    calls = _parsed(calls, f"{where}: 'tool_calls'")
    if not isinstance(calls, list):
        raise UserError(f"{where}: 'tool_calls' must be a list, found {value_in_words(calls)}.")
    result = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(
                f"{where}: a tool call needs a function with 'name' and 'arguments', found {value_in_words(call)}."
            )
        of_this = f"{where}: the arguments of {reprlib.repr(function['name'])}"
        arguments = _parsed(function.get("arguments") or {}, of_this)
        if not isinstance(arguments, dict):
            raise UserError(f"{of_this} must be an object, found {value_in_words(arguments)}.")
        result.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return result


def _parsed(value, where):
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} must be valid JSON, found {value_in_words(value)}: {json_problem(error)}.") from None


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
