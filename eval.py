"""Measure a model on held-out conversations as a user would judge it: by its answers, and by its loss.

    python eval.py --model_name_or_path output/demo --data_path data/validation.jsonl

The model is asked for the last assistant turn of every conversation, given everything before it; it answers greedily
and stops at its stop token. Prints and, with --output, writes the answers and three numbers: exact_match and valid_json
(0 to 1) and eval_loss (mean over supervised tokens). `--metric file.py:function` adds `function(answer, reference,
messages) -> float`.
"""

import argparse
import json
import sys

from recipe import command_line, console, signals
from recipe.console import UserError
from recipe.dataset.encoding import THINKING


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    command_line.add_model_flags(parser, THINKING)
    parser.add_argument("--data_path", nargs="+", required=True, help="Files of conversations.")
    parser.add_argument("--limit", type=int, default=0, help="Only the first N conversations. Default 0: all.")
    parser.add_argument("--model_max_length", type=int, help="Leave out conversations of more tokens. Default none.")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="Longest answer in tokens. Default 256.")
    parser.add_argument("--batch_size", type=int, default=16, help="Prompts answered together. Default 16.")
    parser.add_argument("--metric", help="file.py:function, a measure of your own.")
    parser.add_argument("--output", help="File for the answers, one JSON object a line.")
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    """Measure the model and print its figures.

    Raises:
        UserError: the model, the data or the metric cannot be loaded, or there is nothing to measure.
    """
    from jinja2 import TemplateError

    from finetune import nf4
    from recipe.dataset.conversations import Conversations
    from recipe.dataset.encoding import ChatEncoder
    from recipe.model import loading
    from recipe.training import answers

    metric = answers.load_metric(args.metric) if args.metric else None
    source = Conversations(args.data_path)
    chosen = [source[i] for i in range(min(args.limit or len(source), len(source)))]
    quantize = nf4 if args.q_lora else None
    model, tokenizer = loading.load(args.model_name_or_path, quantize=quantize, **command_line.model_options(args))
    try:
        encoder = ChatEncoder(tokenizer, thinking=args.thinking, template_kwargs=args.chat_template_kwargs)
        found = answers.measure(
            model, encoder, chosen, args.max_new_tokens, args.batch_size, metric, args.model_max_length
        )
    except (ValueError, TemplateError) as error:  # the template is missing, or refuses a conversation
        raise UserError(f"{args.model_name_or_path}: {error}") from None
    if len(found.questions) < len(chosen):
        limit = f", or longer than {args.model_max_length} tokens" if args.model_max_length else ""
        text = (
            f"{len(chosen) - len(found.questions)} of {len(chosen)} conversations left out: no assistant turn to answer"
        )
        print(text + limit, file=sys.stderr)
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            for text, question in zip(found.answers, found.questions, strict=True):
                line = {"answer": text, "reference": question.reference}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    print(json.dumps(found.figures))


def main() -> None:
    """Run the command line; a user's mistake is one sentence."""
    args = parse()
    console.configure_libraries()
    try:
        run(args)
    except UserError as error:
        console.fail(error)


if __name__ == "__main__":
    signals.watch("ended before the work was done.")
    main()
