"""What --data_path takes: files, folders, patterns, datasets of the hub, and entries with a choice of rows."""

import json
import os

import datasets
import numpy as np
import pytest
import torch
import transformers

from helpers import history, parse, write
from recipe.console import UserError
from recipe.dataset.conversations import Conversations, hold_out
from recipe.dataset.encoding import ChatEncoder
from recipe.dataset.mixing import Mixture
from recipe.dataset.sources import Source, parse_columns, parse_sources


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows(*names):
    return [{"prompt": name, "completion": "x"} for name in names]


def read(*sources):
    return [conversation["messages"][0]["content"] for conversation in Conversations(sources)]


def refusal(source):
    with pytest.raises(UserError) as error:
        list(Conversations([source]))
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text
    return text


@pytest.fixture
def folder(tmp_path):
    """A folder of shards of several kinds, with another folder in it."""
    folder = tmp_path / "shards"
    (folder / "more").mkdir(parents=True)
    write(folder / "part-1.jsonl", rows("a", "b"))
    (folder / "part-2.json").write_text(json.dumps(rows("c")))
    datasets.Dataset.from_list(rows("d")).to_parquet(folder / "part-3.parquet")
    (folder / "more" / "part-4.csv").write_text("prompt,completion\ne,x\n")
    (folder / "more" / "part-5.tsv").write_text("prompt\tcompletion\nf, g\tx\n")
    (folder / ".hidden.jsonl").write_text("no record")
    return folder


def test_a_folder_is_all_its_data_files_in_order(folder):
    assert read(str(folder)) == read(f"{folder}/") == ["a", "b", "c", "d", "e", "f, g"]
    assert Conversations([str(folder)]).left_out == []


def test_what_is_left_out_of_a_folder_is_said(folder):
    (folder / "README.md").write_text("# Shards")
    (folder / "dataset_info.json").write_text("{}")
    write(folder / "test.jsonl", rows("t"))
    (folder / "validation").mkdir()
    write(folder / "validation" / "0.jsonl", rows("v"))
    conversations = Conversations([str(folder)])
    assert len(conversations) == 6
    assert conversations.left_out == [
        f"{folder}: left out 1 of the split test, the first is {folder}/test.jsonl",
        f"{folder}: left out 1 of the split validation, the first is {folder}/validation/0.jsonl",
        f"{folder}: left out 2 that are no data, the first is {folder}/README.md",
    ]
    assert read(Source(str(folder), split="test")) == ["t"] and read(Source(str(folder), split="validation")) == ["v"]


def test_a_folder_without_data_for_training_is_refused_with_what_it_has(tmp_path):
    assert "the folder has no data file of the split 'train'; expected .json, .jsonl, " in refusal(str(tmp_path))
    write(tmp_path / "test-1.jsonl", rows("t"))
    assert "its files are of the splits test: name one as split." in refusal(str(tmp_path))


def test_patterns_are_expanded_only_where_no_file_has_that_name(tmp_path, monkeypatch):
    for name in ("a1.jsonl", "a2.jsonl", "b1.jsonl"):
        write(tmp_path / name, rows(name))
    assert read(f"{tmp_path}/a*.jsonl") == ["a1.jsonl", "a2.jsonl"]
    assert read(f"{tmp_path}/[ab]1.jsonl") == ["a1.jsonl", "b1.jsonl"]
    write(tmp_path / "[ab]1.jsonl", rows("literal"))
    assert read(f"{tmp_path}/[ab]1.jsonl") == ["literal"]
    assert "no such file" in refusal(f"{tmp_path}/c*.jsonl")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("~/a1.jsonl") == ["a1.jsonl"] and read("~/a?.jsonl") == ["a1.jsonl", "a2.jsonl"]
    (tmp_path / "deep" / "er").mkdir(parents=True)
    write(tmp_path / "deep" / "er" / "c.jsonl", rows("deep"))
    assert read(f"{tmp_path}/deep/**/*.jsonl") == ["deep"]


@pytest.mark.parametrize("name", ["run[1].parquet", "run*.parquet", "run [x].csv", "a?.arrow", "run{1}.tsv"])
def test_a_path_to_a_table_is_no_pattern(tmp_path, name):
    path = tmp_path / "b [c]" / name
    path.parent.mkdir()
    table = datasets.Dataset.from_list(rows("a"))
    if name.endswith(".parquet"):
        table.to_parquet(path)
    elif name.endswith(".arrow"):
        table.save_to_disk(tmp_path / "saved")
        os.rename(tmp_path / "saved" / "data-00000-of-00001.arrow", path)
    else:
        table.to_csv(path, sep="\t" if name.endswith(".tsv") else ",", index=False)
    assert read(str(path)) == ["a"]


