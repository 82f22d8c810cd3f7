"""Conversations -> rows of tokens: what fits, what is dropped, and a cache that is never stale."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from transformers import AutoTokenizer

import finetune
from helpers import ROOT, ROWS, write
from recipe.console import UserError
from recipe.dataset import report, tokenised
from recipe.dataset.conversations import Conversations
from recipe.dataset.encoding import ChatEncoder, Note
from recipe.dataset.tokenised import Dropped, Tokeniser


@pytest.fixture
def rows(tmp_path):
    return write(tmp_path / "rows.jsonl", ROWS)


def datasets_of(tokenizer, path, **options):
    for kind in (finetune.SupervisedDataset, finetune.LazySupervisedDataset):
        yield kind(Conversations([str(path)]), ChatEncoder(tokenizer), **{"max_length": 512, **options})


@pytest.mark.parametrize("overlong", ["drop", "truncate"])
def test_eager_and_lazy_datasets_hold_the_same_rows(qwen, tmp_path, overlong):
    turn = [{"from": "human", "value": "again " * 20}, {"from": "gpt", "value": "and again"}]
    rows = [{"conversations": turn * count} for count in range(1, 9)] + ROWS
    eager, lazy = datasets_of(qwen, write(tmp_path / "rows.jsonl", rows), max_length=100, overlong=overlong)
    assert [eager[i] for i in range(len(eager))] == [lazy[i] for i in range(len(lazy))]
    assert len(eager) == (16 if overlong == "truncate" else 10)
    assert (eager.kept, eager.dropped, eager.tokens, eager.supervised) == (
        lazy.kept,
        lazy.dropped,
        lazy.tokens,
        lazy.supervised,
    )


def test_rows_keep_their_order_however_many_parts_are_tokenised_at_once(qwen, tmp_path, monkeypatch):
    rows = [{"prompt": f"number {n}", "completion": f"{n} " * (n % 7 + 1)} for n in range(100)]
    path = write(tmp_path / "rows.jsonl", rows)
    whole, _ = datasets_of(qwen, path)
    monkeypatch.setattr(tokenised, "BATCH", 3)
    parts, _ = datasets_of(qwen, path, max_length=511)  # another length: not the rows of the cache
    assert [whole[i] for i in range(100)] == [parts[i] for i in range(100)]


def test_a_large_file_is_tokenised_by_several_processes_to_the_same_rows(qwen, tmp_path, monkeypatch):
    rows = [{"prompt": f"number {n}", "completion": f"{n} " * (n % 7 + 1)} for n in range(100)]
    path = write(tmp_path / "rows.jsonl", rows)
    monkeypatch.setattr(tokenised, "BATCH", 10)
    alone, _ = datasets_of(qwen, path)
    monkeypatch.setattr(tokenised, "SHARE", 30)
    together, _ = datasets_of(qwen, path, max_length=511)
    assert [len(dataset.rows.cache_files) for dataset in (alone, together)] == [1, min(3, os.cpu_count())]
    assert [alone[i] for i in range(100)] == [together[i] for i in range(100)]
    monkeypatch.setattr(tokenised, "SHARE", 5000)
    monkeypatch.setattr(ChatEncoder, "encode_batch", None)  # these rows are there
    again = finetune.SupervisedDataset(Conversations([str(path)]), ChatEncoder(qwen), max_length=511)
    assert [again[i] for i in range(100)] == [alone[i] for i in range(100)]


@pytest.mark.parametrize("bad", [[91], [6, 53], [48, 53, 91]])
def test_the_first_bad_row_is_named_however_many_processes_find_one(qwen, tmp_path, monkeypatch, bad):
    rows = [{"messages": 1} if n + 1 in bad else ROWS[0] for n in range(100)]
    path = write(tmp_path / "rows.jsonl", rows)
    sentences = []
    for batch, share in ((100, 5000), (10, 30)):
        monkeypatch.setattr(tokenised, "BATCH", batch)
        monkeypatch.setattr(tokenised, "SHARE", share)
        with pytest.raises(UserError, match=f"rows.jsonl: record {bad[0]} ") as error:
            finetune.SupervisedDataset(Conversations([str(path)]), ChatEncoder(qwen), max_length=512)
        sentences.append(str(error.value))
    assert sentences[0] == sentences[1]


def test_a_process_that_the_system_ends_is_one_sentence(qwen, tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", [ROWS[0]] * 100)
    monkeypatch.setattr(tokenised, "BATCH", 10)
    monkeypatch.setattr(tokenised, "_processes", lambda conversations: 2)
    monkeypatch.setattr(ChatEncoder, "encode_batch", lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(
        UserError, match="by 2 processes: One of the subprocesses has abruptly died.*set --lazy_preproc"
    ):
        tokenised.cached_rows(Tokeniser(Conversations([str(path)]), ChatEncoder(qwen), 512))


PROGRAM = """
import sys, time
from transformers import AutoTokenizer
from recipe import signals
from recipe.dataset import tokenised
from recipe.dataset.conversations import Conversations
from recipe.dataset.encoding import ChatEncoder

