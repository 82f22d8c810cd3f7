"""An adapter whose start changes the base is saved as a plain one, for the base as it was."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import finetune
from helpers import ROOT, ROWS, argv, history, parse, run_ranks, write
from recipe.console import UserError
from recipe.dataset.encoding import ChatEncoder
from recipe.model import loading
from recipe.training import answers
from recipe.training.merging import merge

PISSA = ["--init_lora_weights", "pissa"]
OPTIONS = {
    "approximate": ["--init_lora_weights", "pissa_niter_4", "--use_rslora", "True"],
    "more than factors": ["--init_lora_weights", "olora", "--lora_bias", "all", "--modules_to_save", "norm"],
    "DoRA": [*PISSA, "--use_dora", "True"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)


def train(tiny_model, data, out, *more):
    words = argv(tiny_model, data, out, "--lora_r", 8, "--eval_data_path", data, *PISSA, "--save_steps", 2, *more)
    finetune.train([*words, "--save_strategy", "steps", "--eval_strategy", "steps", "--eval_steps", "2"])
    return out


@pytest.fixture(scope="module")
def trained(tiny_model, data, tmp_path_factory):
    """Folder of a run of six steps from PiSSA, with checkpoints and evaluations at each second."""
    return train(tiny_model, data, tmp_path_factory.mktemp("pissa") / "out")


def loss_on_the_unchanged_base(tiny_model, folder):
    """By peft alone, on the base's own files."""
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), folder)
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(folder))
    return answers.mean_loss(model, [encoder.encode(row).documents for row in ROWS])


def test_plain_peft_finds_what_was_trained_on_the_unchanged_base(tiny_model, trained):
    config = json.loads((trained / "adapter_config.json").read_text())
    assert (config["init_lora_weights"], config["r"]) == (True, 16)
    losses = history(trained, "eval_loss")
    for folder, loss in ((".", losses[2]), ("checkpoint-4", losses[1]), ("best", min(losses))):
        assert loss_on_the_unchanged_base(tiny_model, trained / folder) == pytest.approx(loss, abs=2e-5)
    assert losses[0] - losses[2] > 1e-2  # far more than the tolerance was learnt


@pytest.mark.parametrize("name", OPTIONS)
def test_whatever_else_is_trained_is_saved_with_it(tiny_model, data, tmp_path, name):
    more = ["--lora_r", 8, "--eval_data_path", data, "--eval_strategy", "no", "--max_steps", 4]
    finetune.train(argv(tiny_model, data, tmp_path / "out", *OPTIONS[name], *more))
    (loss,) = history(tmp_path / "out", "eval_loss")
    assert loss_on_the_unchanged_base(tiny_model, tmp_path / "out") == pytest.approx(loss, abs=2e-5)
    assert history(tmp_path / "out", "loss")[0] - loss > 1e-2


def test_a_resumed_run_ends_as_an_unbroken_one(tiny_model, data, trained, tmp_path):
    shutil.copytree(trained / "checkpoint-4", tmp_path / "out" / "checkpoint-4")
    train(tiny_model, data, tmp_path / "out", "--resume_from_checkpoint", "auto")
    assert history(tmp_path / "out", "loss") == history(trained, "loss")
    first, again = (load_file(folder / "adapter_model.safetensors") for folder in (trained, tmp_path / "out"))
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


def test_a_converted_adapter_is_merged_and_continued(tiny_model, data, trained, tmp_path):
    assert merge(str(trained), str(tmp_path / "merged"), torch.float32) < 1e-4
    finetune.train(argv(tiny_model, data, tmp_path / "more", "--lora_weight_path", trained, "--max_steps", 1))
    assert json.loads((tmp_path / "more" / "adapter_config.json").read_text())["r"] == 16
    assert history(tmp_path / "more", "loss")[0] < history(trained, "loss")[0] - 1e-2


def test_an_adapter_that_was_not_converted_is_not_continued(tiny_model, data, trained, tmp_path):
    raw = shutil.copytree(trained, tmp_path / "raw")
    config = json.loads((raw / "adapter_config.json").read_text())
    (raw / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "pissa"}))
    words = argv(tiny_model, data, tmp_path / "out", "--lora_weight_path", raw)
    with pytest.raises(UserError, match="raw/adapter_config.json: the adapter starts as pissa and belongs to a base"):
        parse(words)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [["--deepspeed", ROOT / "ds_config_zero3.json"], ["--fsdp", "True"]], ids=str)
def test_ranks_that_hold_parts_of_the_adapter_save_it_whole_and_resume(tiny_model, data, tmp_path, engine):
    first, again = tmp_path / "first", tmp_path / "again"
    more = [
        *PISSA,
        "--lora_r",
        8,
        "--lora_dropout",
        0,
        "--eval_data_path",
        data,
        "--per_device_train_batch_size",
        2,
        *engine,
    ]
    more += ["--save_strategy", "steps", "--save_steps", 2, "--max_steps", 4]
    jobs = {"first": {"argv": argv(tiny_model, data, first, *more)}}
    jobs["again"] = {
        "argv": argv(tiny_model, data, again, *more, "--resume_from_checkpoint", "auto"),
        "copy": [first / "checkpoint-2", again / "checkpoint-2"],
    }
    left = run_ranks(tmp_path, jobs, 2)
    assert not left["problem"], left["problem"]
    assert left["first"]["partitioned"] == left["first"]["parameters"]
    assert history(again, "loss") == pytest.approx(history(first, "loss"), rel=1e-5)
    for folder in (first, again):
        loss = history(folder, "eval_loss")[-1]
        assert loss_on_the_unchanged_base(tiny_model, folder) == pytest.approx(loss, abs=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# The base model of an adapter


def test_the_base_is_named_so_that_it_is_found_from_anywhere(tiny_model, data, tmp_path, monkeypatch):
    shutil.copytree(tiny_model, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    finetune.train(argv("base", data, "out", "--use_lora", "--max_steps", 1))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (str(tmp_path / "base"), None)
    monkeypatch.chdir("/")
    assert hasattr(loading.load(str(tmp_path / "out"))[0], "peft_config")


@pytest.mark.filterwarnings("ignore:Could not find a config file")  # peft looks in the hub's own cache only
def test_a_model_of_the_hub_is_named_with_its_commit(tiny_model, data, tmp_path, monkeypatch):
    commits = ["a" * 40, "b" * 40]
    repository = tmp_path / "hub" / "models--someone--tiny"
    for commit in commits:
        shutil.copytree(tiny_model, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commits[0])
    words = argv("someone/tiny", data, tmp_path / "out", "--use_lora", "--max_steps", 1)
    finetune.train([*words, "--cache_dir", str(tmp_path / "hub")])
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("someone/tiny", commits[0])
    (repository / "refs" / "main").write_text(commits[1])  # the hub's model has changed since
    other = load_file(repository / "snapshots" / commits[1] / "model.safetensors")
    save_file(
        {name: tensor + 1 for name, tensor in other.items()},
        repository / "snapshots" / commits[1] / "model.safetensors",
    )
    model, _ = loading.load(str(tmp_path / "out"), torch.float32, cache_dir=str(tmp_path / "hub"))
    first = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert torch.equal(model.get_base_model().model.norm.weight, first.model.norm.weight)
