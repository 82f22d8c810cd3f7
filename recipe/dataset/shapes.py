"""The shapes that a record of a data file may have, and other kinds of data that look like them.

SHAPES and RECORD_FIELDS are the fields of a record that are understood, and the only place that knows them.
"""

import re
import reprlib
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from recipe.console import UserError
from recipe.dataset.files import value_in_words
from recipe.dataset.messages import EMPTY, ROLE_OF, json_list


class Shape(NamedTuple):
    """One shape of records.

    name: for messages and the log.
    fields: a record has this shape if none of them is missing or null.
    also: fields that are read too if a record has them.
    turns: function of (record, where) that returns the turns, each for `messages.to_message`.
    """

    name: str
    fields: tuple[str, ...]
    also: tuple[str, ...]
    turns: Callable[[Any, str], Any]


def _list(field: str) -> Shape:
    """A list of turns; a turn may also be an object of speakers and texts: {"human": "Hi", "assistant": "Hello"}."""

    def turns(record: dict, where: str) -> Any:
        found = json_list(record[field], f"{where}: {field!r}")
        return _turns(found) if isinstance(found, list) else found

    return Shape(field, (field,), (), turns)


def _pair(question: str, answer: str) -> Shape:
    """A question, perhaps with `input` or `context`, and its answer; `history` came before them."""
    context = tuple(name for name in ("input", "context") if name != question)

    def turns(record: dict, where: str) -> list:
        asked, answered = _said(record, question, "user", where), _said(record, answer, "assistant", where)
        more = [_text(record, name, where) for name in context if record.get(name) not in EMPTY]
        if more:
            if len(asked) != 1 or not isinstance(asked[0]["content"], str):
                raise UserError(f"{where}: {question!r} must be a string beside {'input'!r} or {'context'!r}.")
            asked[0]["content"] = "\n\n".join(text for text in (asked[0]["content"], *more) if text.strip())
        return [*_history(record, where), *asked, *answered]

    return Shape(f"{question}/{answer}", (question, answer), (*context, "history"), turns)


QUESTIONS = ("instruction", "prompt", "query", "question", "input")
ANSWERS = ("output", "completion", "response", "answer")
SHAPES = (  # in the order in which they are tried
    _list("messages"),
    _list("conversations"),
    _list("conversation"),
    *(_pair(question, answer) for question in QUESTIONS for answer in ANSWERS),
)
BARE_LIST = Shape("list of turns", (), (), lambda record, where: _turns(record))  # a record that is no object
MESSAGE_LISTS = ("prompt", "completion")  # of a pair's fields, those that may be lists of messages, as TRL has them
RECORD_FIELDS = {  # fields that a record of any shape may have, and their spellings
    "system": ("system", "system_prompt"),
    "tools": ("tools", "functions"),
    "chat_template_kwargs": ("chat_template_kwargs",),
}


def _turns(items: list) -> list:
    return [turn for item in items for turn in _speakers(item)]


def _speakers(turn: Any) -> list:
    """Split an object of speakers and texts into turns; anything else is one turn."""
    if not isinstance(turn, dict) or not turn or not all(isinstance(k, str) and k.lower() in ROLE_OF for k in turn):
        return [turn]
    return [{"role": name, "content": text} for name, text in turn.items() if text is not None]


def _text(record: dict, field: str, where: str) -> str:
    if not isinstance(record[field], str):
        raise UserError(f"{where}: {field!r} must be a string, found {value_in_words(record[field])}.")
    return record[field]


def _said(record: dict, field: str, role: str, where: str) -> list[dict]:
    """Return the turns in one field of a pair: a text or, in MESSAGE_LISTS, messages."""
    value = record[field]
    if field in MESSAGE_LISTS and not isinstance(value, str):
        if isinstance(value, list):
            return _turns(value)
        return [value if isinstance(value, dict) else {"role": role, "content": value}]
    return [{"role": role, "content": _text(record, field, where)}]


def _history(record: dict, where: str) -> list:
    """Return the turns of `history`: [question, answer] pairs or messages."""
    history = json_list(record.get("history"), f"{where}: 'history'") or []
    turns: list = []
    for pair in history if isinstance(history, list) else [history]:
        if isinstance(pair, dict):
            turns += _speakers(pair)
        elif isinstance(pair, list | tuple) and len(pair) == 2:
            turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        else:
            raise UserError(
                f"{where}: 'history' must be a list of [question, answer] pairs, found {value_in_words(pair)}."
            )
    return turns


