"""Read conversations from files: records of several shapes go in, one kind of conversation comes out.

    conversations = Conversations(["data/train.jsonl"])   # JSON, JSON Lines, .gz, Parquet, CSV or a hub dataset
    conversations[0], conversations.where(0)

No text of a file is kept in memory: text files are indexed by byte offset and read record by record, Parquet and CSV
files are memory-mapped by `datasets`.
"""

import bisect
import contextlib
import copy
import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import numpy as np

from recipe.console import UserError
from recipe.dataset.files import Records, value_in_words
from recipe.dataset.messages import (
    EMPTY,
    FIELDS,
    Message,
    field,
    json_list,
    parsed,
    to_message,
    to_tools,
    unused_fields,
)
from recipe.dataset.mixing import Mixture
from recipe.dataset.shapes import BARE_LIST, RECORD_FIELDS, Shape, shape_of
from recipe.dataset.sources import Source, parse_sources

LOOKED_AT = 100  # records at the beginning of a file, to name its shape
MEDIA_MARKER = re.compile(r"<(image|img|video|audio)>")


class Conversation(TypedDict):
    """Messages in their order, a system message only as the first, and what else goes into the chat template."""

    messages: list[Message]
    tools: NotRequired[list[dict]]
    chat_template_kwargs: NotRequired[dict[str, Any]]


def to_conversation(record: Any, where: str, columns: Mapping[str, str] | None = None) -> Conversation:
    """Convert one record of any accepted shape; see `read_record`."""
    return read_record(record, where, columns)[0]


def read_record(record: Any, where: str, columns: Mapping[str, str] | None = None) -> tuple[Conversation, list[str]]:
    """Convert one record of any accepted shape.

    Args:
        record: the value as read from the file.
        where: words that name the file and the record, for error messages.
        columns: {field that is understood: field of the record or of its turns}.
    Returns:
        (conversation, names of what the record has and is not used).
    Raises:
        UserError: one sentence with file, record, turn, what was found and what was expected.
    """
    record = renamed(record, columns)
    shape = shape_of(record, where, columns or ())
    turns = shape.turns(record, where)
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: '{shape.name}' must be a non-empty list of turns, found {value_in_words(turns)}.")
    turns = [renamed(turn, columns) for turn in turns]
    messages = [to_message(turn, f"{where}, turn {number}") for number, turn in enumerate(turns, 1)]
    record = {} if shape is BARE_LIST else record
    unused = [*_flag_turns(record, messages, where), *_unused(record, shape, turns)]
    system = field(record, "system", RECORD_FIELDS, where)
    for number, message in enumerate(messages, 1):
        if message["role"] == "system" and (system or number > 1):
            raise UserError(
                f"{where}, turn {number}: found a system message; expected at most one, as the first turn or as the "
                "record's 'system', so move or remove it."
            )
    if system:  # only now, so that turns were counted as in the file
        messages.insert(0, to_message({"role": "system", "content": system}, f"{where}, 'system'"))
    conversation: Conversation = {"messages": messages}
    tools = field(record, "tools", RECORD_FIELDS, where)
    if tools and (described := to_tools(tools, where)):
        conversation["tools"] = described
    variables = field(record, "chat_template_kwargs", RECORD_FIELDS, where)
    if variables and (variables := parsed(variables, f"{where}: 'chat_template_kwargs'")):
        if not isinstance(variables, dict):
            raise UserError(f"{where}: 'chat_template_kwargs' must be an object, found {value_in_words(variables)}.")
        conversation["chat_template_kwargs"] = variables
    return conversation, unused


def renamed(record: Any, columns: Mapping[str, str] | None) -> Any:
    """Give fields the names that are understood; a field whose name is taken by another is kept under "name (own)"."""
    if not columns or not isinstance(record, dict):
        return record
    mapped = {ours: record[theirs] for ours, theirs in columns.items() if theirs in record}
    rest = {name: value for name, value in record.items() if name not in mapped and name not in columns.values()}
    hidden = {f"{name} (own)": record[name] for name in mapped if name in record and name not in columns.values()}
    return {**mapped, **rest, **hidden}


def _flag_turns(record: dict, messages: list[Message], where: str) -> list[str]:
    """Apply the loss flags of a record, one for each turn or one for all, to its messages.

    Returns:
        names of those that are not used.
    """
    unused = []
    for name in (name for name in FIELDS["train"] if record.get(name) is not None):
        flags = json_list(record[name], f"{where}: {name!r}")
        if isinstance(flags, str):  # of a table
            flags = {"true": True, "1": True, "false": False, "0": False}.get(flags.lower())
        by_turn = isinstance(flags, list)
        if by_turn:
            if len(flags) != len(messages) or any(flag not in (True, False) for flag in flags):
                raise UserError(
                    f"{where}: {name!r} must be true or false (1 or 0), or a list of them with one for each of the "
                    f"{len(messages)} turns, found {value_in_words(flags)}."
                )
        elif flags is not None and flags in (True, False):
            flags = [bool(flags) and message.get("train", True) for message in messages]
        else:  # a number with another meaning
            unused.append(name)
            continue
        for number, (message, flag) in enumerate(zip(messages, flags, strict=True), 1):
            if message["role"] == "assistant":
                if message.setdefault("train", bool(flag)) != bool(flag):
                    raise UserError(f"{where}, turn {number}: its loss flag contradicts the record's {name!r}.")
            elif flag and by_turn:
                unused.append(f"{name} of turns that are not the assistant's")
    return list(dict.fromkeys(unused))


