"""One turn of a data file -> one message with the fields that a chat template reads.

ROLES and FIELDS are the spellings that are understood, and the only place that knows them.
"""

import json
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NotRequired, TypedDict, cast

from recipe.console import UserError
from recipe.dataset.files import json_problem, value_in_words

CALL = "tool call"  # a turn of the assistant whose text is JSON with one call or a list of calls
ROLES = {  # a role, and its spellings in data files, in small letters
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "bot", "ai", "chatbot", "chatgpt"),
    "tool": ("tool", "observation", "function", "ipython", "tool_response", "tool_result", "function_response"),
    CALL: ("function_call", "tool_call"),
}
FIELDS = {  # a field of a message, and its spellings
    "role": ("role", "from"),
    "content": ("content", "value"),
    "reasoning_content": ("reasoning_content", "reasoning", "thinking", "thought"),
    "tool_calls": ("tool_calls", "function_call"),
    "train": ("train", "weight", "loss", "trainable", "loss_mask", "loss_weight"),
    "name": ("name",),
    "tool_call_id": ("tool_call_id",),
}
CALL_FIELDS = {  # the same of a call and its function; where a call stands in a list says nothing
    "id": ("id", "call_id"),
    "type": ("type",),
    "index": ("index",),
    "function": ("function",),
    "name": ("name",),
    "arguments": ("arguments", "parameters", "input", "args"),
}
PARTS = {  # what a part of a content list holds, by its type
    "content": ("text", "input_text", "output_text"),
    "reasoning_content": ("reasoning", "thinking", "thought"),
    "tool_calls": ("tool_call", "function_call", "tool_use"),
}
EMPTY: tuple = (None, "", [], {})  # values that say nothing; a field with one is not named as unused
MEDIA = ("image", "video", "audio")  # types of parts, and fields of records, that begin so are no text
ROLE_OF = {spelling: role for role, spellings in ROLES.items() for spelling in spellings}
PART_OF = {spelling: field for field, spellings in PARTS.items() for spelling in spellings}


class Function(TypedDict):
    """A function that the model calls; its arguments are an object, as templates write them as JSON themselves."""

    name: str
    arguments: dict[str, Any]


class ToolCall(TypedDict):
    """A call of a tool, as in OpenAI's API."""

    type: Literal["function"]
    function: Function
    id: NotRequired[str]


