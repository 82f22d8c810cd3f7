"""From what --data_path names to open files: files, folders, patterns, datasets of the hub, entries of a config file."""

import dataclasses
import difflib
import glob
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from recipe.console import UserError
from recipe.dataset.files import Records, TextRecords, json_problem
from recipe.dataset.messages import FIELDS
from recipe.dataset.shapes import RECORD_FIELDS, SHAPES
from recipe.dataset.tables import DEFAULT_SPLIT, TABLES, ending_of, open_hub, open_saved, open_table, table_kind

TEXTS = (".json", ".jsonl", ".ndjson")
EXPECTED: dict[str, tuple[Any, str]] = {  # of the fields of an entry
    "path": (str, "a text"),
    "name": (str, "a text"),
    "split": (str, "a text"),
    "rows": (int, "a number of rows"),
    "weight": ((int, float), "a number"),
}
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclasses.dataclass(frozen=True)
class Source:
    """One entry of --data_path.

    Args:
        path: file, folder, pattern, or dataset of the hub.
        name: configuration of a dataset of the hub.
        split: of a dataset of the hub or of a folder; "train" if it has several.
        rows: how many of its rows are used, from the first on (None: all).
        weight: share of the rows of an epoch that is drawn from it, relative to the weights of the other sources.
        columns: {field that is understood: field of these records}.
    """

    path: str
    name: str | None = None
    split: str | None = None
    rows: int | None = None
    weight: float | None = None
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def open(self) -> tuple[list[Records], list[str]]:
        """Open the files of this source.

        Returns:
            (files, sentences about files that are left out).
        Raises:
            UserError: there is none, or one cannot be read.
        """
        path = os.path.expanduser(self.path)
        if os.path.isdir(path):
            return self._open_folder(path)
        if not os.path.exists(path):
            matches = sorted(glob.glob(path, recursive=True))
            if not matches:
                return [self._open_name(path)], []
            opened = [dataclasses.replace(self, path=match).open() for match in matches]
            return [file for files, _ in opened for file in files], [word for _, words in opened for word in words]
        if self.split or self.name:
            raise UserError(f"{path}: is a file, which has no split and no configuration; leave out split and name.")
        return [_open_file(path)], []

    def _open_folder(self, folder: str) -> tuple[list[Records], list[str]]:
        from datasets import config

        if self.name:
            return [open_hub(folder, self.name, self.split)], []
        markers = (config.DATASET_STATE_JSON_FILENAME, config.DATASETDICT_JSON_FILENAME)
        if any(os.path.exists(os.path.join(folder, marker)) for marker in markers):
            return [open_saved(folder, self.split)], []
        by_split, others = _data_files(folder)
        split = self.split or DEFAULT_SPLIT
        if split not in by_split:
            found = f"its files are of the splits {', '.join(by_split)}: name one as split"
            found = found if by_split else f"expected {', '.join((*TEXTS, *TABLES))}"
            raise UserError(f"{folder}: the folder has no data file of the split {split!r}; {found}.")
        left_out = [(f"of the split {name}", paths) for name, paths in by_split.items() if name != split]
        left_out += [("that are no data", others)] if others else []
        words = [f"{folder}: left out {len(paths)} {what}, the first is {paths[0]}" for what, paths in left_out]
        return [_open_file(path) for path in by_split[split]], words

    def _open_name(self, name: str) -> Records:
        looks_like_a_file = ending_of(name) in TEXTS or ending_of(name) in TABLES or not HUB_NAME.fullmatch(name)
        if looks_like_a_file:
            raise UserError(f"{self.path}: no such file; check the path (relative paths start at {os.getcwd()}).")
        return open_hub(name, self.name, self.split)


