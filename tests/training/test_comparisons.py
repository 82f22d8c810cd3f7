"""eval.py --report and compare_runs: models and runs side by side, on pages without a network."""

import json
import sys

import pytest

import eval as evaluation
import finetune
from helpers import ROWS, Page, argv, history, write
from recipe.console import UserError
from recipe.training import compare_runs


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    data = write(folder / "rows.jsonl", ROWS)
    outs = folder / "small & slow", folder / "large"
    for out, rank in zip(outs, (2, 16), strict=True):
        finetune.train(argv(tiny_model, data, out, "--use_lora", "--lora_r", rank, "--eval_data_path", data))
    return [*map(str, outs)], data


def test_runs_are_compared_in_a_table_and_in_one_picture(runs, tmp_path, capsys, monkeypatch):
    (first, second), _ = runs
    path = tmp_path / "compared.html"
    monkeypatch.setattr(sys, "argv", ["compare_runs", first, second, "--report", str(path)])
    capsys.readouterr()
    compare_runs.main()
    lines = capsys.readouterr().out.splitlines()
    for out, line in zip((first, second), lines[2:], strict=True):
        assert line.startswith(f"| {out} | {min(history(out, 'eval_loss')):.5g} | 6 |")
    page = path.read_text()
    parsed = Page(page)
    assert not parsed.opened and not {"script", "link", "img"} & set(parsed.tags)
    assert "<td>--lora_r</td><td>2</td><td>16</td>" in page and "--num_train_epochs" not in page
    assert page.count("small &amp; slow") >= 3  # in the title, the table and the picture


def test_a_folder_without_a_run_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"run\.json: cannot be read \(No such file"):
        compare_runs.read(str(tmp_path))
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(UserError, match=r"run\.json: cannot be read \(it has no evaluations\)"):
        compare_runs.read(str(tmp_path))


def test_answers_of_models_stand_side_by_side(runs, tmp_path, capsys):
    (first, second), data = runs
    path = tmp_path / "answers.html"
    words = ["--model_name_or_path", first, second, "--data_path", data, "--max_new_tokens", 3, "--report", path]
    words += ["--output", tmp_path / "answers.jsonl"]
    evaluation.run(evaluation.parse([*map(str, words)]))
    page = path.read_text()
    assert not Page(page).opened
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert page.count("<tr>") == 3 + 1 + len(ROWS) == 4 + len(answers) / 2
    assert "<td>say three</td><td>threethree</td>" in page


def test_a_file_that_cannot_be_written_is_named_before_a_model_is_loaded(runs):
    (first, _), data = runs
    for flag in ("--output", "--report"):
        unused = data.parent / f"unused{flag}"
        with pytest.raises(UserError, match="no/such.*cannot be loaded"):
            words = ["--model_name_or_path", "no/such/model", "--data_path", str(data), flag, str(unused)]
            evaluation.run(evaluation.parse(words))
        assert not unused.exists()
        words = ["--model_name_or_path", "no/such", "--data_path", str(data), flag, "/no/such/folder/x"]
        with pytest.raises(UserError, match="/no/such/folder/x: cannot be written"):
            evaluation.run(evaluation.parse(words))