signals.watch()
tokenised.BATCH, tokenised.SHARE = 10, 30
encode_batch = ChatEncoder.encode_batch
ChatEncoder.encode_batch = lambda *args: time.sleep(3) or encode_batch(*args)
encoder = ChatEncoder(AutoTokenizer.from_pretrained(sys.argv[1]))
tokenised.cached_rows(tokenised.Tokeniser(Conversations([sys.argv[2]]), encoder, 512))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_that_tokenises_outlives_the_program(small_tokenizer, tmp_path, number):
    path = write(tmp_path / "rows.jsonl", [ROWS[0]] * 100)
    program = subprocess.Popen([sys.executable, "-c", PROGRAM, small_tokenizer, path], cwd=ROOT)
    try:
        while len(helping := psutil.Process(program.pid).children()) < 2:
            time.sleep(0.1)
            assert program.poll() is None
    finally:
        program.send_signal(number)
    assert program.wait(10) == (143 if number == signal.SIGTERM else -number)
    assert not psutil.wait_procs(helping, timeout=10)[1]


def test_truncation_ends_after_a_whole_turn_with_its_stop_token(qwen, tmp_path):
    turn = [{"from": "human", "value": "again " * 20}, {"from": "gpt", "value": "and again"}]
    path = write(tmp_path / "rows.jsonl", [{"conversations": turn * 5}])
    for dataset in datasets_of(qwen, path, max_length=100, overlong="truncate"):
        ((document,),) = [dataset[i] for i in range(len(dataset))]
        assert len(document["input_ids"]) <= 100 and document["turns"] == [2, 4]
        assert document["labels"][-1] == qwen.convert_tokens_to_ids("<|im_end|>")
        assert dataset.notes == {Note.CUT: 1}


def test_overlong_rows_can_be_an_error_that_names_the_row(qwen, tmp_path):
    path = write(tmp_path / "rows.jsonl", [ROWS[0], {"prompt": "long " * 300, "completion": "x"}])
    with pytest.raises(UserError, match=r"record 2 \(line 2\): \d+ tokens, expected at most 100"):
        list(datasets_of(qwen, path, max_length=100, overlong="error"))


def test_no_row_left_is_an_error_with_the_reasons(qwen, rows):
    with pytest.raises(UserError, match="no row is left to use: 8 longer than 3 tokens"):
        list(datasets_of(qwen, rows, max_length=3))


def test_a_second_run_opens_the_tokens_of_the_first_and_a_changed_file_is_tokenised_again(qwen, tmp_path, monkeypatch):
    calls = []
    encode = ChatEncoder.encode_batch
    monkeypatch.setattr(
        ChatEncoder, "encode_batch", lambda self, batch: calls.append(len(batch)) or encode(self, batch)
    )
    path = write(tmp_path / "rows.jsonl", ROWS)
    make = lambda: finetune.SupervisedDataset(Conversations([str(path)]), ChatEncoder(qwen), 512)  # noqa: E731
    first, second = make(), make()
    assert calls == [8] and [first[i] for i in range(8)] == [second[i] for i in range(8)]
    write(path, ROWS[:5])
    assert len(make()) == 5 and calls == [8, 5]


