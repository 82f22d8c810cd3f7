"""Measure models on held-out conversations as a user would judge them: by their answers, and by their loss.

    python eval.py --model_name_or_path output/demo --data_path data/validation.jsonl
    python eval.py --model_name_or_path base-model output/demo output/demo/best --data_path data/validation.jsonl

The model is asked for the last assistant turn of every conversation, given everything before it, in the prompt mode that
its training saved beside it; it answers greedily and stops at its stop token. Prints three numbers, exact_match and
valid_json (0 to 1) and eval_loss (mean over supervised tokens), of several models a table; --output writes the answers,
and --report a page that shows them side by side. `--metric file.py:function` adds
`function(answer, reference, messages) -> float`.
"""

import argparse
import gc
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from recipe import command_line, console, signals
from recipe.console import UserError
from recipe.dataset.encoding import THINKING

if TYPE_CHECKING:  # its import takes seconds, and --help needs none of it
    from recipe.training.answers import Measured


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse a command line, that of this process if None."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    command_line.add_model_flags(parser, THINKING, several=True)
    parser.add_argument("--data_path", nargs="+", required=True, help="Files of conversations.")
    parser.add_argument("--limit", type=int, default=0, help="Only the first N conversations. Default 0: all.")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="Longest answer in tokens. Default 256.")
    parser.add_argument("--batch_size", type=int, default=16, help="Prompts answered together. Default 16.")
    parser.add_argument("--metric", help="file.py:function, a measure of your own.")
    parser.add_argument("--output", help="File for the answers, one JSON object a line.")
    parser.add_argument("--report", help="HTML file for the figures and the answers, side by side.")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Measure the models and print their figures.

    Raises:
        UserError: a model, the data or the metric cannot be loaded, or there is nothing to measure.
    """
    from recipe.dataset.conversations import Conversations
    from recipe.training import answers

    for path in filter(None, (args.output, args.report)):
        new = not os.path.exists(path)
        try:
            open(path, "a").close()  # before the models are loaded and have answered
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); name another file.") from None
        if new:
            os.remove(path)  # they may not be there
    metric = answers.load_metric(args.metric) if args.metric else None
    source = Conversations(args.data_path)
    chosen = [source[i] for i in range(min(args.limit or len(source), len(source)))]
    figures: dict[str, dict[str, float]] = {}
    lines, rows = list[dict[str, str]](), dict[tuple[str, str], dict[str, str]]()
    for name in dict.fromkeys(args.model_name_or_path):
        found = measure(name, chosen, metric, args)
        figures[name] = found.figures
        model = {"model": name} if len(args.model_name_or_path) > 1 else {}
        for text, question in zip(found.answers, found.questions, strict=True):
            lines.append({**model, "answer": text, "reference": question.reference})
            first = {"prompt": question.messages[-1]["content"], "wanted": question.reference}
            rows.setdefault((str(question.messages), question.reference), first)[name] = text
        for reason, count in found.left_out.items():
            print(f"{name}: {count} of {len(chosen)} conversations left out, {reason}", file=sys.stderr)
        gc.collect()  # the next model takes its place
    print(json.dumps(found.figures) if len(figures) == 1 else table(figures), flush=True)
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if args.report:
        from recipe.training import report_page

        columns = ["prompt", "wanted", *figures]
        sides = [{name: row.get(name, "(left out)") for name in columns} for row in rows.values()]
        report_page.write_answers(args.report, figures, sides)


def measure(name: str, conversations: list, metric: Any, args: argparse.Namespace) -> "Measured":
    """Load one model and measure it on conversations, in the prompt mode of its training unless flags say another.

    Raises:
        UserError: the model cannot be loaded, or its template is missing or refuses a conversation.
    """
    from jinja2 import TemplateError

    from finetune import nf4
    from recipe.model import loading
    from recipe.model.prompt_mode import PromptMode
    from recipe.training import answers

    quantize = nf4 if args.q_lora else None
    model, tokenizer = loading.load(name, quantize=quantize, **command_line.model_options(args))
    try:
        encoder, limit = PromptMode.chosen(name, args).encoder(tokenizer), args.model_max_length
        return answers.measure(
            model, encoder, conversations, args.max_new_tokens, args.batch_size, metric, limit, show_bar=True
        )
    except (ValueError, TemplateError) as error:
        raise UserError(f"{name}: {error}") from None


def table(figures: dict[str, dict[str, float]]) -> str:
    """Return the figures of several models, {name: {figure: value}}, as a Markdown table."""
    names = list(next(iter(figures.values())))
    width = max(map(len, figures))
    lines = [f"| {'model':<{width}} | {' | '.join(names)} |", f"|{'-' * (width + 2)}|{'---:|' * len(names)}"]
    for model, values in figures.items():
        cells = (f"{values[name]:>{len(name)}.4f}" for name in names)
        lines.append(f"| {model:<{width}} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the command line; a user's mistake is one sentence."""
    args = parse()
    console.configure_libraries()
    console.run(lambda: run(args))


if __name__ == "__main__":
    signals.watch("ended before the work was done.")
    main()
    console.leave()
