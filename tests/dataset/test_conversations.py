"""Conversation files: four shapes in JSON, JSON Lines, .gz, Parquet and CSV go in, one conversation comes out."""

import bz2
import gzip
import json
import lzma
import os
import pathlib
import pickle
import random
import re
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import ROOT
from recipe.console import UserError
from recipe.dataset.conversations import Conversations, hold_out, to_conversation
from recipe.dataset.files import TextRecords

EXAMPLES = ROOT / "data" / "examples"


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def row(question="Hi", answer="Hello"):
    return {"messages": [user(question), assistant(answer)]}


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def read(*paths):
    return list(Conversations([str(path) for path in paths]))


@pytest.fixture
def write(tmp_path):
    """Writes a file of the test's own, from text or bytes, and returns its path."""

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Keeps what `datasets` makes of tables in the test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# ---------------------------------------------------------------------------------------------------------------------
# Four shapes, one kind of conversation

DIALOGUE = [system("Be brief."), user("Hi"), assistant("Hello"), user("2 + 2?"), assistant("4")]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": DIALOGUE},
        {"messages": DIALOGUE[1:], "system": "Be brief."},
        {"messages": [{"role": "developer", "content": "Be brief."}, *DIALOGUE[1:]], "id": 7, "source": None},
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"},
                {"from": "user", "value": "2 + 2?"}, {"from": "assistant", "value": "4"},
            ]
        },
        {
            "id": "identity_1",
            "system": "Be brief.",
            "conversations": [
                {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"},
                {"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"},
            ],
        },
        {"conversations": DIALOGUE},
        {
            "instruction": "2 + 2?", "input": "", "output": "4", "system": "Be brief.", "history": [["Hi", "Hello"]],
        },
        {"prompt": DIALOGUE[:-1], "completion": DIALOGUE[-1:]},
        {"prompt": DIALOGUE[:-1], "completion": "4"},
        {"prompt": DIALOGUE[1:-1], "completion": "4", "system": "Be brief."},
    ],
    ids=[
        "messages", "messages and system", "developer", "from and value", "human, gpt and system",
        "conversations with roles", "alpaca", "lists of messages", "list and string", "prompt and system",
    ],
)  # fmt: skip
def test_every_shape_comes_out_as_the_same_conversation(record):
    assert to_conversation(record, "here") == {"messages": DIALOGUE}


@pytest.mark.parametrize(
    "record, messages",
    [
        ({"prompt": "Hi", "completion": "Hello"}, [user("Hi"), assistant("Hello")]),
        ({"instruction": "Hi", "output": "Hello"}, [user("Hi"), assistant("Hello")]),
        ({"instruction": "Hi", "input": None, "output": "Hello", "history": None, "system": None},
         [user("Hi"), assistant("Hello")]),
        ({"instruction": "Translate.", "input": "Hi", "output": "Hallo", "history": []},
         [user("Translate.\n\nHi"), assistant("Hallo")]),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "model", "value": "Hello"}], "system": ""},
         [user("Hi"), assistant("Hello")]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]},
         [user("Hi")]),
        ({"messages": [user("Hi"), assistant("No", train=False), user("Hi"), assistant("Yes", train=True)]},
         [user("Hi"), assistant("No", train=False), user("Hi"), assistant("Yes", train=True)]),
        ({"messages": [user("Hi"), assistant("No", weight=0), user("Hi"), assistant("Yes", weight=1)]},
         [user("Hi"), assistant("No", train=False), user("Hi"), assistant("Yes", train=True)]),
        ({"messages": [user("Hi"), assistant("Hello", reasoning_content="A greeting.", likes=3)]},
         [user("Hi"), assistant("Hello", reasoning_content="A greeting.")]),
    ],
)  # fmt: skip
def test_optional_fields_and_their_absence(record, messages):
    assert to_conversation(record, "here") == {"messages": messages}


