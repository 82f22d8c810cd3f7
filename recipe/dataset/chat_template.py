"""What a tokenizer's chat template knows: its stop token, thoughts, tools, dates, and what it would leave out."""

import contextlib
import datetime
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from recipe.dataset.control_text import ControlText

_PROBE = "kqzvprobe"  # a word that no template contains
_CALLS = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": _PROBE, "arguments": {}}}],
}
_DATE_FORMAT = re.compile(r"""(?:(\w+)\s*=\s*)?strftime_now\(\s*["']([^"']+)["']""")


class ChatTemplate:
    """Renders messages to text as serving does. What the template knows is found by rendering a word.

    Args:
        tokenizer: a tokenizer with a chat template.
        control_text: patterns of its control tokens.
        kwargs: variables of the template (chat_template_kwargs), for every rendering.
    Attributes:
        stop_token: control token that ends an assistant turn.
        call_stop_token: control token that ends one with tool calls, the same in most templates.
        stops_earlier_turns: whether stop_token also ends a turn that is not the last message.
        opening: what the template writes before the text of a first user message.
        has_switch: whether `enable_thinking` changes a prompt.
        knows_thoughts: whether `reasoning_content` is rendered.
        finds_thoughts: whether a thought between <think> and </think> in the text is rendered the same.
        left_out: parts (roles, "tools", "tool_calls") that are silently left out. A template that raises an error for a
            part says so itself.
    Raises:
        ValueError: the template refuses a plain conversation, ends its turns with no control token, or does not read
            one of the variables.
    """

    def __init__(self, tokenizer: Any, control_text: ControlText, kwargs: Mapping[str, Any]):
        self.tokenizer, self.kwargs, self.source = tokenizer, dict(kwargs), tokenizer.get_chat_template()
        self._reserved = {*inspect.signature(tokenizer.apply_chat_template).parameters, "messages"} - {"documents"}
        unread = self.unread(kwargs)
        if unread:
            raise ValueError(f"the chat template does not read {', '.join(map(repr, unread))} of chat_template_kwargs")
        self._find_stop(control_text)
        self.opening = self.render([{"role": "user", "content": _PROBE}]).partition(_PROBE)[0]
        user = {"role": "user", "content": "q"}
        prompts = {self.render([user], prompt=True, thinking=choice) for choice in (None, True, False)}
        self.has_switch = len(prompts) > 1
        apart = self.render([user, {"role": "assistant", "content": "a", "reasoning_content": _PROBE}])
        in_text = self.render([user, {"role": "assistant", "content": f"<think>\n{_PROBE}\n</think>\n\na"}])
        self.knows_thoughts = _PROBE in apart
        self.finds_thoughts = self.knows_thoughts and in_text == apart
        self.left_out = set(self._left_out_parts(user))

    def render(
        self,
        messages: Sequence,
        tools: list | None = None,
        prompt: bool = False,
        thinking: bool | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Render messages to text.

        Args:
            prompt: add the header of the next answer.
            thinking: the variable enable_thinking, unless it is among the others; None: not passed.
            kwargs: variables of this conversation, which win over those of all.
        """
        switch = {} if thinking is None else {"enable_thinking": thinking}
        return self.tokenizer.apply_chat_template(
            messages,
            tools=tools,
            tokenize=False,
            add_generation_prompt=prompt,
            return_dict=False,
            **{**switch, **self.kwargs, **(kwargs or {})},
        )

    def unread(self, kwargs: Mapping[str, Any]) -> list[str]:
        """Return the variables that the template does not read.

        Raises:
            ValueError: one is an argument of `apply_chat_template` and no variable.
        """
        for name in kwargs:
            if name in self._reserved:
                raise ValueError(f"chat_template_kwargs: {name!r} is no variable of a template; leave it out")
        return [name for name in kwargs if not re.search(rf"\b{re.escape(name)}\b", self.source)]

    def today(self) -> tuple[str, str | None] | None:
        """Return today's date as the template prints it and the variable that would fix it; None if it prints none."""
        for variable, form in _DATE_FORMAT.findall(self.source):
            date = datetime.datetime.now().strftime(form)
            if date in self.opening:
                return date, variable or None
        return None

    def _find_stop(self, control_text: ControlText) -> None:
        user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": _PROBE}
        try:
            last, earlier = (self.render(m).partition(_PROBE)[2] for m in ([user, answer], [user, answer, user]))
        except TemplateError as error:
            raise ValueError(f"the chat template refuses a question and its answer in plain text: {error}") from None
        stop = control_text.special.match(last.lstrip())
        if not stop:
            raise ValueError("the chat template ends an assistant turn with no control token, so no stop can be learnt")
        self.stop_token = stop.group()
        self.stops_earlier_turns = earlier.lstrip().startswith(self.stop_token)
        self.call_stop_token = self.stop_token
        with contextlib.suppress(TemplateError, TypeError):
            _, called, after = self.render([user, _CALLS]).rpartition(_PROBE)
            if called and self.stop_token not in after and (tokens := control_text.special.findall(after)):
                self.call_stop_token = tokens[-1]

    def _left_out_parts(self, user: dict) -> Iterator[str]:
        other = {**_CALLS, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
        described = {"name": _PROBE, "description": "d", "parameters": {"type": "object", "properties": {}}}
        probes: dict[str, tuple[list, list | None]] = {
            "system": ([{"role": "system", "content": _PROBE}, user], None),
            "tools": ([user], [{"type": "function", "function": described}]),
            "tool_calls": ([user, _CALLS], None),
            "tool": ([user, other, {"role": "tool", "content": _PROBE}], None),
        }
        for part, (messages, tools) in probes.items():
            with contextlib.suppress(TemplateError, TypeError):
                if _PROBE not in self.render(messages, tools):
                    yield part
