"""Turn a conversation into token ids and labels, through the tokenizer's own chat template.

For each supervised assistant turn i the prompt is what serving will send, `apply_chat_template(messages[:i],
add_generation_prompt=True)`; the answer is what the template renders after it, up to and including the stop token.
Prompts and everything between turns get the label IGNORE_INDEX; every prompt is rendered and compared, no table of role
markers or token ids is kept, and padding plays no part.

Where the template renders every prompt as the beginning of the whole conversation, one document holds all turns. Where
it rewrites history (thoughts of earlier turns are left out, an empty thought is put in), each supervised turn becomes a
document of its own, as serving would see it. So does a turn whose answer would merge with its prompt into one token.
"""

import contextlib
import re
from typing import NamedTuple

from jinja2 import TemplateError

IGNORE_INDEX = -100
THINKING = ("auto", "keep", "strip", "empty")
SPLIT = "split into several documents, as serving has other tokens before some turns"
NO_THOUGHT = "with a thought that the template leaves out"
FIRST = "with a turn before any user message, used as context only"
_PROBE = "kqzvprobe"  # a word no template contains
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_EMPTY_THOUGHT = re.compile(r"<think>\s*</think>\n{0,2}")
_PARTS = {"system": "system messages", "tools": "the list of tools", "tool_calls": "tool calls", "tool": "tool results"}


class Encoded(NamedTuple):
    """One conversation in tokens.

    documents: dicts with `input_ids` and `labels` (lists of int of equal length, a label is the id or IGNORE_INDEX) and
        `turns` (the supervised turns, counted from 1); no document where no turn is supervised.
    notes: what a user should know of the way they came about, as words that follow "3 conversations".
    """

    documents: list
    notes: list


