"""The shapes that a record of a data file may have: which fields identify each, and how its turns are read."""

import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple

from recipe.console import UserError
from recipe.dataset.files import value_in_words


class Shape(NamedTuple):
    """One shape of records.

    name: for messages and the log.
    fields: a record has this shape if none of them is missing or null.
    turns: function of (record, where) that returns the turns, for `messages.to_message`.
    """

    name: str
    fields: tuple[str, ...]
    turns: Callable[[dict, str], Any]


def _instruction_turns(record: dict, where: str) -> list[dict]:
    """instruction, optional input, output; `history` is a list of [question, answer] pairs that came before."""
    for field in ("instruction", "input", "output"):
        if not isinstance(record.get(field), (str, type(None))):
            raise UserError(f"{where}: '{field}' must be a string, found {value_in_words(record[field])}.")
    history = record.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise UserError(
                f"{where}: 'history' must be a list of [question, answer] pairs, found {value_in_words(pair)}."
            )
    question = record["instruction"]
    if record.get("input"):
        question = f"{question}\n\n{record['input']}"
    pairs = [*history, (question, record["output"])]
    return [turn for q, a in pairs for turn in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]


def _prompt_turns(record: dict, where: str) -> list:
    """prompt and completion, each a string or a list of messages (as TRL has them)."""
    parts: list = []
    for field, role in (("prompt", "user"), ("completion", "assistant")):
        value = record[field]
        parts.extend(value if isinstance(value, list) else [{"role": role, "content": value}])
    return parts


SHAPES = (  # in the order in which they are tried
    Shape("messages", ("messages",), lambda record, where: record["messages"]),
    Shape("conversations", ("conversations",), lambda record, where: record["conversations"]),
    Shape("instruction/output", ("instruction", "output"), _instruction_turns),
    Shape("prompt/completion", ("prompt", "completion"), _prompt_turns),
)


def shape_of(record: Any, where: str) -> Shape:
    """Find the shape of one record.

    Raises:
        UserError: it has none; the sentence lists what was found and what is accepted.
    """
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object with a conversation, found {value_in_words(record)}.")
    for shape in SHAPES:
        if all(record.get(field) is not None for field in shape.fields):
            return shape
    accepted = ", ".join(f"'{shape.name}'" for shape in SHAPES)
    named = ", ".join(reprlib.repr(key) + (" (null)" if record[key] is None else "") for key in list(record)[:8])
    found = f"the fields {named}" if named else "no fields"
    raise UserError(f"{where}: found {found}; expected one of the shapes {accepted}, so rename or fill in the fields.")
