"""Talk to a model or an adapter in the terminal, through the chat template and in the prompt mode of its training.

    python chat.py --model_name_or_path output/demo
    python chat.py --model_name_or_path output/demo --compare base-model

Answers appear as they are made. /help lists the commands. If standard input is no terminal, each of its lines is a turn.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
from typing import Any

from recipe import command_line, console
from recipe.console import UserError
from recipe.dataset.encoding import THINKING

COMMANDS = {
    "/reset": "start a new conversation, as an empty line does",
    "/system TEXT": "use another system message, none if TEXT is empty, and start a new conversation",
    "/think on|off": "ask for answers with or without a thought, if the chat template has a switch",
    "/save FILE": "add the conversation to a JSON Lines file that finetune.py can train on",
    "/help": "list the commands; Ctrl-D ends",
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse a command line, that of this process if None."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    command_line.add_model_flags(parser, THINKING)
    parser.add_argument("--compare", help="Another model or adapter, which answers every turn beside the first.")
    parser.add_argument("--system", help="System message. Default: training's, else the template's own.")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="Longest answer in tokens. Default 512.")
    return parser.parse_args(argv)


class Chat:
    """A conversation with one model, asked in one prompt mode.

    Args:
        name: folder or hub name of the model or adapter.
        args: the command line.
    Raises:
        UserError: the model cannot be loaded, or has no chat template.
    """

    def __init__(self, name: str, args: argparse.Namespace):
        from finetune import nf4
        from recipe.model import loading
        from recipe.model.prompt_mode import PromptMode

        quantize = nf4 if args.q_lora else None
        options = command_line.model_options(args)
        if name != args.model_name_or_path:
            options["base"] = None  # it has one of its own
        self.name, self.args = name, args
        self.model, self.tokenizer = loading.load(name, quantize=quantize, **options)
        self.mode = PromptMode.chosen(name, args)
        self.encoder = self._encoder()
        self.start(self.mode.system if args.system is None else args.system)

    def _encoder(self):
        try:
            return self.mode.encoder(self.tokenizer)
        except ValueError as error:  # the template is missing
            raise UserError(f"{self.name}: {error}") from None

    def start(self, system: str | None) -> None:
        """Start a new conversation with a system message, or without."""
        self.system = system
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []

    def think(self, on: bool) -> bool:
        """Ask for thoughts or for none from now on; return whether the chat template has a switch for that."""
        variables = {k: v for k, v in self.mode.chat_template_kwargs.items() if k != "enable_thinking"}
        self.mode = dataclasses.replace(self.mode, thinking="auto", thoughts=on, chat_template_kwargs=variables)
        self.encoder = self._encoder()
        return self.encoder.template.has_switch

    def answer(self, text: str, streamer: Any = None) -> str | None:
        """Answer the next turn of the user and keep both; None if the conversation is longer than --model_max_length.

        Args:
            text: what the user says.
            streamer: gets the tokens as they are made, see `transformers.TextStreamer`.
        """
        from jinja2 import TemplateError

        from recipe.training import answers

        messages = [*self.messages, {"role": "user", "content": text}]
        try:
            (question,) = answers.questions([self.mode.to_be_answered(messages)], self.encoder)
        except (ValueError, TemplateError) as error:  # the template refuses the conversation
            raise UserError(f"{self.name}: {error}") from None
        if self.args.model_max_length and len(question.prompt_ids) >= self.args.model_max_length:
            return None
        (reply,) = answers.answer(
            self.model, self.tokenizer, [question], self.encoder.stop_ids, self.args.max_new_tokens, streamer=streamer
        )
        self.messages = [*messages, {"role": "assistant", "content": reply}]
        return reply


def talk(args: argparse.Namespace) -> None:
    """Read lines from the terminal and answer each, until the input ends.

    Raises:
        UserError: a model cannot be loaded, or has no chat template.
    """
    from rich.console import Console

    screen, interactive = Console(highlight=False, emoji=False), sys.stdin.isatty()
    commands = {command.split()[0] for command in COMMANDS}
    if interactive:
        with contextlib.suppress(ImportError):  # line editing and a history of what was typed
            import readline  # noqa: F401
    chats = [Chat(name, args) for name in (args.model_name_or_path, args.compare) if name]
    screen.print(
        "Your turn. An empty line starts a new conversation, /help lists the commands, Ctrl-D ends.", style="dim"
    )
    while True:
        try:
            text = screen.input("[bold]> [/bold]") if interactive else input()
        except (EOFError, KeyboardInterrupt):
            return
        if not text.strip() or text.split()[0] in commands or (interactive and text.startswith("/")):
            screen.print(f"({_obey(text, chats)})", style="dim", markup=False)
            continue
        before, problem = [chat.messages for chat in chats], None
        try:
            if not _answer(text, chats, screen):
                problem = "the prompt reaches --model_max_length; an empty line starts anew"
        except KeyboardInterrupt:
            problem = "stopped; the turn is forgotten"
        if problem:
            for chat, messages in zip(chats, before, strict=True):
                chat.messages = messages
            screen.print(f"({problem})", style="dim")


def _answer(text: str, chats: list[Chat], screen: Any) -> bool:
    """Print the answers to a turn; False if the conversation is too long for one of the models."""
    from rich.table import Table
    from rich.text import Text

    if len(chats) == 1:
        reply = chats[0].answer(text, _streamer(chats[0]))
        print()
        return reply is not None
    replies = [chat.answer(text) for chat in chats]
    table = Table(*(chat.name for chat in chats), expand=True)
    table.add_row(*(Text(reply or "") for reply in replies))
    screen.print(table)
    return None not in replies


def _streamer(chat: Chat) -> Any:
    """Return what prints an answer word by word."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            for token in chat.encoder.stop_tokens if stream_end else ():
                text = text.removesuffix(token)
            print(text, end="", flush=True)

    return Streamer(chat.tokenizer, skip_prompt=True, clean_up_tokenization_spaces=False)


def _obey(text: str, chats: list[Chat]) -> str:
    """Do what a command says, for every model; return what was done."""
    name, _, rest = text.strip().partition(" ")
    rest = rest.strip()
    if name in ("", "/reset"):
        for chat in chats:
            chat.start(chat.system)
        return "new conversation"
    if name == "/system":
        for chat in chats:
            chat.start(rest or None)
        return f"new conversation, {'with that' if rest else 'without a'} system message"
    if name == "/think" and rest in ("on", "off"):
        known = [chat.think(rest == "on") for chat in chats]
        return f"thoughts are {rest}" if all(known) else "the chat template has no switch for thoughts"
    if name == "/save" and rest:
        return _save(rest, chats)
    return "\n".join(f"{command}: {what}" for command, what in COMMANDS.items())


def _save(path: str, chats: list[Chat]) -> str:
    talks = [chat.messages for chat in chats if chat.messages and chat.messages[-1]["role"] == "assistant"]
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in talks)
    except OSError as error:
        return f"{path} cannot be written: {error.strerror}"
    return f"{len(talks)} conversation{'s' * (len(talks) != 1)} added to {path}"


def main() -> None:
    """Run the command line; a user's mistake is one sentence."""
    args = parse()
    console.configure_libraries()
    console.run(lambda: talk(args))


if __name__ == "__main__":
    main()
    console.leave()
