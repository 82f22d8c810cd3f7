"""From encoded conversations to the tensors that the model sees.

An item of a dataset is one conversation: a list of documents (see `encoding.Document`). A micro-batch of conversations
becomes one row of documents side by side, each with positions that start at 0 and no attention mask, so that nothing is
padded and no document sees another. If the model cannot do that, it becomes one padded row for each document.

`labels` stand at the position of their own token. `shift_labels` are what the loss uses: the logits of position t
predict token t + 1, so shift_labels[t] is labels[t + 1] of the same document, and IGNORE_INDEX at its last position.
"""

import itertools
from collections.abc import Sequence
from typing import NotRequired, TypedDict

import torch

from recipe.dataset.rendering import IGNORE_INDEX, Document, padding_document


class Batch(TypedDict):
    """One micro-batch: B rows of T tokens, B = 1 if padding-free; K positions have a label in some row.

    input_ids: int64 [B, T].
    labels: int64 [B, T], a token's own id or IGNORE_INDEX.
    shift_labels: int64 [B, T], the label of the next token.
    logits_to_keep: int64 [K], the positions t whose logits the loss needs; [0] if there is no label.
    position_ids: int64 [1, T], from 0 in each document; padding-free only, like the next three.
    cu_seq_lens_q, cu_seq_lens_k: int32 [documents + 1], 0 and where each document ends; the names, and max_length_q and
        max_length_k (tokens of the longest document), are those of transformers' flash attention.
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
    padding_tokens: NotRequired[int]
    attention_mask: NotRequired[torch.Tensor]
    rows: NotRequired[list[int]]


class Collator:
    """Turns a list of conversations into the tensors of one micro-batch.

    Args:
        padding_free: one row without padding (True) or padded rows with an attention mask (False).
        piece: (i, N), to take the i-th of N equal pieces of each padding-free row, which other ranks have the rest of.
    """

    def __init__(self, padding_free: bool = True, piece: tuple[int, int] = (0, 1)):
        self.padding_free, self.piece = padding_free, piece

    def __call__(self, conversations: Sequence[Sequence[Document]]) -> Batch:
        documents = [document for conversation in conversations for document in conversation]
        if not self.padding_free:  # padded rows have a length of their own
            documents = [document for document in documents if not document.get("padding")]
        # A rank whose share of an evaluation set is empty still runs the model, because the other ranks wait for it.
        documents = documents or [{"input_ids": [0, 0], "labels": [IGNORE_INDEX] * 2, "turns": []}]
        shared = self.padding_free and self.piece[1] > 1
        if shared and (over := -sum(len(document["input_ids"]) for document in documents) % self.piece[1]):
            documents.append(padding_document(over))
        ids = [torch.tensor(document["input_ids"], dtype=torch.long) for document in documents]
        labels = [torch.tensor(document["labels"], dtype=torch.long) for document in documents]
        shifted = [torch.cat([label[1:], label.new_tensor([IGNORE_INDEX])]) for label in labels]
        batch = self._side_by_side(ids, labels, shifted) if self.padding_free else self._padded(ids, labels, shifted)
        padding = torch.tensor([bool(document.get("padding")) for document in documents])
        padding = padding.repeat_interleave(torch.tensor(list(map(len, ids))))
        if shared:
            padding = padding[self._cut(batch)]
        if count := int(padding.sum()):
            batch["padding_tokens"] = count
        numbers = [getattr(conversation, "number", None) for conversation in conversations]
        if rows := [number for number in numbers if number is not None]:
            batch["rows"] = rows
        return batch

    def _side_by_side(self, ids: list[torch.Tensor], labels: list[torch.Tensor], shifted: list[torch.Tensor]) -> Batch:
        ends = torch.tensor([0, *itertools.accumulate(map(len, ids))], dtype=torch.int32)
        longest = max(map(len, ids))
        next_labels = torch.cat(shifted)[None]
        return {
            "input_ids": torch.cat(ids)[None],
            "labels": torch.cat(labels)[None],
            "shift_labels": next_labels,
            "position_ids": torch.cat([torch.arange(len(part)) for part in ids])[None],
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": longest,
            "max_length_k": longest,
            "logits_to_keep": _supervised_positions(next_labels),
        }

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

    def _padded(self, ids: list[torch.Tensor], labels: list[torch.Tensor], shifted: list[torch.Tensor]) -> Batch:
        pad = torch.nn.utils.rnn.pad_sequence
        lengths = torch.tensor([len(part) for part in ids])
        next_labels = pad(shifted, True, IGNORE_INDEX)
        return {
            "input_ids": pad(ids, True, 0),
            "labels": pad(labels, True, IGNORE_INDEX),
            "shift_labels": next_labels,
            # By length, never by comparing ids: a pad token can be a real token of the conversation.
            "attention_mask": (torch.arange(int(lengths.max()))[None] < lengths[:, None]).long(),
            "logits_to_keep": _supervised_positions(next_labels),
        }


def _supervised_positions(shift_labels: torch.Tensor) -> torch.Tensor:
    """Return the positions, int64 [K], that have a label in some row of shift_labels [B, T]."""
    kept = (shift_labels != IGNORE_INDEX).any(0).nonzero()[:, 0]
    return kept if len(kept) else torch.zeros(1, dtype=torch.long)
