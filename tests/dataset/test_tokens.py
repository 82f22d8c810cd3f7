"""What is learnt: the assistant's text and its stop token, nothing else."""

import copy
import re
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from helpers import template
from recipe.dataset.control_text import ControlText
from recipe.dataset.encoding import IGNORE_INDEX, ChatEncoder, Note, supervised_runs

TWO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there 😀"}]
THREE = [
    {"role": "system", "content": "Be brief."}, *TWO,
    {"role": "user", "content": "Count"}, {"role": "assistant", "content": "1, 2"},
    {"role": "user", "content": "More"}, {"role": "assistant", "content": "3"},
]  # fmt: skip


def learnt(tokenizer, document):
    return tokenizer.decode([label for label in document["labels"] if label != IGNORE_INDEX])


@pytest.mark.parametrize(
    "messages, expected",
    [(TWO, "Hello there 😀<|im_end|>"), (THREE, "Hello there 😀<|im_end|>1, 2<|im_end|>3<|im_end|>")],
)
def test_supervised_tokens_decode_to_the_answers_and_their_stop_tokens(qwen, messages, expected):
    (document,) = ChatEncoder(qwen).encode({"messages": messages}).documents
    assert learnt(qwen, document) == expected


def test_the_prompt_before_every_answer_is_what_serving_sends(qwen):
    (document,) = ChatEncoder(qwen).encode({"messages": THREE}).documents
    for i in (2, 4, 6):
        prompt = qwen.apply_chat_template(THREE[:i], add_generation_prompt=True, tokenize=True, return_dict=False)
        assert document["input_ids"][: len(prompt)] == prompt
        assert document["labels"][len(prompt) - 1] == IGNORE_INDEX
        assert document["labels"][len(prompt)] != IGNORE_INDEX


def test_an_answer_that_starts_with_a_newline_is_tokenised_apart_from_its_prompt(qwen):
    messages = [*THREE[:-1], {"role": "assistant", "content": "\nthree"}]
    first, *_, last = ChatEncoder(qwen).encode({"messages": messages}).documents
    prompt = qwen.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=True, return_dict=False)
    assert last["input_ids"][: len(prompt)] == prompt
    assert learnt(qwen, last) == "\nthree<|im_end|>"


def test_control_token_text_in_a_message_stays_text(qwen):
    messages = [{"role": "user", "content": "what is <|im_end|>?"}, {"role": "assistant", "content": "<|im_start|>!"}]
    (document,) = ChatEncoder(qwen).encode({"messages": messages}).documents
    assert document["input_ids"].count(qwen.convert_tokens_to_ids("<|im_end|>")) == 3  # system, user, assistant
    assert document["input_ids"].count(qwen.convert_tokens_to_ids("<|im_start|>")) == 3
    assert learnt(qwen, document) == "<|im_start|>!<|im_end|>"


def test_last_turn_and_untrained_turns(qwen):
    (document,) = ChatEncoder(qwen, "last_turn").encode({"messages": THREE}).documents
    assert learnt(qwen, document) == "3<|im_end|>"
    flagged = [dict(message) for message in THREE]
    flagged[4]["train"] = False
    (document,) = ChatEncoder(qwen).encode({"messages": flagged}).documents
    assert learnt(qwen, document) == "Hello there 😀<|im_end|>3<|im_end|>"


def test_a_turn_that_nothing_comes_before_is_context_only_and_noted(qwen):
    encoded = ChatEncoder(qwen).encode({"messages": [{"role": "assistant", "content": "Hi, I am here."}, *TWO]})
    assert learnt(qwen, encoded.documents[0]) == "Hello there 😀<|im_end|>"
    assert encoded.notes == [Note.NO_USER]


def test_a_conversation_without_a_turn_to_learn_gives_no_document(qwen):
    for messages in (TWO[:1], [TWO[0], {**TWO[1], "train": False}], [{"role": "assistant", "content": "Hi"}]):
        assert ChatEncoder(qwen).encode({"messages": messages}).documents == []


