"""The data that ships with the script is what its README says."""

import collections
import json
import shutil
import subprocess
import sys

from helpers import ROOT

DATA = ROOT / "data"


def rows(name):
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def test_the_script_writes_the_files_that_are_there(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "demo").mkdir()
    shutil.copy(ROOT / "demo" / "make_data.py", tmp_path / "demo")
    subprocess.run([sys.executable, str(tmp_path / "demo" / "make_data.py")], check=True, capture_output=True)
    for name in ("train.jsonl", "validation.jsonl"):
        assert (tmp_path / "data" / name).read_bytes() == (DATA / name).read_bytes()


def test_there_are_400_and_60_different_conversations_of_every_kind():
    train, held_out = rows("train.jsonl"), rows("validation.jsonl")
    assert (len(train), len(held_out)) == (400, 60)
    assert len({json.dumps(row) for row in train + held_out}) == 460
    texts = "".join(row["messages"][-2]["content"] for row in train)
    assert all(word in texts for word in ("您好", "Bitte", "souhaite", "Hola"))
    for part in (train, held_out):
        roles = collections.Counter(tuple(message["role"] for message in row["messages"]) for row in part)
        assert set(roles) == {("user", "assistant"), ("system", "user", "assistant"),
                              ("user", "assistant") * 2, ("system", *("user", "assistant") * 2)}  # fmt: skip
        schemas = {tuple(json.loads(row["messages"][-1]["content"])) for row in part}
        assert len(schemas) == 4
        assert any(None in json.loads(row["messages"][-1]["content"]).values() for row in part)


def test_every_answer_is_json_made_of_what_the_conversation_says():
    for row in rows("train.jsonl") + rows("validation.jsonl"):
        said = (
            "".join(m["content"] for m in row["messages"] if m["role"] == "user")
            .replace(".50", ".5")
            .replace(".00", ".0")
        )
        for value in json.loads(row["messages"][-1]["content"]).values():
            assert value is None or str(value) in said.replace(".90", ".9")
