"""One turn of a data file -> one message with the fields that a chat template reads."""

import json
import reprlib
from typing import Any, Literal, NotRequired, TypedDict, cast

from recipe.console import UserError
from recipe.dataset.files import json_problem, value_in_words

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant",
    "tool": "tool", "observation": "tool",
}  # fmt: skip


class Function(TypedDict):
    """A function that the model calls; its arguments are an object, as templates write them as JSON themselves."""

    name: str
    arguments: dict[str, Any]


class ToolCall(TypedDict):
    """A call of a tool, as in OpenAI's API."""

    type: Literal["function"]
    function: Function


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
    named = turn.get("role", turn.get("from"))
    role = ROLES.get(named) if isinstance(named, str) else None
    if role is None:
        found = "no role" if named is None else f"the role {reprlib.repr(named)}"
        raise UserError(f"{where}: found {found}; expected 'role' or 'from' to be one of {', '.join(ROLES)}.")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list) and all(_is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    message: dict[str, Any] = {"role": role, "content": content}
    calls = turn.get("tool_calls") and _tool_calls(turn["tool_calls"], where)
    if calls:
        message["tool_calls"] = calls
        message["content"] = content = "" if content is None else content
    if not isinstance(content, str):
        raise UserError(
            f"{where}: the text of this {role} turn ('content' or 'value') must be a string or a list of text parts, "
            f"found {value_in_words(content)}."
        )
    for field in ("reasoning_content", "name", "tool_call_id"):
        if turn.get(field) is not None:
            if not isinstance(turn[field], str):
                raise UserError(f"{where}: '{field}' must be a string, found {value_in_words(turn[field])}.")
            message[field] = turn[field]
    flag = turn.get("train", turn.get("weight"))
    if flag is not None:
        if flag not in (True, False):  # 0 and 1 compare equal to them
            raise UserError(f"{where}: 'train' (or 'weight') must be true or false, found {value_in_words(flag)}.")
        message["train"] = bool(flag)
    check_unicode(message, where)
    return cast(Message, message)


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def to_tools(tools: Any, where: str) -> list[dict]:
    """Convert the list of tools of a record, which may be JSON text.

    Raises:
        UserError: it is no list of objects.
    """
    tools = parsed(tools, f"{where}: 'tools'")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(
            f"{where}: 'tools' must be a list of function descriptions (objects), found {value_in_words(tools)}."
        )
    check_unicode(tools, f"{where}: 'tools'")
    return tools


def _tool_calls(calls: Any, where: str) -> list[ToolCall]:
    calls = parsed(calls, f"{where}: 'tool_calls'")
    if not isinstance(calls, list):
        raise UserError(f"{where}: 'tool_calls' must be a list, found {value_in_words(calls)}.")
    result: list[ToolCall] = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(
                f"{where}: a tool call needs a function with 'name' and 'arguments', found {value_in_words(call)}."
            )
        of_this = f"{where}: the arguments of {reprlib.repr(function['name'])}"
        arguments = parsed(function.get("arguments") or {}, of_this)
        if not isinstance(arguments, dict):
            raise UserError(f"{of_this} must be an object, found {value_in_words(arguments)}.")
        result.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return result


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
