"""Read records from tables: Parquet, CSV, Arrow, a folder that `save_to_disk` wrote, a dataset of the hub.

All of them are memory-mapped by `datasets`.
"""

import glob
import os
from collections.abc import Callable
from typing import Any

from recipe.console import UserError

TABLES = {  # endings of files: the name `datasets` has for the kind, what the file must be, and how it may begin
    ".parquet": ("parquet", "a whole Parquet file with at least one row", b"PAR1"),
    ".arrow": ("arrow", "a whole Arrow file with at least one row", b"ARROW1"),
    ".csv": ("csv", "UTF-8 text, a line of column names, and texts with commas in quotes", None),
    ".tsv": ("csv", "UTF-8 text, a line of column names, and texts with tabs in quotes", None),
}
PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4")  # endings of compressed files
DEFAULT_SPLIT = "train"


class TableRecords:
    """Records of a table.

    Args:
        name: for messages.
        rows: a `datasets.Dataset`.
    Raises:
        UserError: it holds no record.
    """

    def __init__(self, name: str, rows: Any):
        self.name, self._rows = name, rows
        if not len(rows):
            raise UserError(f"{name}: holds no record; expected at least one conversation.")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        try:
            row = self._rows[int(index)]
        except UnicodeDecodeError as error:  # the formats do not check their texts when they are written or opened
            raise UserError(f"{self.where(index)}: a text in it is not UTF-8 ({error.reason}).") from None
        return _without_filled_in(row, self._rows.features)

    def where(self, index: int) -> str:
        """Name the file and the record, counted from 1."""
        return f"{self.name}: record {index + 1}"

    def fingerprint(self) -> str:
        """Return what `datasets` computes from the file's content or the hub's commit."""
        return self._rows._fingerprint


def ending_of(path: str) -> str:
    """Return the ending of a file's name in small letters, without that of a compression: .jsonl of rows.JSONL.gz."""
    stem, ending = os.path.splitext(path.lower())
    return os.path.splitext(stem)[1] if ending in PACKED else ending


def table_kind(path: str) -> str | None:
    """Return the ending in TABLES that says how to read a file, from its name or its first bytes; None for text."""
    ending = ending_of(path)
    if ending in TABLES:
        return ending
    if not os.path.isfile(path):  # a pipe can be read but once
        return None
    with open(path, "rb") as file:
        start = file.read(6)
    return next((kind for kind, (_, _, magic) in TABLES.items() if magic and start.startswith(magic)), None)


def open_table(path: str, kind: str) -> TableRecords:
    """Open a file of a kind in TABLES.

    Raises:
        UserError: it cannot be loaded or holds no record.
    """
    import datasets

    builder, expected, _ = TABLES[kind]

    def load() -> Any:
        options = _csv_options(path, "\t" if kind == ".tsv" else ",") if builder == "csv" else {}
        return datasets.load_dataset(builder, data_files=glob.escape(path), split="train", **options)

    return TableRecords(path, _loaded(path, load, lambda error: f"expected {expected}"))


def open_saved(folder: str, split: str | None) -> TableRecords:
    """Open a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote.

    Raises:
        UserError: it cannot be loaded, or has no such split.
    """
    import datasets

    saved = _loaded(folder, lambda: datasets.load_from_disk(folder), lambda error: "save it again")
    if isinstance(saved, datasets.DatasetDict):
        if (split or DEFAULT_SPLIT) not in saved:
            raise UserError(
                f"{folder}: has no split {split or DEFAULT_SPLIT!r}; it has {', '.join(saved)}: name one as split."
            )
        saved = saved[split or DEFAULT_SPLIT]
    elif split:
        raise UserError(f"{folder}: is one dataset without splits; leave out split {split!r}.")
    return TableRecords(folder, saved)


def open_hub(name: str, configuration: str | None, split: str | None) -> TableRecords:
    """Open a dataset of the hub, or a folder that is a clone of one.

    Raises:
        UserError: it cannot be loaded; the sentence lists the configurations or splits that it has.
    """
    import datasets

    def load() -> Any:
        return datasets.load_dataset(name, configuration, split=split or DEFAULT_SPLIT)

    def remedy(error: Exception) -> str:
        listed = _choices(name, configuration, split or DEFAULT_SPLIT) if isinstance(error, ValueError) else None
        return listed or "expected a file or a hub dataset of this name"

    place = name + (f" ({configuration})" if configuration else "") + (f" [{split}]" if split else "")
    return TableRecords(place, _loaded(name, load, remedy))


def _choices(name: str, configuration: str | None, split: str) -> str | None:
    """List the configurations or the splits of a dataset if the one that is asked for is not among them."""
    import datasets

    configurations = datasets.get_dataset_config_names(name)
    if (configuration or configurations[0]) not in configurations or (not configuration and len(configurations) > 1):
        return f"it has the configurations {', '.join(configurations)}: choose one with name"
    splits = datasets.get_dataset_split_names(name, configuration)
    return None if split in splits else f"it has the splits {', '.join(splits)}: choose one with split"


def _loaded(name: str, load: Callable[[], Any], remedy: Callable[[Exception], str]) -> Any:
    try:
        return load()
    except UserError:
        raise
    except Exception as error:  # every reader behind `datasets` has its own exceptions
        detail = str(error.__cause__ or error).strip() or type(error).__name__
        raise UserError(f"{name}: cannot be loaded ({detail.splitlines()[0].rstrip('.')}); {remedy(error)}.") from None


def _csv_options(path: str, delimiter: str) -> dict[str, Any]:
    """Read all columns of a CSV file as text, so that an answer such as 42, 007 or NA stays what was written."""
    import datasets
    import pandas

    head = pandas.read_csv(path, nrows=1, delimiter=delimiter)
    if head.empty:
        raise UserError(f"{path}: holds no record; expected a line of column names and a line for each conversation.")
    if not isinstance(head.index, pandas.RangeIndex):  # pandas would take the first field for a row label
        raise UserError(f"{path}: record 1: has more fields than the {len(head.columns)} columns; quote its commas.")
    features = datasets.Features({column: datasets.Value("string") for column in head.columns})
    return {"features": features, "keep_default_na": False, "na_values": [""], "sep": delimiter}


def _without_filled_in(value: Any, feature: Any) -> Any:
    """Remove the nulls with which Arrow fills the fields that an object lacks; those of JSON columns were written."""
    if isinstance(feature, dict) and isinstance(value, dict):
        kept = {name: item for name, item in value.items() if item is not None}
        return {name: _without_filled_in(item, feature.get(name)) for name, item in kept.items()}
    if isinstance(value, list):
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return [_without_filled_in(item, inner) for item in value]
    return value