def test_tables_are_known_by_their_beginning_too(tmp_path):
    import pyarrow

    datasets.Dataset.from_list(rows("a")).to_parquet(tmp_path / "rows")
    assert read(str(tmp_path / "rows")) == ["a"]
    table = pyarrow.table({"prompt": ["b"], "completion": ["x"]})
    with pyarrow.OSFile(str(tmp_path / "other"), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    assert read(str(tmp_path / "other")) == ["b"]


def test_csv_files_may_be_compressed(tmp_path):
    import gzip

    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(b"prompt,completion\na,007\n"))
    assert list(Conversations([str(tmp_path / "rows.csv.gz")]))[0]["messages"][1]["content"] == "007"


def test_a_folder_that_save_to_disk_wrote(tmp_path):
    both = datasets.DatasetDict(train=datasets.Dataset.from_list(rows("a")), test=datasets.Dataset.from_list(rows("t")))
    both["train"].save_to_disk(tmp_path / "one")
    both.save_to_disk(tmp_path / "both")
    assert read(str(tmp_path / "one")) == read(str(tmp_path / "both")) == ["a"]
    assert read(Source(str(tmp_path / "both"), split="test")) == ["t"]
    assert "has no split 'dev'; it has train, test: name one" in refusal(Source(str(tmp_path / "both"), split="dev"))
    assert "is one dataset without splits; leave out split 'test'" in refusal(
        Source(str(tmp_path / "one"), split="test")
    )


@pytest.fixture
def clone(tmp_path):
    """A folder as the hub has it, with two configurations, one of which has no split named train."""
    clone = tmp_path / "owner" / "Set-2.5"
    clone.mkdir(parents=True)
    write(clone / "one.jsonl", rows("1"))
    write(clone / "sft.jsonl", rows("2"))
    write(clone / "gen.jsonl", rows("3"))
    (clone / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_files:\n  - split: train\n    path: one.jsonl\n- config_name: large\n"
        "  data_files:\n  - split: train_sft\n    path: sft.jsonl\n  - split: train_gen\n    path: gen.jsonl\n---\n"
    )
    return str(clone)


def test_configurations_and_splits_are_named_or_listed(clone):
    assert read(Source(clone, name="small")) == ["1"]
    assert read(Source(clone, name="large", split="train_gen")) == ["3"]
    assert "it has the splits train_sft, train_gen: choose one with split." in refusal(Source(clone, name="large"))
    assert "it has the configurations small, large: choose one with name." in refusal(Source(clone, name="huge"))


@pytest.mark.parametrize("name", ["teknium/OpenHermes-2.5", "owner/name.v1.0", "owner/name"])
def test_a_name_with_dots_is_looked_for_on_the_hub(name):
    assert refusal(name).startswith(f"{name}: cannot be loaded (")
    assert "no such file" in refusal(f"{name}.jsonl")


# ----------------------------------------------------------------------------------------------------------------------
# Entries


def test_entries_of_a_config_file_choose_rows_and_name_columns(tmp_path):
    write(tmp_path / "a.jsonl", rows("a", "b", "c"))
    write(tmp_path / "b.jsonl", [{"ask": name, "reply": "x"} for name in "de"])
    columns = {"prompt": "ask", "completion": "reply"}
    entries = [json.dumps({"path": str(tmp_path / "a.jsonl"), "rows": 2}),
               json.dumps({"path": str(tmp_path / "b.jsonl"), "columns": columns})]  # fmt: skip
    sources = parse_sources(entries)
    assert read(*sources) == ["a", "b", "d", "e"]
    conversations = Conversations(sources)
    assert conversations.where(2) == f"{tmp_path}/b.jsonl: record 1 (line 1)"
    train, held_out = hold_out(sources, 0.5, 1)
    assert sorted(c["messages"][0]["content"] for part in (train, held_out) for c in part) == ["a", "b", "d", "e"]
    (only,) = parse_sources([str(tmp_path / "b.jsonl")], ["prompt=ask", "completion=reply"])
    assert read(only) == ["d", "e"] and parse_columns([json.dumps(columns)]) == columns


