"""What a tokenizer's chat template knows: its stop token, thoughts, tools, and what it would leave out."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from jinja2 import TemplateError

from recipe.dataset.control_text import ControlText

_PROBE = "kqzvprobe"  # a word that no template contains


class ChatTemplate:
    """Renders messages to text as serving does. What the template knows is found by rendering a word.

    Args:
        tokenizer: a tokenizer with a chat template.
        control_text: patterns of its control tokens.
    Attributes:
        stop_token: control token that ends an assistant turn.
        stops_earlier_turns: whether it also ends a turn that is not the last message.
        has_switch: whether `enable_thinking` changes a prompt.
        knows_thoughts: whether `reasoning_content` is rendered.
        finds_thoughts: whether a thought between <think> and </think> in the text is rendered the same.
        left_out: parts (roles, "tools", "tool_calls") that are silently left out. A template that raises an error for a
            part says so itself.
    Raises:
        ValueError: the template refuses a plain conversation, or ends its turns with no control token.
    """

    def __init__(self, tokenizer: Any, control_text: ControlText):
        self.tokenizer = tokenizer
        self._find_stop(control_text)
        user = {"role": "user", "content": "q"}
        prompts = {self.render([user], prompt=True, thinking=choice) for choice in (None, True, False)}
        self.has_switch = len(prompts) > 1
        apart = self.render([user, {"role": "assistant", "content": "a", "reasoning_content": _PROBE}])
        in_text = self.render([user, {"role": "assistant", "content": f"<think>\n{_PROBE}\n</think>\n\na"}])
        self.knows_thoughts = _PROBE in apart
        self.finds_thoughts = self.knows_thoughts and in_text == apart
        self.left_out = set(self._left_out_parts(user))

    def render(
        self, messages: Sequence, tools: list | None = None, prompt: bool = False, thinking: bool | None = None
    ) -> str:
        """Render messages; `prompt` adds the header of the next answer, `thinking` is enable_thinking if not None."""
        extra = {} if thinking is None else {"enable_thinking": thinking}
        return self.tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=prompt, return_dict=False, **extra
        )

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

    def _left_out_parts(self, user: dict) -> Iterator[str]:
        call = {"role": "assistant", "content": ""}
        probe, other = ([{"type": "function", "function": {"name": name, "arguments": {}}}] for name in (_PROBE, "f"))
        described = {"name": _PROBE, "description": "d", "parameters": {"type": "object", "properties": {}}}
        probes: dict[str, tuple[list, list | None]] = {
            "system": ([{"role": "system", "content": _PROBE}, user], None),
            "tools": ([user], [{"type": "function", "function": described}]),
            "tool_calls": ([user, {**call, "tool_calls": probe}], None),
            "tool": ([user, {**call, "tool_calls": other}, {"role": "tool", "content": _PROBE}], None),
        }
        for part, (messages, tools) in probes.items():
            with contextlib.suppress(TemplateError, TypeError):
                if _PROBE not in self.render(messages, tools):
                    yield part
