"""From encoded conversations to what the model sees.

An item of a dataset is one conversation: a list of documents (see `tokens.ChatEncoder.encode_batch`). A micro-batch of
conversations becomes one row of documents side by side, each with positions that start at 0 and no attention mask, so
nothing is padded and no document sees another; or, where the model cannot do that, one padded row for each document.
"""

import bisect
import itertools
import math
import random

import torch

from tokens import IGNORE_INDEX, supervised_runs


class Collator:
    """Turns a list of conversations into the tensors of one micro-batch.

    Args:
        padding_free: one row without padding (True) or padded rows with an attention mask (False).
    Returns, with B rows of T tokens (B is 1 when padding-free) and K positions that are supervised in some row:
        input_ids, labels: int64 [B, T].
        shift_labels: int64 [B, T], the label of the next token of the same document, or IGNORE_INDEX.
        logits_to_keep: int64 [K], the positions whose logits the loss needs.
        position_ids int64 [1, T], cu_seq_lens_q and _k int32 [documents + 1] and max_length_q and _k (int) when
        padding-free (0 and where documents end, and the longest: the names of transformers' flash attention);
        attention_mask int64 [B, T] when padded; filler (int): positions that belong to no conversation, where there
        are any.
    """

    def __init__(self, padding_free=True):
        self.padding_free = padding_free

    def __call__(self, conversations):
        documents = [document for documents in conversations for document in documents]
        if not self.padding_free:  # which have a length of their own
            documents = [document for document in documents if not document.get("filler")]
        # A rank whose share of an evaluation set is empty still runs the model, as the other ranks wait for it.
        documents = documents or [{"input_ids": [0, 0], "labels": [IGNORE_INDEX] * 2}]
        ids = [torch.tensor(document["input_ids"], dtype=torch.long) for document in documents]
        labels = [torch.tensor(document["labels"], dtype=torch.long) for document in documents]
        shifted = [torch.cat([label[1:], label.new_tensor([IGNORE_INDEX])]) for label in labels]
        if self.padding_free:
            batch = {name: torch.cat(parts)[None] for name, parts in _named(ids, labels, shifted)}
            batch["position_ids"] = torch.cat([torch.arange(len(part)) for part in ids])[None]
            ends = torch.tensor([0, *itertools.accumulate(map(len, ids))], dtype=torch.int32)
            batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = ends
            batch["max_length_q"] = batch["max_length_k"] = max(map(len, ids))
            filler = sum(len(document["input_ids"]) for document in documents if document.get("filler"))
            batch |= {"filler": filler} if filler else {}
        else:
            lengths = torch.tensor([len(part) for part in ids])
            pad = torch.nn.utils.rnn.pad_sequence
            fill = {"input_ids": 0, "labels": IGNORE_INDEX, "shift_labels": IGNORE_INDEX}
            batch = {name: pad(parts, True, fill[name]) for name, parts in _named(ids, labels, shifted)}
            # By length, never by comparing ids: a pad token can be a real token of the conversation.
            batch["attention_mask"] = (torch.arange(int(lengths.max()))[None] < lengths[:, None]).long()
        kept = (batch["shift_labels"] != IGNORE_INDEX).any(0).nonzero()[:, 0]
        batch["logits_to_keep"] = kept if len(kept) else torch.zeros(1, dtype=torch.long)
        return batch


def _named(ids, labels, shifted):
    return ("input_ids", ids), ("labels", labels), ("shift_labels", shifted)


def supervised_loss(model, batch, label_smoothing=0.0, head=None):
    """Cross entropy of one micro-batch from `Collator`.

    The output head sees only `logits_to_keep`, and the loss is computed in float32.
    Args:
        label_smoothing: share of each target that is spread over the whole vocabulary, 0 to 1.
        head: the model's, when `head_loss.attach` has taught it the loss; the logits then never exist.
    Returns:
        (sum over supervised tokens: float32 scalar with a gradient, their number: int64 scalar).
    """
    batch = {name: value for name, value in batch.items() if name not in ("labels", "filler")}
    targets = batch.pop("shift_labels")[:, batch["logits_to_keep"]].flatten()
    # A cache would make transformers treat the row as one document.
    if head is not None:
        head.targets, head.smoothing = targets, label_smoothing
        try:
            return model(**batch, use_cache=False).logits.squeeze(), (targets != IGNORE_INDEX).sum()
        finally:
            head.targets = None
    logits = model(**batch, use_cache=False).logits.flatten(0, 1).float()
    total = torch.nn.functional.cross_entropy(
        logits, targets, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=label_smoothing
    )
    return total, (targets != IGNORE_INDEX).sum()


def truncated(documents, max_length):
    """Documents cut after their last supervised turn, stop token included, that ends within `max_length` tokens.

    A document with no such turn is left out.
    """
    result = []
    for document in documents:
        ends = [end for _, end in supervised_runs(document["labels"]) if end <= max_length]
        if ends:
            cut = {name: document[name][: ends[-1]] for name in ("input_ids", "labels")}
            result.append({**cut, "turns": document["turns"][: len(ends)]})
    return result


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
