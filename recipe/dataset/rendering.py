"""A conversation on its way to ids and labels: its text, cut into documents, and where the answers are in it."""

import bisect
import itertools
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, NotRequired, TypedDict

from recipe.dataset.chat_template import ChatTemplate

IGNORE_INDEX = -100


class Note(StrEnum):
    """What a user should know about how a conversation was encoded; the value follows a number of conversations."""

    SPLIT = "split into several documents, because serving has other tokens before some turns"
    NO_THOUGHT = "with a thought that the template leaves out"
    NO_USER = "with a turn before any user message, used as context only"
    OPENED = "with a thought that </think> ends and no <think> begins, which was added"
    EMPTY = "with an empty answer, which teaches to stop at once (--train_empty_answers False leaves it out)"
    UNREAD = "with chat_template_kwargs that the chat template does not read"
    CONTROL_TEXT = (
        "with control tokens of this model in a text, where they stay text; remove them if they are a template"
    )
    CUT = "cut after the last turn that fits"


class Document(TypedDict):
    """A sequence of tokens that the model sees by itself.

    input_ids, labels: of equal length; a label is the id or IGNORE_INDEX.
    turns: the supervised turns, counted from 1 as in the file.
    padding: True if the document belongs to no conversation and only fills up a row.
    """

    input_ids: list[int]
    labels: list[int]
    turns: list[int]
    padding: NotRequired[bool]


def padding_document(tokens: int) -> Document:
    """Return a document of `tokens` tokens without labels."""
    return {"input_ids": [0] * tokens, "labels": [IGNORE_INDEX] * tokens, "turns": [], "padding": True}


class Text:
    """A rendered text, the character spans of its supervised answers, and the turns they belong to (from 0).

    Its pieces, with their places in the text, are tokenised separately; see `ControlText.pieces`.
    """

    def __init__(self, text: str, spans: list[tuple[int, int]], turns: list[int]):
        self.text, self.spans, self.turns = text, spans, turns
        self.pieces: list[tuple[int, str]] = []
        self.ids: list[int] = []
        self._encodings: list = []

    def attach_encodings(self, encodings: Mapping[str, Any]) -> None:
        """Take the tokenizer's output for the pieces from {piece: Encoding}."""
        self._encodings = [encodings[piece] for _, piece in self.pieces]
        self.ids = list(itertools.chain.from_iterable(encoding.ids for encoding in self._encodings))

    def token_at(self, char: int) -> tuple[int | None, bool]:
        """Return the index of the token that holds a character, and whether it begins there; (None, False) if none."""
        i = bisect.bisect_right(self.pieces, char, key=lambda piece: piece[0]) - 1
        encoding, char = self._encodings[i], char - self.pieces[i][0]
        token = encoding.char_to_token(char)
        if token is None:
            return None, False
        return sum(map(len, self._encodings[:i])) + token, encoding.token_to_chars(token)[0] == char


class Rendering:
    """A conversation as text.

    prompts: {turn: (text, enable_thinking)}; answers: the (turn, text, ids) that were labelled; turns count from 0.
    """

    def __init__(
        self,
        template: ChatTemplate,
        messages: list[dict[str, Any]],
        tools: list | None,
        sentinel: str | None,
        kwargs: Mapping[str, Any],
    ):
        self.messages, self.sentinel, self.kwargs = messages, sentinel, kwargs
        self._template, self._tools = template, tools
        self.supervised: list[int] = []
        self.prompts: dict[int, tuple[str, bool | None]] = {}
        self._rendered: dict[tuple[int, bool, bool | None], str] = {}
        self.documents: list[Text] = []
        self.answers: list[tuple[int, str, list[int]]] = []
        self.notes: list[Note] = []

    def render(self, end: int | None = None, prompt: bool = False, thinking: bool | None = None) -> str:
        """Render the messages before `end` (None: all); see `ChatTemplate.render`."""
        messages = self.messages[:end]
        key = len(messages), prompt, thinking
        if key not in self._rendered:
            self._rendered[key] = self._template.render(messages, self._tools, prompt, thinking, self.kwargs)
        return self._rendered[key]

    def labelled(self, document: Text, ids: list[int], spans: Sequence[tuple[int, int] | None]) -> Document:
        """Label a document, up to its last answer that has a span of tokens."""
        labels, turns, last = [IGNORE_INDEX] * len(ids), [], 0
        for turn, characters, tokens in zip(document.turns, document.spans, spans, strict=True):
            if tokens:
                (start, last), text = tokens, document.text[slice(*characters)]
                labels[start:last] = ids[start:last]
                turns.append(turn + 1)
                text = text.replace(self.sentinel, "") if self.sentinel else text
                self.answers.append((turn, text, ids[start:last]))
        return {"input_ids": ids[:last], "labels": labels[:last], "turns": turns}
