"""What data files of other tools mean: every spelling is understood, named as not used, or refused by what it is."""

import json

import pytest

from helpers import write
from recipe.console import UserError
from recipe.dataset.conversations import Conversations, read_record, to_conversation
from recipe.dataset.shapes import ANSWERS, QUESTIONS


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def tool(text, **more):
    return {"role": "tool", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


def call(name="weather", **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def messages_of(record, **options):
    return to_conversation(record, "here", **options)["messages"]


def unused(record, **options):
    return read_record(record, "here", **options)[1]


def refusal(record, **options):
    with pytest.raises(UserError) as error:
        to_conversation(record, "rows.jsonl: record 1", **options)
    text = str(error.value)
    assert text.startswith("rows.jsonl: record 1") and text.endswith(".") and "\n" not in text
    return text


# ----------------------------------------------------------------------------------------------------------------------
# Shapes


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_and_its_answer_under_any_pair_of_names(question, answer):
    record = {question: "Hi", answer: "Hello"}
    assert messages_of(record) == [user("Hi"), assistant("Hello")]
    record |= {"history": [["a", "b"]], "system": "S", "id": 7}
    assert messages_of(record) == [system("S"), user("a"), assistant("b"), user("Hi"), assistant("Hello")]
    assert unused(record) == ["id"]


@pytest.mark.parametrize(
    "record, expected",
    [
        ({"instruction": "Sum up.", "context": "Long text", "response": "Short"}, "Sum up.\n\nLong text"),
        ({"instruction": "Sum up.", "input": "Long text", "response": "Short"}, "Sum up.\n\nLong text"),
        ({"question": "Who?", "context": "Long text", "answer": "Short"}, "Who?\n\nLong text"),
        ({"input": "Who?", "output": "Short"}, "Who?"),
        ({"instruction": "", "input": "Long text", "output": "Short"}, "Long text"),
        ({"instruction": "Sum up.", "input": "", "output": "Short"}, "Sum up."),
        ({"instruction": " ", "input": " text", "output": "Short"}, " text"),
        ({"system_prompt": "", "question": "Who?", "response": "Short"}, "Who?"),
    ],
)
def test_only_what_is_not_empty_is_joined_to_the_question(record, expected):
    assert messages_of(record) == [user(expected), assistant("Short")]


TWO_TURNS = [user("Hi"), assistant("Hello"), user("2 + 2?"), assistant("4")]


@pytest.mark.parametrize(
    "record",
    [
        {"conversation": [{"human": "Hi", "assistant": "Hello"}, {"human": "2 + 2?", "assistant": "4"}]},
        {"conversations": [{"user": "Hi", "bot": "Hello"}, {"User": "2 + 2?", "GPT": "4"}]},
        {"messages": [{"human": "Hi"}, {"assistant": "Hello"}, {"human": "2 + 2?"}, {"assistant": "4"}]},
        {"messages": json.dumps(TWO_TURNS)},
        {"conversations": json.dumps([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}, *TWO_TURNS[2:]])},
        {"query": "2 + 2?", "response": "4", "history": json.dumps([["Hi", "Hello"]])},
        {"query": "2 + 2?", "response": "4", "history": TWO_TURNS[:2]},
        {"prompt": TWO_TURNS[:3], "completion": TWO_TURNS[3]},
        TWO_TURNS,
    ],
)  # fmt: skip
def test_turns_as_other_tools_write_them(record):
    assert messages_of(record) == TWO_TURNS
    assert unused(record) == []


# ----------------------------------------------------------------------------------------------------------------------
# Roles, thoughts, loss flags


@pytest.mark.parametrize("human", ["user", "User", "HUMAN", "prompter", " human "])
@pytest.mark.parametrize("bot", ["assistant", "Assistant", "GPT", "bot", "model", "ai", "ChatGPT"])
def test_roles_whatever_their_case(human, bot):
    assert (
        messages_of({"conversations": [{"from": human, "value": "Hi"}, {"from": bot, "value": "Hello"}]})
        == TWO_TURNS[:2]
    )


@pytest.mark.parametrize("said", ["observation", "function", "ipython", "Tool", "tool_response", "function_response"])
def test_roles_of_what_a_tool_said(said):
    turns = [user("Hi"), assistant("", tool_calls=[call()]), {"role": said, "content": "3"}]
    assert messages_of({"messages": turns})[2] == tool("3")


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking", "thought"])
def test_thoughts_under_any_name(field):
    turns = [user("Hi"), assistant("Hello", **{field: "A greeting."})]
    assert messages_of({"messages": turns}) == [user("Hi"), assistant("Hello", reasoning_content="A greeting.")]


@pytest.mark.parametrize("no, yes", [(False, True), (0, 1), (0.0, 1.0)])
@pytest.mark.parametrize("flag", ["train", "weight", "loss", "trainable", "loss_mask", "loss_weight"])
def test_loss_flags_of_turns_under_any_name(flag, no, yes):
    turns = [user("Hi"), assistant("No", **{flag: no}), user("Hi"), assistant("Yes", **{flag: yes})]
    expected = [user("Hi"), assistant("No", train=False), user("Hi"), assistant("Yes", train=True)]
    assert messages_of({"messages": turns}) == expected
    assert unused({"messages": [{**turns[0], flag: no}, *turns[1:]]}) == []
    of_users = {"messages": [{**turns[0], flag: yes}, *turns[1:]]}
    assert unused(of_users) == [f"{flag} of turns that are not the assistant's"]


def test_loss_flags_of_a_record():
    turns = [user("Hi"), assistant("No"), user("Hi"), assistant("Yes")]
    expected = [user("Hi"), assistant("No", train=False), user("Hi"), assistant("Yes", train=True)]
    for mask in ([0, 0, 0, 1], [False, False, False, True], "[0, 0, 0, 1]"):
        record = {"messages": turns, "loss_mask": mask}
        assert (messages_of(record), unused(record)) == (expected, [])
    for name, value in (("train", False), ("loss", 0), ("weight", 0.0), ("trainable", "False")):
        assert [m.get("train") for m in messages_of({"messages": turns, name: value})] == [None, False, None, False]
    assert unused({"messages": turns, "loss_mask": [1, 0, 0, 1]}) == ["loss_mask of turns that are not the assistant's"]
    assert unused({"messages": turns, "loss": 0.37}) == ["loss"]  # a measurement, no flag
    assert "one for each of the 4 turns, found a list ([0, 1])" in refusal({"messages": turns, "loss_mask": [0, 1]})
    flagged = {"messages": [turns[0], assistant("No", train=True)], "loss_mask": [0, 0]}
    assert "turn 2: its loss flag contradicts the record's 'loss_mask'" in refusal(flagged)


def test_two_spellings_with_different_values_are_refused():
    assert "'train' and 'weight'" in refusal({"messages": [user("Hi"), assistant("Hello", train=True, weight=0)]})
    assert "'content' and 'value'" in refusal({"messages": [{**user("Hi"), "value": "Ho"}]})
    assert "the role 'user' and 'gpt'" in refusal({"messages": [{**user("Hi"), "from": "gpt"}]})
    assert messages_of({"messages": [{**user("Hi"), "from": "human", "value": "Hi"}]}) == [user("Hi")]


# ----------------------------------------------------------------------------------------------------------------------
# Calls and tools, old and new

BARE_TOOL = {"name": "weather", "description": "Weather now", "parameters": {"type": "object", "properties": {}}}
LOOP = [user("Weather?"), assistant("", tool_calls=[call(city="Oslo")]), tool("3"), assistant("It is 3 degrees.")]


@pytest.mark.parametrize(
    "tools", [BARE_TOOL, {"type": "function", **BARE_TOOL}, {"type": "function", "function": BARE_TOOL}]
)
@pytest.mark.parametrize("name", ["tools", "functions"])
def test_functions_are_tools(name, tools):
    for value in ([tools], json.dumps([tools])):
        record = {"messages": LOOP, name: value}
        assert to_conversation(record, "here")["tools"] == [{"type": "function", "function": BARE_TOOL}]
        assert unused(record) == []


@pytest.mark.parametrize("nothing", ["null", "[]", "", None, []])
def test_no_tools(nothing):
    assert to_conversation({"messages": LOOP, "tools": nothing}, "here") == {"messages": LOOP}


@pytest.mark.parametrize(
    "turn",
    [
        assistant("", function_call={"name": "weather", "arguments": '{"city": "Oslo"}'}),
        assistant(None, function_call={"name": "weather", "arguments": {"city": "Oslo"}}),
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
        {"from": "function_call", "value": '[{"name": "weather", "arguments": {"city": "Oslo"}}]'},
        {"role": "tool_call", "content": '{"name": "weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}'},
        assistant("", tool_calls=[{"name": "weather", "parameters": {"city": "Oslo"}}]),
        assistant("", tool_calls=json.dumps([call(city="Oslo")])),
        assistant([{"type": "tool_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'}]),
        assistant([{"type": "tool_use", "name": "weather", "input": {"city": "Oslo"}}]),
    ],
)  # fmt: skip
def test_calls_however_they_are_written(turn):
    assert messages_of({"messages": [LOOP[0], turn, {"role": "function", "content": "3"}, LOOP[3]]}) == LOOP


def test_several_calls_and_a_thought_before_them():
    calls = json.dumps([{"name": "a", "arguments": {}}, {"name": "b", "arguments": {"x": None}}])
    said = {"from": "function_call", "value": f"<think>\nBoth.\n</think>\n\n{calls}"}
    expected = assistant("<think>\nBoth.\n</think>", tool_calls=[call("a"), call("b", x=None)])
    assert messages_of({"conversations": [user("Hi"), said]})[1] == expected


def test_ids_of_calls_are_kept():
    turns = [
        user("?"),
        assistant("", tool_calls=[{**call(), "id": "call_1", "index": 0}]),
        tool("3", tool_call_id="call_1"),
    ]
    assert messages_of({"messages": turns})[1]["tool_calls"] == [{**call(), "id": "call_1"}]
    assert messages_of({"messages": turns})[2]["tool_call_id"] == "call_1"


def test_a_field_of_a_call_that_is_not_known_is_refused_as_its_arguments_might_be_in_it():
    turns = [user("?"), assistant("", tool_calls=[{"name": "f", "payload": {"x": 1}}])]
    assert "turn 2: a tool call has the field 'payload'; expected id, type," in refusal({"messages": turns})


# ----------------------------------------------------------------------------------------------------------------------
# Parts of a content


def test_texts_thoughts_and_calls_as_parts():
    parts = [
        {"type": "reasoning", "value": "Look it up."}, {"type": "text", "value": "A "}, {"type": "text", "text": "moment."},
        {"type": "tool_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
    ]  # fmt: skip
    turns = [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}], "loss_weight": 0.0},
             {"role": "assistant", "content": parts, "loss_weight": 1.0}]  # fmt: skip
    expected = assistant("A moment.", reasoning_content="Look it up.", tool_calls=[call(city="Oslo")], train=True)
    assert messages_of({"messages": turns}) == [{**user("Hi"), "train": False}, expected]
    assert "in the order text, reasoning; expected thoughts, then text" in refusal(
        {"messages": [assistant(parts[1::-1])]}
    )


@pytest.mark.parametrize(
    "part", [{"type": "image_url", "value": "1.jpg"}, {"type": "video", "video": "1.mp4"}, {"image": "1.jpg"}]
)
def test_parts_that_are_no_text_are_refused(part):
    assert "only text can be trained" in refusal({"messages": [user([part, {"type": "text", "text": "Who?"}])]})


# ----------------------------------------------------------------------------------------------------------------------
# What is not used is named


def test_fields_that_nothing_reads_are_named_unless_they_are_empty():
    turns = [user("Hi"), assistant("Hello", likes=3, note="")]
    record = {"messages": turns, "id": 7, "documents": ["a"], "source": None, "tags": []}
    assert unused(record) == ["id", "documents", "likes in turns"]
    assert unused({"instruction": "a", "output": "b", "input": "", "response": "c"}) == ["response"]
    assert unused({"messages": TWO_TURNS, "prompt": "Hi"}) == ["prompt"]


def test_markers_of_images_in_a_text_are_named():
    for text in ("<image>Who?", "Who? <img>https://a/b.jpg</img>"):
        (said,) = unused({"query": text, "response": "Nobody."})
        assert said.startswith("markers of images in the text")


# ----------------------------------------------------------------------------------------------------------------------
# What is no supervised data is refused by what it is

PREFERENCES = {
    "LLaMA-Factory": (
        {"conversations": [user("Hi")], "chosen": assistant("Hello"), "rejected": assistant("Go away")},
        {"prompt": "conversations", "completion": "chosen"},
    ),
    "TRL": ({"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}, {"prompt": "prompt", "completion": "chosen"}),
    "TRL messages": (
        {"prompt": [user("Hi")], "chosen": [assistant("Hello")], "rejected": [assistant("Go away")]},
        {"prompt": "prompt", "completion": "chosen"},
    ),
    "whole conversations": (
        {"chosen": [user("Hi"), assistant("Hello")], "rejected": [user("Hi"), assistant("Go away")]},
        {"messages": "chosen"},
    ),
    "beside messages": (
        {"prompt": "Hi", "messages": [user("Hi"), assistant("Hello")], "chosen": [user("Hi"), assistant("Hello")],
         "rejected": [user("Hi"), assistant("Go away")]},
        {"messages": "chosen"},
    ),
    "messages that are chosen": (
        {"messages": [user("Hi"), assistant("Hello")], "rejected_response": "Go away"}, {"messages": "messages"},
    ),
    "v1": (
        {"chosen_messages": [user("Hi"), assistant("Hello")], "rejected_messages": [user("Hi"), assistant("Go away")]},
        {"messages": "chosen_messages"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("tool", PREFERENCES)
def test_preference_pairs_are_refused_and_the_remedy_works(tool):
    record, columns = PREFERENCES[tool]
    text = refusal(record)
    assert "is a preference pair (it has 'rejected" in text
    assert f"add --columns {' '.join(f'{a}={b}' for a, b in columns.items())}." in text
    assert messages_of(record, columns=columns) == [user("Hi"), assistant("Hello")]
    assert [name for name in unused(record, columns=columns) if name.startswith("rejected")]


@pytest.mark.parametrize("good, bad", [(True, False), ("True", "False")])
@pytest.mark.parametrize("shape", [{"messages": TWO_TURNS}, {"prompt": "Hi", "completion": "Hello"}])
def test_judged_answers_are_refused_and_the_remedy_leaves_out_the_bad_ones(shape, good, bad):
    for label in (good, bad):
        text = refusal({**shape, "label": label})
        assert "judged good or bad (KTO) (it has 'label')" in text and "add --columns train=label." in text
    learnt = [[m["train"] for m in messages_of({**shape, "label": label}, columns={"train": "label"}) if "train" in m]
              for label in (good, bad)]  # fmt: skip
    assert set(learnt[0]) == {True} and set(learnt[1]) == {False}


@pytest.mark.parametrize("field", ["images", "image", "videos", "audios"])
def test_more_than_text_is_refused(field):
    record = {"messages": [user("<image>Who?"), assistant("Nobody.")], field: ["1.jpg"]}
    assert f"more than text (it has '{field}')" in refusal(record) and "only text can be trained" in refusal(record)
    assert messages_of({**record, field: []})


@pytest.mark.parametrize(
    "record, named",
    [
        ({"text": "Once upon a time"}, "is plain text (it has 'text')"),
        ({"custom_id": "1", "method": "POST", "url": "/v1", "body": {"messages": []}}, "is a batch request"),
        ({"input_ids": [1, 2], "labels": [1, 2]}, "is a text in tokens"),
    ],
)
def test_other_data_is_named_for_what_it_is(record, named):
    assert named in refusal(record) and "no supervised data; " in refusal(record)


# ----------------------------------------------------------------------------------------------------------------------
# --columns


def test_columns_name_the_fields_of_a_record_and_of_its_turns():
    record = {
        "dialog": [{"speaker": "human", "utterance": "Hi"}, {"speaker": "gpt", "utterance": "Hello"}],
        "messages": 3,
    }
    columns = {"messages": "dialog", "role": "speaker", "content": "utterance"}
    assert messages_of(record, columns=columns) == TWO_TURNS[:2]
    assert unused(record, columns=columns) == ["messages (own)"]
    record = {"ask": "Hi", "reply": "Hello", "persona": "S", "instruction": "x", "output": "y"}
    columns = {"prompt": "ask", "completion": "reply", "system": "persona"}
    assert messages_of(record, columns=columns) == [system("S"), user("Hi"), assistant("Hello")]
    assert unused(record, columns=columns) == ["instruction", "output"]


def test_files_of_many_shapes_are_one_sequence(tmp_path):
    path = write(
        tmp_path / "rows.jsonl",
        [{"query": "Hi", "response": "Hello"}, {"messages": TWO_TURNS}, {"input": "a", "output": "b"}],
    )
    assert [len(conversation["messages"]) for conversation in Conversations([str(path)])] == [2, 4, 2]


@pytest.mark.parametrize("indent", [None, 1])
def test_a_file_that_is_one_list_of_turns_is_one_conversation(tmp_path, indent):
    path = tmp_path / "one.json"
    path.write_text(json.dumps(TWO_TURNS, indent=indent))
    assert list(Conversations([str(path)])) == [{"messages": TWO_TURNS}]


def test_lines_and_a_list_of_lists_of_turns(tmp_path):
    expected = [{"messages": TWO_TURNS}, {"messages": TWO_TURNS[:2]}]
    assert list(Conversations([str(write(tmp_path / "a.jsonl", [TWO_TURNS, TWO_TURNS[:2]]))])) == expected
    for indent in (None, 1):
        (tmp_path / "b.json").write_text(json.dumps([TWO_TURNS, TWO_TURNS[:2]], indent=indent))
        assert list(Conversations([str(tmp_path / "b.json")])) == expected
