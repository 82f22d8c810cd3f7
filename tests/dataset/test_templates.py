"""For every chat template: what comes before an answer is what serving sends, what is learnt is the answer.

Serving is `apply_chat_template(messages[:i], add_generation_prompt=True)`; every expectation here comes from calls of
it and from what the tests spell out, none from tokens.py.
"""

import copy
import itertools
import json
import re
import time
import unicodedata
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError

from demo import demo_model
from helpers import TEMPLATES, template
from recipe.dataset import report
from recipe.dataset.conversations import to_conversation
from recipe.dataset.encoding import IGNORE_INDEX, ChatEncoder, Note

# How each template opens and ends an assistant turn.
CHATML = ("<|im_start|>assistant\n", "<|im_end|>")
FORMATS = dict.fromkeys(TEMPLATES, CHATML) | {
    "llama3": ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    "gemma": ("<start_of_turn>model\n", "<end_of_turn>"),
    "gemma3": ("<start_of_turn>model\n", "<end_of_turn>"),
    "phi3": ("<|assistant|>\n", "<|end|>"),
}
SWITCH = ("qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3_8")  # they know enable_thinking and thoughts
DEMO_MODEL = demo_model.cache_folder() / "SmolLM2-135M-Instruct"
if (DEMO_MODEL / "complete").exists():  # the real tokenizer too, where `make demo` has left it
    FORMATS[str(DEMO_MODEL)] = CHATML
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"


# ----------------------------------------------------------------------------------------------------------------------
# What serving would send and what the template would render


def thought_of(message):
    """The thought of an assistant message, "" if it has none."""
    inline = re.match(r"\s*<think>(.*?)</think>", message["content"], re.DOTALL)
    return (message.get("reasoning_content") or (inline.group(1) if inline else "")).strip()


def without_blank_thought(message):
    return {key: value for key, value in message.items() if key != "reasoning_content" or value.strip()}


def with_thought_apart(message):
    if message.get("reasoning_content") or not re.match(r"\s*<think>.*</think>", message["content"], re.DOTALL):
        return message
    text = message["content"].partition("</think>")[2].lstrip()
    return {**message, "content": text, "reasoning_content": thought_of(message)}


def serve(tokenizer, name, conversation, i, prompt, tokenize):
    """The prompt of turn i, or all up to its end, with enable_thinking as ChatEncoder has it for thinking="auto"."""
    messages, mode = [without_blank_thought(message) for message in conversation["messages"]], {}
    if name == "qwen3_8":  # knows thoughts only in reasoning_content
        messages = [with_thought_apart(m) if m["role"] == "assistant" else m for m in messages]
    if name in SWITCH:
        mode["enable_thinking"] = bool(thought_of(messages[i]))
    return tokenizer.apply_chat_template(
        messages[: i if prompt else i + 1], tools=conversation.get("tools"), add_generation_prompt=prompt,
        tokenize=tokenize, return_dict=False, **mode,
    )  # fmt: skip


def answer_of(tokenizer, name, conversation, i):
    """Text of turn i as the template renders it, up to its stop token, without what the template put in unasked."""
    header, stop = FORMATS[name]
    answer = serve(tokenizer, name, conversation, i, prompt=False, tokenize=False).rpartition(header)[2]
    opened = serve(tokenizer, name, conversation, i, prompt=True, tokenize=False).rpartition(header)[2]
    answer = answer[: answer.rindex(stop) + len(stop)]
    thought = thought_of(conversation["messages"][i])
    if thought and thought in answer:
        assert answer.startswith(opened)
        return answer.removeprefix(opened)
    assert opened in ("", EMPTY_THOUGHT)  # nothing but an empty thought is taken off an answer without one
    return re.sub(r"^<think>\s*</think>\n\n", "", answer) if name in SWITCH else answer


def supervised_turns(tokenizer, name, conversation):
    """The assistant turns that are to be learnt and that serving could be asked for."""
    messages = conversation["messages"]
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and message.get("train", True) and i > 0:
            try:
                serve(tokenizer, name, conversation, i, prompt=True, tokenize=False)
                yield i
            except TemplateError:  # some templates want a user's message before anything else
                assert "user" not in {m["role"] for m in messages[:i]}


def runs(document):
    """(turn from 0, start, end) of every supervised run, the labels checked against the ids."""
    ids, labels, found, position = document["input_ids"], document["labels"], [], 0
    assert len(ids) == len(labels) and all(label in (IGNORE_INDEX, own) for own, label in zip(ids, labels, strict=True))
    for ignored, run in itertools.groupby(labels, lambda label: label == IGNORE_INDEX):
        length = len(list(run))
        if not ignored:
            found.append((position, position + length))
        position += length
    return [(turn - 1, *run) for turn, run in zip(document["turns"], found, strict=True)]


