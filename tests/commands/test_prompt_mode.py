"""chat.py and eval.py ask a model as its training did, and flags win over what was saved."""

import io
import json
import sys

import pytest
import torch
from transformers import AutoTokenizer

import chat
import eval as evaluation
import finetune
from helpers import ROWS, argv, history, template, write
from recipe.console import UserError
from recipe.model import loading
from recipe.model.prompt_mode import FILE, PromptMode
from recipe.training import answers
from recipe.training.merging import merge

SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    path = tmp_path_factory.mktemp("template") / "qwen3.jinja"
    path.write_text(template("qwen3"))
    return path


@pytest.fixture(scope="module")
def thoughtful(tiny_model, qwen3, tmp_path_factory):
    """Folder of an adapter trained on thoughts and one system message, and its data."""
    folder = tmp_path_factory.mktemp("thoughtful")
    rows = [
        {"messages": [SYSTEM, user, {**answer, "reasoning_content": "Twice the word."}]}
        for user, answer in (row["messages"] for row in ROWS)
    ]
    data = write(folder / "rows.jsonl", rows)
    more = ["--use_lora", "--chat_template", qwen3, "--eval_data_path", data, "--max_steps", 2]
    finetune.train(argv(tiny_model, data, folder / "out", *more))
    return folder / "out", data


@pytest.fixture(scope="module")
def plain(tiny_model, qwen3, tmp_path_factory):
    """Folder of a fully trained model whose prompts have an empty thought, and its data."""
    folder = tmp_path_factory.mktemp("plain")
    data = write(folder / "rows.jsonl", ROWS)
    more = ["--thinking", "empty", "--chat_template", qwen3, "--eval_data_path", data, "--max_steps", 2]
    finetune.train(argv(tiny_model, data, folder / "out", *more, "--save_strategy", "steps", "--save_steps", 2))
    return folder / "out", data


def measured(capsys, *words):
    capsys.readouterr()
    evaluation.run(evaluation.parse(list(map(str, (*words, "--max_new_tokens", 2)))))
    return capsys.readouterr()


def asked(monkeypatch, model, text, *flags):
    """Prompt ids with which chat.py asks for the answer to `text`."""
    seen, answer = [], answers.answer

    def noting(model, tokenizer, questions, *more, **options):
        seen.extend(question.prompt_ids for question in questions)
        return answer(model, tokenizer, questions, *more, **options)

    monkeypatch.setattr(answers, "answer", noting)
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    chat.talk(chat.parse(["--model_name_or_path", str(model), "--max_new_tokens", "2", *map(str, flags)]))
    return seen


def served(model, messages, **variables):
    tokenizer = AutoTokenizer.from_pretrained(model)
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **variables)


def test_the_mode_lies_beside_all_weights_and_in_a_merged_folder(thoughtful, plain, tmp_path):
    folders = [plain[0], plain[0] / "best", plain[0] / "checkpoint-2"]
    assert [json.loads((folder / FILE).read_text())["thinking"] for folder in folders] == ["empty"] * 3
    merge(str(thoughtful[0]), str(tmp_path / "merged"))
    expected = PromptMode(thoughts=True, system="Be brief.")
    assert PromptMode.read(str(thoughtful[0])) == PromptMode.read(str(tmp_path / "merged")) == expected
    assert PromptMode.read("no/such-model") == PromptMode()


def test_eval_has_the_loss_of_training_and_flags_win(plain, capsys, monkeypatch):
    model, data = plain
    monkeypatch.setattr(loading, "best_dtype", lambda cpu: torch.float32)  # as it was trained, on any CPU
    words = ["--model_name_or_path", model, "--data_path", data]
    loss = json.loads(measured(capsys, *words).out)["eval_loss"]
    assert loss == pytest.approx(history(model, "eval_loss")[-1], abs=1e-5)
    assert abs(json.loads(measured(capsys, *words, "--thinking", "keep").out)["eval_loss"] - loss) > 1e-3


