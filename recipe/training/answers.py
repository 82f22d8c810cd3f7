"""Measure a model on held-out conversations as a user would judge it: by its answers, and by its loss.

    python evaluate.py --model_name_or_path output/demo --data_path data/validation.jsonl

The model is asked for the last assistant turn of every conversation, given everything before it; it answers greedily
and stops at its stop token. Prints and, with --output, writes the answers and three numbers: exact_match and valid_json
(0 to 1) and eval_loss (mean over supervised tokens). `--metric file.py:function` adds `function(answer, reference,
messages) -> float`.
"""

import dataclasses
import importlib.util
import json
import os
from typing import NamedTuple

import torch

from recipe.console import UserError
from recipe.dataset.collator import Collator
from recipe.dataset.encoding import ChatEncoder, supervised_runs
from recipe.model.loss import supervised_loss
from recipe.training import checks


class Question(NamedTuple):
    """A prompt in tokens, the answer that the data gives, as ids and as text, and the messages before it."""

    prompt_ids: list
    reference_ids: list
    reference: str
    messages: list


def questions(conversations, encoder, max_length=None):
    """One Question for the last assistant turn of each conversation; those without one, or too long, are left out."""
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


@torch.no_grad()
def answer(model, tokenizer, asked, stop_id, max_new_tokens=256, batch_size=16):
    """Greedy answers, as text without the stop token, to a list of Questions.

    Prompts of similar length share a batch, padded on the left and masked.
    """
    training, cache = model.training, model.config.use_cache
    model.eval()
    model.config.use_cache = True
    prompt_ids = [question.prompt_ids for question in asked]
    answers = [None] * len(asked)
    order = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))
    # The last position of each prompt is a strided view, for each row of which torch would copy a frozen head.
    whole = model.get_output_embeddings().register_forward_pre_hook(lambda head, inputs: inputs[0].contiguous())
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = max(len(prompt_ids[i]) for i in chosen)
        ids = torch.tensor([[stop_id] * (width - len(prompt_ids[i])) + prompt_ids[i] for i in chosen])
        mask = torch.tensor([[0] * (width - len(prompt_ids[i])) + [1] * len(prompt_ids[i]) for i in chosen])
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None, top_p=None, top_k=None,  # a model's own sampling settings have no meaning here
            eos_token_id=stop_id,
            pad_token_id=stop_id,
        )  # fmt: skip
        for i, new in zip(chosen, output[:, width:].tolist()):
            new = new[: new.index(stop_id)] if stop_id in new else new
            answers[i] = tokenizer.decode(new, clean_up_tokenization_spaces=False)
    whole.remove()
    model.config.use_cache = cache
    model.train(training)
    return answers


@torch.no_grad()
def mean_loss(model, rows, batch_size=8, collator=None):
    """Mean cross entropy over the supervised tokens of `rows` (lists of documents), whatever the batch size."""
    model.eval()
    collator = collator or Collator(checks.packing_fault(model, Collator()) is None)
    total, count = 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = collator(rows[start : start + batch_size])
        moved = {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in batch.items()}
        loss, supervised = supervised_loss(model, moved)
        total, count = total + loss.item(), count + supervised.item()
    return total / count


def is_json(text):
    try:
        return isinstance(json.loads(text), (dict, list))
    except ValueError:
        return False


def load_metric(name):
    """The function behind `file.py:function`."""
    path, _, function = name.partition(":")
    if not function or not os.path.exists(path) or not path.endswith(".py"):
        raise UserError(f"--metric {name!r}: expected an existing file and a function in it, as in metric.py:score.")
    spec = importlib.util.spec_from_file_location("metric", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"--metric {name!r}: {path} cannot be run: {type(error).__name__}: {error}.") from None
    if function in ("loss", "exact_match", "valid_json"):
        raise UserError(f"--metric {name!r}: {function!r} is the name of a figure that is there; rename the function.")
    if not callable(getattr(module, function, None)):
        raise UserError(f"--metric {name!r}: {path} has no function {function!r}.")
    return getattr(module, function)


def scores(text, question, metric=None):
    """How good one answer is: exact_match and valid_json, 0 or 1, and `metric` under its name where one is given."""
    result = {"exact_match": float(text.strip() == question.reference.strip()), "valid_json": float(is_json(text))}
    if metric:
        try:
            result[metric.__name__] = float(metric(text, question.reference, question.messages))
        except Exception as error:  # one odd answer must not end a run of hours
            print(f"--metric {metric.__name__}: {type(error).__name__}: {error} on the answer {text!r:.200}")
            result[metric.__name__] = float("nan")
    return result


def measure(model, tokenizer, conversations, max_new_tokens=256, batch_size=16, metric=None):
    """All measures of a model on a list of conversations.

    Returns:
        (dict of means, list of answers, list of Questions).
    """
    encoder = ChatEncoder(tokenizer)
    asked = questions(conversations, encoder)
    if not asked:
        raise UserError("no conversation has an assistant turn to be answered.")
    answers = answer(model, tokenizer, asked, encoder.stop_id, max_new_tokens, batch_size)
    each = [scores(text, question, metric) for text, question in zip(answers, asked, strict=True)]
    numbers = {name: sum(score[name] for score in each) / len(each) for name in each[0]}
    rows = [row.documents for row in encoder.encode_batch(conversations) if row.documents]
    numbers["eval_loss"] = mean_loss(model, rows)
    return numbers, answers, asked