def read(tokenizer, ids):
    return normal(tokenizer, tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def normal(tokenizer, text):
    return unicodedata.normalize("NFC", text) if tokenizer.backend_tokenizer.normalizer else text


# ----------------------------------------------------------------------------------------------------------------------
# Text that looks like control tokens


def replaced(tokenizer, conversation):
    """The conversation with harmless words for control-token text, and a function that puts that text back.

    Users and tools say no markup at all; assistants may say <think> or <tool_call>, but nothing that ends a turn.
    """
    added = tokenizer.added_tokens_decoder.values()
    words = {str(token): f"Zq{chr(0x61 + n // 26)}{chr(0x61 + n % 26)}" for n, token in enumerate(added)}
    special = [re.escape(str(token)) for token in added if token.special]
    patterns = {True: "|".join(map(re.escape, words)), False: "|".join(special)}

    def swap(value, all_markup):
        if isinstance(value, str):
            return re.sub(patterns[all_markup], lambda match: words[match.group()], value)
        if isinstance(value, list):
            return [swap(item, all_markup) for item in value]
        if isinstance(value, dict):
            return {swap(key, all_markup): swap(item, all_markup) for key, item in value.items()}
        return value

    def back(text):
        for token, word in words.items():
            text = text.replace(word, token)
        return text

    harmless = {"messages": [swap(m, m["role"] in ("user", "tool")) for m in conversation["messages"]]}
    if conversation.get("tools"):
        harmless["tools"] = swap(conversation["tools"], False)
    return harmless, back


def same_text(found, expected):
    """Equal but for white space: Phi-3's control tokens swallow what follows them."""
    found, expected = ("".join(unicodedata.normalize("NFD", text).split()) for text in (found, expected))
    assert found == expected


# ----------------------------------------------------------------------------------------------------------------------
# The promise


def opened(conversation):
    """The conversation with a <think> before every thought that only its </think> marks."""
    ends = re.compile(r"""(?s)(?:(?!<think>|</think>).)*?(?:(?<![ \t`'"(])</think>|</think>(?=[ \t]*(?:\n|$)))""")

    def with_tag(message):
        if message["role"] != "assistant" or message.get("reasoning_content") or not ends.match(message["content"]):
            return message
        return {**message, "content": "<think>\n" + message["content"].lstrip("\n")}

    return {**conversation, "messages": [with_tag(message) for message in conversation["messages"]]}


def check(tokenizer, name, conversation):
    """Prompts are those of serving, id for id; what is learnt is the answer with its stop token; no turn is lost."""
    conversation = opened(conversation)
    (documents, notes), learnt = ChatEncoder(tokenizer).encode(conversation), []
    harmless, back = replaced(tokenizer, conversation)
    stop = tokenizer.convert_tokens_to_ids(FORMATS[name][1])
    for document in documents:
        for i, start, end in runs(document):
            learnt.append(i)
            before, answer = document["input_ids"][:start], document["input_ids"][start:end]
            assert answer.count(stop) == 1 and answer[-1] == stop
            expected = answer_of(tokenizer, name, harmless, i)
            assert thought_of(harmless["messages"][i]) in expected or Note.NO_THOUGHT in notes
            assert read(tokenizer, answer) == normal(tokenizer, back(expected))
            said_before = [(c["messages"][:i], c.get("tools")) for c in (harmless, conversation)]
            if said_before[0] == said_before[1]:
                assert before == serve(tokenizer, name, conversation, i, prompt=True, tokenize=True)
            else:  # serving would take the text for control tokens
                prompt = serve(tokenizer, name, harmless, i, prompt=True, tokenize=False)
                same_text(read(tokenizer, before), normal(tokenizer, back(prompt)))
    assert sorted(learnt) == list(supervised_turns(tokenizer, name, harmless))
    if harmless != conversation:
        others = ChatEncoder(tokenizer).encode(harmless).documents
        for document, other in zip(documents, others, strict=True):
            assert control_ids(tokenizer, document) == control_ids(tokenizer, other)


def control_ids(tokenizer, document):
    return Counter(i for i in document["input_ids"] if i in tokenizer.added_tokens_decoder)


def user(text):
    return {"role": "user", "content": text}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather", "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}  # fmt: skip
ONE = [user("What is 2 + 2?"), said("It is 4.")]
THREE = [*ONE, user("And 3 + 3?"), said("6"), user("Thanks"), said("You are welcome.\nBye!")]
LOOP = [
    user("Weather in Zürich?"), said("", tool_calls=[{"name": "weather", "arguments": {"city": "Zürich", "days": 2}}]),
    {"role": "tool", "content": '{"sky": "clear"}'}, said("Clear sky."),
]  # fmt: skip
CODE = "def f(x):\n\tif x:\n\t\treturn {'a': [x], \"b\": {}}\n\n\n\n    return {{x}} {% raw %}\r\n"


def thoughts(messages, form):
    """Give every assistant message a thought, as reasoning_content or as text before the answer."""
    told = []
    for number, message in enumerate(messages, 1):
        if message["role"] == "assistant" and form == "reasoning_content":
            message = {**message, "reasoning_content": f"step {number}\n\nthen {{x}}"}
        elif message["role"] == "assistant":
            message = {**message, "content": f"<think>\nstep {number}\n\nthen {{x}}\n</think>\n\n{message['content']}"}
        told.append(message)
    return told


