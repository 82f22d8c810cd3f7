"""Judge a model as a user would: by its answers to held-out prompts, and by its loss on the held-out answers."""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recipe.console import UserError
from recipe.dataset.collator import Collator
from recipe.dataset.conversations import Conversation, Message
from recipe.dataset.encoding import ChatEncoder, Document, supervised_runs
from recipe.model.loss import supervised_loss
from recipe.training import checks

Metric = Callable[[str, str, list[Message]], float]  # (answer, reference, messages of the prompt) -> number
FIGURES = ("loss", "exact_match", "valid_json")  # names that a user's metric cannot have


class Question(NamedTuple):
    """A prompt and the answer that the data gives to it.

    Attributes:
        prompt_ids: token ids up to and including the header of the assistant turn.
        reference_ids: token ids of the answer, with its stop token.
        reference: the answer as text, without its stop token.
        messages: the messages before the answer.
    """

    prompt_ids: list[int]
    reference_ids: list[int]
    reference: str
    messages: list[Message]


class Measured(NamedTuple):
    """What `measure` found.

    Attributes:
        figures: mean over the questions of exact_match, valid_json and the user's metric; and eval_loss.
        answers: the model's answers as text, one for each question.
        questions: the prompts.
        left_out: how many conversations were left out, by the reason.
    """

    figures: dict[str, float]
    answers: list[str]
    questions: list[Question]
    left_out: dict[str, int]


def questions(
    conversations: Sequence[Conversation], encoder: ChatEncoder, max_length: int | None = None
) -> list[Question]:
    """Make one Question of the last assistant turn of each conversation.

    Conversations without one are left out, and those with more than `max_length` tokens.
    """
    last_turn = dataclasses.replace(encoder, train_on="last_turn")
    result = []
    for conversation, encoded in zip(conversations, last_turn.encode_batch(conversations), strict=True):
        for document in encoded.documents:
            ids, ((start, end),) = document["input_ids"], supervised_runs(document["labels"])
            if max_length and len(ids) > max_length:
                continue
            reference = encoder.tokenizer.decode(ids[start : end - 1], clean_up_tokenization_spaces=False)
            turn = document["turns"][-1] - 1
            result.append(Question(ids[:start], ids[start:end], reference, conversation["messages"][:turn]))
    return result


def held_out_questions(datasets: Mapping[str, Any], count: int, encoder: ChatEncoder) -> list[Question]:
    """Make questions of the first `count` conversations that the evaluation datasets use, in their order."""
    used = (dataset.conversations[number] for dataset in datasets.values() for number in dataset.kept)
    longest = min((dataset.max_length for dataset in datasets.values()), default=None)
    return questions(list(itertools.islice(used, count)), encoder, longest) if count else []


