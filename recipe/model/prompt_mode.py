"""How a model was asked in training, saved beside its weights: what chat.py, eval.py and a server have to repeat."""

import collections
import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

from recipe.console import UserError
from recipe.dataset.conversations import Conversation, Message
from recipe.dataset.encoding import THINKING, ChatEncoder
from recipe.dataset.thoughts import thought_of, with_opened_thought

FILE = "prompt_mode.json"
SAMPLE = 64  # conversations, at least


@dataclasses.dataclass(frozen=True)
class PromptMode:
    """What a prompt of training was made of, besides the messages and the chat template.

    Attributes:
        thinking: as in --thinking.
        chat_template_kwargs: variables of the chat template: those of the flag, and of the records if all agree.
        thoughts: whether most of the learnt turns have a thought; a prompt that is to be answered with one differs.
        system: the system message, if all conversations have the same.
    """

    thinking: str = THINKING[0]
    chat_template_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    thoughts: bool = False
    system: str | None = None

    @classmethod
    def of(cls, dataset: Any) -> "PromptMode":
        """Find the mode in which a SupervisedDataset is encoded, from a sample of its conversations."""
        encoder, kept = dataset.tokeniser.encoder, dataset.kept
        chosen = (dataset.conversations[number] for number in kept[:: max(1, len(kept) // SAMPLE)])
        systems: collections.Counter[str | None] = collections.Counter()
        variables: collections.Counter[str] = collections.Counter()
        thoughts = []
        for conversation in chosen:
            first = conversation["messages"][0]
            systems[first["content"] if first["role"] == "system" else None] += 1
            variables[json.dumps(conversation.get("chat_template_kwargs", {}), sort_keys=True)] += 1
            turns = [m for m in conversation["messages"] if m["role"] == "assistant" and m.get("train", True)]
            thoughts += [bool(thought_of(dict(with_opened_thought(turn)))) for turn in turns]
        own = json.loads(next(iter(variables))) if len(variables) == 1 else {}
        return cls(
            encoder.thinking,
            {**encoder.template_kwargs, **own},
            2 * sum(thoughts) > len(thoughts),
            next(iter(systems)) if len(systems) == 1 else None,
        )

    @classmethod
    def read(cls, model: str, cache_dir: str | None = None) -> "PromptMode":
        """Read the mode that is saved in the folder of a model or adapter, or on the hub; the defaults if none is.

        Raises:
            UserError: the file there is no such record.
        """
        try:
            path = cached_file(model, FILE, cache_dir=cache_dir)
        except OSError:  # it is not there
            return cls()
        try:
            with open(path, encoding="utf-8") as file:
                return cls(**json.load(file))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: cannot be read ({error}); delete it, and say --thinking and others.") from None

    @classmethod
    def chosen(cls, model: str, args: Any) -> "PromptMode":
        """Read the mode of a model; the flags of `command_line.add_model_flags` win where they are given."""
        flags = {name: getattr(args, name) for name in ("thinking", "chat_template_kwargs")}
        given = {name: value for name, value in flags.items() if value is not None}
        return dataclasses.replace(cls.read(model, args.cache_dir), **given)

    def save(self, folder: str) -> None:
        """Write the record into a folder of weights."""
        with open(os.path.join(folder, FILE), "w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(self), file, indent=2, ensure_ascii=False)
            file.write("\n")

    def encoder(self, tokenizer: PreTrainedTokenizerBase) -> ChatEncoder:
        """Return the encoder of this mode.

        Raises:
            ValueError: from `ChatEncoder`.
        """
        return ChatEncoder(tokenizer, thinking=self.thinking, template_kwargs=self.chat_template_kwargs)  # type: ignore[arg-type]

    def to_be_answered(self, messages: Sequence[Message]) -> Conversation:
        """Return a conversation whose last turn stands in for the answer to these messages, as training has it."""
        answer: Message = {"role": "assistant", "content": "-"}
        if self.thoughts:
            answer["reasoning_content"] = "-"
        return {"messages": [*messages, answer]}

    def variables(self, encoder: ChatEncoder) -> dict[str, Any]:
        """Return the variables of the chat template with which a server renders the prompts of this mode."""
        return encoder.prompt_variables(self.to_be_answered([{"role": "user", "content": "q"}]))