class ChatEncoder:
    """Encodes conversations for one tokenizer.

    Args:
        tokenizer: a fast (Rust) tokenizer with a chat template.
        train_on: "all_turns" or "last_turn".
        thinking: what becomes of thoughts, in `reasoning_content` or between <think> and </think> before the text (the
            same thing for a template that knows thoughts). A turn that has one is trained with it (auto, keep), after
            the prompt of enable_thinking=True, or without it (strip, empty). A turn that has none follows the prompt of
            enable_thinking=False (auto, empty) or the default prompt (keep, strip), or again that of False where the
            default opens a thought; a thought that the template puts in is not learnt. Also, keep writes a
            `reasoning_content` that the template does not know into the text.
    Attributes:
        stop_token, stop_id: what ends an assistant turn in this template, as text and as id.
    Raises:
        ValueError: the tokenizer has no chat template, or the template ends its turns with no control token.
    """

    def __init__(self, tokenizer, train_on="all_turns", thinking="auto"):
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError("the tokenizer has no fast (Rust) version; use a model of the Qwen1.5 family or later")
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template; start from a chat model or set --chat_template")
        self.tokenizer, self.train_on, self.thinking = tokenizer, train_on, thinking
        self.backend = tokenizer.backend_tokenizer
        added = tokenizer.added_tokens_decoder.values()
        markup = [t for t in added if t.special or re.fullmatch(r"[<\[].+[>\]]", str(t))]
        self._special = _any_of([t for t in markup if t.special])
        self._markup = _any_of(markup)
        self._byte_level = '"ByteLevel"' in str(self.backend.decoder.__getstate__()) if self.backend.decoder else False
        self._header_ids = {}
        self._find_stop()
        self._probe_template()

    def _find_stop(self):
        user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": _PROBE}
        try:
            last, earlier = (self._render(m).partition(_PROBE)[2] for m in ([user, answer], [user, answer, user]))
        except TemplateError as error:
            raise ValueError(f"the chat template refuses a question and its answer in plain text: {error}") from None
        stop = self._special.match(last.lstrip())
        if not stop:
            raise ValueError("the chat template ends an assistant turn with no control token, so no stop can be learnt")
        self.stop_token, self.stop_id = stop.group(), self.tokenizer.convert_tokens_to_ids(stop.group())
        self._stops_earlier_turns = earlier.lstrip().startswith(self.stop_token)

    def _probe_template(self):
        """Find out what the template knows, by rendering a word that must come out again."""
        user, call = {"role": "user", "content": "q"}, {"role": "assistant", "content": ""}
        prompts = {self._render([user], prompt=True, thinking=choice) for choice in (None, True, False)}
        self._has_switch = len(prompts) > 1  # the template knows enable_thinking
        apart = self._render([user, {"role": "assistant", "content": "a", "reasoning_content": _PROBE}])
        in_text = self._render([user, {"role": "assistant", "content": f"<think>\n{_PROBE}\n</think>\n\na"}])
        self._knows_thoughts = _PROBE in apart
        self._finds_thoughts = self._knows_thoughts and in_text == apart  # also between <think> and </think>
        probe, other = ([{"type": "function", "function": {"name": name, "arguments": {}}}] for name in (_PROBE, "f"))
        described = {"name": _PROBE, "description": "d", "parameters": {"type": "object", "properties": {}}}
        probes = {
            "system": ([{"role": "system", "content": _PROBE}, user], None),
            "tools": ([user], [{"type": "function", "function": described}]),
            "tool_calls": ([user, {**call, "tool_calls": probe}], None),
            "tool": ([user, {**call, "tool_calls": other}, {"role": "tool", "content": _PROBE}], None),
        }
        self._left_out = set()  # without a word, that is: a template that refuses says so itself
        for part, (messages, tools) in probes.items():
            with contextlib.suppress(TemplateError, TypeError):
                self._left_out |= set() if _PROBE in self._render(messages, tools) else {part}

    def fingerprint(self):
        """Text that changes when the same conversation would be encoded otherwise; for caches of tokens."""
        used = [self.backend.to_str(), self.tokenizer.chat_template, self.tokenizer.special_tokens_map]
        return "|".join(map(str, [*used, self.train_on, self.thinking]))

    def _render(self, messages, tools=None, prompt=False, thinking=None):
        """The template's text; `thinking` is its variable enable_thinking (None: not given)."""
        extra = {} if thinking is None else {"enable_thinking": thinking}
        return self.tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=prompt, return_dict=False, **extra
        )

    # ------------------------------------------------------------------------------------------------------------------
    # Conversation -> documents of text, with the character spans of the answers

    def encode(self, conversation):
        """One conversation; see `encode_batch`."""
        return self.encode_batch([conversation])[0]

    def encode_batch(self, conversations):
        """Encode many conversations with one call of the tokenizer.

        Returns:
            a list of Encoded.
        Raises:
            jinja2.TemplateError: the template refuses a conversation.
            ValueError: an answer cannot be told apart from its prompt, is not what the message says, or the template
                leaves out part of the conversation.
        """
        drafts = [self._draft(conversation) for conversation in conversations]
        documents = [document for draft in drafts for document in draft.documents]
        self._without_leftovers()
        pieces = [piece for document in documents for piece in document.pieces]
        encodings = iter(self.backend.encode_batch(pieces, add_special_tokens=False))
        for document in documents:
            document.take(encodings)
        encoded = [Encoded(self._finish(draft), draft.notes) for draft in drafts]
        self._verify(drafts)
        return encoded

    def _without_leftovers(self):
        """A saved tokenizer may come with these settings, an earlier call may have left them."""
        # Only where needed: a change waits for no other thread that is tokenising, but fails.
        if self.backend.truncation:
            self.backend.no_truncation()
        if self.backend.padding:
            self.backend.no_padding()
        if self.backend.encode_special_tokens:
            self.backend.encode_special_tokens = False

    def _draft(self, conversation):
        """Render a conversation: whole if every prompt is the beginning of it, else once for each supervised turn."""
        messages, tools = conversation["messages"], conversation.get("tools")
        self._refuse_what_is_left_out(messages, tools)
        supervised = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("train", True)]
        if self.train_on == "last_turn":
            supervised = supervised[-1:]
        draft = _Draft(*self._defused([self._with_thought(m) for m in messages], tools))
        if self.thinking == "auto" and not self._knows_thoughts:
            draft.notes += [NO_THOUGHT] * any(messages[i].get("reasoning_content", "").strip() for i in supervised)
        first_user = next((i for i, m in enumerate(messages) if m["role"] == "user"), len(messages))
        draft.supervised = [i for i in supervised if i > first_user or self._has_prompt(draft, i)]
        if len(draft.supervised) < len(supervised):
            draft.notes.append(FIRST)
        if draft.supervised:
            draft.documents = self._whole(draft) or [self._single(draft, i) for i in draft.supervised]
        return draft

    def _refuse_what_is_left_out(self, messages, tools):
        present = {name for message in messages for name in (message["role"], *message)}
        present |= {"tools"} if tools else set()
        for part in sorted(present & self._left_out):
            raise ValueError(
                f"the chat template has no place for {_PARTS[part]} and would leave it out; use a template that has "
                "one (--chat_template), or remove it from the data"
            )

    def _with_thought(self, message):
        """An assistant message with its thought where the template looks for it, or removed."""
        if message["role"] != "assistant":
            return message
        content, thought = message["content"], message.get("reasoning_content") or ""
        inline = _THOUGHT.match(content)
        text, inner = (content[inline.end() :], inline.group(1).strip()) if inline else (content, None)
        if self.thinking in ("strip", "empty"):
            content, thought = text, ""
        elif not self._knows_thoughts:
            if self.thinking == "keep" and thought.strip():
                content = f"<think>\n{thought}\n</think>\n\n{content}"
            thought = ""
        elif inline and not self._finds_thoughts and not thought.strip():
            content, thought = text, inner
        message = {key: value for key, value in message.items() if key != "reasoning_content"} | {"content": content}
        return message | {"reasoning_content": thought} if thought.strip() else message

    def _has_prompt(self, draft, i):
        """Whether serving could ask for a turn that no user message precedes."""
        try:
            return i > 0 and bool(self._prompt(draft, i))
        except TemplateError:
            return False

    def _prompt(self, draft, i):
        """Text of the prompt of turn i, and the value of enable_thinking that serving would use to get this turn."""
        if i in draft.prompts:
            return draft.prompts[i]
        thought, mode = _thought_of(draft.messages[i]), None
        if self._has_switch and (thought or self.thinking in ("auto", "empty")):
            mode = bool(thought)
        prompt = self._render(draft.messages[:i], draft.tools, prompt=True, thinking=mode)
        if mode is None and self._has_switch and prompt.rstrip().endswith("<think>"):
            mode = False
            prompt = self._render(draft.messages[:i], draft.tools, prompt=True, thinking=mode)
        draft.prompts[i] = prompt, mode
        return prompt, mode

    def _whole(self, draft):
        """One document with all supervised turns, or None where that would not be what serving sees."""
        _, mode = self._prompt(draft, draft.supervised[0])
        text, spans = self._render(draft.messages, draft.tools, thinking=mode), []
        for i in draft.supervised:
            prompt, own_mode = self._prompt(draft, i)
            stops = self._stops_earlier_turns or i + 1 == len(draft.messages)
            if own_mode != mode or not text.startswith(prompt) or not stops:
                return None
            start, end = len(prompt), self._answer_end(text, len(prompt), i)
            put_in = self._thought_put_in(draft.messages[i], text[start:end])
            if put_in and i != draft.supervised[-1]:
                return None
            text, end = text[:start] + text[start + put_in :], end - put_in
            overlaps = spans and start < spans[-1][1]
            if overlaps or not self._says(draft.messages[i], text[start:end]) or not self._ends(draft, i, text[:end]):
                return None
            spans.append((start, end))
        return [_Document(text[: spans[-1][1]], spans, draft.supervised, draft.sentinel)]

    def _ends(self, draft, i, text):
        """Whether an answer with tool calls, the end of `text`, stops in the conversation where it does as the last."""
        if i + 1 == len(draft.messages) or not draft.messages[i].get("tool_calls"):
            return True
        prompt, mode = self._prompt(draft, i)
        alone = self._render(draft.messages[: i + 1], draft.tools, thinking=mode)
        return (alone.rpartition(self.stop_token)[0] + self.stop_token).endswith(text[len(prompt) :])

    def _single(self, draft, i):
        """One supervised turn as serving would see it: nothing after it exists yet."""
        message = draft.messages[i]
        prompt, mode = self._prompt(draft, i)
        text = self._render(draft.messages[: i + 1], draft.tools, thinking=mode)
        if not text.startswith(prompt):
            text = prompt + self._after_header(draft, i, text)
        start, end = len(prompt), self._answer_end(text, len(prompt), i)
        answer = text[start:end]
        answer = answer[self._thought_put_in(message, answer) :]
        if not self._says(message, answer):
            if not self._says(message, answer, but_thought=True):
                raise ValueError(
                    f"turn {i + 1}: the chat template leaves out part of this turn, as Qwen3's does with text before a "
                    '</think>; change its text, or set its "train" to false'
                )
            if NO_THOUGHT not in draft.notes:
                draft.notes.append(NO_THOUGHT)
        return _Document(prompt + answer, [(start, start + len(answer))], [i], draft.sentinel)

    def _after_header(self, draft, i, text):
        """What follows the header of the last turn in `text`, where the template renders what is before it otherwise.

        Qwen3 puts an empty thought into an assistant turn only after a user message and as long as no other assistant
        turn follows it.
        """
        prompt, mode = self._prompt(draft, i)
        header = prompt.removeprefix(self._render(draft.messages[:i], draft.tools, thinking=mode))
        opening = self._special.match(header)
        last = text[text.rfind(opening.group()) :] if opening else ""
        for begin in (header, re.sub(_EMPTY_THOUGHT.pattern + "$", "", header)):
            if last.startswith(begin):
                return last[len(begin) :]
        reason = "a prompt that opens a thought, which this turn lacks" if prompt.rstrip().endswith("<think>") else (
            "an answer that does not follow its prompt")  # fmt: skip
        raise ValueError(f"turn {i + 1}: the chat template renders {reason}")

    def _thought_put_in(self, message, answer):
        """Length of an empty thought with which the template began the answer; the data did not have it."""
        empty, thought = _EMPTY_THOUGHT.match(answer), _thought_of(message)
        if not empty or (thought and thought in answer):
            return 0
        as_text = self.thinking != "auto" or not self._knows_thoughts  # then one in the data is learnt
        return 0 if as_text and _EMPTY_THOUGHT.match(message["content"].lstrip()) else empty.end()

    def _says(self, message, answer, but_thought=False):
        """Whether a rendered answer holds the message's thought (or none of it), then its text, and its calls."""
        inline, thought = _THOUGHT.match(message["content"]), _thought_of(message)
        text = (message["content"][inline.end() :] if inline else message["content"]).strip()
        body = answer.removesuffix(self.stop_token).strip()
        at = 0 if but_thought else body.find(thought)
        without = body.startswith(text) and "</think>" not in body[len(text) :]
        told = without if but_thought else at >= 0 and text in body[at + len(thought) :]
        calls = [call["function"]["name"] for call in message.get("tool_calls") or []]
        return told and all(body.count(name) >= calls.count(name) for name in calls)

    def _answer_end(self, text, start, i):
        # Control-token text inside contents is defused, so the first stop token is the template's own.
        end = text.find(self.stop_token, start)
        if end < 0:
            raise ValueError(f"turn {i + 1}: the chat template does not end this turn with {self.stop_token}")
        return end + len(self.stop_token)

    # ------------------------------------------------------------------------------------------------------------------
    # Text that looks like control tokens

    def _defused(self, messages, tools):
        """Break control-token text in contents with a sentinel character, at which the text is cut again.

        What users and tools say may hold no markup at all; system and assistant messages, which the user of this script
        wrote, may hold tokens like <think> and <tool_call>, but none that ends or begins a turn.
        """
        patterns = [self._markup if m["role"] in ("user", "tool") else self._special for m in messages]
        if not _contains(self._special, tools) and not any(map(_contains, patterns, messages)):
            return messages, tools, None
        used = [messages, tools, self.tokenizer.chat_template]
        sentinel = next(char for char in map(chr, range(0xE000, 0xF8FF)) if not _contains(re.compile(char), used))
        defused = [_broken(pattern, m, sentinel) for pattern, m in zip(patterns, messages, strict=True)]
        return defused, _broken(self._special, tools, sentinel), sentinel

    # ------------------------------------------------------------------------------------------------------------------
    # Documents of text -> ids and labels

    def _finish(self, draft):
        """Rows of ids and labels; a turn whose prompt and answer would merge into one token gets a row of its own."""
        rows, merging = [], []
        for document in draft.documents:
            borders = [self._border(document, span) for span in document.spans]
            merging += [turn for turn, border in zip(document.turns, borders, strict=True) if not border]
            if any(borders):
                rows.append(draft.row(document, document.ids, borders))
        for turn in merging:
            single = self._single(draft, turn)
            ((start, end),) = single.spans
            prompt, answer = (self._ids(text, draft.sentinel) for text in (single.text[:start], single.text[start:end]))
            rows.append(draft.row(single, prompt + answer, [(len(prompt), len(prompt) + len(answer))]))
        draft.notes += [SPLIT] * (len(rows) > 1)
        return sorted(rows, key=lambda row: row["turns"])

    def _border(self, document, span):
        """Token positions of an answer, or None if tokenising its prompt alone would have given other ids."""
        (start, begins_here), (last, _) = document.token_at(span[0]), document.token_at(span[1] - 1)
        if not begins_here or last is None or document.ids[last] != self.stop_id:
            return None
        # A control token cuts the text for the tokenizer, so only what follows the last one needs to be looked at.
        tail = document.text[max(0, span[0] - 200) : span[0]]
        matches = list(self._special.finditer(tail))
        header = tail[matches[-1].start() :] if matches else document.text[: span[0]]
        alone = self._header_ids.get(header) or self._ids(header)
        if len(self._header_ids) < 100:
            self._header_ids[header] = alone
        return (start, last + 1) if document.ids[max(0, start - len(alone)) : start] == alone else None

    def _ids(self, text, sentinel=None):
        encodings = [self.backend.encode(p, add_special_tokens=False) for p in _pieces(text, sentinel)]
        return [i for encoding in encodings for i in encoding.ids]

    def _verify(self, drafts):
        """Every supervised run of ids decodes to the answer's text: the last guard against labels on other tokens."""
        answers = [answer for draft in drafts for answer in draft.answers]
        read = self.backend.decode_batch([ids for _, _, ids in answers], skip_special_tokens=False)
        for (turn, text, _), found in zip(answers, read, strict=True):
            if found != text and self._normalised(found) != self._normalised(text):
                raise ValueError(f"turn {turn + 1}: the labels read {found!r:.200}, the turn says {text!r:.200}")

    def _normalised(self, text):
        text = self.backend.normalizer.normalize_str(text) if self.backend.normalizer else text
        # Decoders other than byte-level ones drop or add spaces beside control tokens.
        return text if self._byte_level else "".join(text.replace("\u2581", " ").split())