def _unused(record: dict, shape: Shape, turns: list[dict]) -> Iterator[str]:
    """Name the fields of a record and of its turns that are not used, and markers of images in its text."""
    known = {*shape.fields, *shape.also, *FIELDS["train"], *(s for names in RECORD_FIELDS.values() for s in names)}
    yield from (name for name, value in record.items() if name not in known and value not in EMPTY)
    yield from dict.fromkeys(name for turn in turns for name in unused_fields(turn))
    if any(isinstance(text, str) and MEDIA_MARKER.search(text) for turn in turns for text in turn.values()):
        yield "markers of images in the text, such as <image>, which are read letter by letter"


class Conversations(Sequence[Conversation]):
    """The records of several sources as one sequence of conversations.

    Args:
        sources: entries of --data_path, as text or parsed.
        indices: int64 [rows], which records, in the order of the sources (None: all).
    Attributes:
        left_out: sentences about files of folders that are not read.
    """

    def __init__(self, sources: Sequence[str | Source], indices: Any = None):
        self.sources = [parse_sources([source])[0] if isinstance(source, str) else source for source in sources]
        self.indices = indices
        self.left_out: list[str] = []
        self._files: list[tuple[Records, Source]] = []
        self._source_of_file: list[int] = []
        self._ends: list[int] = []  # number of records up to the end of each file
        for number, source in enumerate(self.sources):
            files, left_out = source.open()
            self.left_out += left_out
            rest = sum(map(len, files)) if source.rows is None else source.rows
            for file in files:
                used, rest = min(len(file), rest), rest - min(len(file), rest)
                self._files.append((file, source))
                self._source_of_file.append(number)
                self._ends.append(used + (self._ends[-1] if self._ends else 0))

    def __len__(self) -> int:
        return self._ends[-1] if self.indices is None else len(self.indices)

    def _locate(self, index: int) -> tuple[Records, int, Source]:
        index = range(len(self))[index]
        index = int(index if self.indices is None else self.indices[index])
        number = bisect.bisect_right(self._ends, index)
        file, source = self._files[number]
        return file, index - (self._ends[number - 1] if number else 0), source

    def subset(self, indices: Any) -> "Conversations":
        """Return a view of some of the records, int64 [rows], of the same open files."""
        view = copy.copy(self)
        view.indices = indices
        return view

    def sources_of(self, indices: Any) -> np.ndarray:
        """Return the number of the source of each conversation, int64 [rows]."""
        return np.asarray(self._source_of_file)[self.file_of(indices)]

    def file_of(self, indices: Any) -> np.ndarray:
        """Return the number in `files` of the file of each conversation, int64 [rows]."""
        indices = np.asarray(indices, dtype=np.int64)
        records = indices if self.indices is None else np.asarray(self.indices)[indices]
        return np.searchsorted(self._ends, records, side="right")

    def files(self) -> list[Records]:
        """Return the open files, in their order."""
        return [file for file, _ in self._files]

    def mixture(self, indices: Any) -> Mixture | None:
        """Return how the conversations with these indices are mixed; None if the sources have no weights."""
        if self.sources[0].weight is None:
            return None
        weights = [source.weight or 0.0 for source in self.sources]
        return Mixture(self.sources_of(indices), weights, [source.path for source in self.sources])

    def where(self, index: int) -> str:
        """Name the file and the record of a conversation."""
        file, record, _ = self._locate(index)
        return file.where(record)

    def __getitem__(self, index: int) -> Conversation:  # type: ignore[override]  # no slices
        return self.read(index)[0]

    def read(self, index: int) -> tuple[Conversation, list[str]]:
        """Read a conversation and the names of what its record has and is not used; see `read_record`."""
        file, record, source = self._locate(index)
        return read_record(file[record], file.where(record), source.columns)

    def fingerprint(self) -> str:
        """Return a text that changes with the sources, their files and order, and the choice of records."""
        chosen = "all" if self.indices is None else self.indices.tobytes().hex()
        settings = (repr(dataclasses.replace(source, path="")) for source in self.sources)
        return "|".join([*settings, *(file.fingerprint() for file, _ in self._files), chosen])

    def readable(self, indices: Iterable[int]) -> Iterator[Conversation]:
        """Read those of the conversations that can be read."""
        for index in indices:
            with contextlib.suppress(UserError):
                yield self[index]

    def shapes(self) -> dict[str, str]:
        """Return the shape of each file's first record that has one, by the file's name, for the log."""
        return {file.name: _first_shape(file, source.columns) for file, source in self._files}


def _first_shape(file: Records, columns: Mapping[str, str]) -> str:
    for number in range(min(len(file), LOOKED_AT)):
        with contextlib.suppress(UserError):
            return shape_of(renamed(file[number], columns), "", columns).name
    return "no record can be read"


def named_sources(sources: Sequence[Source]) -> dict[str, Source]:
    """Return sources by their names for the log: the file's own name, or the whole path if two have the same."""
    paths = [source.path.rstrip("/") for source in sources]
    names = [os.path.basename(path).split(".")[0] for path in paths]
    if len(set(names)) < len(names):
        names = [re.sub(r"\W+", "_", path).strip("_") for path in paths]
    return dict(zip(names, sources, strict=True))


def hold_out(sources: Sequence[str | Source], ratio: float, seed: int) -> tuple[Conversations, Conversations]:
    """Split the records of sources in two at random: those to train on, and the share `ratio` that is held out.

    Raises:
        UserError: one of the two would be empty.
    """
    whole = Conversations(sources)
    total = len(whole)
    held_out = round(total * ratio)
    if not 0 < held_out < total:
        raise UserError(f"--eval_ratio {ratio} of {total} rows leaves {held_out} to evaluate; change it or add rows.")
    order = np.random.default_rng(seed).permutation(total)
    return whole.subset(np.sort(order[held_out:])), whole.subset(np.sort(order[:held_out]))