def test_a_batch_gives_what_its_conversations_give_one_by_one(qwen):
    marked = [{"role": "user", "content": "<|im_end|>\ue000"}, {"role": "assistant", "content": "\n\ue001<|im_end|>"}]
    conversations = [{"messages": messages} for messages in (TWO, marked, THREE, TWO[:1], marked + THREE[1:])]
    encoder = ChatEncoder(qwen)
    assert encoder.encode_batch(conversations) == [encoder.encode(conversation) for conversation in conversations]
    assert encoder.encode_batch([]) == []


@pytest.mark.parametrize("text", ["\ue000", "<|im_end|>\ue000\ue001<|im_start|>", "\uf8fe<|im_end|>"])
def test_private_use_characters_beside_control_token_text_survive(qwen, text):
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    (document,) = ChatEncoder(qwen).encode({"messages": messages}).documents
    assert learnt(qwen, document) == text + "<|im_end|>"
    assert qwen.decode(document["input_ids"]).count(text) == 2


def test_truncation_padding_and_split_tokens_that_a_tokenizer_was_left_with_change_nothing(qwen):
    encoder = ChatEncoder(qwen)
    expected = encoder.encode({"messages": THREE})
    qwen.backend_tokenizer.enable_truncation(4)
    qwen.backend_tokenizer.enable_padding(direction="left", length=64)
    qwen.backend_tokenizer.encode_special_tokens = True
    assert encoder.encode({"messages": THREE}) == expected


def test_a_tokenizer_or_template_that_cannot_be_used_is_refused_in_a_sentence(qwen):
    def error_of(chat_template):
        tokenizer = copy.copy(qwen)
        tokenizer.chat_template = chat_template
        with pytest.raises(ValueError) as error:
            ChatEncoder(tokenizer)
        return str(error.value)

    assert "has no chat template; start from a chat model" in error_of(None)
    for without_stop in ("{% for m in messages %}{{ m.content }}.{% endfor %}", "nothing of it"):
        assert "ends an assistant turn with no control token" in error_of(without_stop)
    assert "refuses a question and its answer in plain text: Not now" in error_of("{{ raise_exception('Not now') }}")
    with pytest.raises(ValueError, match="no fast"):
        ChatEncoder(object())


def test_what_the_template_has_no_place_for_is_refused_with_a_remedy(qwen):
    tokenizer = copy.copy(qwen)
    tokenizer.chat_template = template("smollm2").replace("in messages", "in messages if message.role != 'system'")
    with pytest.raises(ValueError, match="no place for system messages .* use a template that has one .--chat_templ"):
        ChatEncoder(tokenizer).encode({"messages": THREE})
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    with pytest.raises(ValueError, match="no place for the list of tools"):
        ChatEncoder(tokenizer).encode({"messages": TWO, "tools": tools})


def test_a_tool_call_that_the_template_leaves_out_is_refused(qwen):
    tokenizer = copy.copy(qwen)
    tokenizer.chat_template = qwen.chat_template.replace("in message.tool_calls", "in message.tool_calls[:1]")
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call, call]}
    assert learnt(qwen, ChatEncoder(qwen).encode({"messages": [TWO[0], answer]}).documents[0]).count('"name": "f"') == 2
    with pytest.raises(ValueError, match="turn 2: the chat template leaves out part of this turn"):
        ChatEncoder(tokenizer).encode({"messages": [TWO[0], answer]})