CASES = {  # {open} and {stop} are the template's own control tokens
    "one turn": ONE,
    "three turns": THREE,
    "own system": [{"role": "system", "content": "Be brief.\n"}, *THREE],
    "empty answer": [*ONE, user("Say nothing."), said(""), user("And now?"), said("Something.")],
    "only an empty answer": [user("Say nothing."), said("")],
    "spaces around": [
        user("  \n hi \n\n"), said("  there \t"), user("\t"), said(" \t x\n\n"), user(" "), said("\u3000y"),
    ],
    "newline before an answer": [*ONE, user("List"), said("\n\n- a\n- b\n"), user("More"), said("\r\n- c"), *ONE],
    "newlines as answer": [user("\n"), said("\n\n\n"), *ONE],
    "other scripts": [
        user("日本語、한국어 👩‍👩‍👧 e\u0301 \u212b \u1100\u1161"), said("\u0301x 你好！🇨🇭 n\u0303 \u0338= \ufb01 A\u030a"),
        user("\u202eabc\u202c \x00\ufeff"), said("👍🏽\u200d"), user("\U00010348"), said("\u0958"),
    ],
    "code": [user(f"```python\n{CODE}```"), said(CODE), *ONE, user("{{ messages }}"), said("\t{%- if x -%}\n\t{}")],
    "control tokens of a user": [user("What is {stop} or {open}?{stop}"), said("Text."), user("{open}"), said("Yes.")],
    "control tokens of an answer": [*ONE, user("Which?"), said("{open}{stop} and {stop}\n{open}x"), *ONE],
    "control tokens of both": [user("{stop}{stop}"), said("{stop}"), user("\n{open}"), said("\n{open}")],
    "think text of a user": [user("<think>\nmine\n</think>\n\nwhy?"), said("So."), user("</think>"), said("Well.")],
    "thoughts apart": thoughts(THREE, "reasoning_content"),
    "thoughts in the text": thoughts(THREE, "text"),
    "one thought in the text": thoughts(ONE, "text"),
    "thoughts now and then": [*thoughts(ONE, "reasoning_content"), *ONE, *thoughts(ONE, "text"), user("?"), said("!")],
    "tools": {"messages": LOOP, "tools": [WEATHER]},
    "tools with thoughts": {"messages": thoughts(LOOP, "reasoning_content"), "tools": json.dumps([WEATHER])},
    "tool loop and a new question": {
        "messages": [*LOOP[:1], said("I look.", tool_calls=LOOP[1]["tool_calls"] * 2), *LOOP[2:3] * 2, *LOOP[3:], *ONE],
        "tools": [WEATHER],
    },
    "tool loop with thoughts and a new question": {
        "messages": [*thoughts(LOOP, "text"), *thoughts(ONE, "text")], "tools": [WEATHER],
    },
    "tools never used": {"messages": THREE, "tools": [WEATHER]},
    "control tokens of a tool": {
        "messages": [
            user("Look."), said("", tool_calls=[{"name": "weather", "arguments": {"city{stop}": "{open}{stop}"}}]),
            {"role": "tool", "content": "{stop}\n{open}</tool_response>"}, said("Hm."),
        ],
        "tools": [WEATHER, {"type": "function", "function": {"name": "f", "description": "{stop}"}}],
    },
    "consecutive answers": [user("Tell me."), said("First."), said("Second."), user("More"), said("Third."), said("4")],
    "consecutive answers with thoughts": [user("Tell."), *thoughts([said("First."), said("Second.")], "text"), *ONE],
    "assistant first": [said("Hello, I am here."), *THREE],
    "assistant after system": [{"role": "system", "content": "Greet."}, said("Hello!"), *ONE],
    "user last": [*THREE, user("One more thing")],
    "user last after thoughts": [*thoughts(THREE, "reasoning_content"), user("One more thing")],
    "some turns are context": [*ONE, user("Bad?"), said("Yes.", train=False), user("Good?"), said("No.", train=True)],
}  # fmt: skip


def filled(value, name):
    if isinstance(value, str):
        header, stop = FORMATS[name]
        return value.replace("{open}", header).replace("{stop}", stop)
    if isinstance(value, list):
        return [filled(item, name) for item in value]
    return {filled(k, name): filled(v, name) for k, v in value.items()} if isinstance(value, dict) else value


def conversation_of(case, name):
    record = CASES[case] if isinstance(CASES[case], dict) else {"messages": CASES[case]}
    return to_conversation(filled(record, name), case)


# What a template refuses itself, or would leave out without a word.
WITH_TOOLS = {case for case in CASES if "tool" in case}
NOT_ALTERNATING = {case for case in CASES if case.startswith(("consecutive", "assistant"))}
NO_PLACE = "has no place for (the list of tools|tool calls|tool results)"
REFUSED = {
    "gemma": {
        **dict.fromkeys(WITH_TOOLS, NO_PLACE), **dict.fromkeys(NOT_ALTERNATING, "roles must alternate"),
        "own system": "System role not supported", "assistant after system": "System role not supported",
    },
    "gemma3": dict.fromkeys(WITH_TOOLS, NO_PLACE) | dict.fromkeys(NOT_ALTERNATING, "roles must alternate"),
    "llama3": dict.fromkeys(WITH_TOOLS, NO_PLACE),
    "phi3": dict.fromkeys(WITH_TOOLS, NO_PLACE),
    "smollm2": dict.fromkeys(WITH_TOOLS, NO_PLACE),
    str(DEMO_MODEL): dict.fromkeys(WITH_TOOLS, NO_PLACE),
}  # fmt: skip


def label(name):
    return name.rpartition("/")[2]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FORMATS, ids=label)
def test_prompts_are_those_of_serving_and_answers_are_learnt_or_the_refusal_is_said(tokenizer_of, name, case):
    tokenizer, conversation = tokenizer_of(name), conversation_of(case, name)
    if case in REFUSED.get(name, {}):
        with pytest.raises((TemplateError, ValueError), match=REFUSED[name][case]):
            ChatEncoder(tokenizer).encode(conversation)
    else:
        check(tokenizer, name, conversation)