def shape_of(record: Any, where: str, mapped: Collection[str] = ()) -> Shape:
    """Find the shape of one record.

    Args:
        mapped: names of fields that the user has mapped (--columns); they decide if a record has several shapes, and
            data of another kind is then what the user says it is.
    Raises:
        UserError: it has none, or is data of another kind; the sentence says what was found and what is accepted.
    """
    if isinstance(record, list):
        return BARE_LIST
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object with a conversation, found {value_in_words(record)}.")
    shapes = [shape for shape in SHAPES if all(record.get(field) is not None for field in shape.fields)]
    shapes.sort(key=lambda shape: -sum(field in mapped for field in shape.fields))
    said = bool(shapes) and not set(shapes[0].fields).isdisjoint(mapped)  # which fields are the data
    refuse(OTHER_DATA[2:] if said else OTHER_DATA, record, where)
    if shapes:
        return shapes[0]
    refuse(NO_CONVERSATION, record, where)
    named = ", ".join(reprlib.repr(key) + (" (null)" if record[key] is None else "") for key in list(record)[:8])
    lists = ", ".join(repr(shape.name) for shape in SHAPES if len(shape.fields) == 1)
    raise UserError(
        f"{where}: found {f'the fields {named}' if named else 'no fields'}; expected one of the shapes {lists}, or a "
        f"question ({', '.join(QUESTIONS)}) with an answer ({', '.join(ANSWERS)}), so rename or fill in the fields, or map them "
        "with --columns."
    )


# ----------------------------------------------------------------------------------------------------------------------
# Data of another kind


class OtherData(NamedTuple):
    """Data that is no supervised data, although its records may have an accepted shape.

    name: what a record is.
    evidence: function of a record that returns the fields by which it is recognised; none if it is something else.
    remedy: function of a record that says what to do.
    """

    name: str
    evidence: Callable[[dict], list[str]]
    remedy: Callable[[dict], str]


def _filled(pattern: str, kind: type | tuple[type, ...] = object) -> Callable[[dict], list[str]]:
    """Recognise records by a field that is not empty."""
    compiled = re.compile(pattern)
    return lambda record: [
        name
        for name, value in record.items()
        if isinstance(name, str) and compiled.fullmatch(name) and value not in EMPTY and isinstance(value, kind)
    ]


def _judged(record: dict) -> list[str]:
    return [name for name in ("label", "kto_tag") if str(record.get(name)).lower() in ("true", "false")]


def _map_chosen(record: dict) -> str:
    """Name the --columns that train on the better answer of a preference pair."""
    chosen = next((name for name in record if isinstance(name, str) and name.startswith("chosen")), None)
    prompt = next((name for name in (*QUESTIONS, "conversations", "messages") if record.get(name) not in EMPTY), None)
    if chosen is None:
        columns = f"{prompt}={prompt}" if prompt else "messages=NAME"
    elif prompt and not (isinstance(record[chosen], list) and len(record[chosen]) > 1):
        columns = f"prompt={prompt} completion={chosen}"
    else:
        columns = f"messages={chosen}"
    return f"to train on the better answers alone, add --columns {columns}"


OTHER_DATA = (
    OtherData(
        "a preference pair",
        _filled(r"reject(ed(_(message|response|answer|output|completion|conversation)s?)?)?", (str, list, dict)),
        _map_chosen,
    ),
    OtherData(
        "an answer that was judged good or bad (KTO)",
        _judged,
        lambda record: f"to train on the good ones alone, add --columns train={_judged(record)[0]}",
    ),
    OtherData(
        "a conversation about more than text",
        _filled("(image|video|audio)s?"),
        lambda record: "only text can be trained, so remove such records",
    ),
)
NO_CONVERSATION = (  # records without an accepted shape
    OtherData("plain text", _filled("text", str), lambda record: "write it as a question and its answer"),
    OtherData("a batch request", _filled("custom_id|body"), lambda record: "join its messages with the answer to them"),
    OtherData("a text in tokens", _filled("input_ids|tokens"), lambda record: "use the text that they were made from"),
)


def refuse(kinds: Sequence[OtherData], record: dict, where: str) -> None:
    """Refuse a record that is data of one of these kinds.

    Raises:
        UserError: what it is, the fields by which it is recognised, and what to do.
    """
    for kind in kinds:
        fields = kind.evidence(record)
        if fields:
            named = " and ".join(map(repr, fields))
            raise UserError(f"{where}: is {kind.name} (it has {named}), no supervised data; {kind.remedy(record)}.")