@contextlib.contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put the model into evaluation mode; afterwards it is as before, whatever happened."""
    training = model.training
    # The last position of each prompt is a strided view; for each of its rows torch would copy a frozen head.
    copied = model.get_output_embeddings().register_forward_pre_hook(lambda head, inputs: inputs[0].contiguous())
    try:
        model.eval()
        yield
    finally:
        copied.remove()
        model.train(training)


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Question],
    stop_ids: Sequence[int],
    max_new_tokens: int = 256,
    batch_size: int = 16,
    show_bar: bool = False,
    on_batch: Callable[[str], None] = lambda doing: None,
    streamer: Any = None,
) -> list[str]:
    """Return greedy answers to Questions, as text without the stop token.

    Prompts of similar length share a batch, padded on the left and masked. `show_bar` shows progress in a terminal;
    `on_batch` is called before each batch, with what is being done; a `transformers.TextStreamer` gets the tokens of a
    single prompt as they are made.
    """
    prompt_ids = [question.prompt_ids for question in asked]
    answers = [""] * len(asked)
    order = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))
    bar = tqdm(total=len(order), desc="answers", disable=None if show_bar else True)
    with _evaluating(model), bar:
        for start in range(0, len(order), batch_size):
            on_batch("while the model answers held-out prompts")
            chosen = order[start : start + batch_size]
            width = max(len(prompt_ids[i]) for i in chosen)
            ids = torch.tensor([[stop_ids[0]] * (width - len(prompt_ids[i])) + prompt_ids[i] for i in chosen])
            mask = torch.tensor([[0] * (width - len(prompt_ids[i])) + [1] * len(prompt_ids[i]) for i in chosen])
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                use_cache=True,
                do_sample=False,
                temperature=None, top_p=None, top_k=None,  # the model's own sampling settings do not apply
                eos_token_id=list(stop_ids),
                pad_token_id=stop_ids[0],
                streamer=streamer,
            )  # fmt: skip
            for i, new in zip(chosen, output[:, width:].tolist(), strict=True):
                ids_of_answer = list(itertools.takewhile(lambda token: token not in stop_ids, new))
                answers[i] = tokenizer.decode(ids_of_answer, clean_up_tokenization_spaces=False)
            bar.update(len(chosen))
    return answers


@torch.no_grad()
def mean_loss(
    model: PreTrainedModel, rows: Sequence[list[Document]], batch_size: int = 8, show_bar: bool = False
) -> float:
    """Return the mean cross entropy over the supervised tokens of `rows` (lists of documents)."""
    total, count = 0.0, 0
    with _evaluating(model):
        collator = Collator(checks.packing_fault(model, Collator()) is None)
        for start in tqdm(range(0, len(rows), batch_size), desc="loss", disable=None if show_bar else True):
            batch = collator(rows[start : start + batch_size])
            moved = {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in batch.items()}
            loss, supervised = supervised_loss(model, moved)
            total, count = total + loss.item(), count + supervised.item()
    return total / count


def is_json(text: str) -> bool:
    """Return True if the text is a JSON object or a JSON list."""
    try:
        return isinstance(json.loads(text), (dict, list))
    except ValueError:
        return False


def load_metric(name: str) -> Metric:
    """Load the function that `file.py:function` names.

    Raises:
        UserError: there is no such file or function, the file cannot be run, or the name is that of another figure.
    """
    path, _, function = name.partition(":")
    if not function or not os.path.exists(path) or not path.endswith(".py"):
        raise UserError(f"--metric {name!r}: expected an existing file and a function in it, as in metric.py:score.")
    spec = importlib.util.spec_from_file_location("metric", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"--metric {name!r}: {path} cannot be run: {type(error).__name__}: {error}.") from None
    if function in FIGURES:
        raise UserError(f"--metric {name!r}: {function!r} is the name of a figure that is there; rename the function.")
    if not callable(getattr(module, function, None)):
        raise UserError(f"--metric {name!r}: {path} has no function {function!r}.")
    return getattr(module, function)


def scores(text: str, question: Question, metric: Metric | None = None) -> dict[str, float]:
    """Score one answer: exact_match and valid_json, 0 or 1, and `metric` under its own name.

    A metric that raises an error counts as NaN, and the error is printed: one answer must not end a run of hours.
    """
    result = {"exact_match": float(text.strip() == question.reference.strip()), "valid_json": float(is_json(text))}
    if metric:
        try:
            result[metric.__name__] = float(metric(text, question.reference, question.messages))
        except Exception as error:
            print(f"--metric {metric.__name__}: {type(error).__name__}: {error} on the answer {text!r:.200}")
            result[metric.__name__] = float("nan")
    return result


def mean_scores(each: Iterable[dict[str, float]]) -> dict[str, float]:
    """Return the mean of every score over the answers."""
    each = list(each)
    return {name: sum(score[name] for score in each) / len(each) for name in each[0]}


def measure(
    model: PreTrainedModel,
    encoder: ChatEncoder,
    conversations: Sequence[Conversation],
    max_new_tokens: int = 256,
    batch_size: int = 16,
    metric: Metric | None = None,
    max_length: int | None = None,
    show_bar: bool = False,
) -> Measured:
    """Answer the last turn of each conversation and compute the loss of all its turns.

    Args:
        encoder: encodes for the model's tokenizer, in the mode that the model was trained in.
        max_length: leave out conversations with a longer document, in tokens.
        show_bar: whether to show a progress bar in a terminal.

    Raises:
        UserError: no conversation has an assistant turn to answer.
    """
    rows = [encoded.documents for encoded in encoder.encode_batch(conversations)]
    longest = [max((len(document["input_ids"]) for document in row), default=0) for row in rows]
    kept = [number for number, length in enumerate(longest) if 0 < length <= (max_length or math.inf)]
    left_out = {"without an assistant turn to answer": longest.count(0)}
    left_out[f"longer than {max_length} tokens"] = len(rows) - len(kept) - longest.count(0)
    asked = questions([conversations[number] for number in kept], encoder)
    if not asked:
        limit = f" of at most {max_length} tokens" if max_length else ""
        raise UserError(f"no conversation{limit} has an assistant turn to be answered.")
    answers = answer(model, encoder.tokenizer, asked, encoder.stop_ids, max_new_tokens, batch_size, show_bar)
    figures = mean_scores(scores(text, question, metric) for text, question in zip(answers, asked, strict=True))
    figures["eval_loss"] = mean_loss(model, [rows[number] for number in kept], show_bar=show_bar)
    return Measured(figures, answers, asked, {reason: count for reason, count in left_out.items() if count})