class Message(TypedDict):
    """One turn of a conversation; `train` False makes an assistant turn context only."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]
    train: NotRequired[bool]


def to_message(turn: Any, where: str) -> Message:
    """Convert one turn of a data file.

    Args:
        turn: the value as read from the file.
        where: words that name the file, the record and the turn, for error messages.
    Raises:
        UserError: the turn is malformed.
    """
    if not isinstance(turn, dict):
        raise UserError(f"{where}: expected an object with a role and a text, found {value_in_words(turn)}.")
    role = _role(turn, where)
    text, thought, calls = _content(field(turn, "content", FIELDS, where), where)
    calls += _list_of_calls(field(turn, "tool_calls", FIELDS, where), where, turn)
    if role == CALL:
        role, (text, more) = "assistant", _calls_in_text(text, where)
        calls += more
    if text is None and (calls or thought):
        text = ""
    if not isinstance(text, str):
        raise UserError(
            f"{where}: the text of this {role} turn ('content' or 'value') must be a string or a list of text parts, "
            f"found {value_in_words(text)}."
        )
    message: dict[str, Any] = {"role": role, "content": text}
    if calls:
        message["tool_calls"] = [_tool_call(call, where) for call in calls]
    for name in ("reasoning_content", "name", "tool_call_id"):
        value = field(turn, name, FIELDS, where)
        if value is not None:
            if not isinstance(value, str):
                raise UserError(f"{where}: '{name}' must be a string, found {value_in_words(value)}.")
            message[name] = value
    if thought:
        if message.get("reasoning_content"):
            raise UserError(f"{where}: found a thought in the content and one beside it; expected one, so remove one.")
        message["reasoning_content"] = thought
    learnt = loss_flag(turn, where)
    if learnt is not None:
        message["train"] = learnt
    check_unicode(message, where)
    return cast(Message, message)


def field(record: dict, name: str, spellings: Mapping[str, tuple[str, ...]], where: str) -> Any:
    """Return the value of a field under any of its spellings; None if it is missing or null.

    Raises:
        UserError: two spellings have different values.
    """
    found = {spelling: record[spelling] for spelling in spellings[name] if record.get(spelling) is not None}
    if len(found) < 2:
        return next(iter(found.values()), None)
    filled = {spelling: value for spelling, value in found.items() if value != ""} or found
    first, *others = filled
    for other in others:
        if filled[other] != filled[first]:
            raise UserError(f"{where}: found different values in {first!r} and {other!r}; expected one, so remove one.")
    return filled[first]


def unused_fields(turn: dict) -> Iterator[str]:
    """Name what `to_message` does not use of a turn, unless it is empty."""
    known = {spelling for spellings in FIELDS.values() for spelling in spellings}
    yield from (f"{name} in turns" for name, value in turn.items() if name not in known and value not in EMPTY)
    learnt = next((spelling for spelling in FIELDS["train"] if turn.get(spelling)), None)
    if learnt and _role(turn, "") not in ("assistant", CALL):
        yield f"{learnt} of turns that are not the assistant's"


def loss_flag(record: dict, where: str) -> bool | None:
    """Return whether a turn, or a whole record, is learnt; None if it does not say.

    Raises:
        UserError: the value is not true, false, 0 or 1, or two spellings say different things.
    """
    value = field(record, "train", FIELDS, where)
    if value is not None and value not in (True, False):  # 0, 1, 0.0 and 1.0 compare equal to them
        name = next(spelling for spelling in FIELDS["train"] if record.get(spelling) is not None)
        raise UserError(f"{where}: {name!r} must be true or false, found {value_in_words(value)}.")
    return None if value is None else bool(value)


def to_tools(tools: Any, where: str) -> list[dict]:
    """Convert the list of tools of a record, which may be JSON text, to OpenAI's present form.

    Raises:
        UserError: it is no list of objects.
    """
    tools = parsed(tools, f"{where}: 'tools'") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(
            f"{where}: 'tools' must be a list of function descriptions (objects), found {value_in_words(tools)}."
        )
    check_unicode(tools, f"{where}: 'tools'")
    return [_present_form(tool) for tool in tools]


def _present_form(tool: dict) -> dict:
    """Wrap a function description as OpenAI's API does now; it was bare in `functions`."""
    if "function" in tool or not isinstance(tool.get("name"), str):
        return tool
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def parsed(value: Any, where: str) -> Any:
    """Parse a value that may be JSON text.

    Raises:
        UserError: it is text and no valid JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} must be valid JSON, found {value_in_words(value)}: {json_problem(error)}.") from None


def json_list(value: Any, where: str) -> Any:
    """Parse a list that a table holds as JSON text; anything else is returned as it is.

    Raises:
        UserError: text that begins like a list is no valid JSON.
    """
    return parsed(value, where) if isinstance(value, str) and value.lstrip().startswith("[") else value


def check_unicode(value: Any, where: str) -> None:
    """Refuse half of a surrogate pair, which JSON can write and no tokenizer takes.

    Raises:
        UserError: the character.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise UserError(
            f"{where}: found {half!r}, half of a character cut in two; expected whole characters, so remove it."
        ) from None


def _role(turn: dict, where: str) -> str:
    named = [turn[spelling] for spelling in FIELDS["role"] if turn.get(spelling) is not None]
    roles = {ROLE_OF.get(name.strip().lower()) if isinstance(name, str) else None for name in named}
    role = roles.pop() if len(roles) == 1 else None
    if role is None:
        found = f"the role {' and '.join(map(reprlib.repr, named))}" if named else "no role"
        raise UserError(f"{where}: found {found}; expected 'role' or 'from' to be one of {', '.join(ROLE_OF)}.")
    return role


