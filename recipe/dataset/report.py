"""Show what would be trained: figures, text in colour, or JSON Lines of ids and labels."""

import json
import sys
from collections.abc import Iterator
from typing import Any, TextIO

import numpy as np

from recipe import console
from recipe.console import UserError, say
from recipe.dataset.encoding import IGNORE_INDEX, ChatEncoder, Document
from recipe.dataset.tokenised import Dropped

COLOUR, END = "\033[30;42m", "\033[0m"  # black on green, and back
SHOWN_PLACES = 5  # of dropped rows, enough to find the first by hand
SHOWN_FILES = 10  # of a folder or pattern
SHOWN_NAMES = 20  # of fields that are not used
MANY_DROPPED = 0.01  # share of rows too long from which the length that would keep 99 % is named


def inspect(data_args: Any, tokenizer: Any, datasets: dict[str, Any]) -> bool:
    """Do what --dump_tokens, --preview and --validate_only ask for; returns whether one of them was given.

    Args:
        data_args: finetune.DataArguments.
        tokenizer: to decode the tokens of the preview.
        datasets: "training" and those to evaluate on, each a `SupervisedDataset`.
    """
    if not (data_args.dump_tokens or data_args.preview or data_args.validate_only):
        return False
    if console.rank() == 0:
        if data_args.dump_tokens:
            dump(datasets["training"], data_args.dump_tokens)
            say(f"{data_args.dump_tokens}: {len(datasets['training']):,} conversations in tokens")
        if data_args.preview:
            show(datasets["training"], tokenizer, data_args.preview)
        if data_args.validate_only:
            say(f"chat template: {template(datasets['training'].tokeniser.encoder)}")
            for name, dataset in datasets.items():
                say(f"{name} rows: {rows(dataset)}")
            say("verdict: the data can be trained; every label was read back and compared with its turn.")
    return True


def show(dataset: Any, tokenizer: Any, count: int, stream: TextIO | None = None) -> None:
    """Print conversations with their supervised tokens on green, or between ⟦ ⟧ if the output is no terminal."""
    stream = stream or sys.stdout
    before, after = (COLOUR, END) if stream.isatty() else ("⟦", "⟧")
    for index in range(min(count, len(dataset))):
        documents = dataset[index]
        for number, document in enumerate(documents, 1):
            part = f", document {number} of {len(documents)}" if len(documents) > 1 else ""
            supervised = sum(label != IGNORE_INDEX for label in document["labels"])
            source = dataset.conversations.where(dataset.kept[index])
            print(f"--- {source}{part}: {len(document['input_ids'])} tokens, {supervised} supervised", file=stream)
            print("".join(_marked(document, tokenizer, before, after)), file=stream)


def _marked(document: Document, tokenizer: Any, before: str, after: str) -> Iterator[str]:
    ids, labels, start = document["input_ids"], document["labels"], 0
    for position in range(1, len(ids) + 1):
        if position == len(ids) or (labels[position] == IGNORE_INDEX) != (labels[start] == IGNORE_INDEX):
            text = tokenizer.decode(ids[start:position], clean_up_tokenization_spaces=False)
            yield text if labels[start] == IGNORE_INDEX else before + text + after
            start = position