def _open_file(path: str) -> Records:
    try:
        kind = table_kind(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path.") from None
    return open_table(path, kind) if kind else TextRecords(path)


def _data_files(folder: str) -> tuple[dict[str, list[str]], list[str]]:
    """Return the data files below a folder, by their splits, and the other files."""
    from datasets.data_files import FILES_TO_IGNORE

    by_split: dict[str, list[str]] = {}
    others: list[str] = []
    for path in _files_below(folder):
        if ending_of(path) in (*TEXTS, *TABLES) and os.path.basename(path) not in FILES_TO_IGNORE:
            by_split.setdefault(_split_of(os.path.relpath(path, folder)), []).append(path)
        else:
            others.append(path)
    return by_split, others


def _files_below(folder: str) -> list[str]:
    """Return the files of a folder and of the folders in it, in order, without hidden ones."""
    paths = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        paths += [os.path.join(parent, name) for name in sorted(names) if not name.startswith(".")]
    return paths


def _split_of(path: str) -> str:
    """Return the split of which a file is by its name, or by that of a folder it is in, as `datasets` names them."""
    from datasets.data_files import SPLIT_KEYWORDS

    words = set(re.split(r"[^a-z]+", path.lower()))
    return next((str(split) for split, keywords in SPLIT_KEYWORDS.items() if words & set(keywords)), DEFAULT_SPLIT)


# ----------------------------------------------------------------------------------------------------------------------
# Entries as text


def parse_sources(entries: Sequence[str], columns: Sequence[str] | None = None) -> list[Source]:
    """Parse the entries of --data_path: a path each, or JSON text with the fields of a Source.

    Args:
        columns: those of --columns, for entries without their own.
    Raises:
        UserError: an entry or a column is malformed.
    """
    default = parse_columns(columns or [])
    sources = [_parse_source(entry, default) for entry in entries]
    lacking = [source.path for source in sources if source.weight is None]
    if 0 < len(lacking) < len(sources):
        raise UserError(
            f"--data_path {lacking[0]}: has no weight, while other entries have one; give each one or none."
        )
    return sources


def _parse_source(entry: str, columns: dict[str, str]) -> Source:
    if not entry.lstrip().startswith("{") or os.path.exists(entry):
        return Source(entry, columns=columns)
    try:
        fields = json.loads(entry)
    except ValueError as error:
        raise UserError(f"--data_path {entry}: not valid JSON: {json_problem(error)}.") from None
    known = [field.name for field in dataclasses.fields(Source)]
    for name in fields:
        if name not in known:
            raise UserError(f"--data_path {entry}: {_unknown(name, known)}")
    for name, value in fields.items():
        kind, expected = EXPECTED.get(name, (object, ""))
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise UserError(f"--data_path {entry}: {name} must be {expected}, found {value!r}.")
    if not fields.get("path"):
        raise UserError(f"--data_path {entry}: has no path.")
    if fields.get("rows") is not None and fields["rows"] < 1:
        raise UserError(f"--data_path {entry}: rows must be at least 1.")
    if fields.get("weight") is not None and not 0 < fields["weight"] < math.inf:
        raise UserError(f"--data_path {entry}: weight must be above 0; leave out an entry that is not wanted.")
    own = fields.pop("columns", None)
    return Source(**fields, columns=columns if own is None else parse_columns([json.dumps(own)]))


def parse_columns(words: Sequence[str]) -> dict[str, str]:
    """Parse --columns: words of the form prompt=question, or one JSON object.

    Raises:
        UserError: a word has another form, or maps to a field that is not understood.
    """
    if len(words) == 1 and words[0].lstrip().startswith("{"):
        try:
            columns = json.loads(words[0])
        except ValueError as error:
            raise UserError(f"--columns {words[0]}: not valid JSON: {json_problem(error)}.") from None
    else:
        columns = dict(word.partition("=")[::2] for word in words)
    known = {*(name for shape in SHAPES for name in (*shape.fields, *shape.also)), *RECORD_FIELDS, *FIELDS}
    for ours, theirs in columns.items():
        if not isinstance(theirs, str) or not theirs:
            raise UserError(f"--columns {ours}: expected the form prompt=question, our field and the file's.")
        if ours not in known:
            raise UserError(f"--columns {ours}={theirs}: {_unknown(ours, sorted(known))}")
    return columns


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"unknown field {name!r}; " + (
        f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}."
    )
