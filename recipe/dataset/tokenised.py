"""Tokenised conversations on disk: written once, memory-mapped from then on.

The rows lie in the cache folder of `datasets` (HF_DATASETS_CACHE), under a hash of everything that they were made from.
Several processes that ask for the same rows write them once; the others wait for the file and not for each other.
"""

from recipe.console import UserError
from recipe.dataset.encoding import supervised_runs

FIGURES = ("dropped", "notes", "length", "tokens", "supervised")  # of a row, besides its documents


def rows(generate, made_from):
    """The rows that `generate` yields, or those of an earlier run with an equal `made_from`.

    Args:
        generate: function without arguments that yields dicts with `documents` and FIGURES.
        made_from: list of texts and numbers.
    Returns:
        a memory-mapped `datasets.Dataset`.
    Raises:
        UserError: from `generate`.
    """
    import datasets
    from datasets import Features, List, Value

    ids = List(Value("int32"))
    features = Features(
        documents=List({"input_ids": ids, "labels": ids, "turns": ids}),
        dropped=Value("string"),
        notes=List(Value("string")),
        length=Value("int32"),
        tokens=Value("int64"),
        supervised=Value("int64"),
    )
    fingerprint = datasets.fingerprint.Hasher.hash(made_from)
    shown = not datasets.utils.are_progress_bars_disabled()
    datasets.utils.disable_progress_bars()  # `generate` has one that counts conversations
    try:
        return datasets.Dataset.from_generator(generate, features, fingerprint=fingerprint)
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ if isinstance(error.__cause__, UserError) else error from None
    finally:
        if shown:
            datasets.utils.enable_progress_bars()


def figures(dataset):
    """FIGURES of every row, without reading the documents."""
    return zip(*(dataset.data.column(name).to_pylist() for name in FIGURES), strict=True)


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