def test_rows_are_counted_over_all_files_of_a_folder(folder):
    for count in (1, 3, 5):
        assert read(Source(str(folder), rows=count)) == ["a", "b", "c", "d", "e", "f, g"][:count]
    assert len(read(Source(str(folder), rows=99))) == 6


def test_the_fingerprint_changes_with_every_field_of_a_source(tmp_path):
    write(tmp_path / "a.jsonl", [{**row, "system": "S"} for row in rows("a", "b")])
    path = str(tmp_path / "a.jsonl")
    variants = [Source(path), Source(path, rows=1), Source(path, columns={"context": "system"})]
    assert len({Conversations([source]).fingerprint() for source in variants}) == 3


@pytest.mark.parametrize(
    "entry, told",
    [
        ('{"path": "a", "weigth": 2}', "unknown field 'weigth'"), ('{"name": "a"}', "has no path"),
        ('{"path": "a", "rows": "many"}', "rows must be a number of rows, found 'many'"),
        ('{"path": "a", "rows": 0}', "rows must be at least 1"), ('{"path": "a"', "not valid JSON"),
        ('{"path": "a", "columns": {"promt": "b"}}', "--columns promt=b: unknown field 'promt'; did you mean prompt?"),
    ],
)  # fmt: skip
def test_a_malformed_entry_is_one_sentence(entry, told):
    with pytest.raises(UserError, match="^--(data_path|columns) ") as error:
        parse_sources([entry])
    assert told in str(error.value)


def test_malformed_columns_are_one_sentence():
    with pytest.raises(UserError, match="^--columns prompt: expected the form prompt=question"):
        parse_columns(["prompt"])
    with pytest.raises(UserError, match="did you mean completion"):
        parse_columns(["completoin=reply"])


def test_a_file_has_no_split(tmp_path):
    write(tmp_path / "a.jsonl", rows("a"))
    assert "is a file, which has no split and no configuration" in refusal(
        Source(str(tmp_path / "a.jsonl"), split="test")
    )


def test_run_yaml_holds_entries_and_columns(tmp_path):

    write(tmp_path / "a.jsonl", rows("a", "b"))
    (tmp_path / "run.yaml").write_text(
        f"model_name_or_path: none\ndata_path:\n- path: {tmp_path}/a.jsonl\n  rows: 1\n- {tmp_path}/a.jsonl\n"
        "columns:\n  prompt: prompt\n  completion: completion\n"
    )
    _, data_args, _, _ = parse([str(tmp_path / "run.yaml")])
    assert read(*parse_sources(data_args.data_path, data_args.columns)) == ["a", "a", "b"]
    (tmp_path / "run.yaml").write_text(f"model_name_or_path: none\ndata_path: {{path: {tmp_path}/a.jsonl, rows: 1}}\n")
    _, data_args, _, _ = parse([str(tmp_path / "run.yaml")])
    assert read(*parse_sources(data_args.data_path, data_args.columns)) == ["a"]


# ----------------------------------------------------------------------------------------------------------------------
# Weights


@pytest.mark.parametrize(
    "sizes, weights", [((10, 100), (0.7, 0.3)), ((5, 5, 7), (1, 2, 4)), ((3, 1000), (1, 1)), ((4,), (2,))]
)
def test_an_epoch_takes_rows_by_weight_and_none_again_before_its_source_is_used_up(sizes, weights):
    source_of_row = np.concatenate([np.full(size, number) for number, size in enumerate(sizes)])
    mixture, total = Mixture(source_of_row, weights, "abc"[: len(sizes)]), sum(sizes)
    seen = [[] for _ in sizes]
    for epoch in range(6):
        order = mixture.order(epoch, seed=1)
        assert order.dtype == torch.int64 and len(order) == total and order.tolist() == mixture.order(epoch, 1).tolist()
        for row in order.tolist():
            seen[source_of_row[row]].append(row)
    for number, weight in enumerate(weights):
        assert abs(len(seen[number]) / (6 * total) - weight / sum(weights)) < 1 / total
        times = np.bincount(seen[number], minlength=total)[source_of_row == number]
        assert times.max() - times.min() <= 1
    assert mixture.order(0, 1).tolist() != mixture.order(1, 1).tolist() != mixture.order(1, 2).tolist()


