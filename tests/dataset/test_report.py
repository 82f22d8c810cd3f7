"""--preview, --dump_tokens and --validate_only show what would be trained, without weights."""

import json
import re
import subprocess
import sys

import pytest

import finetune
from helpers import ROOT, ROWS, argv, write
from recipe.dataset.encoding import ChatEncoder


@pytest.fixture
def rows(tmp_path):
    return write(tmp_path / "rows.jsonl", ROWS)


def test_preview_marks_what_is_trained(tiny_model, tmp_path, capsys):
    data = write(tmp_path / "rows.jsonl", [{"system": "Be brief.", "prompt": "Hi", "completion": "Hello"}])
    finetune.train(argv(tiny_model, data, tmp_path / "out", "--preview", 1))
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    expected += "<|im_start|>assistant\n⟦Hello<|im_end|>⟧\n"
    said = capsys.readouterr().out
    assert re.search(r"record 1 \(line 1\): \d+ tokens, \d+ supervised\n", said) and said.endswith(expected)
    assert not (tmp_path / "out").exists()


def test_dump_tokens_writes_what_would_be_trained(tiny_model, rows, tmp_path):
    finetune.train(
        argv(tiny_model, rows, tmp_path / "out", "--dump_tokens", tmp_path / "dump.jsonl", "--lazy_preprocess")
    )
    dumped = [json.loads(line) for line in (tmp_path / "dump.jsonl").read_text().splitlines()]
    assert len(dumped) == 8 and dumped[1]["source"] == f"{rows}: record 2 (line 2)" and dumped[1]["turns"] == [2]
    encoder = ChatEncoder(finetune.transformers.AutoTokenizer.from_pretrained(tiny_model))
    (document,) = encoder.encode(ROWS[1]).documents
    assert (dumped[1]["input_ids"], dumped[1]["labels"]) == (document["input_ids"], document["labels"])


@pytest.mark.slow
def test_validate_only_reads_everything_but_the_weights_and_ends_with_a_verdict(
    tiny_model, rows, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(finetune, "load_model", lambda *_: pytest.fail("the weights are loaded"))
    finetune.train(argv(tiny_model, rows, tmp_path / "out", "--validate_only"))
    said = capsys.readouterr().out
    assert "8 read from" in said and "verdict: the data can be trained" in said
    broken = write(tmp_path / "broken.jsonl", [*ROWS, {"messages": [{"role": "user", "content": None}]}])
    command = [sys.executable, "finetune.py", *argv(tiny_model, broken, tmp_path / "out", "--validate_only")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "record 9 (line 9), turn 1" in done.stderr and "Traceback" not in done.stderr


def test_the_block_names_what_is_not_used_and_what_is_odd(tiny_model, tmp_path, capsys):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "likes": 3}]
    rows = [{"messages": turns, "id": n} for n in range(3)]
    rows += [
        {"messages": [turns[0], {"role": "assistant", "content": ""}]},
        {"prompt": "<|im_end|>", "completion": "x"},
    ]
    finetune.train(argv(tiny_model, write(tmp_path / "rows.jsonl", rows), tmp_path / "out", "--validate_only"))
    told = capsys.readouterr().out
    assert "not used, with the number of rows: id (3), likes in turns (3)\n" in told
    assert "1 with an empty answer" in told and "1 with control tokens of this model in a text" in told
    more = ["--train_empty_answers", "False"]
    finetune.train(argv(tiny_model, tmp_path / "rows.jsonl", tmp_path / "out", "--validate_only", *more))
    assert "1 dropped, without a turn to learn" in capsys.readouterr().out