def test_a_template_that_renders_earlier_questions_otherwise_gets_the_prompts_of_serving(qwen):
    tokenizer = copy.copy(qwen)
    tokenizer.chat_template = (  # of the same length, so that nothing but the comparison of the prompts can tell
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'user' %}{{ 'old: ' if messages[loop.index0 + 2:] else 'new: ' }}{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    documents = ChatEncoder(tokenizer).encode({"messages": THREE[1:]}).documents
    for i, document in zip((1, 3, 5), documents, strict=True):
        prompt = tokenizer.apply_chat_template(THREE[1 : i + 1], add_generation_prompt=True, return_dict=False)
        assert document["input_ids"][: len(prompt)] == prompt
        assert qwen.decode(prompt).count("new: ") == 1
        assert learnt(qwen, document) == THREE[i + 1]["content"] + "<|im_end|>"


def test_labels_that_do_not_read_as_the_answer_are_refused(qwen):
    tokenizer = copy.deepcopy(qwen)
    tokenizer.add_tokens([AddedToken("<|stop|>", lstrip=True, special=True)])  # swallows the spaces before it
    tokenizer.chat_template = qwen.chat_template.replace("<|im_end|>", "<|stop|>")
    assert ChatEncoder(tokenizer).encode({"messages": TWO}).documents
    with pytest.raises(ValueError, match=re.escape("turn 2: the labels read 'x<|stop|>', the turn says 'x  <|stop|>'")):
        ChatEncoder(tokenizer).encode({"messages": [TWO[0], {"role": "assistant", "content": "x  "}]})


def test_the_fingerprint_changes_with_all_that_changes_the_tokens(qwen, tokenizer_of):
    encoders = [
        ChatEncoder(qwen), ChatEncoder(qwen, "last_turn"), ChatEncoder(qwen, thinking="keep"),
        ChatEncoder(tokenizer_of("smollm2")), ChatEncoder(tokenizer_of("qwen3_instruct_2507")),
    ]  # fmt: skip
    assert len({encoder.fingerprint() for encoder in encoders}) == len(encoders)
    assert ChatEncoder(qwen).fingerprint() == encoders[0].fingerprint()


def test_supervised_runs_are_the_unbroken_stretches_of_labels():
    assert supervised_runs([]) == supervised_runs([IGNORE_INDEX]) == []
    assert supervised_runs([5, 6]) == [(0, 2)]
    assert supervised_runs([IGNORE_INDEX, 0, IGNORE_INDEX, 7, 8]) == [(1, 2), (3, 5)]


def test_a_template_that_ends_tool_calls_otherwise_never_teaches_what_the_tool_said(qwen):
    tokenizer = copy.copy(qwen)
    before, last, after = qwen.chat_template.partition(
        "</tool_call>' }}\n        {%- endfor %}\n        {{- '<|im_end|>"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    messages = [
        TWO[0], {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "42"}, TWO[1],
    ]  # fmt: skip
    tokenizer.chat_template = before + last.replace("<|im_end|>", "<|endoftext|>") + after
    encoder = ChatEncoder(tokenizer)
    assert encoder.stop_tokens == ["<|im_end|>", "<|endoftext|>"]
    (document,) = encoder.encode({"messages": messages}).documents
    called = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|endoftext|>'
    assert learnt(qwen, document) == called + "Hello there 😀<|im_end|>"
    tokenizer.chat_template = before + last.replace("<|im_end|>", "") + after
    with pytest.raises(ValueError, match="turn 2: the chat template does not end this turn with <.im_end.>"):
        ChatEncoder(tokenizer).encode({"messages": messages})
    messages[1] = {**messages[1], "train": False}
    (document,) = ChatEncoder(tokenizer).encode({"messages": messages}).documents
    assert learnt(qwen, document) == "Hello there 😀<|im_end|>"


# ----------------------------------------------------------------------------------------------------------------------
# What is told


def test_an_empty_answer_is_noted_and_can_be_left_out(qwen):
    messages = [TWO[0], {"role": "assistant", "content": ""}, *THREE[3:5]]
    encoded = ChatEncoder(qwen).encode({"messages": messages})
    assert encoded.notes == [Note.EMPTY] and encoded.documents[0]["turns"] == [2, 4]
    encoded = ChatEncoder(qwen, train_empty_answers=False).encode({"messages": messages})
    assert encoded.notes == [] and encoded.documents[0]["turns"] == [4]
    assert learnt(qwen, encoded.documents[0]) == "1, 2<|im_end|>"
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    for full in ({"content": "", "tool_calls": [call]}, {"content": "", "reasoning_content": "Say nothing."}):
        assert Note.EMPTY not in ChatEncoder(qwen).encode({"messages": [TWO[0], {"role": "assistant", **full}]}).notes


def test_a_text_that_a_template_was_applied_to_stays_text_and_is_noted(qwen):
    prompt = "<|im_start|>user\nName a colour<|im_end|>\n<|im_start|>assistant\n"
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "Blue<|im_end|>"}]
    encoded = ChatEncoder(qwen).encode({"messages": messages})
    assert encoded.notes == [Note.CONTROL_TEXT]
    assert encoded.documents[0]["input_ids"].count(qwen.convert_tokens_to_ids("<|im_start|>")) == 3
    assert learnt(qwen, encoded.documents[0]) == "Blue<|im_end|><|im_end|>"


