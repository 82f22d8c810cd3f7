"""Turn a conversation into token ids and labels, through the tokenizer's own chat template.

For each supervised assistant turn i the prompt is what serving will send, `apply_chat_template(messages[:i],
add_generation_prompt=True)`; the answer is what the template renders after it, up to and including the stop token.
Prompts and everything between turns get the label IGNORE_INDEX; nothing is searched for by role markers or token ids,
and padding plays no part.
"""

import re

IGNORE_INDEX = -100
_PROBE = "kqzvprobe"  # a word no template contains


class ChatEncoder:
    """Encodes conversations for one tokenizer.

    Args:
        tokenizer: a fast (Rust) tokenizer with a chat template.
        train_on: "all_turns" or "last_turn".
    Attributes:
        stop_token, stop_id: what ends an assistant turn in this template, as text and as id.
    Raises:
        ValueError: the tokenizer has no chat template, or the template ends its turns with no control token.
    """

    def __init__(self, tokenizer, train_on="all_turns"):
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError("the tokenizer has no fast (Rust) version; use a model of the Qwen1.5 family or later")
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template; start from a chat model or set --chat_template")
        self.tokenizer = tokenizer
        self.train_on = train_on
        self.added = sorted(
            {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}, key=len, reverse=True
        )
        self._control = re.compile("|".join(map(re.escape, self.added)))
        self._header_ids = {}
        self.stop_token, self.stop_id = self._find_stop()

    def _find_stop(self):
        user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": _PROBE}
        text = self._render([user, answer])
        after = text[text.index(_PROBE) + len(_PROBE) :]
        stop = self._control.search(after)
        if not stop or after[: stop.start()].strip():
            raise ValueError("the chat template ends an assistant turn with no control token, so no stop can be learnt")
        return stop.group(), self.tokenizer.convert_tokens_to_ids(stop.group())

    def _render(self, messages, tools=None, prompt=False):
        return self.tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=prompt, return_dict=False
        )

    def encode(self, conversation):
        """Documents of one conversation; see `encode_batch`."""
        return self.encode_batch([conversation])[0]

    def encode_batch(self, conversations):
        """Encode many conversations with one call of the tokenizer.

        Returns:
            For each conversation a list of documents: dicts with `input_ids` and `labels` (lists of int of equal
            length, IGNORE_INDEX or the id) and `turns` (the supervised turns, counted from 1). Usually one document;
            one for each supervised turn where the template rewrites history; none where no turn is supervised.
        Raises:
            jinja2.TemplateError: the template refuses the conversation.
            ValueError: an answer cannot be told apart from its prompt.
        """
        drafts = [self._draft(conversation) for conversation in conversations]
        texts = _Texts()
        for draft in drafts:
            for document in draft.documents:
                document.handle = texts.add(document.text, draft.sentinel)
        texts.encode(self.tokenizer)
        return [self._finish(draft, texts) for draft in drafts]

    def _draft(self, conversation):
        """Render a conversation: whole if every prompt is a prefix of it, else once for each supervised turn."""
        messages, tools = conversation["messages"], conversation.get("tools")
        supervised = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("train", True)]
        if self.train_on == "last_turn":
            supervised = supervised[-1:]
        messages, tools, sentinel = self._defused(messages, tools)
        draft = _Draft(messages, tools, sentinel, supervised)
        if not supervised:
            return draft
        whole = self._render(messages, tools)
        spans = []
        for i in supervised:
            prompt = self._render(messages[:i], tools, prompt=True)
            if not whole.startswith(prompt):
                draft.documents = [self._single(draft, turn) for turn in supervised]
                return draft
            spans.append((len(prompt), self._answer_end(whole, len(prompt))))
        draft.documents = [_Document(whole[: spans[-1][1]], spans, supervised)]
        return draft

    def _single(self, draft, i):
        """One supervised turn as serving would see it: nothing after it exists yet."""
        prompt = self._render(draft.messages[:i], draft.tools, prompt=True)
        through = self._render(draft.messages[: i + 1], draft.tools)
        if not through.startswith(prompt):
            raise ValueError(f"turn {i + 1}: the chat template renders the answer differently from its prompt")
        end = self._answer_end(through, len(prompt))
        return _Document(through[:end], [(len(prompt), end)], [i])

    def _answer_end(self, text, start):
        # Control-token text inside contents is defused, so the first stop token is the template's own.
        end = text.find(self.stop_token, start)
        if end < 0:
            raise ValueError("the chat template renders an assistant turn without its stop token")
        return end + len(self.stop_token)

    def _defused(self, messages, tools):
        """Break control-token text in contents with a sentinel character, at which `_Texts` cuts the text again."""
        if not self._has_control_text(messages) and not self._has_control_text(tools):
            return messages, tools, None
        everything = repr((messages, tools))
        sentinel = next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in everything)

        def defuse(value):
            if isinstance(value, str):
                return self._control.sub(lambda match: match.group()[0] + sentinel + match.group()[1:], value)
            if isinstance(value, dict):
                return {key: defuse(item) for key, item in value.items()}
            return [defuse(item) for item in value] if isinstance(value, list) else value

        return defuse(messages), defuse(tools), sentinel

    def _has_control_text(self, value):
        if isinstance(value, str):
            return self._control.search(value) is not None
        if isinstance(value, dict):
            return any(self._has_control_text(item) for item in value.values())
        return any(self._has_control_text(item) for item in value) if isinstance(value, list) else False

    def _finish(self, draft, texts):
        documents = []
        for document in draft.documents:
            borders = [self._border(document, span, texts) for span in document.spans]
            if all(borders):
                ids = texts.ids(document.handle)
                labels = [IGNORE_INDEX] * len(ids)
                for start, end in borders:
                    labels[start:end] = ids[start:end]
                documents.append(_row(ids, labels, document.turns))
            else:  # some prompt and answer would merge into one token: tokenise them apart, as serving does
                documents += [self._apart(self._single(draft, i), draft.sentinel) for i in document.turns]
        return documents

    def _border(self, document, span, texts):
        """Token positions of an answer, or None if tokenising its prompt alone would have given other ids."""
        start, end = (texts.token_at(document.handle, char) for char in span)
        if start is None or end is None:
            return None
        header = document.text[: span[0]]
        last = None
        for last in self._control.finditer(header, max(0, len(header) - 200)):
            pass
        header = header[last.start() if last else 0 :]
        if header not in self._header_ids:
            self._header_ids[header] = self._plain(header)
        alone = self._header_ids[header]
        return (start, end) if texts.ids(document.handle)[start - len(alone) : start] == alone else None

    def _apart(self, document, sentinel):
        (start, end), text = document.spans[0], document.text
        prompt, answer = ([i for part in t.split(sentinel) for i in self._plain(part)] if sentinel else self._plain(t)
                          for t in (text[:start], text[start:end]))  # fmt: skip
        return _row(prompt + answer, [IGNORE_INDEX] * len(prompt) + answer, document.turns)

    def _plain(self, text):
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def _row(ids, labels, turns):
    return {"input_ids": ids, "labels": labels, "turns": [turn + 1 for turn in turns]}