def test_chat_sends_the_prompt_of_training(thoughtful, plain, monkeypatch):
    user = {"role": "user", "content": "say nine"}
    assert asked(monkeypatch, plain[0], "say nine\n") == [served(plain[0], [user], enable_thinking=False)]
    assert asked(monkeypatch, thoughtful[0], "say nine\n") == [
        served(thoughtful[0], [SYSTEM, user], enable_thinking=True)
    ]
    other = ["--system", "Sing.", "--chat_template_kwargs", '{"enable_thinking": false}']
    sung = [{"role": "system", "content": "Sing."}, user]
    assert asked(monkeypatch, thoughtful[0], "say nine\n", *other) == [
        served(thoughtful[0], sung, enable_thinking=False)
    ]


def test_a_server_gets_the_variables_of_the_prompts(thoughtful, plain):
    for (model, _), expected in ((thoughtful, True), (plain, False)):
        mode = PromptMode.read(str(model))
        assert mode.variables(mode.encoder(AutoTokenizer.from_pretrained(model))) == {"enable_thinking": expected}


def test_variables_of_the_records_are_kept_if_all_agree(tiny_model, qwen3, tmp_path):
    rows = [{**row, "chat_template_kwargs": {"enable_thinking": True}} for row in ROWS]
    for name, records in (("same", rows), ("mixed", [*rows[1:], ROWS[0]])):
        words = argv(tiny_model, write(tmp_path / f"{name}.jsonl", records), tmp_path / name, "--max_steps", 1)
        finetune.train([*words, "--use_lora", "--chat_template", str(qwen3)])
    assert PromptMode.read(str(tmp_path / "same")).chat_template_kwargs == {"enable_thinking": True}
    assert PromptMode.read(str(tmp_path / "mixed")).chat_template_kwargs == {}
    (tmp_path / "same" / FILE).write_text("[")
    with pytest.raises(UserError, match=f"{FILE}: cannot be read"):
        PromptMode.read(str(tmp_path / "same"))


def test_chat_refuses_a_conversation_beyond_its_limit(plain, monkeypatch, capsys):
    text = "say nine\nsay " + "long " * 60 + "\nsay one\n"
    assert len(asked(monkeypatch, plain[0], text, "--model_max_length", 60)) == 2
    assert "reaches --model_max_length" in capsys.readouterr().out


def test_eval_counts_what_it_leaves_out_and_compares_models_in_a_table(plain, thoughtful, tmp_path, capsys):
    turns = [{"role": "user", "content": "long " * 300}, {"role": "assistant", "content": "x"}]
    rows = [*ROWS[:2], {"messages": turns}, {"messages": turns[:1]}]
    data, output = write(tmp_path / "rows.jsonl", rows), tmp_path / "answers.jsonl"
    words = ["--data_path", data, "--model_max_length", 100, "--output", output]
    said = measured(capsys, "--model_name_or_path", plain[0], thoughtful[0], *words)
    lines = said.out.splitlines()[-4:]
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == ["model", "exact_match", "valid_json", "eval_loss"]
    for line, model in zip(lines[2:], (plain[0], thoughtful[0]), strict=True):
        alone = json.loads(measured(capsys, "--model_name_or_path", model, *words[:4]).out.splitlines()[-1])
        name, *values = (cell.strip() for cell in line.split("|")[1:-1])
        assert name == str(model) and list(map(float, values)) == pytest.approx(list(alone.values()), abs=1e-4)
        assert f"{model}: 1 of 4 conversations left out, longer than 100 tokens" in said.err
        assert f"{model}: 1 of 4 conversations left out, without an assistant turn to answer" in said.err
    assert "answers:" not in said.err  # a progress bar is for terminals


def test_a_terminal_sees_a_progress_bar(plain, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    measured(capsys, "--model_name_or_path", plain[0], "--data_path", plain[1])
    assert "answers: 100%" in sys.stderr.getvalue() and "loss: 100%" in sys.stderr.getvalue()
