"""Every run explains itself: run.json, the model card, the last lines and report.html say what was done."""

import contextlib
import hashlib
import io
import json
import os
import re
import shlex
import signal

import pytest
import yaml
from huggingface_hub import ModelCard

import chat
import finetune
from helpers import ROWS, Page, argv, history, parse, write
from recipe import signals
from recipe.console import UserError
from recipe.training import checkpoints, model_card
from recipe.training.merging import merge

FILES = {"run.json", "run.yaml", "README.md", "report.html", "loss.png", "prompt_mode.json"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    long = {"messages": [{"role": "user", "content": "long " * 200}, {"role": "assistant", "content": "<&>"}]}
    write(folder / "rows.jsonl", [*ROWS, long])
    write(folder / "more.jsonl", ROWS[:3])
    return folder


@pytest.fixture(scope="module")
def ran(tiny_model, data, tmp_path_factory):
    """(folder, what was printed) of a LoRA run over two files with evaluations, a checkpoint and a secret."""
    out = tmp_path_factory.mktemp("ran") / "my adapter"
    words = argv(tiny_model, data / "rows.jsonl", out, "--use_lora", "--lora_r", 12, "--hub_token", "hf_secret")
    words.insert(words.index("--output_dir"), str(data / "more.jsonl"))
    more = ["--eval_data_path", str(data / "more.jsonl"), "--model_max_length", "120", "--save_steps", "3"]
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setenv("HF_TOKEN", "hf_environment")
        finetune.train([*words, *more, "--save_strategy", "steps"])
    return out, said.getvalue()


def record(out):
    return json.loads((out / "run.json").read_text())


def test_run_json_says_what_was_done_and_what_came_of_it(ran, data, tiny_model):
    out, _ = ran
    facts = record(out)
    assert FILES <= set(os.listdir(out))
    first, second = facts["data"]["training"]
    assert (first["path"], first["rows"]) == (str(data / "rows.jsonl"), 8) and second["rows"] == 3
    assert first["hash"] == "sha256:" + hashlib.sha256((data / "rows.jsonl").read_bytes()).hexdigest()
    (held_out,) = facts["data"]["more"]
    assert held_out["tokens"] == second["tokens"] > 0
    assert facts["tokens"] == 3 * (first["tokens"] + second["tokens"])  # three epochs
    assert 0 < facts["supervised_tokens"] < facts["tokens"]
    losses, evaluated = history(out, "loss"), history(out, "eval_loss")
    assert (facts["first_loss"], facts["last_loss"]) == (losses[0], losses[-1])
    assert [entry["eval_loss"] for entry in facts["evaluations"]] == evaluated and len(evaluated) == 3
    assert facts["best_step"] == json.loads((out / "best" / "metrics.json").read_text())["step"]
    assert (facts["exit_reason"], facts["saved"], facts["steps"]) == ("all steps are done", True, 9)
    assert facts["seconds"] > 0 and facts["peak_memory_gb"] > 0.1 and facts["versions"]["peft"]
    assert re.fullmatch(r"[0-9a-f]{40}( and changes)?", facts["commit"])
    assert facts["base"] == {"name_or_path": str(tiny_model), "revision": None}
    assert facts["arguments"]["lora_r"] == 12 and facts["arguments"]["lora_alpha"] == 16
    assert {"lora_r", "model_max_length"} <= set(facts["set_by_user"]) and "lora_alpha" not in facts["set_by_user"]


def test_nothing_secret_is_written(ran):
    for path in ran[0].rglob("*"):
        if path.suffix in (".json", ".yaml", ".md", ".html"):
            assert "hf_secret" not in path.read_text() and "hf_environment" not in path.read_text(), path


def test_the_record_of_a_run_and_that_of_a_checkpoint_are_not_confused(ran):
    out, _ = ran
    assert checkpoints.record_of(out / "checkpoint-9")["mode"] == "LoRA" and checkpoints.record_of(out) == {}


def test_the_last_lines_and_the_cards_say_how_to_use_these_weights(ran, tiny_model, monkeypatch, capsys):
    out, said = ran
    lines = dict(line.split(": ", 1) for line in said.splitlines()[-6:])
    assert list(lines) == ["saved", "best", "prompts", "chat", "merge", "serve"]
    assert "a LoRA adapter of rank 12" in lines["saved"] and "--thinking auto, no template" in lines["prompts"]
    serve = shlex.split(lines["serve"])
    assert serve[:5] == ["vllm", "serve", str(tiny_model), "--enable-lora", "--max-lora-rank"] and serve[5] == "16"
    assert f"my adapter={out}" in serve and os.path.exists(serve[serve.index("--chat-template") + 1])
    monkeypatch.setattr("builtins.input", lambda *prompt: (_ for _ in ()).throw(EOFError))
    chat.talk(chat.parse(shlex.split(lines["chat"])[2:]))
    for folder in (out, out / "best", out / "checkpoint-9"):
        card = ModelCard.load(folder / "README.md")
        assert "More Information Needed" not in card.text and shlex.quote(str(folder)) in card.text
        assert card.data.library_name == "peft" and card.data.base_model is None  # a path is no name on the hub
        assert "rows.jsonl | 8 |" in card.text and ".saving" not in card.text
        assert ("\nbest: " in card.text) == (folder == out)
        flags = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card.text, re.DOTALL).group(1))
        assert flags["lora_r"] == 12 and "hub_token" not in flags
    assert "held out, step 9: eval_loss" in ModelCard.load(out / "README.md").text


