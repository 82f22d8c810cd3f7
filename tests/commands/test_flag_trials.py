"""What a flag needs late is tried before the data is read: one sentence that names the flag."""

import dataclasses
import enum
import os
import re
import typing

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import finetune
from helpers import ROWS, argv, parse, write
from recipe import flag_trials
from recipe.console import UserError

WRONG = {  # words -> the sentence
    "--report_to wandb": r"--report_to wandb: .*wandb",
    "--report_to no_such_reporter": r"no_such_reporter",
    "--optim galore_adamw": r"--optim galore_adamw: .*[Gg]a[Ll]ore",
    "--optim lomo": r"--optim lomo: .*lomo",
    "--optim adamw_torch --optim_args betas": r"--optim_args betas: expected name=value pairs",
    "--optim rmsprop_bnb --optim_args nothing=1": r"--optim rmsprop_bnb --optim_args nothing=1: |no_such",
    "--lr_scheduler_type cosine_with_min_lr": r"--lr_scheduler_type cosine_with_min_lr: .*min_lr",
    '--lr_scheduler_type cosine --lr_scheduler_kwargs {"cycles":2}': r"--lr_scheduler_type cosine --lr_sched.*cycles",
    '--lr_scheduler_type constant --lr_scheduler_kwargs {"a":2}': r"this schedule has no arguments",
    "--use_liger_kernel True": r"--use_liger_kernel needs the package liger-kernel; pip install liger-kernel",
    "--attn_implementation flash_attention_2": r"--attn_implementation flash_attention_2: FlashAttention2 .* installed",
    "--attn_implementation spda": r"--attn_implementation spda: ",
    "--torch_compile_backend nothing": r"--torch_compile with backend nothing and mode None: ",
    "--init_lora_weights pisa": r"--init_lora_weights pisa: expected true, false",
    "--init_lora_weights orthogonal --lora_r 3": r"expected an even --lora_r, not 3",
    "--trainable_token_indices -1 --use_lora": r"--trainable_token_indices -1: expected ids",
    "--dataloader_persistent_workers True": r"--dataloader_num_workers 0 --dataloader_persistent_workers True: ",
    "--dataloader_num_workers 2 --dataloader_prefetch_factor -1": r"--dataloader_prefetch_factor -1: ",
    "--eval_on_start True": r"--eval_on_start is set but there is nothing to evaluate; add --eval_data_path",
    "--save_strategy best": r"--save_strategy best needs evaluations in the course of training; add --eval_data_path",
    "--eval_ratio 0.1 --metric_for_best_model accuracy": r"--metric_for_best_model accuracy: expected eval_loss\.",
    "--push_to_hub True": r"--push_to_hub: there is no token of the hub",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_missing_package_or_wrong_argument_is_found_before_the_data_is_read(tmp_path, words, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(UserError, match=WRONG[words]) as raised:
        finetune.train(argv("no/model", tmp_path / "no_data.jsonl", tmp_path / "out", *words.split()))
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--output_dir", "--dump_tokens"])
def test_a_folder_that_cannot_be_written_is_found_before_the_data_is_read(tmp_path, flag):
    place = write(tmp_path / "file", []) / "folder"
    words = argv("no/model", tmp_path / "no_data.jsonl", tmp_path / "out", flag, place / "tokens")
    with pytest.raises(UserError, match=f"{flag} .*: cannot be written .*; name another place"):
        finetune.train(words)


def test_trying_leaves_no_folder_and_no_random_number(tiny_model, tmp_path):
    data, states = write(tmp_path / "rows.jsonl", ROWS), []
    arguments = parse(argv(tiny_model, data, tmp_path / "a" / "b"))
    for _ in range(2):
        states.append(finetune.torch.get_rng_state())
        flag_trials.try_flags(*arguments)
    assert finetune.torch.equal(*states) and os.listdir(tmp_path) == ["rows.jsonl"]


@pytest.mark.parametrize("name", ["adamw_torch", "adafactor", "sgd", "adamw_bnb_8bit", "lion_32bit", "rmsprop"])
def test_optimizers_that_are_there_pass(tiny_model, tmp_path, name):
    arguments = parse(argv(tiny_model, tmp_path / "rows.jsonl", tmp_path / "out", "--optim", name))
    flag_trials.try_flags(*arguments)


@pytest.mark.parametrize("name", sorted({kind.value for kind in finetune.SchedulerType}))
def test_every_schedule_passes_or_is_refused_by_its_name(tiny_model, tmp_path, name):
    words = argv(tiny_model, tmp_path / "rows.jsonl", tmp_path / "out", "--lr_scheduler_type", name)
    try:
        flag_trials.try_flags(*parse(words))
    except UserError as error:
        assert re.match(rf"(--)?lr_scheduler_type {name}\W", str(error))


# ----------------------------------------------------------------------------------------------------------------------
# Any flags


FIELDS = {
    field.name: typing.get_type_hints(kind)[field.name]
    for kind in finetune.ARGUMENTS
    for field in dataclasses.fields(kind)
    if field.init
}
# They name files, folders and servers, make a run long, or end it before it trains.
FIXED = """model_name_or_path data_path output_dir push_to_hub hub_token hub_model_id local_rank debug ddp_timeout max_steps
    stall_minutes num_train_epochs preview dump_tokens validate_only torch_compile torch_compile_backend
    torch_compile_mode report_to""".split()
WORDS = [
    "0",
    "1",
    "-1",
    "nan",
    "",
    "x",
    "True",
    "no",
    "steps",
    "{}",
    '{"a": 1}',
    "[1]",
    "a=b",
    "/nowhere",
    "q_proj",
    "lm_head",
]


def values(kind):
    """Values of a type that are right, or not far from it."""
    if typing.get_origin(kind) is typing.Literal:
        return list(map(str, typing.get_args(kind)))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return [str(member.value) for member in kind]
    if typing.get_args(kind) and typing.get_origin(kind) not in (list, dict):
        return [value for part in typing.get_args(kind) for value in values(part)]
    numbers = {bool: ["True", "False"], int: ["0", "1", "2", "7", "100"], float: ["0", "0.1", "0.5", "1", "2", "1e-4"]}
    return numbers.get(kind, WORDS)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flags_train_or_are_one_sentence_before_the_weights_load(tiny_model, tmp_path_factory, data, monkeypatch):
    folder = tmp_path_factory.mktemp("flags")
    rows = write(folder / "rows.jsonl", ROWS)
    names = data.draw(st.lists(st.sampled_from(sorted(set(FIELDS) - set(FIXED))), min_size=1, max_size=3, unique=True))
    words = [word for name in names for word in (f"--{name}", data.draw(st.sampled_from(values(FIELDS[name]))))]
    words += data.draw(st.sampled_from([[], ["--use_lora"], ["--eval_data_path", str(rows)]]))
    command = argv(tiny_model, rows, folder / "out", *words, "--max_steps", 1, "--report_to", "none")
    try:
        finetune.train([*command, "--validate_only"])
    except UserError as error:
        assert str(error) and not (folder / "out").exists()
    else:
        finetune.train(command)  # and nothing is found out too late
