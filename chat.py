"""Talk to a model or an adapter in the terminal, through the chat template and in the prompt mode of its training.

python chat.py --model_name_or_path output/demo
"""

import argparse

from recipe import command_line, console
from recipe.console import UserError
from recipe.dataset.encoding import THINKING


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse a command line, that of this process if None."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    command_line.add_model_flags(parser, THINKING)
    parser.add_argument("--system", help="System message. Default: training's, else the template's own.")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="Longest answer in tokens. Default 512.")
    return parser.parse_args(argv)


def talk(args: argparse.Namespace) -> None:
    """Read lines from the terminal and answer each, until the input ends.

    Raises:
        UserError: the model cannot be loaded, or has no chat template.
    """
    from jinja2 import TemplateError

    from finetune import nf4
    from recipe.model import loading
    from recipe.model.prompt_mode import PromptMode
    from recipe.training import answers

    quantize = nf4 if args.q_lora else None
    model, tokenizer = loading.load(args.model_name_or_path, quantize=quantize, **command_line.model_options(args))
    mode = PromptMode.chosen(args.model_name_or_path, args)
    system = mode.system if args.system is None else args.system
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    try:
        encoder = mode.encoder(tokenizer)
        print("Your turn. An empty line starts a new conversation, Ctrl-D ends.")
        while (text := _line()) is not None:
            if not text.strip():
                messages = list(start)
                print("(new conversation)")
                continue
            messages.append({"role": "user", "content": text})
            (question,) = answers.questions([mode.to_be_answered(messages)], encoder)
            if args.model_max_length and len(question.prompt_ids) >= args.model_max_length:
                print(f"({len(question.prompt_ids)} tokens reach --model_max_length; an empty line starts anew)")
                messages.pop()
                continue
            (reply,) = answers.answer(model, tokenizer, [question], encoder.stop_ids, args.max_new_tokens)
            print(reply)
            messages.append({"role": "assistant", "content": reply})
    except (ValueError, TemplateError) as error:  # the template is missing, or refuses the conversation
        raise UserError(f"{args.model_name_or_path}: {error}") from None


def _line():
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        return None


def main() -> None:
    """Run the command line; a user's mistake is one sentence."""
    args = parse()
    console.configure_libraries()
    console.run(lambda: talk(args))


if __name__ == "__main__":
    main()