def test_a_lazy_dataset_tokenises_no_more_than_its_first_rows_and_those_asked_for(qwen, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenised, "SCAN", 3)
    path = write(tmp_path / "rows.jsonl", [*ROWS[:5], {"prompt": "long " * 300, "completion": "x"}, *ROWS[5:]])
    calls = []
    encode = ChatEncoder.encode_batch
    monkeypatch.setattr(
        ChatEncoder, "encode_batch", lambda self, batch: calls.append(len(batch)) or encode(self, batch)
    )
    dataset = finetune.LazySupervisedDataset(Conversations([str(path)]), ChatEncoder(qwen), 100)
    assert (calls, len(dataset), dataset.examined) == ([3], 9, 3)
    assert dataset[4] == encode(dataset.tokeniser.encoder, [ROWS[4]])[0].documents
    assert dataset[5] == dataset[6]  # the long one gives its place to the next


def test_reasons_for_dropping_are_told_apart(qwen, tmp_path):
    rows = [*ROWS, {"prompt": "long " * 300, "completion": "x"}, {"messages": [{"role": "user", "content": "alone"}]}]
    for dataset in datasets_of(qwen, write(tmp_path / "rows.jsonl", rows), max_length=100):
        assert dataset.dropped == {Dropped.TOO_LONG: [8], Dropped.NOTHING_TO_LEARN: [9]}
        assert Dropped.TOO_LONG.words(100) == "longer than 100 tokens"


def test_bad_rows_are_errors_or_are_skipped_counted_and_listed(qwen, tmp_path):
    bad = [
        '{"messages": [',
        '{"messages": [{"role": "user"}]}',
        '{"prompt": "a", "completion": 5}',
        '{"chosen": 1, "rejected": 2}',
    ]
    good = [json.dumps(row) for row in ROWS]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([bad[0], *good[:3], bad[1], bad[2], *good[3:], bad[3]]))
    with pytest.raises(UserError, match=r"record 1 \(line 1\): not valid JSON"):
        list(datasets_of(qwen, path))
    for dataset in datasets_of(qwen, path, on_bad_row="skip"):
        assert dataset.dropped == {Dropped.BAD: [0, 4, 5, 11]} and len(dataset) == 8
        for number, problem in zip((1, 5, 6, 12), dataset.problems, strict=True):
            assert f"record {number} (line {number})" in problem
        told = report.rows(dataset)
        assert f"12 read from {path} (messages)" in told and "4 dropped, with an error (--on_bad_row skip): " in told
        assert all(problem in told for problem in dataset.problems)


def test_a_conversation_that_the_template_refuses_is_a_bad_row(tokenizer_of, tmp_path):
    rows = [*ROWS[:2], {"messages": [{"role": "user", "content": "a"}] * 2 + ROWS[0]["messages"][1:]}, *ROWS[2:]]
    path = write(tmp_path / "rows.jsonl", rows)
    for dataset in datasets_of(tokenizer_of("gemma"), path, on_bad_row="skip"):
        assert dataset.dropped == {Dropped.BAD: [2]}
        assert "record 3 (line 3): Conversation roles must alternate" in dataset.problems[0]
        assert [dataset[i] for i in range(8)] == [
            row["documents"] for row in dataset.tokeniser.rows([0, 1, 3, 4, 5, 6, 7, 8])
        ]


def test_no_row_left_says_why_the_first_are_bad(qwen, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"messages": []}])
    with pytest.raises(UserError, match="no row is left to use: 1 with an error .*'messages' must be a non-empty list"):
        list(datasets_of(qwen, path, on_bad_row="skip"))


# ----------------------------------------------------------------------------------------------------------------------
# The key of the cache


CUT_ROW = {
    "conversations": [{"from": "human", "value": "again " * 60}, {"from": "gpt", "value": "<think>a</think>b"}] * 5
}


def rows_of(dataset):
    return [dataset.rows[i] for i in range(len(dataset.rows))]