def weighted(tmp_path, *, weights=(3, 1), counts=(8, 24)):
    entries = []
    for name, weight, count in zip("ab", weights, counts, strict=True):
        path = write(
            tmp_path / f"{name}.jsonl",
            [{"prompt": f"{name}{n}", "completion": f"{n} " * (n % 5 + 1)} for n in range(count)],
        )
        entries.append(json.dumps({"path": str(path), "weight": weight}))
    return entries


def train(tiny_model, out, *more):
    import finetune

    words = ["--model_name_or_path", tiny_model, "--output_dir", out, "--per_device_train_batch_size", 4, "--max_steps", 12,
             "--logging_steps", 1, "--bf16", False, "--use_lora", "--lora_dropout", 0, "--disable_tqdm", True]  # fmt: skip
    finetune.train([str(word) for word in [*words, *more]])
    return history(out, "loss")


@pytest.mark.slow
def test_a_weighted_run_goes_on_after_a_resume_as_an_unbroken_one(tiny_model, tmp_path, capsys):
    data = ["--data_path", *weighted(tmp_path)]
    whole = train(tiny_model, tmp_path / "whole", *data, "--save_strategy", "no")
    told = capsys.readouterr().out
    assert f"{tmp_path}/a.jsonl: 8 rows, " in told and "weight 3: 24 rows an epoch (3.00 times each)" in told
    assert "weight 1: 8 rows an epoch (0.33 times each)" in told
    part = [*data, "--save_steps", 6, "--save_strategy", "steps"]  # an epoch has 8
    train(tiny_model, tmp_path / "part", *part)
    resume = ["--resume_from_checkpoint", tmp_path / "part" / "checkpoint-6"]
    assert train(tiny_model, tmp_path / "part", *part, *resume) == pytest.approx(whole, rel=1e-6)
    with pytest.raises(UserError, match="the data changed"):
        train(tiny_model, tmp_path / "part", *part[3:], "--data_path", *weighted(tmp_path, weights=(1, 1)), *resume)


@pytest.mark.parametrize("lazy", [[], ["--lazy_preprocess"]])
def test_eager_lazy_and_packed_rows_are_drawn_by_weight(tiny_model, tmp_path, monkeypatch, lazy):
    import finetune
    from recipe.dataset import mixing, packing, tokenised

    monkeypatch.setattr(tokenised, "SCAN", 5)
    words = ["--model_name_or_path", str(tiny_model), "--data_path", *weighted(tmp_path), *lazy]
    words += ["--model_max_length", "256"]
    _, data_args, training_args, _ = parse(words)
    encoder = ChatEncoder(transformers.AutoTokenizer.from_pretrained(tiny_model))
    dataset, _ = finetune.make_datasets(data_args, training_args, encoder)
    for epoch in (0, 1):
        rows = [dataset.conversations[dataset.numbers()[row]] for row in mixing.epoch_order(dataset, epoch, 7).tolist()]
        assert [row["messages"][0]["content"][0] for row in rows].count("a") == 24 and len(rows) == 32
    if not lazy:
        packed = packing.PackedDataset(dataset, 256, seed=7)
        items = sorted(item for pack in packed.packs for item, _ in pack)
        assert items == sorted(dataset.mixture.order(0, 7).tolist())
        assert packed.held == sum(len(document["input_ids"]) for pack in packed for document in pack)


@pytest.mark.parametrize(
    "more, told",
    [
        (["--train_sampling_strategy", "sequential"], "has weights, by which rows are drawn at random"),
        (["--eval_data_path", '{"path": "x", "weight": 1}'], "--eval_data_path: has weights"),
        (
            ["--data_path", '{"path": "x", "weight": 1}', "y"],
            "--data_path y: has no weight, while other entries have one",
        ),
        (["--data_path", '{"path": "x", "weight": 0}'], "weight must be above 0"),
        (["--data_path", '{"path": "x", "weight": "much"}'], "weight must be a number, found 'much'"),
    ],
)
def test_weights_that_have_no_meaning_are_told_before_anything_is_read(more, told):

    words = ["--model_name_or_path", "none", "--data_path", '{"path": "x", "weight": 1}', '{"path": "y", "weight": 1}']
    with pytest.raises(UserError) as error:
        parse([*words, *more])
    assert told in str(error.value)


def test_a_source_of_which_no_row_is_left_is_told(tmp_path):
    with pytest.raises(UserError, match="b.jsonl: has a weight and no row that can be used"):
        Conversations(parse_sources(weighted(tmp_path))).mixture(range(8))
