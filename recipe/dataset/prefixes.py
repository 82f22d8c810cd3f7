"""Documents of a row that begin alike share the tokens that they begin with, so that a model computes these once.

Chats repeat much: the system prompt and the tools of a whole file, and all earlier turns of a conversation where its
template renders them anew for every answer (see `encoding.Document`). A token depends on those before it alone, so as
far as two documents are the same, they are so in every layer; each attends to the shared tokens as to its own (see
`model.attention`). The documents of a row form a tree of which every token is computed once.

No shared token predicts one that is learnt, so each loss stays in the document that it belongs to.
"""

from collections.abc import Sequence

import torch

from recipe.dataset.rendering import IGNORE_INDEX, Document

LEAST = 1 / 64  # share of a row's tokens; to fetch them takes 1 % of a step (SmolLM2, 8 documents, two CPU cores)


def share(documents: Sequence[Document]) -> tuple[list[Document], list[int]] | None:
    """Find what the documents of a row have in common.

    Returns:
        (the documents, those that begin alike side by side; how many tokens at the beginning of each are those of the
        document before it, fewer than it has). None if that is too little to be of use.
    """
    heads = [_head(document) for document in documents]
    order = sorted(range(len(documents)), key=lambda n: (bool(documents[n].get("padding")), heads[n]))
    # Of sorted documents, each has as much in common with its neighbour as with any other before it.
    taken = [0, *(_in_common(heads[one], heads[other]) for one, other in zip(order, order[1:], strict=False))]
    if sum(taken) <= LEAST * sum(len(document["input_ids"]) for document in documents):
        return None
    return [documents[n] for n in order], taken


def places(lengths: Sequence[int], taken: Sequence[int]) -> torch.Tensor:
    """Return where each token of each document stands in their row, int64 [sum of lengths].

    The row has, document after document, the tokens that are not `taken` from the one before (see `share`).
    """
    found, end = [torch.empty(0, dtype=torch.long)], 0
    for length, count in zip(lengths, taken, strict=True):
        found.append(torch.cat([found[-1][:count], torch.arange(end, end := end + length - count)]))
    return torch.cat(found)


def _head(document: Document) -> list[int]:
    """Return the ids that a document may share: the last of them does not yet predict a label."""
    ids, labels = document["input_ids"], document["labels"]
    first = next((place for place, label in enumerate(labels) if label != IGNORE_INDEX), len(ids))
    return [] if document.get("padding") else list(ids[: max(0, first - 1)])


def _in_common(one: list[int], other: list[int]) -> int:
    count = min(len(one), len(other))
    different = torch.tensor(one[:count]) != torch.tensor(other[:count])
    return int(different.int().argmax()) if different.any() else count
