"""What is learnt: the assistant's text and its stop token, nothing else."""

import pytest

from tokens import IGNORE_INDEX, ChatEncoder

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
