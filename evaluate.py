"""Measure a model on held-out conversations as a user would judge it: by its answers, and by its loss.

    python evaluate.py --model_name_or_path output/demo --data_path data/validation.jsonl

The model is asked for the last assistant turn of every conversation, given everything before it; it answers greedily
and stops at its stop token. Prints and, with --output, writes the answers and three numbers: exact_match and valid_json
(0 to 1) and eval_loss (mean over supervised tokens). `--metric file.py:function` adds `function(answer, reference,
messages) -> float`.
"""

import argparse
import importlib.util
import json
import os

import torch

import attention
import cli
from batches import Collator, supervised_loss
from conversations import Conversations, UserError
from hardware import best_dtype
from tokens import IGNORE_INDEX, ChatEncoder


def load(folder, dtype=None):
    """Model and tokenizer from a model folder, a hub name or an adapter folder (its base model is looked up).

    Returns:
        (model in evaluation mode on the GPU if there is one, tokenizer); `dtype` None means the fastest here.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    adapter = os.path.exists(os.path.join(folder, "adapter_config.json"))
    base = folder
    if adapter:
        with open(os.path.join(folder, "adapter_config.json"), encoding="utf-8") as file:
            base = json.load(file)["base_model_name_or_path"]
    cpu = not torch.cuda.is_available()
    attention.register()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        config = AutoConfig.from_pretrained(base)
        kernel = {"attn_implementation": attention.PACKED} if attention.can_pack(config.get_text_config()) else {}
        model = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=dtype or best_dtype(cpu), **kernel)
    except OSError as error:
        raise UserError(f"{folder}: cannot be loaded as a model: {str(error).splitlines()[0]}") from None
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder)
    return model.eval().to("cpu" if cpu else "cuda"), tokenizer


def prompts(conversations, tokenizer):
    """For each conversation the ids of the prompt of its last assistant turn, and that turn's own text.

    Conversations without an assistant turn are left out.
    """
    encoder = ChatEncoder(tokenizer, "last_turn")
    result = []
    for conversation, encoded in zip(conversations, encoder.encode_batch(conversations), strict=True):
        for document in encoded.documents:
            start = next(i for i, label in enumerate(document["labels"]) if label != IGNORE_INDEX)
            turn = document["turns"][-1] - 1
            messages = conversation["messages"]
            result.append((document["input_ids"][:start], messages[turn]["content"], messages[:turn]))
    return result, encoder.stop_id


@torch.no_grad()
def answer(model, tokenizer, prompt_ids, stop_id, max_new_tokens=256, batch_size=16):
    """Greedy answers, as text without the stop token, to a list of prompts (lists of ids).

    Prompts of similar length share a batch, padded on the left and masked.
    """
    training, cache = model.training, model.config.use_cache
    model.eval()
    model.config.use_cache = True
    answers = [None] * len(prompt_ids)
    order = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))
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
    model.config.use_cache = cache
    model.train(training)
    return answers


@torch.no_grad()
def mean_loss(model, rows, batch_size=8, collator=None):
    """Mean cross entropy over the supervised tokens of `rows` (lists of documents), whatever the batch size."""
    model.eval()
    collator = collator or Collator()
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
    if not function or not os.path.exists(path):
        raise UserError(f"--metric {name!r}: expected an existing file and a function in it, as in metric.py:score.")
    spec = importlib.util.spec_from_file_location("metric", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise UserError(f"--metric {name!r}: {path} has no function {function!r}.")
    return getattr(module, function)


def score(answers, asked, metric=None):
    """Means over all answers: exact_match and valid_json, and `metric` where one is given."""
    references = [reference for _, reference, _ in asked]
    result = {
        "exact_match": sum(a.strip() == r.strip() for a, r in zip(answers, references)) / len(answers),
        "valid_json": sum(map(is_json, answers)) / len(answers),
    }
    if metric:
        scores = [metric(a, r, messages) for a, (_, r, messages) in zip(answers, asked)]
        result[metric.__name__] = sum(map(float, scores)) / len(scores)
    return result


def measure(model, tokenizer, conversations, max_new_tokens=256, batch_size=16, metric=None):
    """All measures of a model on a list of conversations.

    Returns:
        (dict of numbers, list of answers, list of (prompt ids, reference, messages) as from `prompts`).
    """
    asked, stop_id = prompts(conversations, tokenizer)
    answers = answer(model, tokenizer, [ids for ids, _, _ in asked], stop_id, max_new_tokens, batch_size)
    numbers = score(answers, asked, metric)
    encoded = ChatEncoder(tokenizer).encode_batch(conversations)
    rows = [row.documents for row in encoded if row.documents]
    numbers["eval_loss"] = mean_loss(model, rows)
    return numbers, answers, asked


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model_name_or_path", required=True, help="Model folder, adapter folder or hub name.")
    parser.add_argument("--data_path", nargs="+", required=True, help="Files of conversations.")
    parser.add_argument("--limit", type=int, default=0, help="Only the first N conversations. Default 0: all.")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="Longest answer in tokens. Default 256.")
    parser.add_argument("--batch_size", type=int, default=16, help="Prompts answered together. Default 16.")
    parser.add_argument("--metric", help="file.py:function, a measure of your own.")
    parser.add_argument("--output", help="File for the answers, one JSON object a line.")
    args = parser.parse_args()
    try:
        metric = load_metric(args.metric) if args.metric else None
        source = Conversations(args.data_path)
        chosen = [source[i] for i in range(min(args.limit or len(source), len(source)))]
        model, tokenizer = load(args.model_name_or_path)
        numbers, answers, asked = measure(model, tokenizer, chosen, args.max_new_tokens, args.batch_size, metric)
    except UserError as error:
        cli.fail(error)
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            for text, (_, reference, _) in zip(answers, asked):
                file.write(json.dumps({"answer": text, "reference": reference}, ensure_ascii=False) + "\n")
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