def test_a_tool_call_with_its_arguments_as_json_text_gives_the_same_ids(tokenizer_of):
    call = {"name": "weather", "arguments": '{"city": "Zürich", "days": 2}'}
    as_text = [LOOP[0], said("", tool_calls=[call]), *LOOP[2:]]
    for name in ("qwen2_5", "qwen3", "qwen3_5_think"):
        encoder = ChatEncoder(tokenizer_of(name))
        one, two = (to_conversation({"messages": m, "tools": [WEATHER]}, "tools") for m in (LOOP, as_text))
        assert encoder.encode(one) == encoder.encode(two)


@pytest.mark.parametrize("name", SWITCH)
def test_a_thought_in_the_text_and_one_in_reasoning_content_give_the_same_ids(tokenizer_of, name):
    encoder = ChatEncoder(tokenizer_of(name))
    for messages in (ONE, THREE):
        one, two = ({"messages": thoughts(messages, form)} for form in ("text", "reasoning_content"))
        assert encoder.encode(one) == encoder.encode(two)


# ----------------------------------------------------------------------------------------------------------------------
# --thinking, spelt out: between the brackets ⟦ ⟧ is what is learnt

S = "<|im_start|>system\nS<|im_end|>\n"
Q1, Q2, Q3 = (f"<|im_start|>user\nQ{n}<|im_end|>\n" for n in (1, 2, 3))
A, E = "<|im_start|>assistant\n", "<|im_end|>"
T1, T2, T3 = (f"<think>\nT{n}\n</think>\n\n" for n in (1, 2, 3))
NONE = "<think>\n\n</think>\n\n"
SYSTEM = {"role": "system", "content": "S"}
PLAIN_ONE = [SYSTEM, user("Q1"), said("A1")]
PLAIN_THREE = [*PLAIN_ONE, user("Q2"), said("A2"), user("Q3"), said("A3")]
TOLD_THREE = [
    SYSTEM, user("Q1"), said("A1", reasoning_content="T1"), user("Q2"), said("A2", reasoning_content="T2"),
    user("Q3"), said("A3", reasoning_content="T3"),
]  # fmt: skip
TOLD_ONE = TOLD_THREE[:3]

ONE_PLAIN = [S + Q1 + A + "⟦A1" + E + "⟧"]
ONE_PLAIN_AFTER_NONE = [S + Q1 + A + NONE + "⟦A1" + E + "⟧"]
ONE_TOLD = [S + Q1 + A + "⟦" + T1 + "A1" + E + "⟧"]
ONE_TOLD_AFTER_OPENING = [S + Q1 + A + "<think>\n⟦T1\n</think>\n\nA1" + E + "⟧"]
THREE_PLAIN = [S + Q1 + A + "⟦A1" + E + "⟧\n" + Q2 + A + "⟦A2" + E + "⟧\n" + Q3 + A + "⟦A3" + E + "⟧"]
PAST1 = S + Q1 + A + "A1" + E + "\n" + Q2 + A
PAST2 = PAST1 + "A2" + E + "\n" + Q3 + A
THREE_PLAIN_AFTER_NONE = [
    S + Q1 + A + NONE + "⟦A1" + E + "⟧",
    PAST1 + NONE + "⟦A2" + E + "⟧",
    PAST2 + NONE + "⟦A3" + E + "⟧",
]
THREE_TOLD = [
    S + Q1 + A + "⟦" + T1 + "A1" + E + "⟧",
    PAST1 + "⟦" + T2 + "A2" + E + "⟧",
    PAST2 + "⟦" + T3 + "A3" + E + "⟧",
]
THREE_TOLD_AFTER_OPENING = [
    S + Q1 + A + "<think>\n⟦T1\n</think>\n\nA1" + E + "⟧",
    PAST1 + "<think>\n⟦T2\n</think>\n\nA2" + E + "⟧",
    PAST2 + "<think>\n⟦T3\n</think>\n\nA3" + E + "⟧",
]
THREE_TOLD_IN_TEXT = [
    S + Q1 + A + "⟦" + T1 + "A1" + E + "⟧\n" + Q2 + A + "⟦" + T2 + "A2" + E + "⟧\n"
    + Q3 + A + "⟦" + T3 + "A3" + E + "⟧"
]  # fmt: skip
IN_TEXT = [PLAIN_ONE, ONE_PLAIN], [PLAIN_THREE, THREE_PLAIN]
LEFT_OUT = [TOLD_ONE, ONE_PLAIN, Note.NO_THOUGHT], [TOLD_THREE, THREE_PLAIN, Note.NO_THOUGHT]
REMOVED = [TOLD_ONE, ONE_PLAIN], [TOLD_THREE, THREE_PLAIN]
WRITTEN = [TOLD_ONE, ONE_TOLD], [TOLD_THREE, THREE_TOLD_IN_TEXT]
NOT_THINKING = (
    [PLAIN_ONE, ONE_PLAIN_AFTER_NONE], [PLAIN_THREE, THREE_PLAIN_AFTER_NONE, Note.SPLIT],
    [TOLD_ONE, ONE_PLAIN_AFTER_NONE], [TOLD_THREE, THREE_PLAIN_AFTER_NONE, Note.SPLIT],
)  # fmt: skip
OPENED = [TOLD_ONE, ONE_TOLD_AFTER_OPENING], [TOLD_THREE, THREE_TOLD_AFTER_OPENING, Note.SPLIT]
THOUGHT = [TOLD_ONE, ONE_TOLD], [TOLD_THREE, THREE_TOLD, Note.SPLIT]
GOLDEN = {  # what goes in, the documents that come out, and what is noted
    ("qwen2_5", "auto"): [*IN_TEXT, *LEFT_OUT],
    ("qwen2_5", "keep"): [*IN_TEXT, *WRITTEN],
    ("qwen2_5", "strip"): [*IN_TEXT, *REMOVED],
    ("qwen2_5", "empty"): [*IN_TEXT, *REMOVED],
    ("qwen3_instruct_2507", "auto"): [*IN_TEXT, *LEFT_OUT],
    ("qwen3_instruct_2507", "keep"): [*IN_TEXT, *WRITTEN],
    ("qwen3_instruct_2507", "strip"): [*IN_TEXT, *REMOVED],
    ("qwen3_instruct_2507", "empty"): [*IN_TEXT, *REMOVED],
    ("qwen3", "auto"): [*NOT_THINKING[:2], *THOUGHT],
    ("qwen3", "keep"): [*IN_TEXT, *THOUGHT],
    ("qwen3", "strip"): [*IN_TEXT, *REMOVED],
    ("qwen3", "empty"): NOT_THINKING,
    ("qwen3_5_think", "auto"): [*NOT_THINKING[:2], *OPENED],
    ("qwen3_5_think", "keep"): [*NOT_THINKING[:2], *OPENED],
    ("qwen3_5_think", "strip"): NOT_THINKING,
    ("qwen3_5_think", "empty"): NOT_THINKING,
}