@pytest.mark.parametrize(
    "changed",
    [
        {"thinking": "keep"}, {"train_on": "last_turn"}, {"chat_template": "smollm2"}, {"max_length": 400},
        {"overlong": "truncate"},
    ],
    ids=lambda changed: next(iter(changed)),
)  # fmt: skip
def test_a_changed_setting_never_gets_the_rows_that_another_one_left_in_the_cache(tokenizer_of, tmp_path, changed):
    conversations = Conversations([str(write(tmp_path / "rows.jsonl", [CUT_ROW, *ROWS]))])

    def made(thinking="auto", train_on="all_turns", chat_template="qwen3", max_length=250, overlong="drop"):
        return conversations, ChatEncoder(tokenizer_of(chat_template), train_on, thinking), max_length, overlong

    first, second = finetune.SupervisedDataset(*made()), finetune.SupervisedDataset(*made(**changed))
    assert rows_of(second) == Tokeniser(*made(**changed)).rows(range(9)) != rows_of(first)


def key(tokeniser):
    return json.dumps(tokeniser.fingerprint())


@dataclasses.dataclass(eq=False)
class EncoderWithOneMoreSetting(ChatEncoder):
    more: str = "a"


def test_every_setting_is_in_the_key_also_one_that_is_added_later(small_tokenizer, rows):
    qwen, conversations = AutoTokenizer.from_pretrained(small_tokenizer), Conversations([str(rows)])
    tokeniser = Tokeniser(conversations, ChatEncoder(qwen), 512)
    assert key(tokeniser) == key(Tokeniser(Conversations([str(rows)]), ChatEncoder(qwen), 512))
    for setting in dataclasses.fields(tokeniser):
        if setting.name not in ("conversations", "encoder"):  # which have a fingerprint of their own
            assert key(dataclasses.replace(tokeniser, **{setting.name: "another value"})) != key(tokeniser)
    for kind in (ChatEncoder, EncoderWithOneMoreSetting):
        one, other = (Tokeniser(conversations, kind(qwen), 512) for _ in range(2))
        assert key(one) == key(other)
        for setting in dataclasses.fields(kind):
            if setting.name != "tokenizer":
                other = Tokeniser(conversations, kind(qwen), 512)
                setattr(other.encoder, setting.name, "another value")
                assert key(one) != key(other), setting.name


@pytest.mark.parametrize("library", tokenised.LIBRARIES)
def test_another_version_of_a_library_is_another_key(small_tokenizer, rows, tmp_path, monkeypatch, library):
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(small_tokenizer))
    tokeniser = Tokeniser(Conversations([str(rows)]), encoder, 512)
    before = key(tokeniser)
    installed = tmp_path / f"{library}-0.0.1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {library}\nVersion: 0.0.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert f"{library} 0.0.1" in key(tokeniser) != before


def code_of(folder):
    program = "from recipe.dataset import tokenised; print(tokenised.__file__); print(tokenised.code())"
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True)
    place, _, code = done.stdout.partition("\n")
    assert place.startswith(str(folder))
    return code


def test_the_key_holds_the_code_of_all_modules_of_the_room_and_no_comments(tmp_path):
    shutil.copytree(ROOT / "recipe", tmp_path / "recipe", ignore=shutil.ignore_patterns("__pycache__"))
    folder, codes = tmp_path / "recipe" / "dataset", [code_of(tmp_path)]
    collator = (folder / "collator.py").read_text()
    (folder / "collator.py").write_text(
        "# more\n" + collator.replace("class Collator:\n", "class Collator:\n\n") + "\n# x"
    )
    assert code_of(tmp_path) == codes[0]
    (folder / "a_helper_that_was_moved.py").write_text("SHARE = 1")
    codes.append(code_of(tmp_path))
    (folder / "a_helper_that_was_moved.py").write_text("SHARE = 2")
    codes.append(code_of(tmp_path))
    rendering = (folder / "rendering.py").read_text()
    (folder / "rendering.py").write_text(rendering.replace("IGNORE_INDEX = -100", "IGNORE_INDEX = -101"))
    codes.append(code_of(tmp_path))
    assert len(set(codes)) == 4
