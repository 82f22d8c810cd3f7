"""Text in a message that looks like one of the tokenizer's control tokens stays text.

A tokenizer turns the characters `<|im_end|>` into the control token wherever they stand. So a sentinel character is put
behind their first character before the template is rendered, and the rendered text is cut at the sentinels and
tokenised piece by piece.

Documents of one conversation are cut before control tokens, too, where the tokenizer cuts a text before all else. So
the pieces that they share are tokenised once, and not once for each later turn.
"""

import itertools
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

PRIVATE_USE = range(0xE000, 0xF8FF)  # code points without a meaning of their own: candidates for the sentinel


class ControlText:
    """Patterns of a tokenizer's control tokens, and the sentinels that break text which matches them.

    Args:
        tokenizer: a fast tokenizer with a chat template.
    Attributes:
        special: pattern of the special tokens, which begin and end turns.
        markup: pattern of these and of added tokens in brackets such as <think> and <tool_call>.
    """

    def __init__(self, tokenizer: Any):
        added = tokenizer.added_tokens_decoder.values()
        markup = [token for token in added if token.special or re.fullmatch(r"[<\[].+[>\]]", str(token))]
        self.special = _any_of(token for token in markup if token.special)
        self.markup = _any_of(markup)
        self._cut = _any_of(_cutting(added))
        self._tokenizer = tokenizer

    def neutralise(self, messages: list, tools: list | None) -> tuple[list, list | None, str | None]:
        """Break text that looks like control tokens in messages and tools.

        Users and tools must not say any markup. System and assistant messages, which the owner of the data wrote, may
        hold tokens like <think> and <tool_call>, but none that begins or ends a turn.

        Returns:
            (messages, tools, sentinel): as given and None if nothing had to be broken.
        """
        patterns = [self.markup if message["role"] in ("user", "tool") else self.special for message in messages]
        if not contains(self.special, tools) and not any(map(contains, patterns, messages)):
            return messages, tools, None
        used = [messages, tools, self._tokenizer.chat_template]
        sentinel = next(char for char in map(chr, PRIVATE_USE) if not contains(re.compile(char), used))
        broken = [_with_sentinel(pattern, m, sentinel) for pattern, m in zip(patterns, messages, strict=True)]
        return broken, _with_sentinel(self.special, tools, sentinel), sentinel

    def pieces(self, text: str, sentinel: str | None, shared: bool = False) -> list[tuple[int, str]]:
        """Cut a rendered text at its sentinels, and before control tokens if another text shares its pieces.

        Returns:
            (place in the text, piece) of each.
        """
        result, start = [], 0
        for part in text.split(sentinel) if sentinel else [text]:
            cuts = [0, *(match.start() for match in self._cut.finditer(part) if shared), len(part)]
            result += [(start + a, part[a:b]) for a, b in itertools.pairwise(cuts) if a < b]
            start += len(part) + 1
        return result


def contains(pattern: re.Pattern, value: Any) -> bool:
    """Return whether a string somewhere in a JSON value matches the pattern; keys of objects count."""
    if isinstance(value, str):
        return pattern.search(value) is not None
    if isinstance(value, dict):
        return any(contains(pattern, part) for item in value.items() for part in item)
    return isinstance(value, list) and any(contains(pattern, item) for item in value)


def _with_sentinel(pattern: re.Pattern, value: Any, sentinel: str) -> Any:
    return _map_strings(lambda text: pattern.sub(lambda m: m.group()[0] + sentinel + m.group()[1:], text), value)


def _map_strings(change: Callable[[str], str], value: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_map_strings(change, key): _map_strings(change, item) for key, item in value.items()}
    return [_map_strings(change, item) for item in value] if isinstance(value, list) else value


def _cutting(added: Collection) -> list:
    """Return the special tokens before which the tokenizer always cuts a text, whatever stands there."""
    special = [token for token in added if token.special and not token.normalized]
    inner = {char for token in added for char in str(token)[1:]}  # another token may reach across such a character
    reaching = [str(token) for token in added if token.lstrip or token.single_word]  # or be taken back when it is found
    words = any(token.single_word for token in added)  # which take note of the character after them

    def always(text: str) -> bool:
        taken_back = any(other.startswith(text) for other in reaching)  # the token itself included
        return not (taken_back or text[0] in inner or text[0].isspace() or (words and re.match(r"\w", text)))

    return [token for token in special if always(str(token))]


def _any_of(tokens: Iterable) -> re.Pattern:
    longest_first = sorted({str(token) for token in tokens}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
