"""Turn a conversation into token ids and labels, through the tokenizer's own chat template.

For each supervised assistant turn i the prompt is what serving sends, `apply_chat_template(messages[:i],
add_generation_prompt=True)`. The answer is what the template renders after it, up to and including the stop token.
Prompts and the text between turns get the label IGNORE_INDEX. Every prompt is rendered and compared: there is no table
of role markers or token ids, and padding is not involved.

If the template renders every prompt as the beginning of the whole conversation, one document holds all turns. If it
rewrites history (drops the thoughts of earlier turns, inserts an empty thought), each supervised turn becomes a
document of its own, as serving would see it. So does a turn whose answer would merge with its prompt into one token.

A thought is the text in `reasoning_content`, or between <think> and </think> before the answer; for a template that
knows thoughts they are the same. What happens to it depends on `thinking` and on whether the turn has one:

    thinking | turn with a thought: prompt, learnt       | turn without a thought: prompt, learnt
    ---------|-------------------------------------------|---------------------------------------
    auto     | enable_thinking=True,  thought and answer | enable_thinking=False, answer
    keep     | enable_thinking=True,  thought and answer | default,               answer
    strip    | default,               answer             | default,               answer
    empty    | enable_thinking=False, answer             | enable_thinking=False, answer

* If the default prompt opens a thought and the turn has none, the prompt of enable_thinking=False is used.
* An empty thought that the template inserts by itself is not learnt.
* A text up to </think> without a <think> is a thought, too: the prompt had opened it.
* If the template does not know thoughts, auto leaves out `reasoning_content` (Note.NO_THOUGHT) and keep writes it into
  the text.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jinja2 import TemplateError

from recipe.dataset.chat_template import ChatTemplate
from recipe.dataset.control_text import ControlText
from recipe.dataset.conversations import Conversation, Message
from recipe.dataset.rendering import IGNORE_INDEX, Document, Note, Rendering, Text
from recipe.dataset.thoughts import EMPTY_THOUGHT, THOUGHT, is_empty, thought_of, with_opened_thought

THINKING = ("auto", "keep", "strip", "empty")
ENABLE_THINKING = {  # what serving passes for a turn (without, with) a thought that is learnt; None: nothing
    "auto": (False, True),
    "keep": (None, True),
    "strip": (None, None),
    "empty": (False, False),
}
_PARTS = {"system": "system messages", "tools": "the list of tools", "tool_calls": "tool calls", "tool": "tool results"}
_HEADER = 200  # characters before an answer that are searched for the control token that begins its header
_KNOWN_HEADERS = 100  # ids of headers that are remembered; a template has a handful


class Encoded(NamedTuple):
    """One conversation in tokens; it has no document if no turn is supervised."""

    documents: list[Document]
    notes: list[Note]


@dataclasses.dataclass(eq=False)
class ChatEncoder:
    """Encodes conversations for one tokenizer. Everything that changes its output is a field, and so in `fingerprint`.

    Args:
        tokenizer: a fast (Rust) tokenizer with a chat template.
        train_on: which assistant turns are supervised, of those whose message does not say `"train": false`.
        thinking: what happens to thoughts; see the table above.
        train_empty_answers: whether an answer without text, thought and calls is learnt; if not it is context.
        template_kwargs: variables for the chat template. Those of a conversation win, and both win over `thinking`.
        vocab_size: rows of the model's embeddings; a token with a larger id is an error. None: it is not checked.
    Attributes:
        stop_tokens, stop_ids: what ends an assistant turn in this template, as texts and as ids; of two, the second ends
            one with tool calls.
    Raises:
        ValueError: the tokenizer has no chat template, or the template ends its turns with no control token.
    """

    tokenizer: Any
    train_on: Literal["all_turns", "last_turn"] = "all_turns"
    thinking: Literal["auto", "keep", "strip", "empty"] = "auto"
    train_empty_answers: bool = True
    template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError("the tokenizer has no fast (Rust) version; use a model of the Qwen1.5 family or later")
        if not self.tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template; start from a chat model or set --chat_template")
        self.backend = self.tokenizer.backend_tokenizer
        self._control_text = ControlText(self.tokenizer)
        self.template = ChatTemplate(self.tokenizer, self._control_text, self.template_kwargs)
        self.stop_tokens = list(dict.fromkeys([self.template.stop_token, self.template.call_stop_token]))
        self.stop_ids = self.tokenizer.convert_tokens_to_ids(self.stop_tokens)
        self._byte_level = '"ByteLevel"' in str(self.backend.decoder.__getstate__()) if self.backend.decoder else False
        self._header_ids: dict[str, list[int]] = {}

    def fingerprint(self) -> str:
        """Return a text that changes when the same conversation would be encoded differently, for caches of tokens."""
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "tokenizer"}
        used = [self.template.source, self.template.opening, self.tokenizer.special_tokens_map]  # a date in the opening
        return json.dumps([self.backend.to_str(), *used, settings], default=str, sort_keys=True)

    # ------------------------------------------------------------------------------------------------------------------
    # Conversation -> documents of text, with the character spans of the answers

    def encode(self, conversation: Conversation) -> Encoded:
        """Encode one conversation; see `encode_batch`."""
        return self.encode_batch([conversation])[0]

    def encode_batch(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        """Encode many conversations with one call of the tokenizer.

        Raises:
            jinja2.TemplateError: the template refuses a conversation.
            ValueError: an answer cannot be separated from its prompt, is not what the message says, the template
                leaves out part of the conversation, or the model has no embedding of a token.
        """
        renderings = [self._render_documents(conversation) for conversation in conversations]
        documents = [document for rendering in renderings for document in rendering.documents]
        self._reset_tokenizer()
        pieces = list(dict.fromkeys(piece for document in documents for _, piece in document.pieces))
        encodings = dict(zip(pieces, self.backend.encode_batch(pieces, add_special_tokens=False), strict=True))
        for document in documents:
            document.attach_encodings(encodings)
            self._refuse_unknown_token(document.ids)
        encoded = [Encoded(self._label(rendering), rendering.notes) for rendering in renderings]
        self._verify(renderings)
        return encoded

    def prompt_variables(self, conversation: Conversation) -> dict[str, Any]:
        """Return the variables of the chat template with which serving renders the prompt of the last turn."""
        rendering = self._render_documents(conversation)
        _, thinking = self._prompt(rendering, len(rendering.messages) - 1)
        switch = {} if thinking is None else {"enable_thinking": thinking}
        return {**switch, **self.template_kwargs, **rendering.kwargs}

    def _refuse_unknown_token(self, ids: Sequence[int]) -> None:
        highest = max(ids, default=0)
        if self.vocab_size is not None and highest >= self.vocab_size:
            raise ValueError(
                f"the token {self.tokenizer.convert_ids_to_tokens(highest)} has the id {highest}, and the model has "
                f"embeddings for {self.vocab_size} tokens; use the tokenizer that came with the model, or resize the "
                "model to this one (resize_token_embeddings) and save it"
            )

    def _reset_tokenizer(self) -> None:
        """Switch off settings that a saved tokenizer may have, or that an earlier call may have left on."""
        # Only where needed: a change fails while another thread tokenises.
        if self.backend.truncation:
            self.backend.no_truncation()
        if self.backend.padding:
            self.backend.no_padding()
        if self.backend.encode_special_tokens:
            self.backend.encode_special_tokens = False

    def _render_documents(self, conversation: Conversation) -> Rendering:
        """Render a conversation: as one document if that is what serving sees, else one for each supervised turn."""
        messages, tools = conversation["messages"], conversation.get("tools")
        self._refuse_what_is_left_out(messages, tools)
        opened = [with_opened_thought(message) for message in messages]
        neutral = self._control_text.neutralise([self._with_thought(message) for message in opened], tools)
        rendering = Rendering(self.template, *neutral, conversation.get("chat_template_kwargs", {}))
        supervised = self._supervised_turns(opened, rendering.notes)
        if any(message is not own for message, own in zip(opened, messages, strict=True)):
            rendering.notes.append(Note.OPENED)
        if rendering.sentinel:
            rendering.notes.append(Note.CONTROL_TEXT)
        if self.template.unread(rendering.kwargs):
            rendering.notes.append(Note.UNREAD)
        if self.thinking == "auto" and not self.template.knows_thoughts:
            if any(messages[i].get("reasoning_content", "").strip() for i in supervised):
                rendering.notes.append(Note.NO_THOUGHT)
        first_user = next((i for i, m in enumerate(messages) if m["role"] == "user"), len(messages))
        rendering.supervised = [i for i in supervised if i > first_user or self._has_prompt(rendering, i)]
        if len(rendering.supervised) < len(supervised):
            rendering.notes.append(Note.NO_USER)
        if rendering.supervised:
            whole = self._one_document(rendering)
            turns = rendering.supervised
            rendering.documents = [whole] if whole else [self._document_of_turn(rendering, i) for i in turns]
        for text in rendering.documents:
            shared = len(rendering.documents) > 1
            text.pieces = self._control_text.pieces(text.text, rendering.sentinel, shared)
        return rendering

    def _supervised_turns(self, messages: Sequence[Message], notes: list[Note]) -> list[int]:
        """Return the turns that are to be learnt, as far as the messages themselves say."""
        supervised = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("train", True)]
        if self.train_on == "last_turn":
            supervised = supervised[-1:]
        empty = [i for i in supervised if is_empty(messages[i])]
        if empty and self.train_empty_answers:
            notes.append(Note.EMPTY)
        return supervised if self.train_empty_answers else [i for i in supervised if i not in empty]

    def _refuse_what_is_left_out(self, messages: Sequence[Message], tools: list | None) -> None:
        present = {name for message in messages for name in (message["role"], *message)}
        present |= {"tools"} if tools else set()
        for part in sorted(present & self.template.left_out):
            raise ValueError(
                f"the chat template has no place for {_PARTS[part]} and would leave it out; use a template that has "
                "one (--chat_template), or remove it from the data"
            )

    def _with_thought(self, message: Message) -> dict[str, Any]:
        """Copy a message with its thought where the template looks for it, or without it."""
        changed: dict[str, Any] = dict(message)
        if message["role"] != "assistant":
            return changed
        content, thought = message["content"], changed.pop("reasoning_content", None) or ""
        inline = THOUGHT.match(content)
        if self.thinking in ("strip", "empty"):
            content, thought = content[inline.end() :] if inline else content, ""
        elif not self.template.knows_thoughts:
            if self.thinking == "keep" and thought.strip():
                content = f"<think>\n{thought}\n</think>\n\n{content}"
            thought = ""
        elif inline and not self.template.finds_thoughts and not thought.strip():
            content, thought = content[inline.end() :], inline.group(1).strip()
        changed["content"] = content
        return changed | {"reasoning_content": thought} if thought.strip() else changed

    def _has_prompt(self, rendering: Rendering, i: int) -> bool:
        """Return whether the template can render a prompt for turn i although no user message comes before it."""
        try:
            return i > 0 and bool(self._prompt(rendering, i))
        except TemplateError:
            return False

    def _prompt(self, rendering: Rendering, i: int) -> tuple[str, bool | None]:
        """Render the prompt of turn i; also returns the enable_thinking with which serving would get this turn."""
        if i in rendering.prompts:
            return rendering.prompts[i]
        has_thought = bool(thought_of(rendering.messages[i]))
        mode = ENABLE_THINKING[self.thinking][has_thought] if self.template.has_switch else None
        prompt = rendering.render(i, prompt=True, thinking=mode)
        if mode is None and self.template.has_switch and prompt.rstrip().endswith("<think>"):
            mode = False
            prompt = rendering.render(i, prompt=True, thinking=mode)
        rendering.prompts[i] = prompt, mode
        return prompt, mode

    def _one_document(self, rendering: Rendering) -> Text | None:
        """Render one document with all supervised turns; None if that is not what serving sees before each."""
        _, mode = self._prompt(rendering, rendering.supervised[0])
        text, spans = rendering.render(thinking=mode), list[tuple[int, int]]()
        for i in rendering.supervised:
            prompt, own_mode = self._prompt(rendering, i)
            stops = self.template.stops_earlier_turns or i + 1 == len(rendering.messages)
            if own_mode != mode or not text.startswith(prompt) or not stops:
                return None
            start, end = len(prompt), self._answer_end(text, len(prompt), rendering.messages[i], i)
            inserted = self._inserted_thought(rendering.messages[i], text[start:end])
            if inserted and i != rendering.supervised[-1]:
                return None
            text, end = text[:start] + text[start + inserted :], end - inserted
            overlaps = spans and start < spans[-1][1]
            complete = not overlaps and self._contains_message(rendering.messages[i], text[start:end])
            if not complete or not self._ends_like_last_turn(rendering, i, text[:end]):
                return None
            spans.append((start, end))
        return Text(text[: spans[-1][1]], spans, rendering.supervised)

    def _ends_like_last_turn(self, rendering: Rendering, i: int, text: str) -> bool:
        """Return whether turn i, with which `text` ends, stops where it does as the last turn.

        Only turns with tool calls can differ: some templates end them with another token.
        """
        if i + 1 == len(rendering.messages) or not rendering.messages[i].get("tool_calls"):
            return True
        prompt, mode = self._prompt(rendering, i)
        alone = rendering.render(i + 1, thinking=mode)
        stop = self._stop_token(rendering.messages[i])
        return (alone.rpartition(stop)[0] + stop).endswith(text[len(prompt) :])

    def _document_of_turn(self, rendering: Rendering, i: int) -> Text:
        """Render one supervised turn as serving would see it: nothing after it exists yet."""
        message = rendering.messages[i]
        prompt, mode = self._prompt(rendering, i)
        text = rendering.render(i + 1, thinking=mode)
        if not text.startswith(prompt):
            text = prompt + self._after_header(rendering, i, text)
        start, end = len(prompt), self._answer_end(text, len(prompt), rendering.messages[i], i)
        answer = text[start:end]
        answer = answer[self._inserted_thought(message, answer) :]
        if not self._contains_message(message, answer):
            if not self._contains_message(message, answer, without_thought=True):
                raise ValueError(
                    f"turn {i + 1}: the chat template leaves out part of this turn, as Qwen3's does with text before a "
                    '</think>; change its text, or set its "train" to false'
                )
            if Note.NO_THOUGHT not in rendering.notes:
                rendering.notes.append(Note.NO_THOUGHT)
        return Text(prompt + answer, [(start, start + len(answer))], [i])

    def _after_header(self, rendering: Rendering, i: int, text: str) -> str:
        """Return what follows the header of turn i, the last one of `text`, whose beginning is not the prompt.

        Qwen3 inserts an empty thought into an assistant turn only after a user message, and only as long as no other
        assistant turn follows; gpt-oss leaves out the thought before a call when an answer follows.
        """
        prompt, mode = self._prompt(rendering, i)
        history = rendering.render(i, thinking=mode)
        header = prompt.removeprefix(history)
        opening = self._control_text.special.match(header)
        last = text[text.rfind(opening.group()) :] if opening else ""
        if opening and opening.group() in history:  # a turn of gpt-oss has several messages, each with an opening
            before = history[history.rfind(opening.group()) :]
            last = text.rpartition(before)[2] if before in text else last
        for begin in (header, re.sub(EMPTY_THOUGHT.pattern + "$", "", header)):
            if last.startswith(begin):
                return last[len(begin) :]
        reason = "an answer that does not follow its prompt"
        if prompt.rstrip().endswith("<think>"):
            reason = "a prompt that opens a thought, which this turn lacks"
        raise ValueError(f"turn {i + 1}: the chat template renders {reason}")

    def _inserted_thought(self, message: dict[str, Any], answer: str) -> int:
        """Return the length of an empty thought with which the template, and not the data, begins the answer."""
        empty, thought = EMPTY_THOUGHT.match(answer), thought_of(message)
        if not empty or (thought and thought in answer):
            return 0
        as_text = self.thinking != "auto" or not self.template.knows_thoughts  # one in the data is learnt then
        return 0 if as_text and EMPTY_THOUGHT.match(message["content"].lstrip()) else empty.end()

    def _contains_message(self, message: dict[str, Any], answer: str, without_thought: bool = False) -> bool:
        """Return whether a rendered answer has the message's thought (or none), then its text, and its calls."""
        inline, thought = THOUGHT.match(message["content"]), thought_of(message)
        text = (message["content"][inline.end() :] if inline else message["content"]).strip()
        body = answer.removesuffix(self._stop_token(message)).strip()
        if without_thought:
            has_text = body.startswith(text) and "</think>" not in body[len(text) :]
        else:
            at = body.find(thought)
            has_text = at >= 0 and text in body[at + len(thought) :]
        calls = [call["function"]["name"] for call in message.get("tool_calls") or []]
        return has_text and all(body.count(name) >= calls.count(name) for name in calls)

    def _stop_token(self, message: Mapping[str, Any]) -> str:
        return self.stop_tokens[-1] if message.get("tool_calls") else self.stop_tokens[0]

    def _answer_end(self, text: str, start: int, message: Mapping[str, Any], i: int) -> int:
        # Text that looks like a control token is broken up, so the first stop token is the template's own.
        stop = self._stop_token(message)
        end = text.find(stop, start)
        if end < 0:
            raise ValueError(f"turn {i + 1}: the chat template does not end this turn with {stop}")
        return end + len(stop)

    # ------------------------------------------------------------------------------------------------------------------
    # Documents of text -> ids and labels

    def _label(self, rendering: Rendering) -> list[Document]:
        """Label the documents; a turn whose prompt and answer would merge into one token gets one of its own."""
        result, merging = [], []
        for document in rendering.documents:
            spans = [self._answer_token_span(document, span) for span in document.spans]
            merging += [turn for turn, span in zip(document.turns, spans, strict=True) if not span]
            if any(spans):
                result.append(rendering.labelled(document, document.ids, spans))
        for turn in merging:
            single = self._document_of_turn(rendering, turn)
            ((start, end),) = single.spans
            prompt = self._ids(single.text[:start], rendering.sentinel)
            answer = self._ids(single.text[start:end], rendering.sentinel)
            result.append(rendering.labelled(single, prompt + answer, [(len(prompt), len(prompt) + len(answer))]))
        if len(result) > 1:
            rendering.notes.append(Note.SPLIT)
        return sorted(result, key=lambda document: document["turns"])

    def _answer_token_span(self, document: Text, span: tuple[int, int]) -> tuple[int, int] | None:
        """Return the token positions of an answer; None if its prompt tokenised by itself has other ids."""
        (start, begins_here), (last, _) = document.token_at(span[0]), document.token_at(span[1] - 1)
        if start is None or not begins_here or last is None or document.ids[last] not in self.stop_ids:
            return None
        # A control token cuts the text for the tokenizer, so only what follows the last one has to be compared.
        tail = document.text[max(0, span[0] - _HEADER) : span[0]]
        matches = list(self._control_text.special.finditer(tail))
        header = tail[matches[-1].start() :] if matches else document.text[: span[0]]
        alone = self._header_ids.get(header) or self._ids(header)
        if len(self._header_ids) < _KNOWN_HEADERS:
            self._header_ids[header] = alone
        return (start, last + 1) if document.ids[max(0, start - len(alone)) : start] == alone else None

    def _ids(self, text: str, sentinel: str | None = None) -> list[int]:
        pieces = self._control_text.pieces(text, sentinel)
        encodings = [self.backend.encode(piece, add_special_tokens=False) for _, piece in pieces]
        return [i for encoding in encodings for i in encoding.ids]

    def _verify(self, renderings: Sequence[Rendering]) -> None:
        """Decode every supervised run of ids and compare it with the answer: the last check of the labels."""
        answers = [answer for rendering in renderings for answer in rendering.answers]
        read = self.backend.decode_batch([ids for _, _, ids in answers], skip_special_tokens=False)
        for (turn, text, _), found in zip(answers, read, strict=True):
            if found != text and self._normalised(found) != self._normalised(text):
                raise ValueError(f"turn {turn + 1}: the labels read {found!r:.200}, the turn says {text!r:.200}")

    def _normalised(self, text: str) -> str:
        text = self.backend.normalizer.normalize_str(text) if self.backend.normalizer else text
        # Decoders other than byte-level ones drop or add spaces beside control tokens.
        return text if self._byte_level else "".join(text.replace("\u2581", " ").split())


def supervised_runs(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Return (start, end) of every unbroken run of labels that are not IGNORE_INDEX."""
    runs, start = [], None
    for position, label in enumerate(labels):
        if label != IGNORE_INDEX and start is None:
            start = position
        elif label == IGNORE_INDEX and start is not None:
            runs.append((start, position))
            start = None
    return runs if start is None else [*runs, (start, len(labels))]
