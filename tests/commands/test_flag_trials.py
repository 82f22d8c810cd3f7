"""What a flag needs late is tried before the data is read: one sentence that names the flag."""

import os
import re

import pytest

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