def marked(tokenizer, document):
    """The document's text with ⟦ ⟧ around what is learnt."""
    text, done = "", 0
    for _, start, end in runs(document):
        text += read(tokenizer, document["input_ids"][done:start]) + "⟦"
        text, done = text + read(tokenizer, document["input_ids"][start:end]) + "⟧", end
    return text + read(tokenizer, document["input_ids"][done:])


@pytest.mark.parametrize("name, thinking", GOLDEN)
def test_thinking_decides_over_prompts_and_thoughts(tokenizer_of, name, thinking):
    tokenizer = tokenizer_of(name)
    for messages, documents, *notes in GOLDEN[name, thinking]:
        encoded = ChatEncoder(tokenizer, thinking=thinking).encode({"messages": messages})
        assert [marked(tokenizer, document) for document in encoded.documents] == documents
        assert encoded.notes == notes


@pytest.mark.parametrize("name", SWITCH)
def test_a_blank_thought_is_no_thought(tokenizer_of, name):
    encoder = ChatEncoder(tokenizer_of(name))
    (plain,) = encoder.encode({"messages": PLAIN_ONE}).documents
    for blank in ({"reasoning_content": ""}, {"reasoning_content": " \n"}):
        assert encoder.encode({"messages": [*PLAIN_ONE[:2], said("A1", **blank)]}).documents == [plain]
    for empty in (NONE, "<think></think>", "<think> </think>\n"):
        assert encoder.encode({"messages": [*PLAIN_ONE[:2], said(empty + "A1")]}).documents == [plain]


UNOPENED = [
    ("Two and two make four.\n</think>\n\n4", "Two and two make four.", "4"),
    ("Two and two make four.</think>4", "Two and two make four.", "4"),
    ("\nTwo and two. </think>\n4", "Two and two.", "4"),
]


@pytest.mark.parametrize("text, thought, answer", UNOPENED)
@pytest.mark.parametrize("name", [*SWITCH, "qwen2_5"])
def test_a_thought_that_the_prompt_had_opened_is_the_same_as_one_with_its_opening_tag(
    tokenizer_of, name, text, thought, answer
):
    encoder = ChatEncoder(tokenizer_of(name))
    encoded = encoder.encode({"messages": [user("2 + 2?"), said(text)]})
    whole = encoder.encode({"messages": [user("2 + 2?"), said(f"<think>\n{text.lstrip()}")]})
    assert encoded.documents == whole.documents and encoded.notes == [Note.OPENED]
    learnt = [
        tokenizer_of(name).decode(document["input_ids"][start:])
        for document in encoded.documents
        for _, start, _ in runs(document)
    ]
    assert thought in learnt[0] and learnt[0].endswith(answer + "<|im_end|>")
    for thinking in ("strip", "empty"):
        encoder = ChatEncoder(tokenizer_of(name), thinking=thinking)
        one, two = (encoder.encode({"messages": [user("2 + 2?"), said(words)]}).documents for words in (text, answer))
        assert one == two


@pytest.mark.parametrize("text", ["Close it with </think> here.", "Write `</think>` at the end."])
def test_a_closing_tag_within_a_sentence_ends_no_thought(tokenizer_of, text):
    for thinking in ("auto", "strip"):
        encoded = ChatEncoder(tokenizer_of("qwen2_5"), thinking=thinking).encode(
            {"messages": [user("How?"), said(text)]}
        )
        assert marked(tokenizer_of("qwen2_5"), encoded.documents[0]).endswith(f"⟦{text}<|im_end|>⟧")
        assert encoded.notes == []


# ----------------------------------------------------------------------------------------------------------------------
# Any conversation

