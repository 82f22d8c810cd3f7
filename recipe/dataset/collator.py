"""From encoded conversations to what the model sees.

An item of a dataset is one conversation: a list of documents (see `tokens.ChatEncoder.encode_batch`). A micro-batch of
conversations becomes one row of documents side by side, each with positions that start at 0 and no attention mask, so
nothing is padded and no document sees another; or, where the model cannot do that, one padded row for each document.
"""

import itertools

import torch

from recipe.dataset.encoding import IGNORE_INDEX


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