class _Document:
    """A rendered text, the character spans of its supervised answers, and the turns they belong to (from 0)."""

    def __init__(self, text, spans, turns):
        self.text, self.spans, self.turns = text, spans, turns
        self.handle = None


class _Draft:
    def __init__(self, messages, tools, sentinel, supervised):
        self.messages, self.tools, self.sentinel, self.supervised = messages, tools, sentinel, supervised
        self.documents = []


class _Texts:
    """Tokenises many texts in one batch and answers which token starts at a character.

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

    def encode(self, tokenizer):
        self._encodings = tokenizer.backend_tokenizer.encode_batch(self._pieces, add_special_tokens=False)

    def ids(self, handle):
        first, offsets = self._handles[handle]
        if len(offsets) == 1:
            return self._encodings[first].ids
        return [i for encoding in self._encodings[first : first + len(offsets)] for i in encoding.ids]

    def token_at(self, handle, char):
        """Index of the token that starts exactly at character `char` of the text (or ends it), None if none does."""
        first, offsets = self._handles[handle]
        before = 0
        for number, offset in enumerate(offsets):
            encoding, piece = self._encodings[first + number], self._pieces[first + number]
            if char - offset < len(piece):
                token = encoding.char_to_token(char - offset)
                if token is None or encoding.offsets[token][0] != char - offset:
                    return None
                return before + token
            before += len(encoding)
        return before