PLAIN = [
    "a", "word", " two", " ", "\n", "\n\n", "\t", "\r\n", "e\u0301", "\u0301", "\u0338", "é", "漢字", "😀", "👩‍👧",
    "\u200d", "\ue000", "{", "}}", "<", ">", "|>", "<|", "1,2", "don't", "</s>",
]  # fmt: skip
MARKED = [
    "<think>", "</think>", "<tool_call>", "</tool_response>", "<|im_end|>", "<|im_start|>", "<|im_start|>assistant\n",
    "<|endoftext|>",
]  # fmt: skip
TEXT = st.lists(st.sampled_from(PLAIN * 2 + MARKED), max_size=5).map("".join)
CALL = {"name": st.sampled_from(["f", "weather"]), "arguments": st.dictionaries(TEXT, TEXT, max_size=1)}
CALLS = st.lists(st.fixed_dictionaries(CALL), max_size=2)
MESSAGE = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "user", "tool"]), "content": TEXT}),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": TEXT},
        optional={"reasoning_content": TEXT, "train": st.booleans(), "tool_calls": CALLS},
    ),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": st.builds("<think>{}</think>{}".format, TEXT, TEXT)},
    ),
)
TOOLS = st.sampled_from([[], [WEATHER], [{"type": "function", "function": {"name": "f", "description": "<|im_end|>"}}]])


@st.composite
def conversations(draw):
    messages = draw(st.lists(TEXT.map(lambda text: {"role": "system", "content": text}), max_size=1))
    messages += draw(st.lists(MESSAGE, min_size=1, max_size=6))
    if draw(st.booleans()):
        return to_conversation({"messages": messages, "tools": draw(TOOLS)}, "record")
    return to_conversation({"messages": [{**message, "tool_calls": None} for message in messages]}, "record")


@pytest.mark.parametrize("name, examples", [("qwen2_5", 700), ("qwen3", 700), ("smollm2", 600)])
def test_any_conversation_keeps_the_promise_or_is_refused(tokenizer_of, name, examples):
    tokenizer, refused = tokenizer_of(name), []

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(conversations())
    def keeps_the_promise(conversation):
        try:
            ChatEncoder(tokenizer).encode(conversation)
        except (TemplateError, ValueError) as error:
            refused.append(str(error))
        else:
            check(tokenizer, name, conversation)

    keeps_the_promise()
    assert len(refused) < examples / 2 and all(len(sentence.split()) > 5 for sentence in refused)


# ----------------------------------------------------------------------------------------------------------------------
# The trainers' own templates, which mark the answers with {% generation %}

SAME_HISTORY = [
    (name, case)
    for name in ("qwen2_5", "qwen3_instruct_2507", "llama3", "gemma", "gemma3", "phi3")
    for case in ("one turn", "three turns", "own system", "empty answer", "other scripts", "tools", "thoughts apart")
    if case not in REFUSED.get(name, {})
]


def twin_of(tokenizer, name, conversation):
    """Ids and assistant mask of the training template."""
    messages = conversation["messages"]
    mode = {"enable_thinking": bool(thought_of(messages[-1]))} if name in SWITCH else {}
    if name == "qwen3_8":
        messages = [with_thought_apart(message) for message in messages]
    twin = tokenizer.apply_chat_template(
        messages, tools=conversation.get("tools"), chat_template=template(f"{name}_training"),
        return_assistant_tokens_mask=True, return_dict=True, **mode,
    )  # fmt: skip
    return twin["input_ids"], twin["assistant_masks"]


@pytest.mark.parametrize("name, case", SAME_HISTORY)
def test_what_is_learnt_is_what_the_training_template_marks_but_for_newlines_of_the_template(tokenizer_of, name, case):
    tokenizer, conversation = tokenizer_of(name), conversation_of(case, name)
    (document,) = ChatEncoder(tokenizer).encode(conversation).documents
    (ids, mask), labels = twin_of(tokenizer, name, conversation), document["labels"]
    assert ids[: len(labels)] == document["input_ids"]
    labels = labels + [IGNORE_INDEX] * (len(ids) - len(labels))
    assert all(marked for marked, label in zip(mask, labels, strict=True) if label != IGNORE_INDEX)
    beyond = [own for own, marked, label in zip(ids, mask, labels, strict=True) if marked and label == IGNORE_INDEX]
    allowed = {"\n", "<|endoftext|>"} if name == "phi3" else {"\n"}  # Phi-3 adds it after the last turn
    assert {tokenizer.decode(own) for own in beyond} <= allowed
    assert len(beyond) <= 2 * len(document["turns"])


@pytest.mark.parametrize("case", ["one turn", "three turns", "one thought in the text", "thoughts apart", "tools"])
@pytest.mark.parametrize("name", SWITCH)
def test_the_final_turn_is_learnt_as_the_training_template_marks_it_whose_history_differs(tokenizer_of, name, case):
    tokenizer, conversation = tokenizer_of(name), conversation_of(case, name)
    document = ChatEncoder(tokenizer).encode(conversation).documents[-1]
    *_, (_, start, end) = runs(document)
    ids, mask = twin_of(tokenizer, name, conversation)
    last = ids[len(mask) - next(i for i, is_marked in enumerate(reversed(mask)) if not is_marked) :]
    assert tokenizer.decode(last).endswith("<|im_end|>\n")
    ours = document["input_ids"][start:end]
    assert last[-1 - len(ours) : -1] == ours
    # What it marks more: the thought that our prompt already holds, opened or empty.
    put_in = tokenizer.decode(last[: -1 - len(ours)])
    assert put_in in ("", "<think>\n") if thought_of(conversation["messages"][-1]) else put_in == EMPTY_THOUGHT


# ----------------------------------------------------------------------------------------------------------------------
# Templates with habits of their own


