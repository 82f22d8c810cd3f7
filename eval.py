"""Measure a model on held-out conversations as a user would judge it: by its answers, and by its loss.

    python eval.py --model_name_or_path output/demo --data_path data/validation.jsonl

The model is asked for the last assistant turn of every conversation, given everything before it; it answers greedily
and stops at its stop token. Prints and, with --output, writes the answers and three numbers: exact_match and valid_json
(0 to 1) and eval_loss (mean over supervised tokens). `--metric file.py:function` adds `function(answer, reference,
messages) -> float`.
"""

import argparse
import json

from jinja2 import TemplateError

from recipe import console
from recipe.console import UserError
from recipe.dataset.conversations import Conversations
from recipe.model.loading import load
from recipe.training.answers import load_metric, measure


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
    console.quiet()
    try:
        metric = load_metric(args.metric) if args.metric else None
        source = Conversations(args.data_path)
        chosen = [source[i] for i in range(min(args.limit or len(source), len(source)))]
        model, tokenizer = load(args.model_name_or_path)
        numbers, answers, asked = measure(model, tokenizer, chosen, args.max_new_tokens, args.batch_size, metric)
    except (UserError, ValueError, TemplateError) as error:  # a template that is missing, or refuses a conversation
        console.fail(error)
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            for text, question in zip(answers, asked, strict=True):
                line = {"answer": text, "reference": question.reference}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