@pytest.mark.parametrize(
    "calls",
    [
        [CALL],
        [{"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}],
        [{"name": "weather", "arguments": {"city": "Oslo"}}],
        json.dumps([CALL]),
    ],
)
@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_tool_calls_have_their_arguments_as_objects_however_they_are_written(calls, tools):
    turns = [user("Weather?"), assistant(None, tool_calls=calls), {"role": "tool", "content": "3", "tool_call_id": "1"}]
    expected = {"id": "call_1", **CALL} if "call_1" in str(calls) else CALL
    assert to_conversation({"messages": turns, "tools": tools}, "here") == {
        "messages": [
            user("Weather?"),
            assistant("", tool_calls=[expected]),
            {"role": "tool", "content": "3", "tool_call_id": "1"},
        ],
        "tools": [TOOL],
    }


@pytest.mark.parametrize("nothing", [None, [], "", "[]"])
def test_empty_tools_and_tool_calls_are_none(nothing):
    record = {"messages": [user("Hi"), assistant("Hello", tool_calls=nothing)], "tools": nothing}
    assert to_conversation(record, "here") == row()


WEATHER = {
    "name": "weather", "description": "Weather now",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}  # fmt: skip
LOOP = {
    "messages": [
        user("Weather in Oslo?"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": "3 degrees, rain"},
        assistant("It rains in Oslo at 3 degrees."),
    ],
    "tools": [{"type": "function", "function": WEATHER}],
}  # fmt: skip
TWO_OPPOSITES = [
    system("Be brief."), user("The opposite of hot?"), assistant("Cold"), user("And of up?"), assistant("Down"),
]  # fmt: skip
EXPECTED_EXAMPLES = {
    "messages.jsonl": (
        "messages",
        [
            {"messages": [
                system("Answer in one word."), user("What is the capital of France?"), assistant("Paris"),
            ]},
            {"messages": [
                user("2 + 2?"), assistant("5", train=False), user("Are you sure?"), assistant("No: 4."),
            ]},
            LOOP,
        ],
    ),
    "conversations.json": (
        "conversations",
        [
            {"messages": [user("Who are you?"), assistant("A model fine-tuned with one script.")]},
            {"messages": [
                system("You are a pirate."), user("Good morning!"), assistant("Ahoy!"),
                user("How is the sea?"), assistant("Rough, matey."),
            ]},
        ],
    ),
    "alpaca.json": (
        "instruction/output",
        [
            {"messages": [user("Name a primary colour."), assistant("Red")]},
            {"messages": [user("Translate into German.\n\nGood night"), assistant("Gute Nacht")]},
            {"messages": [
                system("You translate."), user("Good night in German?"), assistant("Gute Nacht"),
                user("And in French?"), assistant("Bonne nuit"),
            ]},
        ],
    ),
    "prompt_completion.jsonl": (
        "prompt/completion",
        [
            {"messages": [user("The opposite of hot?"), assistant("Cold")]},
            {"messages": [system("Be brief."), user("The opposite of up?"), assistant("Down")]},
        ],
    ),
    "conversation.jsonl": ("conversation", [{"messages": TWO_OPPOSITES}]),
    "query_response.jsonl": ("query/response", [{"messages": TWO_OPPOSITES}]),
    "instruction_response.jsonl": ("instruction/response", [row("Which city?\n\nIt rains in Oslo.", "Oslo")]),
    "question_answer.jsonl": ("question/answer", [row("The opposite of hot?", "Cold")]),
    "prompt_response.jsonl": ("prompt/response", [row("The opposite of hot?", "Cold")]),
    "input_output.jsonl": ("input/output", [row("The opposite of hot?", "Cold")]),
    "list_of_turns.jsonl": ("list of turns", [row("The opposite of hot?", "Cold"), row("And of up?", "Down")]),
    "function_call.json": ("conversations", [LOOP]),
    "functions.jsonl": (
        "messages",
        [{**LOOP, "messages": [*LOOP["messages"][:2], {**LOOP["messages"][2], "name": "weather"}, LOOP["messages"][3]]}],
    ),
    "parts.jsonl": (
        "messages",
        [{**LOOP, "messages": [
            user("Weather in Oslo?") | {"train": False},
            assistant("", tool_calls=[CALL], reasoning_content="I look it up.", train=True),
            LOOP["messages"][2],
            assistant("It rains in Oslo at 3 degrees.", train=True),
        ]}],
    ),
}  # fmt: skip


def test_every_example_file_is_expected_here():
    assert {path.name for path in EXAMPLES.iterdir()} == set(EXPECTED_EXAMPLES)


@pytest.mark.parametrize("name", EXPECTED_EXAMPLES)
def test_the_examples_read_as_written_out_here(name):
    shape, expected = EXPECTED_EXAMPLES[name]
    conversations = Conversations([str(EXAMPLES / name)])
    assert conversations.shapes() == {str(EXAMPLES / name): shape}
    assert list(conversations) == expected


def test_the_examples_together_are_one_sequence():
    paths = [EXAMPLES / name for name in EXPECTED_EXAMPLES]
    assert read(*paths) == [conversation for _, expected in EXPECTED_EXAMPLES.values() for conversation in expected]
    assert list(Conversations(map(str, paths)).shapes().values()) == [shape for shape, _ in EXPECTED_EXAMPLES.values()]


# ---------------------------------------------------------------------------------------------------------------------
# Files

TWO = [row("Grüße, 世界 😀", "你好\u2028\u0085!"), row("two")]
IN_LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in TWO)
INDENTED = [json.dumps(record, ensure_ascii=False, indent=2) for record in TWO]
IN_ARRAY = json.dumps(TWO, ensure_ascii=False, indent=2)
LAYOUTS = {
    "JSON Lines": IN_LINES,
    "JSON Lines with escapes": lines(*TWO),
    "JSON Lines without the last newline": IN_LINES[:-1],
    "JSON Lines with CRLF": IN_LINES.replace("\n", "\r\n"),
    "JSON Lines with blank lines": "\n  \n" + IN_LINES.replace("\n", "\n\n \t \n" + 40 * " " + "\r\n"),
    "JSON Lines with spaces around": "".join(f"  {line}  \n" for line in IN_LINES.split("\n")),
    "JSON Lines with commas after the lines": IN_LINES.replace("}\n", "},\n"),
    "array": IN_ARRAY,
    "array in one line": json.dumps(TWO, ensure_ascii=False),
    "array with one record a line": "[" + IN_LINES[:-1].replace("}\n", "},\n") + "]\n",
    "array with CRLF": IN_ARRAY.replace("\n", "\r\n"),
    "array between blank lines": f"\n \r\n{IN_ARRAY}\n\n",
    "array with a comma at the end": IN_ARRAY[:-2] + ",\n]",
    "indented objects": "\n".join(INDENTED),
    "indented objects without a newline between": "".join(INDENTED),
    "objects in one line": IN_LINES.replace("}\n", "} "),
    "objects that start with their first field": "\n".join(text.replace("{\n", "{", 1) for text in INDENTED),
}


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_is_known_by_content_not_by_name(write, layout, name):
    assert read(write(name, LAYOUTS[layout])) == TWO


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_byte_order_mark_is_tolerated(write, layout):
    assert read(write("rows.json", b"\xef\xbb\xbf" + LAYOUTS[layout].encode())) == TWO


def packed(codec, data):
    import pyarrow

    stream = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(stream, codec) as file:
        file.write(data)
    return stream.getvalue().to_pybytes()


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gzip_is_unpacked_whatever_its_name(write, layout, name):
    assert read(write(name, gzip.compress(LAYOUTS[layout].encode()))) == TWO


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.packed"])
@pytest.mark.parametrize("codec", ["bz2", "xz", "zstd", "lz4"])
def test_compressed_text_is_unpacked_whatever_its_name(write, codec, name):
    pack = {"bz2": bz2.compress, "xz": lzma.compress}.get(codec) or (lambda data: packed(codec, data))
    assert read(write(name, pack(IN_LINES.encode()))) == TWO
    if codec != "lz4":
        halves = [pack(line.encode() + b"\n") for line in IN_LINES.split("\n")[:2]]
        assert read(write(name, b"".join(halves))) == TWO


def test_files_with_byte_order_marks_may_be_joined(write):
    marked = [b"\xef\xbb\xbf" + line.encode() + b"\n" for line in IN_LINES.split("\n")[:2]]
    assert read(write("joined.jsonl", b"".join(marked))) == TWO
    assert read(write("joined.json", b"".join(b"\xef\xbb\xbf" + text.encode() for text in INDENTED))) == TWO


@pytest.mark.parametrize("text", [json.dumps(row()), json.dumps(row(), indent=2), json.dumps([row()], indent=2)])
def test_one_record_is_enough(write, text):
    assert read(write("one.json", text)) == [row()]


def test_a_text_of_a_table_that_is_not_utf8_is_named_with_its_record(tmp_path, own_cache):
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xbd")]
    )
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": texts, "completion": ["x", "y"]}), path)
    with pytest.raises(UserError, match=r"rows\.parquet: record 2: a text in it is not UTF-8"):
        read(path)


def test_a_parquet_file_reads_like_the_same_rows_in_json(write, tmp_path, own_cache):
    import datasets

    records = [
        {"messages": [user("Weather?"), assistant("", tool_calls=[CALL])], "tools": [TOOL]},
        {"messages": [user("Grüße"), assistant("😀", train=False)]},
    ]
    path = str(tmp_path / "rows.parquet")
    datasets.Dataset.from_list(records).to_parquet(path)
    expected = read(write("rows.jsonl", lines(*records)))
    assert read(path) == expected
    assert Conversations([path]).shapes() == {path: "messages"}


def test_a_table_keeps_the_nulls_of_json_columns_and_loses_those_that_arrow_filled_in(tmp_path, own_cache):
    import datasets
    from datasets import Features, Json, List, Value

    schema = {"x": {"type": "string", "default": None}, "y": {"type": "null"}}
    call = {"name": "f", "arguments": {"x": "a", "y": None, "z": [None, {"w": None}]}}
    turns = [user("Hi"), assistant("", tool_calls=[call]), {"role": "tool", "content": "3"}]
    record = {"messages": turns, "tools": [{"name": "f", "parameters": schema}]}
    calls = List({"name": Value("string"), "arguments": Json()})
    text = Value("string")
    features = Features({"messages": List({"role": text, "content": text, "tool_calls": calls}), "tools": Json()})
    path = str(tmp_path / "rows.parquet")
    datasets.Dataset.from_list([record, row()], features=features).to_parquet(path)
    assert read(path) == [to_conversation(record, "here"), row()]
    (said,) = [message for message in read(path)[0]["messages"] if "tool_calls" in message]
    assert said["tool_calls"][0]["function"]["arguments"] == call["arguments"]


def test_lists_that_a_table_holds_as_json_text(tmp_path, own_cache, write):
    import datasets

    records = [{"messages": json.dumps(DIALOGUE), "tools": "null"}, {"messages": json.dumps(DIALOGUE), "tools": "[]"}]
    datasets.Dataset.from_list(records).to_parquet(path := str(tmp_path / "rows.parquet"))
    text = 'conversations,tools\n"' + json.dumps(DIALOGUE).replace('"', '""') + '",null\n'
    assert read(path, write("rows.csv", text)) == [{"messages": DIALOGUE}] * 3


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_csv_file_holds_text_even_where_it_looks_like_numbers_or_nothing(write, own_cache, mark):
    text = 'instruction,input,output\r\nAdd.,2 + 40,42\r\nAgent?,,007\r\nMissing?,,NA\r\n"Ä, ""b""","1\n2",1.50\r\n'
    path = write("rows.CSV", mark + text.encode())
    assert Conversations([path]).shapes() == {path: "instruction/output"}
    assert read(path) == [
        row("Add.\n\n2 + 40", "42"), row("Agent?", "007"), row("Missing?", "NA"), row('Ä, "b"\n\n1\n2', "1.50"),
    ]  # fmt: skip


def test_a_csv_file_of_prompts_and_completions(write, own_cache):
    path = write("rows.csv", "id,prompt,completion,system\n1,Hi,Hello,\n2,Hi,Ahoy,You are a pirate.\n")
    assert read(path) == [row(), {"messages": [system("You are a pirate."), user("Hi"), assistant("Ahoy")]}]


# ---------------------------------------------------------------------------------------------------------------------
# Several files as one sequence


@pytest.fixture
def three(write, own_cache):
    return [
        write("a.jsonl", "\n" + lines(row("a1")) + "\n \n" + lines(row("a2"), row("a3"))),
        write("b.json", json.dumps([row("b1"), row("b2")], indent=1)),
        write("c.csv", "prompt,completion\nc1,Hello\nc2,Hello\n"),
    ]


def questions(conversations):
    return [conversation["messages"][0]["content"] for conversation in conversations]


def test_several_files_are_one_sequence(three):
    conversations = Conversations(three)
    assert len(conversations) == 7
    assert questions(conversations) == ["a1", "a2", "a3", "b1", "b2", "c1", "c2"]
    assert conversations[3] == row("b1") and conversations[-1] == row("c2") and conversations[-5] == row("a3")
    with pytest.raises(IndexError):
        conversations[7]


def test_where_names_file_record_and_line(three):
    a, b, c = three
    conversations = Conversations(three)
    assert [conversations.where(i) for i in range(7)] == [
        f"{a}: record 1 (line 2)", f"{a}: record 2 (line 5)", f"{a}: record 3 (line 6)",
        f"{b}: record 1", f"{b}: record 2", f"{c}: record 1", f"{c}: record 2",
    ]  # fmt: skip


def test_a_choice_of_records_keeps_their_places(three):
    conversations = Conversations(three, np.array([1, 4, 6]))
    assert questions(conversations) == ["a2", "b2", "c2"]
    assert [conversations.where(i) for i in range(3)] == [
        f"{three[0]}: record 2 (line 5)", f"{three[1]}: record 2", f"{three[2]}: record 2",
    ]  # fmt: skip


@pytest.mark.parametrize("ratio, held_out", [(0.1, 3), (0.5, 15), (0.9, 27)])
def test_hold_out_parts_are_disjoint_complete_and_repeatable(write, ratio, held_out):
    paths = [write(f"{k}.jsonl", lines(*(row(f"{k}.{i}") for i in range(n)))) for k, n in enumerate((10, 1, 19))]
    everything = questions(Conversations(paths))
    train, held = (questions(part) for part in hold_out(paths, ratio, seed=1))
    assert len(held) == held_out and len(everything) == 30
    assert sorted(train + held) == sorted(everything)
    assert [train, held] == [questions(part) for part in hold_out(paths, ratio, seed=1)]
    assert held != questions(hold_out(paths, ratio, seed=2)[1])


@pytest.mark.parametrize("ratio", [0.01, 0.99])
def test_hold_out_refuses_to_leave_a_part_empty(write, ratio):
    path = write("rows.jsonl", lines(*[row()] * 10))
    with pytest.raises(UserError, match=rf"^--eval_ratio {ratio} of 10 rows leaves \d+ to evaluate; change it"):
        hold_out([path], ratio, seed=1)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_the_fingerprint_changes_with_the_file_and_only_then(write, own_cache, name):
    texts = {"rows.jsonl": [lines(row("a")), lines(row("b"))], "rows.csv": ["prompt,completion\na,b\n"] * 2}[name]
    path = write(name, texts[0])
    os.utime(path, (1_000_000, 1_000_000))
    before = Conversations([path]).fingerprint()
    assert Conversations([path]).fingerprint() == before
    write(name, texts[1])
    os.utime(path, (1_000_001, 1_000_001))
    assert Conversations([path]).fingerprint() != before


def test_the_fingerprint_changes_with_the_choice_and_the_order_of_files(write):
    a, b = write("a.jsonl", lines(*[row()] * 9)), write("b.jsonl", lines(*[row()] * 9))
    views = [Conversations([a, b]), Conversations([b, a]), *hold_out([a, b], 0.5, 1), *hold_out([a, b], 0.5, 2)]
    assert len({view.fingerprint() for view in views}) == 6


# ---------------------------------------------------------------------------------------------------------------------
# Malformed files: what is said about the file

GOOD = lines(row())
CUT = json.dumps([row("a"), row("b")], indent=1)
BAD_FILES = {
    "JSON Lines broken in line 3": (
        "rows.jsonl", lines(row(), row()) + '{"messages": [{"role": "user", "content": "Hi}]}\n' + GOOD,
        ": record 3 (line 3): not valid JSON: Unterminated string starting at (column 43).",
    ),
    "JSON Lines broken in line 1": (
        "rows.jsonl", '{"messages": [{"role": "user" "content": "Hi"}]}\n' + GOOD,
        ": record 1 (line 1): not valid JSON: Expecting ',' delimiter (column 31).",
    ),
    "JSON Lines cut off in the last line": (
        "rows.jsonl", GOOD + GOOD[:30], ": record 2 (line 2): not valid JSON: ",
    ),
    "JSON Lines broken after blank lines": (
        "rows.jsonl", GOOD + "\n\n" + "{'messages': []}\n", ": record 2 (line 4): not valid JSON: Expecting property",
    ),
    "two objects in a later line": (
        "rows.jsonl", GOOD + "{} {}\n", ": record 2 (line 2): not valid JSON: Extra data (column 4).",
    ),
    "a number with too many digits": (
        "rows.jsonl", GOOD + '{"n": ' + "1" * 5000 + "}\n", ": record 2 (line 2): not valid JSON: Exceeds the limit",
    ),
    "lists without end": (
        "rows.jsonl", GOOD + '{"a": ' + "[" * 100_000, ": record 2 (line 2): not valid JSON: maximum recursion depth",
    ),
    "array cut off between records": (
        "rows.json", CUT[: CUT.index("\n },") + 3],
        ": the list is cut off after record 1; expected a closing ']'.",
    ),
    "array cut off in a record": (
        "rows.json", CUT[: CUT.rindex("role")], ": record 2 (line 21): not valid JSON: ",
    ),
    "array broken in a record": (
        "rows.json", CUT.replace('"b"', "b"), ": record 2 (line 18): not valid JSON: Expecting value (column 16).",
    ),
    "array of lists without end": ("rows.json", "[" * 100_000, ": record 1 (line 1): not valid JSON: maximum"),
    "array with a number too long": ("rows.json", f"[{'1' * 5000}]", ": record 1 (line 1): not valid JSON: Exceeds"),
    "two arrays joined": (
        "rows.json", "[\n{}\n]\n[\n{}\n]\n", ": found more text after the list that ends in line 3; expected one list.",
    ),
    "indented object that is broken": (
        "row.json", '{\n "messages": [\n  {"role": user}\n ]\n}\n', ": record 1 (line 3): not valid JSON: Expecting",
    ),
    "text after an object": (
        "row.json", json.dumps(row(), indent=1) + "\n\nend", ": record 2 (line 14): not valid JSON: Expecting value",
    ),
    "UTF-16": (
        "rows.jsonl", GOOD.encode("utf-16"), ": is not UTF-8 but looks like UTF-16; save it as UTF-8.",
    ),
    "UTF-16 without a mark": (
        "rows.jsonl", GOOD.encode("utf-16-le"), ": is not UTF-8 but looks like UTF-16; save it as UTF-8.",
    ),
    "UTF-16 in gzip": (
        "rows.json.gz", gzip.compress(CUT.encode("utf-16")), ": is not UTF-8 but looks like UTF-16; save it as UTF-8.",
    ),
    "Latin-1 in line 2": (
        "rows.jsonl", GOOD.encode() + '{"prompt": "Grüße", "completion": "b"}\n'.encode("latin-1"),
        ": record 2 (line 2): is not UTF-8; save the file as UTF-8.",
    ),
    "Latin-1 in an array": (
        "rows.json", '[\n{},\n{"prompt": "Grüße"}]'.encode("latin-1"), ": line 3: is not UTF-8; save the file",
    ),
    "GBK in line 1": (
        "rows.jsonl", '{"prompt": "你好", "completion": "b"}\n'.encode("gbk"),
        ": record 1 (line 1): is not UTF-8; save the file as UTF-8.",
    ),
    "half a character as bytes": (
        "rows.jsonl", GOOD.encode() + b'{"prompt": "\xed\xa0\xbd"}', ": record 2 (line 2): is not UTF-8; save the file",
    ),
    "empty": ("rows.json", "", ": is empty; expected JSON or JSON Lines with one conversation a record."),
    "only spaces": ("rows.json", " \n\r\n\t" * 30_000, ": is empty; expected JSON or JSON Lines with"),
    "only a byte order mark": ("rows.json", b"\xef\xbb\xbf\n", ": is empty; expected JSON or JSON Lines with"),
    "empty gzip": ("rows.json.gz", gzip.compress(b""), ": is empty; expected JSON or JSON Lines with"),
    "empty array": ("rows.json", "[ ]", ": holds no record; expected at least one conversation."),
    "gzip without its end": (
        "rows.jsonl.gz", gzip.compress(GOOD.encode())[:-9], ": is a damaged gzip file (Compressed file ended before",
    ),
    "gzip with a wrong checksum": (
        "rows.jsonl.gz", gzip.compress(GOOD.encode())[:-8] + b"\0" * 8, ": is a damaged gzip file (CRC check failed",
    ),
    "gzip with broken blocks": (
        "rows.jsonl.gz", gzip.compress(GOOD.encode())[:10] + b"\xff" * 40, ": is a damaged gzip file (Error -3 while",
    ),
    "plain text": ("rows.txt", "Hi\nHello\n", ": record 1 (line 1): not valid JSON: Expecting value (column 1)."),
    "table with tabs": ("rows.txt", "prompt\tcompletion\na\tb\n", ": record 1 (line 1): not valid JSON: Expecting"),
    "zip": ("rows.jsonl", b"PK\x03\x04 and so on", ": is a zip archive or an Office document; unpack it, or save it as"),
    "pickle": ("rows.jsonl", pickle.dumps(row()), ": is a Python pickle; export its records as JSON Lines."),
    "SQLite": ("rows.json", b"SQLite format 3\0...", ": is an SQLite database; export its table as CSV."),
    "tar": ("rows.tar.gz", gzip.compress(b"a" * 257 + b"ustar"), ": is a tar archive; unpack it."),
    "PDF": ("rows", b"%PDF-1.7", ": is a PDF document; expected JSON Lines"),
    "xz that is cut off": ("rows.xz", lzma.compress(GOOD.encode())[:-8], ": is a damaged xz file ("),
    "bzip2 that is cut off": ("rows.bz2", bz2.compress(GOOD.encode())[:-8], ": is a damaged bzip2 file ("),
    "Zstandard that is cut off": ("rows.zst", packed("zstd", GOOD.encode())[:-8], ": is a damaged Zstandard file ("),
    "CSV without the columns": (
        "rows.csv", "ask,reply\nHi,Hello\n",
        ": record 1: found the fields 'ask', 'reply'; expected one of the shapes 'messages', 'conversations', ",
    ),
    "CSV with an empty answer": (
        "rows.csv", "prompt,completion\nHi,Hello\nHi,\n", ": record 2: found the fields 'prompt'; expected one of the",
    ),
    "CSV with commas outside quotes": (
        "rows.csv", "prompt,completion\nHi,Hello, you\n", ": record 1: has more fields than the 2 columns; quote its",
    ),
    "CSV with commas outside quotes later": (
        "rows.csv", "prompt,completion\nHi,Hello\nHi,Hello, you\n",
        ": cannot be loaded (Error tokenizing data. C error: Expected 2 fields in line 3, saw 3); expected UTF-8 text",
    ),
    "CSV in Latin-1": (
        "rows.csv", "prompt,completion\nä,b\n".encode("latin-1"), ": cannot be loaded ('utf-8' codec can't decode byte",
    ),
    "CSV without rows": ("rows.csv", "prompt,completion\n", ": holds no record; expected a line of column names and"),
    "CSV without anything": ("rows.csv", "", ": cannot be loaded (No columns to parse from file); expected UTF-8 text"),
    "Parquet that is none": (
        "rows.parquet", GOOD[:6], ": cannot be loaded (Parquet file size is 6 bytes, smaller than the minimum file "
        "footer (8 bytes)); expected a whole Parquet file with at least one row.",
    ),
}  # fmt: skip


def complaint(path):
    """What a reader of the whole file says about it; any exception but UserError fails the test."""
    with pytest.raises(UserError) as caught:
        read(path)
    return str(caught.value)


def assert_is_one_sentence_about(path, message):
    assert message.startswith(f"{path}: ")
    own_words = re.sub(r"\([^()]*\)", "", message[len(path) :])  # without what a library said and samples of the data
    assert message.endswith(".") and "\n" not in message and not re.search(r"\. [A-Z]", own_words)


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_malformed_file_is_explained_in_one_sentence(write, own_cache, case):
    name, content, expected = BAD_FILES[case]
    path = write(name, content)
    message = complaint(path)
    assert_is_one_sentence_about(path, message)
    assert message.startswith(path + expected)


@pytest.mark.parametrize("name", ["nothing.jsonl", "nothing", "nothing.parquet", "~/nothing"])
def test_a_missing_file_is_said_to_be_missing(tmp_path, name):
    for path in (name, str(tmp_path / name)):
        assert complaint(path).startswith(f"{path}: no such file; check the path (relative paths start at ")


def test_a_name_that_is_neither_file_nor_hub_dataset_says_both():
    message = complaint("some/nothing")
    assert_is_one_sentence_about("some/nothing", message)
    assert message.startswith("some/nothing: cannot be loaded (")
    assert message.endswith("; expected a file or a hub dataset of this name.")


def test_a_pipe_cannot_be_read_at_random(tmp_path):
    reader, writer = os.pipe()
    try:
        os.write(writer, GOOD.encode())
        path = f"/dev/fd/{reader}"
        assert complaint(path) == f"{path}: cannot be read (Illegal seek); check the path."
    finally:
        os.close(reader)
        os.close(writer)


# ---------------------------------------------------------------------------------------------------------------------
# Malformed records: what is said about record and turn


def messages(*turns, **more):
    return {"messages": list(turns), **more}


def calling(call):
    return messages(user("Hi"), assistant(None, tool_calls=call))


SHAPES_EXPECTED = (
    "; expected one of the shapes 'messages', 'conversations', 'conversation', or a question (instruction, "
)
REMEDY = (
    "prompt, query, question, input) with an answer (output, completion, response, answer), so rename or fill in the "
    "fields, or map them with --columns."
)
ROLES_EXPECTED = "; expected 'role' or 'from' to be one of system, developer, user, human, prompter, assistant, gpt, "
TEXT_EXPECTED = " ('content' or 'value') must be a string or a list of text parts, found "
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
BAD_RECORDS = {
    "record is a list of texts": (["Hi"], ", turn 1: expected an object with a role and a text, found a string ('Hi')."),
    "record is an empty list": ([], ": 'list of turns' must be a non-empty list of turns, found a list ([])."),
    "record is a string": ("Hi", ": expected a JSON object with a conversation, found a string ('Hi')."),
    "record is a number": (5, ": expected a JSON object with a conversation, found a number (5)."),
    "record is null": (None, ": expected a JSON object with a conversation, found nothing (null)."),
    "record is true": (True, ": expected a JSON object with a conversation, found a truth value (True)."),
    "record is empty": ({}, ": found no fields" + SHAPES_EXPECTED),
    "unknown fields": (
        {"ask": "Hi", "reply": "Hello"}, ": found the fields 'ask', 'reply'" + SHAPES_EXPECTED,
    ),
    "a data set in a field": ({"data": [row()]}, ": found the fields 'data'" + SHAPES_EXPECTED),
    "completion is null": (
        {"prompt": "Hi", "completion": None},
        f": found the fields 'prompt', 'completion' (null){SHAPES_EXPECTED}{REMEDY}",
    ),
    "completion is missing": ({"prompt": "Hi"}, ": found the fields 'prompt'" + SHAPES_EXPECTED),
    "completion is a number": (
        {"prompt": "6 * 7", "completion": 42},
        f", turn 2: the text of this assistant turn{TEXT_EXPECTED}a number (42).",
    ),
    "prompt is a list of strings": (
        {"prompt": ["Hi"], "completion": "Hello"},
        ", turn 1: expected an object with a role and a text, found a string ('Hi').",
    ),
    "prompt and completion without turns": (
        {"prompt": [], "completion": []}, ": 'prompt/completion' must be a non-empty list of turns, found a list ([]).",
    ),
    "messages are null": ({"messages": None}, ": found the fields 'messages' (null)" + SHAPES_EXPECTED),
    "no turns": ({"messages": []}, ": 'messages' must be a non-empty list of turns, found a list ([])."),
    "conversation is a string": (
        {"conversations": "Hi"}, ": 'conversations' must be a non-empty list of turns, found a string ('Hi').",
    ),
    "conversation is an object": (
        {"conversations": {"from": "human"}},
        ": 'conversations' must be a non-empty list of turns, found an object ({'from': 'human'}).",
    ),
    "turn is a string": (
        messages(user("Hi"), "Hello"), ", turn 2: expected an object with a role and a text, found a string ('Hello').",
    ),
    "turn is null": (
        messages(None), ", turn 1: expected an object with a role and a text, found nothing (null).",
    ),
    "role is unknown": (
        messages({"role": "narrator", "content": "Hi"}), ", turn 1: found the role 'narrator'" + ROLES_EXPECTED,
    ),
    "role is a list": (messages({"role": ["user"], "content": "Hi"}), ", turn 1: found the role ['user']; expected"),
    "role is missing": (messages(user("Hi"), {"content": "Hello"}), ", turn 2: found no role" + ROLES_EXPECTED),
    "content is null": (
        messages(user("Hi"), assistant(None)),
        f", turn 2: the text of this assistant turn{TEXT_EXPECTED}nothing (null).",
    ),
    "content is missing": (
        messages({"role": "user", "text": "Hi"}), f", turn 1: the text of this user turn{TEXT_EXPECTED}nothing (null).",
    ),
    "content is a number": (messages(user(5)), f", turn 1: the text of this user turn{TEXT_EXPECTED}a number (5)."),
    "content is an object": (
        messages(user({"text": "Hi"})),
        f", turn 1: the text of this user turn{TEXT_EXPECTED}an object ({{'text': 'Hi'}}).",
    ),
    "content has images": (
        messages(user([{"type": "text", "text": "What is this?"}, IMAGE])),
        ", turn 1: has a part of type 'image_url'; only text can be trained, so remove such records.",
    ),
    "content has a text part without text": (
        messages(user([{"type": "text", "text": None}])),
        f", turn 1: the text of this user turn{TEXT_EXPECTED}a list ([{{'text': None, 'type': 'text'}}]).",
    ),
    "system in the middle": (
        messages(user("Hi"), system("Be brief."), assistant("Hello")),
        ", turn 2: found a system message; expected at most one, as the first turn or as the record's 'system', so ",
    ),
    "system twice": (
        messages(system("Be brief."), user("Hi"), system="Be kind."),
        ", turn 1: found a system message; expected at most one, ",
    ),
    "system of the record is a list": (
        {"conversations": [{"from": "human", "value": "Hi"}], "system": ["Be brief."]},
        f", 'system': the text of this system turn{TEXT_EXPECTED}a list (['Be brief.']).",
    ),
    "turns count as in the file after a system of the record": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": 5}], "system": "Be brief."},
        f", turn 2: the text of this assistant turn{TEXT_EXPECTED}a number (5).",
    ),
    "instruction is a list": (
        {"instruction": ["Hi"], "input": "x", "output": "Hello"},
        ": 'instruction' must be a string, found a list (['Hi']).",
    ),
    "input is a number": (
        {"instruction": "Double it.", "input": 4, "output": "8"}, ": 'input' must be a string, found a number (4).",
    ),
    "output is a number": (
        {"instruction": "Double it.", "output": 8}, ": 'output' must be a string, found a number (8).",
    ),
    "history is a string": (
        {"instruction": "Hi", "output": "Hello", "history": "none"},
        ": 'history' must be a list of [question, answer] pairs, found a string ('none').",
    ),
    "history is one pair": (
        {"instruction": "Hi", "output": "Hello", "history": ["Hi", "Hello"]},
        ": 'history' must be a list of [question, answer] pairs, found a string ('Hi').",
    ),
    "history has half a pair": (
        {"instruction": "Hi", "output": "Hello", "history": [["Hi", "Hello"], ["Hi"]]},
        ": 'history' must be a list of [question, answer] pairs, found a list (['Hi']).",
    ),
    "history has a null": (
        {"instruction": "Hi", "output": "Hello", "history": [["Hi", None]]},
        f", turn 2: the text of this assistant turn{TEXT_EXPECTED}nothing (null).",
    ),
    "tools are broken JSON": (
        messages(user("Hi"), tools="[{'name'}]"),
        ": 'tools' must be valid JSON, found a string (\"[{'name'}]\"): Expecting property name enclosed in double ",
    ),
    "tools are an object": (
        messages(user("Hi"), tools={"name": "f"}),
        ": 'tools' must be a list of function descriptions (objects), found an object ({'name': 'f'}).",
    ),
    "tools are names": (
        messages(user("Hi"), tools=["f"]), ": 'tools' must be a list of function descriptions (objects), found a list",
    ),
    "tool calls are an object": (
        calling({"name": "f"}), ", turn 2: 'tool_calls' must be a list, found an object ({'name': 'f'}).",
    ),
    "tool calls are broken JSON": (
        calling("[{"), ", turn 2: 'tool_calls' must be valid JSON, found a string ('[{'): Expecting property name",
    ),
    "tool call without a name": (
        calling([{"function": {"arguments": {}}}]),
        ", turn 2: a tool call needs a function with 'name' and 'arguments', found an object ({'function': ",
    ),
    "tool call is a string": (
        calling(["f()"]), ", turn 2: a tool call needs a function with 'name' and 'arguments', found a string ('f()').",
    ),
    "arguments are broken JSON": (
        calling([{"function": {"name": "f", "arguments": '{"city": Oslo}'}}]),
        ", turn 2: the arguments of 'f' must be valid JSON, found a string ('{\"city\": Oslo}'): "
        "Expecting value (column 10).",
    ),
    "arguments are broken JSON over two lines": (
        calling([{"function": {"name": "f", "arguments": "{\nx}"}}]),
        ", turn 2: the arguments of 'f' must be valid JSON, found a string ('{\\nx}'): ",
    ),
    "arguments are a list": (
        calling([{"function": {"name": "f", "arguments": "[1]"}}]),
        ", turn 2: the arguments of 'f' must be an object, found a list ([1]).",
    ),
    "train is a string": (
        messages(user("Hi"), assistant("Hello", train="false")),
        ", turn 2: 'train' must be true or false, found a string ('false').",
    ),
    "train is a fraction": (
        messages(user("Hi"), assistant("Hello", weight=0.5)),
        ", turn 2: 'weight' must be true or false, found a number (0.5).",
    ),
    "reasoning is a list": (
        messages(user("Hi"), assistant("Hello", reasoning_content=["Hm"])),
        ", turn 2: 'reasoning_content' must be a string, found a list (['Hm']).",
    ),
    "half a character in a text": (
        messages(user("Hi"), assistant("Hello \ud83d")),
        ", turn 2: found '\\ud83d', half of a character cut in two; expected whole characters, so remove it.",
    ),
    "half a character in the arguments of a call": (
        calling([{"function": {"name": "f", "arguments": '{"a": "\\ude00"}'}}]), ", turn 2: found '\\ude00', half of a",
    ),
    "half a character in a tool": (messages(user("Hi"), tools=[{"name": "\ud83d"}]), ": 'tools': found '\\ud83d',"),
    "half a character in a role": (messages({"role": "\ud83d"}), ", turn 1: found the role '\\ud83d'; expected"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_a_malformed_record_is_explained_in_one_sentence(write, case):
    record, expected = BAD_RECORDS[case]
    path = write("rows.jsonl", "\n" + lines(row(), record))
    message = complaint(path)
    assert_is_one_sentence_about(path, message)
    assert message.startswith(f"{path}: record 2 (line 3){expected}")
    message.encode()
    assert len(message) < len(path) + 400

    path = write("rows.json", json.dumps([row(), record], indent=2))
    assert complaint(path).startswith(f"{path}: record 2{expected}")


def test_a_long_value_is_shown_in_short(write):
    path = write("rows.jsonl", lines({"conversations": "long " * 100_000, "tools": "[" * 100_000}))
    assert len(complaint(path)) < len(path) + 200


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.just("\ud83d")
    | st.sampled_from(["user", "assistant", "system", "[]", '{"a": 1}']),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(
        st.sampled_from([
            "conversation", "query", "response", "functions", "function_call", "loss_mask", "thinking", "label", "images",
            "human", "rejected", "messages", "conversations", "instruction", "input", "output", "history", "system", "prompt", "completion",
            "tools", "tool_calls", "function", "name", "arguments", "role", "from", "content", "value", "train",
            "weight", "reasoning_content", "type", "text", "other",
        ]), values, max_size=5,
    ),
    max_leaves=30,
)  # fmt: skip
RECORDS = st.one_of(
    JSON_VALUES,
    st.fixed_dictionaries({"messages": st.lists(st.fixed_dictionaries({"role": st.just("user")}, optional={
        key: JSON_VALUES for key in ("content", "tool_calls", "train", "name")}), max_size=3)},
        optional={"tools": JSON_VALUES, "system": JSON_VALUES}),
    st.fixed_dictionaries({"instruction": JSON_VALUES, "output": JSON_VALUES}, optional={
        key: JSON_VALUES for key in ("input", "history", "system")}),
    st.fixed_dictionaries({"prompt": JSON_VALUES, "completion": JSON_VALUES}),
)  # fmt: skip


@given(RECORDS)
@settings(max_examples=150, deadline=None)
def test_any_json_value_is_a_conversation_or_a_users_error(record):
    try:
        conversation = to_conversation(record, "here")
    except UserError as error:
        assert str(error).startswith("here") and "\n" not in str(error)
    else:
        assert conversation["messages"]
        for message in conversation["messages"]:
            assert message["role"] in ("system", "user", "assistant", "tool")
            message["content"].encode()


@given(st.sampled_from(sorted(LAYOUTS)), st.integers(0, 400), st.integers(0, 20), st.binary(max_size=3), st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_damage_to_a_file_is_still_read_or_a_users_error(tmp_path_factory, layout, at, length, instead, packed):
    data = LAYOUTS[layout].encode()
    data = gzip.compress(data) if packed else data
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(data[:at] + instead + data[at + length :])
    try:
        read(path)
    except UserError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


# ---------------------------------------------------------------------------------------------------------------------
# What is written reads back equal, and costs no memory

MESSAGES = st.builds(
    lambda start, turns: start + turns,
    st.lists(st.builds(system, st.text()), max_size=1),
    st.lists(
        st.builds(user, st.text()) | st.builds(assistant, st.text())
        | st.builds(assistant, st.text(), train=st.booleans(), reasoning_content=st.text()),
        min_size=1, max_size=4,
    ),
)  # fmt: skip
CONVERSATIONS = st.lists(st.fixed_dictionaries({"messages": MESSAGES}), min_size=1, max_size=5)


@given(CONVERSATIONS, st.booleans())
@settings(max_examples=50, deadline=None)
def test_conversations_read_back_equal_from_every_layout(tmp_path_factory, conversations, escaped):
    def dumps(value, indent=None):
        return json.dumps(value, ensure_ascii=escaped, indent=indent)

    path = tmp_path_factory.getbasetemp() / "written"
    for text in (
        "".join(dumps(conversation) + "\n" for conversation in conversations),
        dumps(conversations, indent=2),
        "".join(map(dumps, conversations)),
        "\n".join(dumps(conversation, indent=2) for conversation in conversations),
    ):
        path.write_bytes(text.encode())
        assert read(path) == conversations


def resident():
    """Bytes of memory that this process has in use."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_json_lines_are_read_at_random_without_the_file_in_memory(tmp_path):
    path, count = tmp_path / "large.jsonl", 30_000
    with open(path, "w") as file:
        for number in range(count):
            file.write(json.dumps(row(f"question {number} " + "x" * 900, f"answer {number}")) + "\n")
    assert path.stat().st_size > 29e6

    before = resident()
    records = TextRecords(str(path))
    assert resident() - before < 5e6

    tracemalloc.start()
    try:
        records = TextRecords(str(path))
        for number in random.Random(1).sample(range(count), 1000):
            assert records[number]["messages"][1]["content"] == f"answer {number}"
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5e6
    assert len(records) == count and records.where(count - 1) == f"{path}: record {count} (line {count})"
