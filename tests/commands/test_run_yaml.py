"""The run.yaml beside the trained weights: it holds the flags as the run resolved them, and repeats the run."""

import dataclasses
import json

import pytest
import yaml

import finetune
from commands.ancestors import COMMANDS, original
from commands.test_cli import FIXED, INHERITED, LEFT_OUT, NO_GPU, other_than_default
from helpers import ROWS, argv, history, parse, write
from recipe import command_line

PATHS = ["--model_name_or_path", "model", "--data_path", "rows.jsonl"]


def values(arguments):
    return {field.name: getattr(part, field.name) for part in arguments for field in dataclasses.fields(part)}


def repeated(arguments, tmp_path):
    """What finetune.py makes of the run.yaml of these arguments, and the file's entries."""
    path = tmp_path / "run.yaml"
    path.write_text(command_line.run_yaml(arguments))
    return parse([str(path)]), yaml.safe_load(path.read_text())


@pytest.mark.parametrize("name", sorted(INHERITED - LEFT_OUT - FIXED - set(command_line.NOT_RECORDED)))
def test_every_flag_that_differs_from_its_default_is_repeated(name, tmp_path):
    entries = other_than_default(name)
    (tmp_path / "mine.json").write_text(json.dumps(entries))
    first = parse([str(tmp_path / "mine.json")])
    again, written = repeated(first, tmp_path)
    assert values(again) == values(first)
    if name not in command_line.ALWAYS_SO and name not in command_line.RENAMED:
        assert name in written


@pytest.mark.skipif(not NO_GPU, reason="with a GPU, DeepSpeed starts up and needs its configuration file")
@pytest.mark.parametrize("name", COMMANDS)
def test_an_ancestors_command_is_repeated(name, tmp_path):
    first = parse(original(name))
    again, _ = repeated(first, tmp_path)
    assert {**values(again), "local_rank": 0} == {**values(first), "local_rank": 0}


def test_what_decides_the_result_is_written_and_secrets_and_the_environment_are_not(tmp_path):
    arguments = parse([*PATHS, "--hub_token", "secret", "--eval_ratio", "0.1", "--lora_r", "8", "--local_rank=0"])
    arguments[2].model_max_length = 2048  # as load_config resolves it
    _, written = repeated(arguments, tmp_path)
    assert written["model_max_length"] == 2048
    assert written["learning_rate"] == 5e-5
    assert written["eval_strategy"] == "epoch"
    assert written["use_lora"] is True
    assert (written["bf16"], written["fp16"]) == (arguments[2].bf16, arguments[2].fp16)
    assert not {"hub_token", "local_rank", "device", "resume_from_checkpoint"} & set(written)
    assert "secret" not in (tmp_path / "run.yaml").read_text()


def test_without_an_adapter_no_flag_of_one_is_written(tmp_path):
    _, written = repeated(parse(PATHS), tmp_path)
    assert not {field.name for field in dataclasses.fields(finetune.LoraArguments)} & set(written)


@pytest.mark.parametrize(
    "more", [["--use_lora", "--lora_dropout", "0.1"], ["--pack_tokens", "64", "--warmup_ratio", "0.5"]]
)
def test_the_file_beside_the_weights_repeats_the_run(more, tiny_model, tmp_path):
    data = write(tmp_path / "rows.jsonl", ROWS)
    words = argv(tiny_model, data, tmp_path / "first", "--eval_ratio", "0.25", "--seed", "7", *more)
    finetune.train(words)
    finetune.train([str(tmp_path / "first" / "run.yaml"), "--output_dir", str(tmp_path / "again")])
    for key in ("loss", "eval_loss", "learning_rate"):
        first = history(tmp_path / "first", key)
        assert len(first) >= 3
        assert history(tmp_path / "again", key) == first
    first, again = (yaml.safe_load((tmp_path / name / "run.yaml").read_text()) for name in ("first", "again"))
    assert again == {**first, "output_dir": str(tmp_path / "again")}
