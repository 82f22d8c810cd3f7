"""From encoded conversations to the tensors that the model sees.

An item of a dataset is one conversation: a list of documents (see `encoding.Document`). A micro-batch of conversations
becomes one row of documents side by side, each with positions that start at 0 and no attention mask, so that nothing is
padded and no document sees another. Documents that begin alike may share these tokens (see `prefixes.py`). If the model
cannot do that, a micro-batch becomes one padded row for each document.

`labels` stand at the position of their own token. `shift_labels` are what the loss uses: the logits of position t
predict token t + 1, so shift_labels[t] is labels[t + 1] of the same document, and IGNORE_INDEX at its last position.
"""

import itertools
from collections.abc import Sequence
from typing import NotRequired, TypedDict

import torch

from recipe.dataset import prefixes
from recipe.dataset.rendering import IGNORE_INDEX, Document, padding_document


class Batch(TypedDict):
    """One micro-batch: B rows of T tokens, B = 1 if padding-free; K positions have a label in some row.

    input_ids: int64 [B, T].
    labels: int64 [B, T], a token's own id or IGNORE_INDEX.
    shift_labels: int64 [B, T], the label of the next token.
    logits_to_keep: int64 [K], the positions t whose logits the loss needs; [0] if there is no label.
    position_ids: int64 [1, T], from 0 in each document; padding-free only, like the next three.
    cu_seq_lens_q, cu_seq_lens_k: int32 [documents + 1], 0 and where each document ends; the names, and max_length_q and
        max_length_k (tokens of the longest document), are those of transformers' flash attention. Where documents share
        tokens, q is what each has for itself, and k all of it.
    key_places: int64 [S], where in the row each token of each document stands; only where they share tokens.
    shared_tokens: S - T, by which the documents are longer than the row; only where they share tokens.
    padding_tokens: how many tokens of the row belong to no conversation; only if there are any.
    attention_mask: int64 [B, T], 0 on padding; padded rows only.
    rows: numbers of the rows in the dataset, if they are `packing.NumberedRow`s.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    shift_labels: torch.Tensor
    logits_to_keep: torch.Tensor
    position_ids: NotRequired[torch.Tensor]
    cu_seq_lens_q: NotRequired[torch.Tensor]
    cu_seq_lens_k: NotRequired[torch.Tensor]
    max_length_q: NotRequired[int]
    max_length_k: NotRequired[int]
    key_places: NotRequired[torch.Tensor]
    shared_tokens: NotRequired[int]
    padding_tokens: NotRequired[int]
    attention_mask: NotRequired[torch.Tensor]
    rows: NotRequired[list[int]]


class Collator:
    """Turns a list of conversations into the tensors of one micro-batch.

    Args:
        padding_free: one row without padding (True) or padded rows with an attention mask (False).
        piece: (i, N), to take the i-th of N equal pieces of each padding-free row, which other ranks have the rest of.
        share_prefixes: let documents of a padding-free row share the tokens that they begin with; for models whose
            attention knows of it (see `attention.can_share_prefixes`).
    """

    def __init__(self, padding_free: bool = True, piece: tuple[int, int] = (0, 1), share_prefixes: bool = False):
        self.padding_free, self.piece, self.share_prefixes = padding_free, piece, share_prefixes

    def __call__(self, conversations: Sequence[Sequence[Document]]) -> Batch:
        documents = [document for conversation in conversations for document in conversation]
        if not self.padding_free:  # padded rows have a length of their own
            documents = [document for document in documents if not document.get("padding")]
        # A rank whose share of an evaluation set is empty still runs the model, because the other ranks wait for it.
        documents = documents or [{"input_ids": [0, 0], "labels": [IGNORE_INDEX] * 2, "turns": []}]
        batch = self._side_by_side(documents) if self.padding_free else self._padded(documents)
        numbers = [getattr(conversation, "number", None) for conversation in conversations]
        if rows := [number for number in numbers if number is not None]:
            batch["rows"] = rows
        return batch

    def _side_by_side(self, documents: list[Document]) -> Batch:
        alike = prefixes.share(documents) if self.share_prefixes else None
        documents, taken = alike or (documents, [0] * len(documents))
        lengths = [len(document["input_ids"]) for document in documents]
        if over := -(sum(lengths) - sum(taken)) % self.piece[1]:
            documents, lengths, taken = [*documents, padding_document(over)], [*lengths, over], [*taken, 0]
        columns = *zip(*map(_tensors, documents), strict=True), map(torch.arange, lengths)
        own = [length - count for length, count in zip(lengths, taken, strict=True)]
        ids, labels, next_labels, positions = (
            torch.cat([part[count:] for part, count in zip(parts, taken, strict=True)])[None] for parts in columns
        )
        batch: Batch = {
            "input_ids": ids,
            "labels": labels,
            "shift_labels": next_labels,
            "position_ids": positions,
            "cu_seq_lens_q": _ends(own),
            "cu_seq_lens_k": _ends(lengths),
            "max_length_q": max(own),
            "max_length_k": max(lengths),
            "logits_to_keep": _supervised_positions(next_labels),
        }
        if alike:
            batch["key_places"] = prefixes.places(lengths, taken)
        padding = torch.tensor([bool(document.get("padding")) for document in documents])
        padding = padding.repeat_interleave(torch.tensor(own))
        if self.piece[1] > 1:
            padding = padding[self._cut(batch)]
        if count := int(padding.sum()):
            batch["padding_tokens"] = count
        if alike and self.piece[0] == 0:  # of a row that ranks share, the first counts them
            batch["shared_tokens"] = sum(taken)
        return batch

    def _cut(self, batch: Batch) -> slice:
        """Leave this rank's piece in a batch, and return where it is; the ends stay those of the whole row's documents."""
        number, count = self.piece
        tokens = batch["input_ids"].shape[1]
        here = slice(number * tokens // count, (number + 1) * tokens // count)
        batch["max_length_k"] = tokens  # by which attention knows, see `attention.packed_attention`
        batch["input_ids"], batch["position_ids"] = batch["input_ids"][:, here], batch["position_ids"][:, here]
        batch["labels"], batch["shift_labels"] = batch["labels"][:, here], batch["shift_labels"][:, here]
        batch["logits_to_keep"] = _supervised_positions(batch["shift_labels"])
        return here

    def _padded(self, documents: list[Document]) -> Batch:
        pad = torch.nn.utils.rnn.pad_sequence
        ids, labels, shifted = map(list, zip(*map(_tensors, documents), strict=True))
        lengths = torch.tensor(list(map(len, ids)))
        next_labels = pad(shifted, True, IGNORE_INDEX)
        return {
            "input_ids": pad(ids, True, 0),
            "labels": pad(labels, True, IGNORE_INDEX),
            "shift_labels": next_labels,
            # By length, never by comparing ids: a pad token can be a real token of the conversation.
            "attention_mask": (torch.arange(int(lengths.max()))[None] < lengths[:, None]).long(),
            "logits_to_keep": _supervised_positions(next_labels),
        }


def _tensors(document: Document) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the ids, the labels, and the labels of the next token, int64 [tokens] each."""
    ids, labels = (torch.tensor(document[name], dtype=torch.long) for name in ("input_ids", "labels"))
    return ids, labels, torch.cat([labels[1:], labels.new_tensor([IGNORE_INDEX])])


def _ends(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def _supervised_positions(shift_labels: torch.Tensor) -> torch.Tensor:
    """Return the positions, int64 [K], that have a label in some row of shift_labels [B, T]."""
    kept = (shift_labels != IGNORE_INDEX).any(0).nonzero()[:, 0]
    return kept if len(kept) else torch.zeros(1, dtype=torch.long)
