"""Turn a conversation into token ids and labels, through the tokenizer's own chat template.

For each supervised assistant turn i the prompt is what serving will send, `apply_chat_template(messages[:i],
add_generation_prompt=True)`; the answer is what the template renders after it, up to and including the stop token.
Prompts and everything between turns get the label IGNORE_INDEX; every prompt is rendered and compared, no table of role
markers or token ids is kept, and padding plays no part.

Where the template renders every prompt as the beginning of the whole conversation, one document holds all turns. Where
it rewrites history (thoughts of earlier turns are left out, an empty thought is put in), each supervised turn becomes a
document of its own, as serving would see it. So does a turn whose answer would merge with its prompt into one token.
"""

import bisect
import re
from typing import NamedTuple

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
        from jinja2 import TemplateError

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
        self._left_out = {part for part, probe in probes.items() if self._leaves_out(*probe)}

    def _leaves_out(self, messages, tools):
        from jinja2 import TemplateError

        try:
            return _PROBE not in self._render(messages, tools)
        except (TemplateError, TypeError):
            return False  # it says so itself

    def fingerprint(self):
        """Text that changes when the same conversation would be encoded otherwise; for caches of tokens."""
        return "|".join([self.backend.to_str(), str(self.tokenizer.chat_template), self.train_on, self.thinking])

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
        texts = _Texts()
        for draft in drafts:
            for document in draft.documents:
                document.handle = texts.add(document.text, draft.sentinel)
        self.backend.no_truncation()  # a saved tokenizer may come with these, an earlier call may have left them
        self.backend.no_padding()
        self.backend.encode_special_tokens = False
        texts.encode(self.backend)
        encoded = [Encoded(self._finish(draft, texts), draft.notes) for draft in drafts]
        self._verify(drafts)
        return encoded

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
                f"the chat template has no place for {_PARTS[part]} and would leave it out; use a template that has one "
                "(--chat_template), or remove it from the data"
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
        from jinja2 import TemplateError

        if i == 0:
            return False
        try:
            self._prompt(draft, i)
            return True
        except TemplateError:
            return False

    def _mode(self, message):
        """The value of enable_thinking that serving would use to get this turn, None for its default."""
        if not self._has_switch:
            return None
        if _thought_of(message):
            return True
        return False if self.thinking in ("auto", "empty") else None

    def _prompt(self, draft, i):
        """Text of the prompt of turn i, and the mode it was rendered in."""
        if i not in draft.prompts:
            mode = self._mode(draft.messages[i])
            prompt = self._render(draft.messages[:i], draft.tools, prompt=True, thinking=mode)
            if mode is None and self._has_switch and prompt.rstrip().endswith("<think>"):
                mode = False
                prompt = self._render(draft.messages[:i], draft.tools, prompt=True, thinking=mode)
            draft.prompts[i] = prompt, mode
        return draft.prompts[i]

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
        return [_Document(text[: spans[-1][1]], spans, draft.supervised)]

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
            if self._knows_thoughts or not self._says(message, answer, but_thought=True):
                raise ValueError(
                    f"turn {i + 1}: the chat template leaves out part of this turn, as Qwen3's does with what is before a "
                    '</think>; change its text, or set its "train" to false'
                )
            if NO_THOUGHT not in draft.notes:
                draft.notes.append(NO_THOUGHT)
        return _Document(prompt + answer, [(start, start + len(answer))], [i])

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
        meant = self.thinking != "auto" or not self._knows_thoughts  # an empty thought in the data is learnt as text
        if not empty or (thought and thought in answer) or (meant and _EMPTY_THOUGHT.match(message["content"].lstrip())):
            return 0
        return empty.end()

    def _says(self, message, answer, but_thought=False):
        """Whether a rendered answer holds the message's thought, then its text, and its calls, spaces around aside."""
        inline = _THOUGHT.match(message["content"])
        text = (message["content"][inline.end() :] if inline else message["content"]).strip()
        rest = answer.removesuffix(self.stop_token)
        for part in [text] if but_thought else [_thought_of(message), text]:
            _, found, rest = rest.partition(part) if part else ("", True, rest)
            if not found:
                return False
        calls = [call["function"]["name"] for call in message.get("tool_calls") or []]
        return all(answer.count(name) >= calls.count(name) for name in calls)

    def _answer_end(self, text, start, i):
        # Control-token text inside contents is defused, so the first stop token is the template's own.
        end = text.find(self.stop_token, start)
        if end < 0:
            raise ValueError(f"turn {i + 1}: the chat template does not end this turn with {self.stop_token}")
        return end + len(self.stop_token)

    # ------------------------------------------------------------------------------------------------------------------
    # Text that looks like control tokens

    def _defused(self, messages, tools):
        """Break control-token text in contents with a sentinel character, at which `_Texts` cuts the text again.

        What users and tools say may hold no markup at all; system and assistant messages, which the user of this script
        wrote, may hold tokens like <think> and <tool_call>, but none that ends or begins a turn.
        """
        patterns = [self._markup if m["role"] in ("user", "tool") else self._special for m in messages]
        if not _contains(self._special, tools) and not any(map(_contains, patterns, messages)):
            return messages, tools, None
        sentinel = next(c for c in map(chr, range(0xE000, 0xF8FF)) if not _contains(re.compile(c), [messages, tools]))
        defused = [_broken(pattern, m, sentinel) for pattern, m in zip(patterns, messages, strict=True)]
        return defused, _broken(self._special, tools, sentinel), sentinel

    # ------------------------------------------------------------------------------------------------------------------
    # Documents of text -> ids and labels

    def _finish(self, draft, texts):
        """Rows of ids and labels; a turn whose prompt and answer would merge into one token gets a row of its own."""
        rows, merging = [], []
        for document in draft.documents:
            ids = texts.ids(document.handle)
            borders = [self._border(document, span, ids, texts) for span in document.spans]
            merging += [turn for turn, border in zip(document.turns, borders, strict=True) if not border]
            if any(borders):
                rows.append(draft.row(document, ids, borders))
        for turn in merging:
            single = self._single(draft, turn)
            ((start, end),) = single.spans
            prompt, answer = self._ids(single.text[:start], draft), self._ids(single.text[start:end], draft)
            rows.append(draft.row(single, prompt + answer, [(len(prompt), len(prompt) + len(answer))]))
        if len(rows) > 1:
            draft.notes.append(SPLIT)
        return sorted(rows, key=lambda row: row["turns"])

    def _border(self, document, span, ids, texts):
        """Token positions of an answer, or None if tokenising its prompt alone would have given other ids."""
        start, last = texts.token_from(document.handle, span[0]), texts.token_at(document.handle, span[1] - 1)
        if start is None or last is None or ids[last] != self.stop_id:
            return None
        # A control token cuts the text for the tokenizer, so only what follows the last one needs to be looked at.
        tail = document.text[max(0, span[0] - 200) : span[0]]
        matches = list(self._special.finditer(tail))
        header = tail[matches[-1].start() :] if matches else document.text[: span[0]]
        alone = self._header_ids.get(header)
        if alone is None:
            alone = self._ids(header)
            if len(self._header_ids) < 100:
                self._header_ids[header] = alone
        return (start, last + 1) if ids[max(0, start - len(alone)) : start] == alone else None

    def _ids(self, text, draft=None):
        parts = text.split(draft.sentinel) if draft and draft.sentinel else [text]
        return [i for part in parts for i in self.backend.encode(part, add_special_tokens=False).ids]

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


