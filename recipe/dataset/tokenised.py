"""Conversations -> rows of tokens that fit the model, kept on disk for the next run, and figures about them.

The rows lie in the cache folder of `datasets` (HF_DATASETS_CACHE), under a hash of all that shapes them. Rows can only
be made from the fields of a `Tokeniser`, all of which are in the hash, by the code of this package and the libraries
below, which are in it too. So a new setting cannot be forgotten. Several processes that need the same rows write them
once; the others wait for the file. The one that writes has the other cores of its machine help with a large file.
"""

import ast
import collections
import dataclasses
import functools
import importlib.metadata
import math
import multiprocessing
import os
import pathlib
import sys
from array import array
from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import Any, Literal, TypedDict

from jinja2 import TemplateError

from recipe import console
from recipe.console import UserError
from recipe.dataset.conversations import Conversation, Conversations
from recipe.dataset.encoding import IGNORE_INDEX, ChatEncoder, Document, Encoded, Note, supervised_runs

BATCH = 1000  # conversations that one call of the tokenizer encodes on all cores; more only takes memory
SHARE = 5000  # conversations for which one more process starts
MOST_PROCESSES = 32  # as a container may have fewer cores than it sees
KEPT_PROBLEMS = 5  # sentences about bad rows that are kept to be printed
SCAN = 10_000  # conversations that a lazy dataset tokenises at its start: figures within some percent, in seconds
LIBRARIES = ("transformers", "tokenizers", "jinja2", "datasets", "pyarrow", "pandas")  # that read, render and tokenise


class Dropped(StrEnum):
    """Why a row is not used; the value follows a number of rows."""

    TOO_LONG = "longer than {max_length} tokens"
    NOTHING_TO_LEARN = "without a turn to learn"
    BAD = "with an error (--on_bad_row skip)"

    def words(self, max_length: int) -> str:
        """Return the reason with its numbers filled in."""
        return self.value.format(max_length=max_length)


class Row(TypedDict):
    """One conversation in tokens, as it is cached.

    documents: those in use, each at most max_length tokens; none if the row is dropped.
    dropped: name of a member of Dropped, or "".
    problem: the sentence that says why a row is bad, or "".
    notes: names of members of Note.
    unused: names of what the record has and is not used.
    length: tokens of the longest document before anything was cut.
    tokens, supervised: tokens of all documents in use, and those with a label.
    """

    documents: list[Document]
    dropped: str
    problem: str
    notes: list[str]
    unused: list[str]
    length: int
    tokens: int
    supervised: int


FIGURES = [name for name in Row.__annotations__ if name != "documents"]


@dataclasses.dataclass(frozen=True)
class Tokeniser:
    """Makes rows of conversations. All that shapes a row is a field, and therefore part of `fingerprint`.

    Args:
        conversations: where they are read from.
        encoder: how they become ids and labels.
        max_length: longest document, in tokens.
        overlong: what happens to a conversation with a longer one.
        on_bad_row: whether a record that cannot be read or rendered is an error, or a row that is dropped.
    """

    conversations: Conversations
    encoder: ChatEncoder
    max_length: int
    overlong: Literal["drop", "truncate", "error"] = "drop"
    on_bad_row: Literal["error", "skip"] = "error"

    def fingerprint(self) -> list[str]:
        """Return texts that change when some conversation could become another row."""
        fields = [getattr(self, field.name) for field in dataclasses.fields(self)]
        settings = [value.fingerprint() if hasattr(value, "fingerprint") else repr(value) for value in fields]
        return [*settings, *map(_version, LIBRARIES), code()]

    def rows(self, numbers: Sequence[int]) -> list[Row]:
        """Tokenise the conversations with these numbers.

        Raises:
            UserError: one of them cannot be read or rendered (see on_bad_row), or is too long (see overlong).
        """
        read = [self._read(number) for number in numbers]
        good = [(number, row[0]) for number, row in zip(numbers, read, strict=True) if not isinstance(row, UserError)]
        encoded = iter(self._encoded(good))
        rows = []
        for number, row in zip(numbers, read, strict=True):
            result = row if isinstance(row, UserError) else next(encoded)
            if isinstance(result, UserError):
                rows.append(self._bad(result))
            else:
                rows.append(self._fitted(number, result, row[1]))  # type: ignore[index]
        return rows

    def _read(self, number: int) -> tuple[Conversation, list[str]] | UserError:
        try:
            return self.conversations.read(number)
        except UserError as error:
            if self.on_bad_row == "error":
                raise
            return error

    def _encoded(self, batch: list[tuple[int, Conversation]]) -> list[Encoded | UserError]:
        """Encode conversations with their numbers."""
        try:
            return list(self.encoder.encode_batch([conversation for _, conversation in batch]))
        except (TemplateError, ValueError) as error:
            if len(batch) > 1:  # finds which one it was
                return [encoded for one in batch for encoded in self._encoded([one])]
            problem = UserError(f"{self.conversations.where(batch[0][0])}: {str(error).rstrip('.')}.")
            if self.on_bad_row == "error":
                raise problem from None
            return [problem]

    def _bad(self, problem: UserError) -> Row:
        return Row(
            documents=[],
            dropped=Dropped.BAD.name,
            problem=str(problem),
            notes=[],
            unused=[],
            length=0,
            tokens=0,
            supervised=0,
        )

    def _fitted(self, number: int, encoded: Encoded, unused: list[str]) -> Row:
        documents, notes, dropped = encoded.documents, list(encoded.notes), ""
        length = max((len(document["input_ids"]) for document in documents), default=0)
        if not documents:
            dropped = Dropped.NOTHING_TO_LEARN.name
        elif length > self.max_length:
            if self.overlong == "error":
                raise UserError(
                    f"{self.conversations.where(number)}: {length} tokens, expected at most {self.max_length}; raise "
                    "--model_max_length or set --overlong drop."
                )
            documents = truncated(documents, self.max_length) if self.overlong == "truncate" else []
            if documents:
                notes.append(Note.CUT)
            else:
                dropped = Dropped.TOO_LONG.name
        return {
            "documents": documents,
            "dropped": dropped,
            "problem": "",
            "notes": [note.name for note in notes],
            "unused": unused,
            "length": length,
            "tokens": sum(len(document["input_ids"]) for document in documents),
            "supervised": sum(label != IGNORE_INDEX for document in documents for label in document["labels"]),
        }