def supervised_runs(labels):
    """(start, end) of every unbroken run of labels that are not IGNORE_INDEX."""
    runs, start = [], None
    for position, label in enumerate(labels):
        if label != IGNORE_INDEX and start is None:
            start = position
        elif label == IGNORE_INDEX and start is not None:
            runs.append((start, position))
            start = None
    return runs if start is None else [*runs, (start, len(labels))]


def _any_of(tokens):
    ordered = sorted({str(token) for token in tokens}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


def _contains(pattern, value):
    if isinstance(value, str):
        return pattern.search(value) is not None
    if isinstance(value, dict):
        return any(_contains(pattern, part) for item in value.items() for part in item)
    return any(_contains(pattern, item) for item in value) if isinstance(value, list) else False


def _broken(pattern, value, sentinel):
    if isinstance(value, str):
        return pattern.sub(lambda match: match.group()[0] + sentinel + match.group()[1:], value)
    if isinstance(value, dict):
        return {_broken(pattern, key, sentinel): _broken(pattern, item, sentinel) for key, item in value.items()}
    return [_broken(pattern, item, sentinel) for item in value] if isinstance(value, list) else value


def _thought_of(message):
    """The thought of an assistant message, "" if it has none."""
    inline = _THOUGHT.match(message["content"])
    return (message.get("reasoning_content") or (inline.group(1) if inline else "")).strip()


def _pieces(text, sentinel):
    return text.split(sentinel) if sentinel else [text]


class _Document:
    """A rendered text, the character spans of its supervised answers, and the turns they belong to (from 0).

    Its pieces, cut at the sentinel, are tokenised apart, so that the halves of control-token text never meet again.
    """

    def __init__(self, text, spans, turns, sentinel):
        self.text, self.spans, self.turns, self.pieces = text, spans, turns, _pieces(text, sentinel)

    def take(self, encodings):
        """Take the tokenizer's output for the pieces from an iterator."""
        self.encodings = [next(encodings) for _ in self.pieces]
        self.ids = sum((encoding.ids for encoding in self.encodings[1:]), self.encodings[0].ids)

    def token_at(self, char):
        """Index of the token that holds a character of the text, and whether it begins there; (None, False) if none."""
        before = 0
        for piece, encoding in zip(self.pieces, self.encodings, strict=True):
            if char < len(piece):
                token = encoding.char_to_token(char)
                return (None, False) if token is None else (before + token, encoding.token_to_chars(token)[0] == char)
            char -= len(piece) + 1
            before += len(encoding)
        return None, False


class _Draft:
    """A conversation on its way to tokens; `answers` are the (turn, text, ids) that were labelled."""

    def __init__(self, messages, tools, sentinel):
        self.messages, self.tools, self.sentinel = messages, tools, sentinel
        self.supervised, self.prompts, self.documents, self.answers, self.notes = [], {}, [], [], []

    def row(self, document, ids, borders):
        """Ids and labels of a document up to its last answer that has borders."""
        labels, turns = [IGNORE_INDEX] * len(ids), []
        for turn, span, border in zip(document.turns, document.spans, borders, strict=True):
            if border:
                (start, end), text = border, document.text[slice(*span)]
                labels[start:end] = ids[start:end]
                turns.append(turn + 1)
                self.answers.append((turn, text.replace(self.sentinel, "") if self.sentinel else text, ids[start:end]))
        return {"input_ids": ids[:end], "labels": labels[:end], "turns": turns}