# ----------------------------------------------------------------------------------------------------------------------
# Texts are tokenised in pieces


WORDS = ["<a>", "<|b|>", "<", "a>", ">", "EOS", "x", " ", "  ", "\n", "word words", "\u0301", "é", "\u2581", "5"]
KINDS = {
    "byte-level": ([normalizers.NFC()], pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "a space before a text": ([], pre_tokenizers.Metaspace(prepend_scheme="first")),
    "a space before each part": ([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")], None),
    "words": ([normalizers.Lowercase()], pre_tokenizers.Whitespace()),
}


def trained(kind, tokens):
    """A tokenizer of a few merges with these added tokens, each (text, its flags)."""
    steps, cut = KINDS[kind]
    backend = Tokenizer(models.BPE(unk_token="?"))
    backend.normalizer = normalizers.Sequence(steps)
    if cut:
        backend.pre_tokenizer = cut
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["?"], show_progress=False)
    backend.train_from_iterator(["<a> x word words é 5\n ", " ".join(WORDS) * 3], trainer)
    backend.add_tokens([AddedToken(text, **flags) for text, flags in tokens])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_pieces_have_the_ids_of_the_whole_text_whatever_the_flags_of_control_tokens(data):
    flags = st.fixed_dictionaries(
        {"special": st.sampled_from([True, True, False])},
        optional={name: st.booleans() for name in ("lstrip", "rstrip", "normalized", "single_word")},
    )
    names = [
        "<a>",
        "<|b|>",
        *data.draw(st.sampled_from([[], *([text] for text in ("x<a>", "<a>x", " <", "<", "<a>>", "EOS", "é", "\n"))])),
    ]
    tokenizer = trained(data.draw(st.sampled_from(sorted(KINDS))), [(name, data.draw(flags)) for name in names])
    text = "".join(data.draw(st.lists(st.sampled_from(WORDS), max_size=12)))
    backend, pieces = tokenizer.backend_tokenizer, ControlText(tokenizer).pieces(text, None, shared=True)
    assert "".join(piece for _, piece in pieces) == text and all(text.startswith(p, at) for at, p in pieces)
    whole = backend.encode(text, add_special_tokens=False).ids
    assert sum((backend.encode(piece, add_special_tokens=False).ids for _, piece in pieces), []) == whole


def test_what_documents_of_a_conversation_share_is_tokenised_once(tokenizer_of):
    encoder, seen = ChatEncoder(tokenizer_of("qwen3")), []
    backend = encoder.backend
    encoder.backend = SimpleNamespace(
        **{name: getattr(backend, name) for name in ("encode", "decode_batch", "truncation", "padding", "normalizer")},
        encode_special_tokens=False,
        encode_batch=lambda texts, **options: seen.extend(texts) or backend.encode_batch(texts, **options),
    )
    encoded = encoder.encode({"messages": THREE})
    assert len(encoded.documents) == 3 and len(seen) == len(set(seen))
    assert sum("Be brief" in text for text in seen) == sum("Count" in text for text in seen) == 1
    encoder.backend = backend
    assert encoder.encode({"messages": THREE}) == encoded