def dump(dataset: Any, path: str) -> None:
    """Write one JSON object for each document: `input_ids`, `labels`, `source` (file and record) and `turns`.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        file = open(path, "w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--dump_tokens {path}: cannot be written ({error.strerror}).") from None
    with file:
        for index in range(len(dataset)):
            source = dataset.conversations.where(dataset.kept[index])
            for document in dataset[index]:
                file.write(json.dumps({**document, "source": source}) + "\n")


def template(encoder: ChatEncoder) -> str:
    """Describe what the chat template writes by itself, and how a date in it can be kept."""
    text = f"a conversation begins with {encoder.template.opening!r:.500}"
    if encoder.template_kwargs:
        text += f"; with {json.dumps(encoder.template_kwargs)}"
    if today := encoder.template.today():
        date, variable = today
        remedy = "use a template without strftime_now (--chat_template)"
        if variable:
            remedy = f"add --chat_template_kwargs '{json.dumps({variable: date})}'"
        text += f"; this holds today's date, {date}, so tokens are made anew each day: to keep it, {remedy}"
    return text


def rows(dataset: Any) -> str:
    """Describe a dataset: how many conversations were read, kept, dropped and why, and what they hold."""
    total, max_length = len(dataset.conversations), dataset.max_length
    files = [f"{name} ({shape})" for name, shape in dataset.conversations.shapes().items()]
    more = f" and {len(files) - SHOWN_FILES} more files" if len(files) > SHOWN_FILES else ""
    lines = [f"{total:,} read from {', '.join(files[:SHOWN_FILES])}{more}", *dataset.conversations.left_out]
    if dataset.examined < total:
        lines.append(f"figures of the first {dataset.examined:,}; the others are checked when they are needed")
    lines.append(f"{len(dataset.kept):,} kept")
    for reason, numbers in dataset.dropped.items():
        if reason == Dropped.BAD:
            lines.append(f"{len(numbers):,} dropped, {reason.value}: {' '.join(dataset.problems)}")
            lines[-1] += " ..." if len(numbers) > len(dataset.problems) else ""
            continue
        places = ", ".join(dataset.conversations.where(number) for number in numbers[:SHOWN_PLACES])
        more = ", ..." if len(numbers) > SHOWN_PLACES else ""
        lines.append(f"{len(numbers):,} dropped, {reason.words(max_length)}: {places}{more}")
    lines += [f"{count:,} {note}" for note, count in dataset.notes.items()]
    if dataset.unused:
        named = [f"{name} ({count:,})" for name, count in dataset.unused.most_common(SHOWN_NAMES)]
        others = len(dataset.unused) - len(named)
        lines.append(f"not used, with the number of rows: {', '.join(named)}{f' and {others} more' if others else ''}")
    if len(dataset.conversations.sources) > 1:
        lines += _sources(dataset)
    share = dataset.supervised / max(dataset.tokens, 1)
    lines.append(f"{dataset.tokens:,} tokens, {dataset.supervised:,} of them supervised ({share:.0%})")
    half, most, nearly, longest = (int(x) for x in np.percentile(dataset.lengths, [50, 90, 99, 100]))
    lines.append(
        f"lengths: half up to {half}, 90 % up to {most}, 99 % up to {nearly}, the longest {longest} tokens, "
        f"--model_max_length {max_length}"
    )
    if len(dataset.dropped.get(Dropped.TOO_LONG, [])) > MANY_DROPPED * dataset.examined:
        lines.append(f"--model_max_length {nearly} would keep 99 %")
    return "\n  ".join(lines)


def _sources(dataset: Any) -> Iterator[str]:
    """Give rows and tokens of each source and, if they have weights, of what an epoch draws from each."""
    sources, mixture = dataset.conversations.sources, dataset.mixture
    of_row = dataset.conversations.sources_of(dataset.kept)
    rows_of = np.bincount(of_row, minlength=len(sources))
    tokens_of = np.bincount(of_row, np.asarray(dataset.sizes)[np.asarray(dataset.kept)], minlength=len(sources))
    counts = mixture.counts if mixture else rows_of
    means = tokens_of / np.maximum(rows_of, 1)
    drawn = means * counts
    for number, source in enumerate(sources):
        text = f"{source.path}: {rows_of[number]:,} rows, {int(tokens_of[number]):,} tokens"
        if mixture:
            repeats = counts[number] / mixture.available[number]
            text += (
                f"; weight {source.weight:g}: {counts[number]:,} rows an epoch ({repeats:.2f} times each), about "
                f"{drawn[number]:,.0f} tokens"
            )
        yield text + f" ({drawn[number] / max(drawn.sum(), 1):.0%})"
