"""Rows of a fixed number of tokens, the order of an epoch, and datasets filled up to whole batches."""

import bisect
import math
import random

import torch

from recipe.dataset.encoding import IGNORE_INDEX


class Packed(torch.utils.data.Dataset):
    """A dataset whose items are documents of several conversations, as many as fit into `tokens` tokens.

    Conversations are taken in a random order (or as they come) and each goes to the open pack that it fills best; a
    bounded number of packs is open at a time. A conversation of several documents that together are too long is shared
    out by document. No document is cut.

    Args:
        dataset: a `SupervisedDataset` none of whose documents is longer than `tokens`.
        seed: of the order; None keeps that of the dataset.
        static: fill each pack up with a document of which nothing is learnt, so that all are equally long.
    """

    limit = 256  # open packs

    def __init__(self, dataset, tokens, seed=None, static=False):
        self.dataset, self.tokens, self.static = dataset, tokens, static
        order = list(range(len(dataset)))
        if seed is not None:
            random.Random(seed).shuffle(order)
        self.packs, opened = [], []  # lists of (item, document or None for all); sorted (room, pack)
        for index, document, size in self._units(order):
            fits = bisect.bisect_left(opened, (size, 0))
            if fits < len(opened):
                room, pack = opened.pop(fits)
            else:
                room, pack = tokens, len(self.packs)
                self.packs.append([])
            self.packs[pack].append((index, document))
            bisect.insort(opened, (room - size, pack))
            if len(opened) > self.limit:
                del opened[0]  # the fullest

    def _units(self, order):
        for index in order:
            size = self.dataset.sizes[self.dataset.kept[index]]
            if size <= self.tokens:
                yield index, None, size
            else:
                for number, document in enumerate(self.dataset[index]):
                    yield index, number, len(document["input_ids"])

    def __len__(self):
        return len(self.packs)

    def __getitem__(self, index):
        documents = []
        for item, number in self.packs[index]:
            whole = self.dataset[item]
            documents += whole if number is None else [whole[number]]
        rest = self.tokens - sum(len(document["input_ids"]) for document in documents)
        if self.static and rest:
            documents.append({"input_ids": [0] * rest, "labels": [IGNORE_INDEX] * rest, "filler": True})
        return documents


class Order(torch.utils.data.Sampler):
    """The rows of an epoch in the order (int64 [rows]) that `order()` gives as it starts, then those to fill it up."""

    def __init__(self, order, rows, filled):
        self.order, self.rows, self.filled = order, rows, filled

    def __len__(self):
        return self.filled

    def __iter__(self):
        for part in self.order().split(10_000):  # a list of a million numbers takes 36 MB
            yield from part.tolist()
        yield from range(self.rows, self.filled)


class Filled(torch.utils.data.Dataset):
    """A dataset followed by empty conversations up to a multiple of `batch`."""

    def __init__(self, dataset, batch):
        self.dataset, self.length = dataset, math.ceil(len(dataset) / batch) * batch

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return self.dataset[index] if index < len(self.dataset) else []