class _Document:
    """A rendered text, the character spans of its supervised answers, and the turns they belong to (from 0)."""

    def __init__(self, text, spans, turns):
        self.text, self.spans, self.turns = text, spans, turns
        self.handle = None


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


class _Texts:
    """Tokenises many texts in one batch and answers which token a character belongs to.

    A text with sentinels is cut at them, so that the two halves of control-token text never meet in one token.
    """

    def __init__(self):
        self._pieces, self._handles = [], []

    def add(self, text, sentinel):
        parts = text.split(sentinel) if sentinel else [text]
        first, offset, offsets = len(self._pieces), 0, []
        for part in parts:
            offsets.append(offset)
            offset += len(part) + 1
        self._pieces += parts
        self._handles.append((first, offsets))
        return len(self._handles) - 1

    def encode(self, backend):
        self._encodings = backend.encode_batch(self._pieces, add_special_tokens=False)

    def ids(self, handle):
        first, offsets = self._handles[handle]
        if len(offsets) == 1:
            return self._encodings[first].ids
        return [i for encoding in self._encodings[first : first + len(offsets)] for i in encoding.ids]

    def token_at(self, handle, char):
        """Index of the token that holds character `char` of the text, None if none does."""
        token, before, _, _ = self._find(handle, char)
        return None if token is None else before + token

    def token_from(self, handle, char):
        """Index of the token that starts exactly at character `char` of the text, None if none does."""
        token, before, encoding, char = self._find(handle, char)
        return None if token is None or encoding.token_to_chars(token)[0] != char else before + token

    def _find(self, handle, char):
        first, offsets = self._handles[handle]
        number = bisect.bisect_right(offsets, char) - 1
        encoding, char = self._encodings[first + number], char - offsets[number]
        before = sum(map(len, self._encodings[first : first + number]))
        return encoding.char_to_token(char), before, encoding, char