@pytest.mark.parametrize("thinking, empty", [("auto", EMPTY_THOUGHT), ("keep", "")])
@pytest.mark.parametrize("answer", ["  spaced", "\tx ", " \n y"])
def test_white_space_before_an_answer_survives_the_empty_thought_of_qwen3(tokenizer_of, answer, thinking, empty):
    tokenizer = tokenizer_of("qwen3")
    (document,) = ChatEncoder(tokenizer, thinking=thinking).encode({"messages": [user("Q"), said(answer)]}).documents
    assert marked(tokenizer, document) == f"<|im_start|>user\nQ<|im_end|>\n{A}{empty}⟦{answer}<|im_end|>⟧"


def test_a_thought_that_is_lost_from_history_is_not_mistaken_for_the_same_words_in_the_answer(tokenizer_of):
    tokenizer = tokenizer_of("qwen3")
    messages = [user("Q"), said("42", reasoning_content="42"), user("Thanks")]
    (document,) = ChatEncoder(tokenizer).encode({"messages": messages}).documents
    assert marked(tokenizer, document) == f"<|im_start|>user\nQ<|im_end|>\n{A}⟦<think>\n42\n</think>\n\n42<|im_end|>⟧"


def test_text_that_a_template_cuts_from_an_answer_is_refused(tokenizer_of):
    encoder = ChatEncoder(tokenizer_of("qwen3"))
    for answer in ("Close it with </think> here.", "<think>a</think>b</think>c", "<think>one <think> two</think>x"):
        with pytest.raises(ValueError, match="turn 2: the chat template leaves out part of this turn"):
            encoder.encode({"messages": [user("Q"), said(answer)]})


@pytest.fixture
def gpt_oss(tokenizer_of):
    tokenizer = copy.deepcopy(tokenizer_of("qwen2_5"))
    tokenizer.chat_template = template("gptoss")
    names = ("start", "end", "message", "channel", "constrain", "return", "call")
    tokenizer.add_tokens([f"<|{name}|>" for name in names], special_tokens=True)
    return tokenizer


def test_a_template_that_ends_earlier_turns_otherwise_gets_a_document_for_each_turn(gpt_oss):
    tokenizer = gpt_oss
    encoder = ChatEncoder(tokenizer)
    encoded = encoder.encode({"messages": [*PLAIN_THREE[1:], user("Thanks")]})
    assert encoder.stop_tokens == ["<|return|>", "<|call|>"] and encoded.notes == [Note.SPLIT]
    past = "<|start|>assistant<|channel|>final<|message|>A1<|end|><|start|>user<|message|>Q2<|end|><|start|>assistant"
    assert marked(tokenizer, encoded.documents[1]).endswith(past + "⟦<|channel|>final<|message|>A2<|return|>⟧")
    for i, document in zip((1, 3, 5), encoded.documents, strict=True):
        prompt = serve(tokenizer, "gptoss", {"messages": PLAIN_THREE[1:]}, i, prompt=True, tokenize=True)
        assert document["input_ids"][: len(prompt)] == prompt


