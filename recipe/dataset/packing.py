"""Rows of a fixed number of tokens, the order of an epoch, and datasets padded to whole batches."""

import bisect
import itertools
import math
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from recipe.dataset.rendering import Document, padding_document

OPEN_PACKS = 256  # the fill no longer grows beyond some hundred, while the search for the best pack takes longer
CHUNK = 10_000  # row numbers that become Python integers at a time; a list of a million takes 36 MB


class PackedDataset(torch.utils.data.Dataset):
    """A dataset whose items are documents of several conversations, as many as fit into `tokens` tokens.

    Best-fit packing (Ding et al., arXiv 2404.10830), with a bounded number of open packs: conversations are taken in a
    random order (or in that of the dataset), and each goes into the open pack that it fills best. A conversation whose
    documents do not fit into one pack together is divided by document. No document is cut.

    Args:
        dataset: a `SupervisedDataset` none of whose documents is longer than `tokens`.
        tokens: length of a row.
        seed: for the order; None keeps that of the dataset. A dataset with a mixture is packed as its first epoch.
        pad_to_full: append a document without labels to each pack, so that all rows are equally long.
    Attributes:
        held: tokens of all packs.
    """

    def __init__(self, dataset: Any, tokens: int, seed: int | None = None, pad_to_full: bool = False):
        self.dataset, self.tokens, self.pad_to_full = dataset, tokens, pad_to_full
        order = list(range(len(dataset)))
        if getattr(dataset, "mixture", None) is not None:
            order = dataset.mixture.order(0, seed or 0).tolist()
        elif seed is not None:
            random.Random(seed).shuffle(order)
        self.held = 0
        self.packs: list[list[tuple[int, int | None]]] = []  # of (item, number of the document or None for all)
        opened: list[tuple[int, int]] = []  # sorted (room, number of the pack)
        for index, document, size in self._units(order):
            self.held += size
            fits = bisect.bisect_left(opened, (size, 0))
            if fits < len(opened):
                room, pack = opened.pop(fits)
            else:
                room, pack = tokens, len(self.packs)
                self.packs.append([])
            self.packs[pack].append((index, document))
            bisect.insort(opened, (room - size, pack))
            if len(opened) > OPEN_PACKS:
                del opened[0]  # the fullest

    def _units(self, order: list[int]) -> Iterator[tuple[int, int | None, int]]:
        for index in order:
            size = self.dataset.sizes[self.dataset.kept[index]]
            if size <= self.tokens:
                yield index, None, size
            else:
                for number, document in enumerate(self.dataset[index]):
                    yield index, number, len(document["input_ids"])

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> list[Document]:
        documents: list[Document] = []
        for item, number in self.packs[index]:
            whole = self.dataset[item]
            documents += whole if number is None else [whole[number]]
        rest = self.tokens - sum(len(document["input_ids"]) for document in documents)
        return [*documents, padding_document(rest)] if self.pad_to_full and rest else documents


def conversations(dataset: Any) -> Any:
    """Return the `SupervisedDataset` of a training, also if its conversations are packed."""
    return dataset.dataset if isinstance(dataset, PackedDataset) else dataset


def packed(dataset: Any, tokens: int, args: Any) -> PackedDataset:
    """Pack a dataset in the order and to the shape that TrainingArguments ask for."""
    seed = None if args.train_sampling_strategy == "sequential" else args.seed
    return PackedDataset(dataset, tokens, seed, args.torch_compile)


class EpochSampler(torch.utils.data.Sampler[int]):
    """The rows of an epoch, followed by those that fill it up to whole batches (see `PaddedToBatch`).

    Args:
        order: function that returns the order of the next epoch, int64 [rows], when the epoch starts.
        rows: number of rows of the dataset.
        padded_rows: the same with those that fill up the last batch.
    """

    def __init__(self, order: Callable[[], torch.Tensor], rows: int, padded_rows: int):
        self.order, self.rows, self.padded_rows = order, rows, padded_rows

    def __len__(self) -> int:
        return self.padded_rows

    def __iter__(self) -> Iterator[int]:
        for part in self.order().split(CHUNK):
            yield from part.tolist()
        yield from range(self.rows, self.padded_rows)


class SharedRows(torch.utils.data.Sampler[int]):
    """The rows of a sampler, each batch of them several times in a row: for the ranks that share them.

    Args:
        sampler: the rows.
        batch: how many make a batch of a rank; a last one that is not full is left out.
        count: how many neighbouring ranks take the same batch.
    """

    def __init__(self, sampler: Collection[int], batch: int, count: int):
        self.sampler, self.batch, self.count = sampler, batch, count

    def __len__(self) -> int:
        return len(self.sampler) // self.batch * self.batch * self.count

    def __iter__(self) -> Iterator[int]:
        rows = iter(self.sampler)
        while len(batch := list(itertools.islice(rows, self.batch))) == self.batch:
            yield from batch * self.count


class NumberedRow(list[Document]):
    """The documents of a row, with its number in the dataset; None for a row that fills up a batch."""

    def __init__(self, documents: Sequence[Document] = (), number: int | None = None):
        super().__init__(documents)
        self.number = number


class PaddedToBatch(torch.utils.data.Dataset):
    """A dataset followed by empty conversations up to a multiple of `batch`; an item is a `NumberedRow`."""

    def __init__(self, dataset: Any, batch: int):
        self.dataset, self.length = dataset, math.ceil(len(dataset) / batch) * batch

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> NumberedRow:
        return NumberedRow(self.dataset[index], index) if index < len(self.dataset) else NumberedRow()


class Place(NamedTuple):
    """A conversation of a row: its file and record in words, and how many tokens its longest document has."""

    where: str
    tokens: int


def places(dataset: Any, row: int) -> list[Place]:
    """Return which conversations are in a row of a `SupervisedDataset` or `PackedDataset`."""
    if isinstance(dataset, PackedDataset):
        items = dict.fromkeys(item for item, _ in dataset.packs[row])
        return [place for item in items for place in places(dataset.dataset, item)]
    number = int(dataset.numbers()[row])
    # A dataset that tokenises late takes the next conversation in place of one that must be dropped.
    while (tokenised := dataset.tokeniser.rows([number])[0])["dropped"]:
        number = (number + 1) % len(dataset.conversations)
    return [Place(dataset.conversations.where(number), max(len(d["input_ids"]) for d in tokenised["documents"]))]
