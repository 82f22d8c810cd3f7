"""Read conversations from files: records of several shapes go in, one kind of conversation comes out.

    conversations = Conversations(["data/train.jsonl"])   # JSON, JSON Lines, .gz, Parquet, CSV or a hub dataset
    conversations[0], conversations.where(0)

No text of a file is kept in memory: text files are indexed by byte offset and read record by record, Parquet and CSV
files are memory-mapped by `datasets`.
"""

import bisect
import copy
import itertools
import os
import re
from collections.abc import Sequence
from typing import Any, NotRequired, TypedDict

import numpy as np

from recipe.console import UserError
from recipe.dataset.files import Records, open_records, value_in_words
from recipe.dataset.messages import Message, to_message, to_tools
from recipe.dataset.shapes import shape_of


class Conversation(TypedDict):
    """Messages in their order, a system message only as the first, and the tools that the model may call."""

    messages: list[Message]
    tools: NotRequired[list[dict]]


def to_conversation(record: Any, where: str) -> Conversation:
    """Convert one record of any accepted shape.

    Args:
        record: the value as read from the file.
        where: words that name the file and the record, for error messages.
    Raises:
        UserError: one sentence with file, record, turn, what was found and what was expected.
    """
    shape = shape_of(record, where)
    turns = shape.turns(record, where)
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: '{shape.name}' must be a non-empty list of turns, found {value_in_words(turns)}.")
    messages = [to_message(turn, f"{where}, turn {number}") for number, turn in enumerate(turns, 1)]
    has_system = record.get("system") not in (None, "")
    for number, message in enumerate(messages, 1):
        if message["role"] == "system" and (has_system or number > 1):
            raise UserError(
                f"{where}, turn {number}: found a system message; expected at most one, as the first turn or as the "
                "record's 'system', so move or remove it."
            )
    if has_system:  # only now, so that turns were counted as in the file
        messages.insert(0, to_message({"role": "system", "content": record["system"]}, f"{where}, 'system'"))
    conversation: Conversation = {"messages": messages}
    tools = record.get("tools") and to_tools(record["tools"], where)
    if tools:
        conversation["tools"] = tools
    return conversation


class Conversations(Sequence[Conversation]):
    """The records of several files as one sequence of conversations.

    Args:
        paths: files or hub datasets.
        indices: int64 [rows], which records, in the order of the files (None: all).
    """

    def __init__(self, paths: Sequence[str], indices: Any = None):
        self.sources: list[Records] = [open_records(path) for path in paths]
        self._ends = list(itertools.accumulate(len(source) for source in self.sources))
        self.indices = indices

    def __len__(self) -> int:
        return self._ends[-1] if self.indices is None else len(self.indices)

    def _locate(self, index: int) -> tuple[Records, int]:
        index = range(len(self))[index]
        index = int(index if self.indices is None else self.indices[index])
        file = bisect.bisect_right(self._ends, index)
        return self.sources[file], index - (self._ends[file - 1] if file else 0)

    def subset(self, indices: Any) -> "Conversations":
        """Return a view of some of the records, int64 [rows], of the same open files."""
        view = copy.copy(self)
        view.indices = indices
        return view

    def where(self, index: int) -> str:
        """Name the file and the record of a conversation."""
        source, record = self._locate(index)
        return source.where(record)

    def __getitem__(self, index: int) -> Conversation:  # type: ignore[override]  # no slices
        source, record = self._locate(index)
        return to_conversation(source[record], source.where(record))

    def fingerprint(self) -> str:
        """Return a text that changes with the files, their order and the choice of records, for caches."""
        chosen = "all" if self.indices is None else self.indices.tobytes().hex()
        return "|".join([*(source.fingerprint() for source in self.sources), chosen])

    def shapes(self) -> dict[str, str]:
        """Return the shape of each file's first record, by the file's name, for the log."""
        return {source.name: shape_of(source[0], source.where(0)).name for source in self.sources}


def named_paths(paths: Sequence[str]) -> dict[str, str]:
    """Return the paths by their names for the log: the file's own name, or the whole path if two have the same."""
    names = [os.path.basename(path).split(".")[0] for path in paths]
    if len(set(names)) < len(names):
        names = [re.sub(r"\W+", "_", path).strip("_") for path in paths]
    return dict(zip(names, paths, strict=True))


def hold_out(paths: Sequence[str], ratio: float, seed: int) -> tuple[Conversations, Conversations]:
    """Split the records of files in two at random: those to train on, and the share `ratio` that is held out.

    Raises:
        UserError: one of the two would be empty.
    """
    whole = Conversations(paths)
    total = len(whole)
    held_out = round(total * ratio)
    if not 0 < held_out < total:
        raise UserError(f"--eval_ratio {ratio} of {total} rows leaves {held_out} to evaluate; change it or add rows.")
    order = np.random.default_rng(seed).permutation(total)
    return whole.subset(np.sort(order[held_out:])), whole.subset(np.sort(order[:held_out]))