def test_calls_and_thoughts_of_gpt_oss_are_learnt_up_to_the_tokens_that_end_them(gpt_oss):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        user("Q"), {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "T1"},
        {"role": "tool", "content": "2"}, said("A", reasoning_content="T2"),
    ]  # fmt: skip
    described = {"name": "add", "description": "d", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": described}]
    first, second = ChatEncoder(gpt_oss).encode({"messages": messages, "tools": tools}).documents
    thought, header = (
        "<|channel|>analysis<|message|>{}<|end|><|start|>assistant",
        " to=functions.add<|channel|>commentary",
    )
    assert marked(gpt_oss, first).endswith(f'⟦{thought.format("T1")}{header} json<|message|>{{"a": 1}}<|call|>⟧')
    assert marked(gpt_oss, second).endswith(f"⟦{thought.format('T2')}<|channel|>final<|message|>A<|return|>⟧")
    for i, document in ((1, first), (3, second)):
        prompt = serve(gpt_oss, "gptoss", {"messages": messages, "tools": tools}, i, prompt=True, tokenize=True)
        assert document["input_ids"][: len(prompt)] == prompt


def test_only_the_turn_that_would_merge_with_its_prompt_gets_a_document_of_its_own(tokenizer_of):
    tokenizer = tokenizer_of("qwen3_instruct_2507")
    messages = [SYSTEM, user("Q1"), said("A1"), user("Q2"), said("\nA2"), user("Q3"), said("A3")]
    encoded = ChatEncoder(tokenizer).encode({"messages": messages})
    past = S + Q1 + A + "{}A1" + E + "{}\n" + Q2 + A
    assert [marked(tokenizer, document) for document in encoded.documents] == [
        past.format("⟦", "⟧") + "\nA2" + E + "\n" + Q3 + A + "⟦A3" + E + "⟧",
        past.format("", "") + "⟦\nA2" + E + "⟧",
    ]
    assert encoded.notes == [Note.SPLIT]


# ----------------------------------------------------------------------------------------------------------------------
# Speed


def test_a_conversation_of_128_turns_and_12000_tokens_takes_few_times_its_tokenising(qwen):
    text = ("the quick model reads every prompt as serving sends it and learns only what follows 1 2 3 " * 5)[:420]
    messages = [[user, said][n % 2](f"{n} {text}") for n in range(128)]
    encoder, backend = ChatEncoder(qwen), qwen.backend_tokenizer
    whole = qwen.apply_chat_template(messages, tokenize=False)

    def seconds(work):
        times = []
        for _ in range(5):
            start = time.process_time()
            result = work()
            times.append(time.process_time() - start)
        return min(times), result

    alone, reference = seconds(lambda: backend.encode(whole, add_special_tokens=False))
    taken, encoded = seconds(lambda: encoder.encode({"messages": messages}))
    assert 11_000 < len(reference) < 14_000 and len(encoded.documents[0]["turns"]) == 64
    assert taken < max(0.060, 5 * alone)  # about 0.05 s; on a busy machine both take longer


# ----------------------------------------------------------------------------------------------------------------------
# Variables of a template


def learnt_texts(tokenizer, documents):
    return [marked(tokenizer, document) for document in documents]


def test_variables_go_into_every_rendering_and_into_the_fingerprint(tokenizer_of):
    tokenizer, messages = tokenizer_of("qwen3_8"), thoughts(THREE, "reasoning_content")
    texts, keys = {}, set()
    for effort in ("xhigh", "medium", "low"):
        encoder = ChatEncoder(tokenizer, template_kwargs={"reasoning_effort": effort})
        texts[effort] = learnt_texts(tokenizer, encoder.encode({"messages": messages}).documents)
        prompt = tokenizer.apply_chat_template(
            messages[:1], add_generation_prompt=True, tokenize=False, enable_thinking=True, reasoning_effort=effort
        )
        assert texts[effort][0].replace("⟦", "").startswith(prompt)
        keys.add(encoder.fingerprint())
    assert all("set to low" in text for text in texts["low"]) and "effort" not in "".join(texts["medium"])
    assert texts["xhigh"] == learnt_texts(tokenizer, ChatEncoder(tokenizer).encode({"messages": messages}).documents)
    assert len(keys | {ChatEncoder(tokenizer).fingerprint()}) == 4


def test_variables_of_a_record_win(tokenizer_of):
    tokenizer = tokenizer_of("qwen3_8")
    encoder = ChatEncoder(tokenizer, template_kwargs={"reasoning_effort": "low"})
    record = {"messages": thoughts(ONE, "reasoning_content"), "chat_template_kwargs": {"reasoning_effort": "medium"}}
    own = encoder.encode(to_conversation(record, "here")).documents
    medium = ChatEncoder(tokenizer, template_kwargs={"reasoning_effort": "medium"})
    assert own == medium.encode({"messages": record["messages"]}).documents
    as_text = {**record, "chat_template_kwargs": json.dumps(record["chat_template_kwargs"])}
    assert encoder.encode(to_conversation(as_text, "here")).documents == own


@pytest.mark.parametrize("explicit", [True, False])
def test_enable_thinking_as_a_variable_wins_over_the_mode(tokenizer_of, explicit):
    tokenizer = tokenizer_of("qwen3")
    by_all = ChatEncoder(tokenizer, template_kwargs={"enable_thinking": explicit}).encode({"messages": PLAIN_ONE})
    by_row = ChatEncoder(tokenizer).encode(
        {"messages": PLAIN_ONE, "chat_template_kwargs": {"enable_thinking": explicit}}
    )
    expected = ONE_PLAIN if explicit else ONE_PLAIN_AFTER_NONE
    assert learnt_texts(tokenizer, by_all.documents) == learnt_texts(tokenizer, by_row.documents) == expected


def test_variables_that_the_template_does_not_read_are_refused_or_noted(tokenizer_of):
    tokenizer = tokenizer_of("qwen2_5")
    with pytest.raises(ValueError, match="the chat template does not read 'reasoning_efort'"):
        ChatEncoder(tokenizer, template_kwargs={"reasoning_efort": "low"})
    with pytest.raises(ValueError, match="'tokenize' is no variable of a template"):
        ChatEncoder(tokenizer, template_kwargs={"tokenize": True})
    encoded = ChatEncoder(tokenizer).encode({"messages": ONE, "chat_template_kwargs": {"enable_thinking": False}})
    assert encoded.notes == [Note.UNREAD]
    assert encoded.documents == ChatEncoder(tokenizer).encode({"messages": ONE}).documents


def test_a_template_that_prints_the_date_is_noticed_and_its_date_can_be_kept(tokenizer_of):
    import datetime

    tokenizer = copy.copy(tokenizer_of("llama3"))
    tokenizer.chat_template = template("llama3_2")
    encoder = ChatEncoder(tokenizer)
    today = datetime.datetime.now().strftime("%d %b %Y")
    assert encoder.template.today() == (today, "date_string") and today in encoder.fingerprint()
    told = report.template(encoder)
    assert f"""add --chat_template_kwargs '{{"date_string": "{today}"}}'""" in told
    kept = ChatEncoder(tokenizer, template_kwargs={"date_string": "26 Jul 2024"})
    assert kept.template.today() is None and "26 Jul 2024" in kept.template.opening
    (document,) = kept.encode({"messages": ONE}).documents
    assert "26 Jul 2024" in tokenizer.decode(document["input_ids"]) and today not in kept.fingerprint()
    assert ChatEncoder(tokenizer_of("qwen2_5")).template.today() is None


def test_what_a_template_writes_by_itself_is_told(tokenizer_of):
    assert "You are Qwen, created by Alibaba Cloud" in report.template(ChatEncoder(tokenizer_of("qwen2_5")))
    assert "Reasoning effort is set to xhigh" in report.template(ChatEncoder(tokenizer_of("qwen3_8")))
    low = report.template(ChatEncoder(tokenizer_of("qwen3_8"), template_kwargs={"reasoning_effort": "low"}))
    assert "set to low" in low and """with {"reasoning_effort": "low"}""" in low