def _content(content: Any, where: str) -> tuple[Any, str, list]:
    """Split a content into its text (anything that is no list of parts is returned as it is), thought and calls."""
    if content == []:
        return "", "", []
    kinds = [_kind(part) for part in content] if isinstance(content, list) else []
    for kind in kinds:
        if kind.startswith(MEDIA):
            raise UserError(f"{where}: has a part of type {kind!r}; only text can be trained, so remove such records.")
    if not kinds or not all(kind in PART_OF for kind in kinds):
        return content, "", []
    holds = [PART_OF[kind] for kind in kinds]
    if holds != sorted(holds, key=["reasoning_content", "content", "tool_calls"].index):
        raise UserError(
            f"{where}: has parts in the order {', '.join(kinds)}; expected thoughts, then text, then calls."
        )
    values = [_value(part, kind, where) for part, kind in zip(content, kinds, strict=True)]
    of = {name: [value for value, held in zip(values, holds, strict=True) if held == name] for name in PARTS}
    if not all(isinstance(value, str) for value in of["content"] + of["reasoning_content"]):
        return content, "", []
    return "".join(of["content"]), "\n".join(of["reasoning_content"]), of["tool_calls"]


def _kind(part: Any) -> str:
    """Return the type of a part of a content list; without a 'type' it is the name of its only field."""
    if not isinstance(part, dict):
        return ""
    return str(part.get("type") or (next(iter(part)) if len(part) == 1 else ""))


def _value(part: dict, kind: str, where: str) -> Any:
    if PART_OF[kind] == "tool_calls" and "name" in part:
        return {name: value for name, value in part.items() if name != "type"}
    value = next((part[name] for name in (kind, "text", "value", "content") if part.get(name) is not None), None)
    return parsed(value, f"{where}: the part {kind!r}") if PART_OF[kind] == "tool_calls" else value


def _list_of_calls(calls: Any, where: str, turn: dict) -> list:
    name = next((spelling for spelling in FIELDS["tool_calls"] if turn.get(spelling) is not None), "")
    calls = parsed(calls or None, f"{where}: {name!r}")
    if calls in EMPTY:
        return []
    if name == "function_call" and isinstance(calls, dict):
        return [calls]
    if not isinstance(calls, list):
        raise UserError(f"{where}: {name!r} must be a list, found {value_in_words(calls)}.")
    return calls


def _calls_in_text(text: Any, where: str) -> tuple[str, list]:
    """Split the text of a turn that is JSON with calls, possibly after a thought, into the thought and the calls."""
    thought, tag, calls = text.rpartition("</think>") if isinstance(text, str) else ("", "", text)
    calls = parsed(calls, f"{where}: the call in this turn")
    return thought + tag, calls if isinstance(calls, list) else [calls]


def _tool_call(call: Any, where: str) -> ToolCall:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(
            f"{where}: a tool call needs a function with 'name' and 'arguments', found {value_in_words(call)}."
        )
    of_this = f"{where}: the arguments of {reprlib.repr(function['name'])}"
    known = {spelling for spellings in CALL_FIELDS.values() for spelling in spellings}
    unknown = {name for part in (call, function) for name, value in part.items() if value not in EMPTY} - known
    if unknown:
        raise UserError(f"{where}: a tool call has the field {min(unknown)!r}; expected {', '.join(CALL_FIELDS)}.")
    arguments = parsed(field(function, "arguments", CALL_FIELDS, where) or {}, of_this) or {}
    if not isinstance(arguments, dict):
        raise UserError(f"{of_this} must be an object, found {value_in_words(arguments)}.")
    result: ToolCall = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    identity = field(call, "id", CALL_FIELDS, where)
    if identity is not None:
        if not isinstance(identity, str):
            raise UserError(f"{where}: the 'id' of a tool call must be a string, found {value_in_words(identity)}.")
        result["id"] = identity
    return result
