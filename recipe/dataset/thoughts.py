"""Thoughts of a message: the text in `reasoning_content`, or between <think> and </think> before the answer."""

import re
from typing import Any

from recipe.dataset.messages import Message

THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
EMPTY_THOUGHT = re.compile(r"<think>\s*</think>\n{0,2}")
# A </think> that no <think> precedes ends a thought, unless it is written like a word in a sentence.
_UNOPENED = re.compile(r"""(?:(?<![ \t`'"(])</think>|</think>(?=[ \t]*(?:\n|$)))""")


def with_opened_thought(message: Message) -> Message:
    """Return a message whose thought has its opening tag; the message itself if nothing had to be added."""
    content = message["content"]
    if message["role"] != "assistant" or "</think>" not in content or message.get("reasoning_content"):
        return message
    end = content.index("</think>")
    if "<think>" in content[:end] or not _UNOPENED.match(content, end):
        return message
    return {**message, "content": "<think>\n" + content.lstrip("\n")}


def is_empty(message: Message) -> bool:
    """Whether an assistant message has no text, no thought and no calls."""
    text = THOUGHT.sub("", message["content"], count=1) if not thought_of(dict(message)) else message["content"]
    return not text.strip() and not message.get("reasoning_content", "").strip() and not message.get("tool_calls")


def thought_of(message: dict[str, Any]) -> str:
    """Return the thought of an assistant message, "" if it has none."""
    inline = THOUGHT.match(message["content"])
    return (message.get("reasoning_content") or (inline.group(1) if inline else "")).strip()