def truncated(documents: Sequence[Document], max_length: int) -> list[Document]:
    """Cut documents after their last supervised turn, stop token included, that ends within `max_length` tokens.

    A document without such a turn is left out.
    """
    result: list[Document] = []
    for document in documents:
        ends = [end for _, end in supervised_runs(document["labels"]) if end <= max_length]
        if ends:
            ids, labels, turns = document["input_ids"], document["labels"], document["turns"]
            result.append({"input_ids": ids[: ends[-1]], "labels": labels[: ends[-1]], "turns": turns[: len(ends)]})
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Rows on disk


def cached_rows(tokeniser: Tokeniser) -> Any:
    """Tokenise all conversations, or open the rows of an earlier run that had the same fingerprint.

    Returns:
        a memory-mapped `datasets.Dataset` of Row.
    Raises:
        UserError: from `Tokeniser.rows`.
    """
    import datasets
    from datasets import Features, List, Value

    ids = List(Value("int32"))
    features = Features(
        documents=List({"input_ids": ids, "labels": ids, "turns": ids}),
        dropped=Value("string"),
        problem=Value("string"),
        notes=List(Value("string")),
        unused=List(Value("string")),
        length=Value("int32"),
        tokens=Value("int64"),
        supervised=Value("int64"),
    )
    key = datasets.fingerprint.Hasher.hash(tokeniser.fingerprint())
    shown = not datasets.utils.are_progress_bars_disabled()
    datasets.utils.disable_progress_bars()  # `_generate` has one that counts conversations
    total = len(tokeniser.conversations)
    _work[key] = work = _Work(tokeniser)
    numbers = {"starts": list(range(0, total, BATCH)), "key": key}
    try:
        return datasets.Dataset.from_generator(
            _generate, features, gen_kwargs=numbers, num_proc=work.processes, fingerprint=key
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if work.processes and work.bad.value < total:
            tokeniser.rows(range(work.bad.value, min(work.bad.value + work.size, total)))  # raises it here, too
        raise error.__cause__ if isinstance(error.__cause__, UserError) else error from None
    except RuntimeError as error:
        if not work.processes:
            raise
        raise UserError(
            f"tokenising by {work.processes} processes: {str(error).partition('.')[0]}; if main memory has run out, free "
            "some, or set --lazy_preprocess, which starts none."
        ) from None
    finally:
        del _work[key]
        if shown:
            datasets.utils.enable_progress_bars()


class _Work:
    """What `_generate` works on.

    Attributes:
        processes: how many work on it, or None for this one alone.
        size: conversations that one of them works on at once.
        bad: where the first of those that hold a mistake begin, shared by all processes; else a large number.
        bar: progress of the process that has the first conversation.
    """

    def __init__(self, tokeniser: Tokeniser):
        self.tokeniser, self.processes, self.size = tokeniser, _processes(len(tokeniser.conversations)), BATCH
        self.bar: Any = None
        if self.processes:
            self.size = max(1, BATCH // 10)  # as each holds so many
            self.bad = multiprocessing.get_context("fork").Value("q", 1 << 62)

    def found_bad(self, begin: int) -> None:
        """Remember that a mistake is among the conversations from `begin` on."""
        if self.processes:
            with self.bad.get_lock():
                self.bad.value = min(self.bad.value, begin)

    def is_over(self, begin: int) -> bool:
        """Return whether a mistake was found before the conversation `begin`: only what comes before it still counts."""
        return bool(self.processes) and self.bad.value < begin

    def progress(self, begin: int, done: int) -> None:
        """Show that the `done` conversations from `begin` on are ready."""
        from tqdm import tqdm

        total = len(self.tokeniser.conversations)
        if begin == 0:
            name = f"tokenising, the first of {self.processes} processes" if self.processes else "tokenising"
            own = min(total, math.ceil(total / BATCH / (self.processes or 1)) * BATCH)
            self.bar = tqdm(total=own, desc=name, unit=" rows", disable=total < BATCH or console.rank() > 0)
        if self.bar:
            self.bar.update(done)
            if self.bar.n == self.bar.total:
                self.bar.close()


_work: dict[str, _Work] = {}  # forked processes find it here: tokenizers and open files do not travel otherwise


def _processes(conversations: int) -> int | None:
    """Return how many processes tokenise so many conversations; None: this one."""
    if not sys.platform.startswith("linux"):
        return None
    most = min(conversations // SHARE, len(os.sched_getaffinity(0)), MOST_PROCESSES)
    if most <= 1:
        return None
    import multiprocess  # which datasets uses

    return most if multiprocess.get_start_method() == "fork" else None


def _generate(starts: list[int], key: str) -> Iterator[Row]:
    """Tokenise BATCH conversations from each of `starts` on."""
    work = _work[key]
    if work.processes:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other cores have processes of their own
    total = len(work.tokeniser.conversations)
    for begin in (begin for start in starts for begin in range(start, min(start + BATCH, total), work.size)):
        if work.is_over(begin):
            raise RuntimeError("another process has found a mistake")
        try:
            rows = work.tokeniser.rows(range(begin, min(begin + work.size, total)))
        except UserError:
            work.found_bad(begin)
            raise
        yield from rows
        work.progress(begin, len(rows))


def _version(library: str) -> str:
    try:
        return f"{library} {importlib.metadata.version(library)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{library} none"


@functools.cache
def code() -> str:
    """Return the code of every module of this package, so that none that shapes rows can be left out.

    Comments, docstrings and layout are not in it: they change no row.
    """
    folder = pathlib.Path(__file__).parent
    return "\n".join(f"{path.name}\n{_bare(path.read_text(encoding='utf-8'))}" for path in sorted(folder.glob("*.py")))


def _bare(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


# ----------------------------------------------------------------------------------------------------------------------
# Figures


class Figures:
    """What a dataset's rows are, without their documents; arrays, as a million rows take 20 MB so, and 100 in lists.

    Attributes:
        kept: int64 array, numbers of the conversations in use.
        dropped: numbers of the others, by the reason.
        lengths: int32 array, tokens of the longest document of every conversation, before anything was cut.
        sizes: int64 array, tokens of all documents in use of every conversation.
        notes: how many conversations have each note; unused: the same for each name of what is not used.
        problems: the first sentences about bad rows.
        tokens, supervised: sums over the conversations in use.
    """

    def __init__(self) -> None:
        self.kept, self.lengths, self.sizes = array("q"), array("i"), array("q")
        self.dropped: dict[Dropped, list[int]] = {}
        self.notes: collections.Counter[Note] = collections.Counter()
        self.unused: collections.Counter[str] = collections.Counter()
        self.problems: list[str] = []
        self.tokens = self.supervised = 0

    def add(
        self,
        dropped: str,
        problem: str,
        notes: Sequence[str],
        unused: Sequence[str],
        length: int,
        tokens: int,
        supervised: int,
    ) -> None:
        """Count the next conversation; the arguments are FIGURES of its row."""
        number = len(self.lengths)
        if problem and len(self.problems) < KEPT_PROBLEMS:
            self.problems.append(problem)
        self.lengths.append(length)
        self.sizes.append(tokens)
        self.notes.update(Note[name] for name in notes)
        self.unused.update(unused)
        if dropped:
            self.dropped.setdefault(Dropped[dropped], []).append(number)
        else:
            self.kept.append(number)
            self.tokens += tokens
            self.supervised += supervised

    def reasons(self, max_length: int) -> str:
        """Say why rows were dropped and what to do, for the case that none is left."""
        counted = "; ".join(f"{len(rows)} {reason.words(max_length)}" for reason, rows in self.dropped.items())
        return " ".join([f"{counted}. Raise --model_max_length or mend the data.", *self.problems[:1]])


def figures_of_table(rows: Any) -> Figures:
    """Count the rows of a `datasets.Dataset`, without reading their documents."""
    figures = Figures()
    columns = [rows.data.column(name).to_pylist() for name in FIGURES]
    for row in zip(*columns, strict=True):
        figures.add(*row)
    return figures


def figures_of(tokeniser: Tokeniser, count: int) -> Figures:
    """Tokenise the first `count` conversations and count them."""
    figures = Figures()
    for start in range(0, count, BATCH):
        for row in tokeniser.rows(range(start, min(start + BATCH, count))):
            figures.add(*(row[name] for name in FIGURES))  # type: ignore[literal-required]
    return figures