@pytest.mark.parametrize(
    "more, said",
    [
        ([], "serve: vllm serve"),
        (["--use_dora", "True"], "serve: merge first, as servers cannot load DoRA; then vllm serve"),
        (["--lora_bias", "all", "--modules_to_save", "norm"], "cannot load trained biases, modules_to_save; then"),
        (["--trainable_token_indices", "5"], "cannot load trained tokens; then"),
        (["--lora_r", "600"], "cannot load a rank above 512; then"),
        (["--rope_scaling", "yarn", "--model_max_length", "4096"], "cannot load an extended window; then"),
        (["--init_lora_weights", "pissa", "--lora_r", "8"], "--max-lora-rank 16 "),
    ],
    ids=str,
)
def test_what_servers_cannot_load_is_to_be_merged_first(tiny_model, data, tmp_path, capsys, more, said):
    adapter = ["--use_lora"] if more else []
    finetune.train(argv(tiny_model, data / "more.jsonl", tmp_path / "out", *adapter, *more, "--max_steps", 1))
    printed = capsys.readouterr().out
    assert said in printed and said in (tmp_path / "out" / "README.md").read_text() + printed
    assert ("merge: python merge.py" in printed) == bool(more)


def test_the_variables_of_the_template_are_in_the_line_to_serve_with():
    facts = {"adapter": None, "evaluations": [], "best_step": None, "template_variables": {"enable_thinking": False}}
    facts |= {"base": {"name_or_path": "base"}, "prompt": {"thinking": "empty", "system": "Be brief."}}
    facts["arguments"] = {"trust_remote_code": False}
    usage = model_card.usage(facts, "out")
    assert usage["serve"] == """vllm serve out --default-chat-template-kwargs '{"enable_thinking": false}'"""
    assert usage["prompts"].endswith('variables {"enable_thinking": false}, system message "Be brief."')


