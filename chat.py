"""Talk to a model or an adapter in the terminal, through the chat template it was trained with.

python chat.py --model_name_or_path output/demo
"""

import argparse

from recipe import command_line, console
from recipe.console import UserError
from recipe.dataset.encoding import THINKING


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    command_line.add_model_flags(parser, THINKING)
    parser.add_argument("--system", help="System message. Default: the template's own.")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="Longest answer in tokens. Default 512.")
    return parser.parse_args()


def talk(args: argparse.Namespace) -> None:
    """Read lines from the terminal and answer each, until the input ends.

    Raises:
        UserError: the model cannot be loaded, or has no chat template.
    """
    from jinja2 import TemplateError

    from finetune import nf4
    from recipe.dataset.encoding import ChatEncoder
    from recipe.model import loading
    from recipe.training import answers

    quantize = nf4 if args.q_lora else None
    model, tokenizer = loading.load(args.model_name_or_path, quantize=quantize, **command_line.model_options(args))
    start = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(start)
    try:
        encoder = ChatEncoder(tokenizer, thinking=args.thinking, template_kwargs=args.chat_template_kwargs)
        print("Your turn. An empty line starts a new conversation, Ctrl-D ends.")
        while (text := _line()) is not None:
            if not text.strip():
                messages = list(start)
                print("(new conversation)")
                continue
            messages.append({"role": "user", "content": text})
            # Training's prompt for this turn; the last message stands in for the answer.
            (question,) = answers.questions([{"messages": [*messages, {"role": "assistant", "content": "-"}]}], encoder)
            (reply,) = answers.answer(model, tokenizer, [question], encoder.stop_id, args.max_new_tokens)
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
    try:
        talk(args)
    except UserError as error:
        console.fail(error)


if __name__ == "__main__":
    main()