def test_tokens_that_were_not_counted_are_not_given(tiny_model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune.tokenised, "SCAN", 4)
    more = ["--use_lora", "--lazy_preprocess", "True", "--max_steps", 1]
    finetune.train(argv(tiny_model, data / "rows.jsonl", tmp_path / "out", *more))
    (file,) = record(tmp_path / "out")["data"]["training"]
    assert (file["rows"], file["tokens"]) == (9, None)
    assert "| 9 | not counted |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "error, reason",
    [
        (UserError("the disk is on fire."), "UserError: the disk is on fire."),
        (signals.Interrupted(signal.SIGTERM), "ended by SIGTERM"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
    ids=["error", "signal", "Ctrl-C"],
)
def test_a_run_that_fails_says_why(tiny_model, data, tmp_path, monkeypatch, error, reason):
    def failing(*args, **kwargs):
        raise error

    monkeypatch.setattr(finetune.RecipeTrainer, "_save_checkpoint", failing)
    words = argv(tiny_model, data / "more.jsonl", tmp_path / "out", "--use_lora", "--save_steps", 2)
    with pytest.raises(type(error)):
        finetune.train([*words, "--save_strategy", "steps"])
    facts = record(tmp_path / "out")
    assert (facts["exit_reason"], facts["saved"], facts["steps"]) == (reason, False, 2)


def test_the_card_of_a_merged_folder_is_that_of_a_whole_model(ran, tmp_path):
    for adapter in (ran[0], ran[0] / "best"):
        merged = tmp_path / adapter.name
        merge(str(adapter), str(merged))
        text = (merged / "README.md").read_text()
        assert ModelCard(text).data.library_name == "transformers" and f"vllm serve {shlex.quote(str(merged))}" in text
        assert "--enable-lora" not in text and "merge.py" not in text and "AutoModelForCausalLM" in text
        assert "rows.jsonl | 8 |" in text and "lora_r: 12" in text
    assert "README.md" in json.loads((merged / "merge.json").read_text())["files"]


# ----------------------------------------------------------------------------------------------------------------------
# The page


def test_the_page_needs_no_network_and_no_script(ran):
    text = (ran[0] / "report.html").read_text()
    page = Page(text)
    assert not page.opened and not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert page.references and all(reference.startswith("#") for reference in page.references)  # within the picture
    assert "url(" not in re.sub(r"url\(#\w+\)", "", text) and "@import" not in text
    assert "light-dark(" in text and "currentColor" in text and "#123456" not in text


def test_the_page_shows_the_curves_what_was_dropped_and_how_to_repeat(ran):
    out, _ = ran
    text = (out / "report.html").read_text()
    for label in (
        "loss per supervised token",
        "learning rate",
        "gradient norm",
        "tokens / s",
        "tokens of a conversation",
    ):
        assert f">{label}" in text
    assert "1 dropped, longer than 120 tokens: " in text and "rows.jsonl: record 9" in text
    assert f"python finetune.py {out}/run.yaml" in text and "--lora_r 12" in text
    assert f"{history(out, 'eval_loss')[-1]:.5g}" in text


# ----------------------------------------------------------------------------------------------------------------------
# Early stopping


def test_training_stops_when_the_held_out_loss_of_all_files_no_longer_falls(tiny_model, data, tmp_path):
    held_out = [{"messages": [ROWS[n]["messages"][0], ROWS[n + 1]["messages"][1]]} for n in range(4)]
    files = [write(tmp_path / f"{name}.jsonl", held_out[start::2]) for start, name in enumerate(("a", "b"))]
    more = ["--early_stopping_patience", 2, "--num_train_epochs", 30, "--learning_rate", 5e-2, "--save_steps", 2]
    more += ["--eval_strategy", "steps", "--eval_steps", "1", "--eval_data_path", *files]
    words = argv(tiny_model, data / "more.jsonl", tmp_path / "out", "--use_lora", *more)
    finetune.train([*words, "--save_strategy", "steps"])
    losses, facts = history(tmp_path / "out", "eval_loss"), record(tmp_path / "out")
    best = losses.index(min(losses))
    assert len(losses) == best + 3 < 30 and all(loss >= losses[best] for loss in losses[best:])
    assert facts["exit_reason"] == "early stopping: 2 evaluations without a better eval_loss"
    (resumed,) = [f for f in (tmp_path / "out").glob("checkpoint-*") if int(f.name[11:]) in (best + 1, best + 2)][:1]
    finetune.train([*words, "--save_strategy", "no", "--resume_from_checkpoint", str(resumed)])
    assert history(tmp_path / "out", "eval_loss") == losses  # the evaluations before the checkpoint count


def test_early_stopping_needs_something_to_evaluate(tiny_model, data, tmp_path):
    words = argv(tiny_model, data / "more.jsonl", tmp_path / "out", "--early_stopping_patience", 2)
    with pytest.raises(UserError, match="--early_stopping_patience needs .* add --eval_data_path or --eval_ratio"):
        parse(words)
    with pytest.raises(UserError, match="--early_stopping_patience 0: expected a number of at least 1"):
        parse([*words[:-1], "0", "--eval_ratio", "0.1"])
