"""The command line: what is accepted, what it means, and what a mistake is told.

`parse` runs as the program runs it, on the flags alone: no model and no data of these names exist.
"""

import dataclasses
import json
import os
import pathlib
import re
import resource
import subprocess
import sys
import types

import pytest
import torch
import transformers
from transformers.debug_utils import DebugOption

import finetune
from commands.ancestors import COMMANDS, original
from helpers import ROOT, parse
from recipe import command_line, flag_rules
from recipe.console import UserError
from recipe.model.precision import has_bf16

SCRIPT = pathlib.Path(finetune.__file__)
PATHS = ["--model_name_or_path", "model", "--data_path", "rows.jsonl"]
NO_GPU = not torch.cuda.is_available()
INHERITED = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}


def settings(argv):
    """All arguments of a command line, whichever class they belong to."""
    return types.SimpleNamespace(**{name: value for part in parse(argv) for name, value in vars(part).items()})


def parsed(*flags):
    return settings([*PATHS, *map(str, flags)])


def written(path, text):
    path.write_text(text)
    return str(path)


# ----------------------------------------------------------------------------------------------------------------------
# Everything transformers.TrainingArguments has is accepted

OTHER_THAN_DEFAULT = {  # for the fields whose default does not show what they hold
    "accelerator_config": {"split_batches": True},
    "activation_checkpointing": True,
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "data_seed": 7,
    "dataloader_multiprocessing_context": "spawn",
    "dataloader_prefetch_factor": 4,
    "ddp_broadcast_buffers": True,
    "ddp_bucket_cap_mb": 25,
    "ddp_find_unused_parameters": False,
    "ddp_static_graph": True,
    "debug": ["underflow_overflow"],
    "disable_tqdm": True,
    "eval_accumulation_steps": 3,
    "eval_steps": 0.25,
    "eval_strategy": "steps",
    "fsdp_config": {"version": 2},
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "greater_is_better": True,
    "metric_for_best_model": "loss",
    "hub_private_repo": True,
    "hub_strategy": "end",
    "include_for_metrics": ["loss"],
    "include_num_input_tokens_seen": "non_padding",
    "liger_kernel_config": {"rope": True, "swiglu": False},
    "log_level": "debug",
    "log_level_replica": "error",
    "logging_strategy": "epoch",
    "lr_scheduler_kwargs": {"num_cycles": 0.25},
    "lr_scheduler_type": "constant_with_warmup",
    "neftune_noise_alpha": 5.0,
    "optim": "adafactor",
    "optim_target_modules": ["attn", "mlp"],
    "parallelism_config": {"dp_replicate_size": 1},
    "report_to": ["tensorboard", "wandb"],
    "save_strategy": "epoch",
    "tf32": False,
    "torch_empty_cache_steps": 2,
    "trackio_static_space_id": False,
    "train_sampling_strategy": "sequential",
}
NEEDS = {  # other flags without which transformers refuses a value
    "dataloader_prefetch_factor": {"dataloader_num_workers": 1},
    "load_best_model_at_end": {"save_strategy": "epoch"},
}
# The hardware decides, or a folder that has to be there: in tests of their own.
LEFT_OUT = {"bf16", "fp16", "deepspeed", "fsdp", "use_cpu", "resume_from_checkpoint"}
FIXED = {"label_names", "remove_unused_columns", "prediction_loss_only"}  # by our batches
LEFT_OUT |= {"ddp_backend"}  # needs several processes
LEFT_OUT |= {"auto_find_batch_size", "enable_jit_checkpoint"}  # refused: see test_out_of_memory.py
HELD_AS = {"debug": [DebugOption.UNDERFLOW_OVERFLOW]}


def other_than_default(name):
    """Entries of a config file with a value of this flag other than its default, and whatever that needs."""
    default = {field.name: field.default for field in dataclasses.fields(finetune.TrainingArguments)}[name]
    if name in OTHER_THAN_DEFAULT:
        value = OTHER_THAN_DEFAULT[name]
    elif isinstance(default, bool):
        value = not default
    else:
        value = default + 1 if isinstance(default, (int, float)) else "text"
    paths = {"model_name_or_path": "model", "data_path": "a", "eval_data_path": "b"}
    return {**paths, **NEEDS.get(name, {}), name: value}


@pytest.mark.parametrize("name", sorted(INHERITED - LEFT_OUT - FIXED))
def test_a_config_file_sets_every_field_of_transformers_training_arguments(name, tmp_path):
    default = {field.name: field.default for field in dataclasses.fields(finetune.TrainingArguments)}[name]
    entries = other_than_default(name)
    value = entries[name]
    held = getattr(settings([written(tmp_path / "run.json", json.dumps(entries))]), name)
    if name in ("accelerator_config", "parallelism_config"):
        held = {key: getattr(held, key) for key in value}
    assert held == HELD_AS.get(name, value) and value != default


@pytest.mark.parametrize(
    "flags, name, value",
    [
        (["--lr_scheduler_kwargs", '{"num_cycles": 0.25}'], "lr_scheduler_kwargs", {"num_cycles": 0.25}),
        (["--liger_kernel_config", '{"rope": true}'], "liger_kernel_config", {"rope": True}),
        (["--report_to", "wandb"], "report_to", ["wandb"]),
        (["--report_to", "wandb", "tensorboard"], "report_to", ["wandb", "tensorboard"]),
        (["--optim_target_modules", "all-linear"], "optim_target_modules", "all-linear"),
        (["--optim_target_modules", "attn", "mlp"], "optim_target_modules", ["attn", "mlp"]),
        (["--include_num_input_tokens_seen"], "include_num_input_tokens_seen", "all"),
        (["--include_num_input_tokens_seen", "non_padding"], "include_num_input_tokens_seen", "non_padding"),
        (["--gradient-accumulation-steps", "4"], "gradient_accumulation_steps", 4),
        (["--no_average_tokens_across_devices"], "average_tokens_across_devices", False),
        (["--data_path", "a.json", "b.json"], "data_path", ["a.json", "b.json"]),
        (["--no_padding_free"], "padding_free", False),
    ],
)
def test_the_command_line_takes_json_lists_texts_and_booleans(flags, name, value):
    assert getattr(parsed(*flags), name) == value


YAML = """
model_name_or_path: model
data_path: [a.json, b.json]
eval_data_path: c.json
use_lora: true
lora_target_modules:
  - q_proj
  - v_proj
modules_to_save: []
learning_rate: 3e-4
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr: 1e-6}
eval_strategy: no
save_strategy: no
bf16: false
fp16: false
seed: 7
run_name: null
lora_weight_path: ""
"""
JSON = json.dumps(
    {
        "model_name_or_path": "model",
        "data_path": ["a.json", "b.json"],
        "eval_data_path": "c.json",
        "use_lora": True,
        "lora_target_modules": ["q_proj", "v_proj"],
        "modules_to_save": [],
        "learning_rate": 3e-4,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 1e-6},
        "eval_strategy": "no",
        "save_strategy": "no",
        "bf16": False,
        "fp16": False,
        "seed": 7,
        "run_name": None,
        "lora_weight_path": "",
    }
)


@pytest.mark.parametrize("name, text", [("run.yaml", YAML), ("run.yml", YAML), ("run.json", JSON)])
def test_a_config_file_holds_numbers_texts_lists_booleans_nested_entries_and_null(name, text, tmp_path):
    args = settings([written(tmp_path / name, text)])
    assert (args.model_name_or_path, args.data_path, args.eval_data_path) == ("model", ["a.json", "b.json"], ["c.json"])
    assert (args.use_lora, args.lora_target_modules, args.modules_to_save) == (True, ["q_proj", "v_proj"], None)
    assert (args.learning_rate, args.lr_scheduler_kwargs, args.seed) == (3e-4, {"min_lr": 1e-6}, 7)
    assert (args.eval_strategy, args.save_strategy) == ("no", "no")
    assert (args.bf16, args.fp16, args.run_name, args.lora_weight_path) == (False, False, None, "")


def test_the_command_line_wins_over_the_config_file(tmp_path):
    path = written(tmp_path / "run.yaml", YAML)
    args = settings([path, "--learning_rate", "1e-4", "--data_path", "d.json", "--eval_strategy", "steps", "--seed=8"])
    assert (args.learning_rate, args.data_path, args.eval_strategy, args.seed) == (1e-4, ["d.json"], "steps", 8)
    assert args.use_lora


def test_a_config_file_may_use_old_spellings_and_the_last_one_given_is_told_once(tmp_path, capsys):
    path = written(tmp_path / "run.yaml", "evaluation_strategy: no\nwarmup_ratio: 0.5\n")
    args = settings([path, *PATHS, "--warmup-ratio", "0.1"])
    assert (args.eval_strategy, args.warmup_steps) == ("no", 0.1)
    told = [line for line in capsys.readouterr().out.splitlines() if "warmup_ratio" in line]
    assert told == ["--warmup_ratio is now --warmup_steps: using --warmup_steps=0.1."]


@pytest.mark.parametrize("text", ["no", "on", "007", "1_000", "1e3", "2026-11-25", "0x10", "~x", "null-model"])
def test_a_text_of_a_yaml_file_stays_as_it_is_written(text, tmp_path):
    path = written(tmp_path / "run.yaml", f"run_name: {text}\nmodules_to_save: [{text}, b]\n")
    args = settings([path, *PATHS])
    assert args.run_name == text
    assert args.modules_to_save == [text, "b"]


def test_yaml_files_may_merge_entries(tmp_path):
    path = written(tmp_path / "run.yaml", "<<: {seed: 4, lora_r: 8}\nlora_r: 16\n")
    args = settings([path, *PATHS])
    assert args.seed == 4
    assert args.lora_r == 16


def test_a_first_flag_whose_value_ends_in_json_is_no_config_file():
    assert settings(["--data_path=rows.json", "--model_name_or_path", "model"]).data_path == ["rows.json"]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("run.yaml", "learning_rate: [1e-4", r"run\.yaml: not valid YAML: line 1: expected ',' or '\]', .+\."),
        ("run.yaml", "\0", r"run\.yaml: not valid YAML: .+\."),
        ("run.json", '{"learning_rate": }', r"run\.json: not valid JSON: .+ line 1 column 19 .+\."),
        ("run.json", "", r"run\.json: not valid JSON: .+\."),
        ("run.yaml", "", r"run\.yaml: expected entries of the form 'learning_rate: 1e-4', one for each flag\."),
        ("run.yaml", "- learning_rate", r"run\.yaml: expected entries of the form .+\."),
        ("run.json", "3", r"run\.json: expected entries of the form .+\."),
        ("run.yaml", None, r"run\.yaml: cannot be read \(No such file or directory\)\."),
        (
            "run.yaml",
            "learning_rat: 1e-4",
            r"run\.yaml: Unknown flag '--learning_rat'\. Did you mean --learning_rate\?",
        ),
        ("run.json", '{"lora": {"r": 8}}', r"run\.json: Unknown flag '--lora'\. Did you mean --\w*lora\w*\?"),
        ("run.yaml", "learning_rate: fast", r"run\.yaml: argument --learning_rate: invalid float value: 'fast'\."),
        ("run.yaml", "max_steps: {a: 1}", r"run\.yaml: argument --max_steps: invalid int value: '{\"a\": 1}'\."),
        ("run.yaml", "seed: [1, 2]", r"run\.yaml: Unexpected word '2'\. See --help\."),
        ("run.yaml", "overlong: cut", r"run\.yaml: argument --overlong: invalid choice: 'cut' .+\."),
        ("run.yaml", "seed: 1.5", r"run\.yaml: argument --seed: invalid int value: '1\.5'\."),
        ("run.yaml", "seed: 1\nlora_r: 8\nseed: 2", r"run\.yaml: not valid YAML: seed stands there twice\."),
        ("run.json", '{"seed": 1, "seed": 2}', r"run\.json: not valid JSON: seed stands there twice\."),
    ],
)
def test_a_config_file_that_cannot_be_used_is_one_sentence(name, text, message, tmp_path):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as caught:
        parse([str(path), *PATHS])
    assert re.fullmatch(message, str(caught.value).removeprefix(f"{tmp_path}/"))


def test_a_config_file_after_the_flags_is_refused_with_the_reason(tmp_path):
    with pytest.raises(UserError, match=r"^Unexpected word 'run\.yaml'\. A config file comes before all flags\.$"):
        parsed("--seed", 1, "run.yaml")


# ----------------------------------------------------------------------------------------------------------------------
# Ancestors' commands

no_gpu = pytest.mark.skipif(not NO_GPU, reason="with a GPU, DeepSpeed starts up and needs its configuration file")


@no_gpu
@pytest.mark.parametrize("launched_by_deepspeed", [False, True])
@pytest.mark.parametrize("name", COMMANDS)
def test_an_ancestors_command_means_what_it_meant(name, launched_by_deepspeed):
    args = settings(original(name, launched_by_deepspeed))
    _, expected, warmup = COMMANDS[name]
    assert (args.model_name_or_path, args.data_path) == ("Qwen/Qwen-7B", ["path_to_data"])
    assert {flag: getattr(args, flag) for flag in expected} == expected
    training_args = parse(original(name, launched_by_deepspeed))[2]
    assert {steps: training_args.get_warmup_steps(steps) for steps in warmup} == warmup
    assert args.local_rank == (0 if launched_by_deepspeed else -1)


@no_gpu
@pytest.mark.parametrize("name", COMMANDS)
def test_a_renamed_flag_is_told_once_and_nothing_else_is_renamed(name, capsys):
    argv = original(name)
    parse(argv)
    renamed = {"--evaluation_strategy", "--warmup_ratio", "--flash_attn"} & set(argv)
    if "activation_checkpointing" in INHERITED:
        renamed |= {"--gradient_checkpointing"} & set(argv)
    told = re.findall(r"^(--\w+) is now --\w+: using --.+\.$", capsys.readouterr().out, re.MULTILINE)
    assert sorted(told) == sorted(renamed)


@no_gpu
@pytest.mark.parametrize("name", COMMANDS)
def test_without_a_gpu_the_run_says_what_it_leaves_out(name, capsys):
    argv = original(name)
    args = settings(argv)
    said = capsys.readouterr().out
    assert args.use_cpu and args.deepspeed is None and args.tf32 is None
    assert ("DeepSpeed is left out" in said) == ("--deepspeed" in argv)
    assert ("--tf32 is for GPUs" in said) == ("--tf32" in argv)
    usable = "--bf16" in argv and has_bf16(cpu=True)
    assert ("this hardware does not compute in it" in said) == (not usable)
    assert args.bf16 or not usable
    assert not args.fp16  # never on a CPU


def test_lora_flags_alone_train_lora_as_in_fastchat(capsys):
    for flags in (["--lora_r", 8], ["--lora-r", 8], ["--q_lora"], ["--use_dora", "True"], ["--modules_to_save", "x"]):
        assert parsed(*flags).use_lora
        assert capsys.readouterr().out == "LoRA flags are given: training a LoRA adapter (--use_lora).\n"
    assert not parsed("--q_lora", "False").use_lora
    with pytest.raises(UserError, match="--use_lora False contradicts the LoRA flags"):
        parsed("--lora_r", 8, "--use_lora", "False")


def test_evaluation_without_data_is_left_out_of_an_ancestors_command(capsys):
    args = parsed("--evaluation_strategy", "steps", "--eval_steps", 100)
    assert (args.eval_strategy, args.do_eval) == ("no", False)
    assert "there is nothing to evaluate" in capsys.readouterr().out


@pytest.mark.parametrize(
    "old, name, value",
    [
        ("--evaluation-strategy=no", "eval_strategy", "no"),
        ("--warmup_ratio 0", "warmup_steps", 0),
        ("--warmup_ratio=3e-2", "warmup_steps", 0.03),
        ("--flash_attn", "attn_implementation", "flash_attention_2"),
        ("--flash_attn True", "attn_implementation", "flash_attention_2"),
        ("--flash_attn 0", "attn_implementation", "auto"),
        ("--group_by_length", "train_sampling_strategy", "group_by_length"),
        ("--group_by_length False", "train_sampling_strategy", "random"),
        ("--no_cuda", "use_cpu", True),
    ],
)
def test_an_old_spelling_sets_the_new_flag_with_one_notice(old, name, value, capsys):
    assert getattr(parsed(*old.split()), name) == value
    assert capsys.readouterr().out.count("is now --") == 1


@pytest.mark.parametrize("old", ["--overwrite_output_dir", "--save_safetensors False", "--logging_dir logs"])
def test_a_flag_without_a_successor_is_left_out_with_one_notice(old, capsys):
    assert parsed(*old.split(), "--seed", 3).seed == 3
    assert capsys.readouterr().out == f"{old.split()[0]} has no effect any more and is left out.\n"


# ----------------------------------------------------------------------------------------------------------------------
# A mistake is one sentence

UNKNOWN = [
    ("--learning_rat 1e-4", "Unknown flag '--learning_rat'. Did you mean --learning_rate?"),
    ("--learning_rat=1e-4", "Unknown flag '--learning_rat'. Did you mean --learning_rate?"),
    ("--learning-rat 1e-4", "Unknown flag '--learning-rat'. Did you mean --learning_rate?"),
    ("-learning_rate 1e-4", "Unknown flag '-learning_rate'. Did you mean --learning_rate?"),
    ("--lora_rank 8", "Unknown flag '--lora_rank'. Did you mean --lora_r?"),
    ("--use_lor", "Unknown flag '--use_lor'. Did you mean --use_lora?"),
    ("--num_train_epoch 3", "Unknown flag '--num_train_epoch'. Did you mean --num_train_epochs?"),
    ("--xyzzy", "Unknown flag '--xyzzy'. See --help."),
    ("--seed 1 2", "Unexpected word '2'. See --help."),
]
WRONG = [
    ("--learning_rate abc", r"argument --learning_rate: invalid float value: 'abc'\."),
    ("--num_train_epochs", r"argument --num_train_epochs: expected one argument\."),
    ("--data_path", r"argument --data_path: expected at least one argument\."),
    ("--use_lora perhaps", r"argument --use_lora: .+perhaps.+\."),
    ("--seed 1.5", r"argument --seed: invalid int value: '1\.5'\."),
    ("--overlong cut", r"argument --overlong: invalid choice: 'cut' \(choose from .*drop.*truncate.*error.*\)\."),
    ("--thinking hard", r"argument --thinking: invalid choice: 'hard' .+\."),
    ("--train_on first", r"argument --train_on: invalid choice: 'first' .+\."),
    ("--lora_bias some", r"argument --lora_bias: invalid choice: 'some' .+\."),
    ("--optim nonsense", r"argument --optim: invalid choice: 'nonsense' \(choose from .*adamw_torch.*\)\."),
    ("--lr_scheduler_type nonsense", r"argument --lr_scheduler_type: invalid choice: 'nonsense' .*cosine.*\."),
    ("--save_strategy sometimes", r"argument --save_strategy: invalid choice: 'sometimes' .*no.*steps.*epoch.*\."),
    ("--lr_scheduler_kwargs {a:1}", r"argument --lr_scheduler_kwargs: not valid JSON: .+\."),
    ("--liger_kernel_config rope", r"argument --liger_kernel_config: not valid JSON: .+\."),
    ("--flash_attn perhaps", r"argument --flash_attn: .+perhaps.+yes/no, true/false.+\."),
    ("--warmup_ratio 1.0", r"argument --warmup_ratio: expected a share of all steps, below 1, got 1\.0; see .+\."),
    ("--warmup_ratio x", r"argument --warmup_ratio: expected a share of all steps, below 1, got x; see .+\."),
    ("--warmup_ratio -.1", r"argument --warmup_ratio: expected a share of all steps, below 1, got -\.1; see .+\."),
    ("--warmup_steps -1", r"(Got )?warmup_steps .+\."),
    ("--accelerator_config no_such_file.json", r".*No such file or directory: 'no_such_file\.json'\."),
    ("--fp16 --bf16", r"--fp16 and --bf16 exclude each other; give one of them\."),
    ("--per_device_train_batch_size 0", r"--per_device_train_batch_size 0: expected a number of at least 1\."),
    ("--per_device_train_batch_size -1", r"--per_device_train_batch_size -1: expected a number of at least 1\."),
    ("--per_device_eval_batch_size 0", r"--per_device_eval_batch_size 0: expected a number of at least 1\."),
    ("--gradient_accumulation_steps 0", r"--gradient_accumulation_steps 0: expected a number of at least 1\."),
    ("--learning_rate -1e-4", r"--learning_rate -0\.0001: expected a number of at least 0\."),
    ("--learning_rate nan", r"--learning_rate nan: expected a number of at least 0\."),
    ("--num_train_epochs -1", r"--num_train_epochs -1\.0: expected a number of at least 0\."),
    ("--model_max_length 0", r"--model_max_length 0: expected a number of at least 1\."),
    ("--lora_r 0", r"--lora_r 0: expected a number of at least 1\."),
    ("--lora_dropout 1.5", r"--lora_dropout 1\.5: expected a number of at least 0 and below 1\."),
    ("--eval_ratio 2", r"--eval_ratio 2\.0: expected a number of at least 0 and below 1\."),
    ("--eval_ratio -.1", r"--eval_ratio -0\.1: expected a number of at least 0 and below 1\."),
    ("--eval_strategy epoch", r"--eval_strategy is set but there is nothing to evaluate; .+\."),
]


@pytest.mark.parametrize("flags, message", UNKNOWN)
def test_an_unknown_flag_is_an_error_that_names_the_nearest(flags, message):
    with pytest.raises(UserError) as caught:
        parsed(*flags.split())
    assert str(caught.value) == message


@pytest.mark.parametrize("flags, message", WRONG)
def test_a_wrong_value_is_one_sentence_and_the_program_leaves_with_code_2(
    flags, message, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["finetune.py", *PATHS, "--output_dir", str(out), *flags.split()])
    with pytest.raises(SystemExit) as left:
        finetune.main()
    said = capsys.readouterr()
    assert left.value.code == 2 and said.out == "" and not out.exists()
    assert re.fullmatch(f"error: {message}\n", said.err)


@pytest.mark.parametrize("missing", ["--model_name_or_path", "--data_path"])
def test_a_required_flag_that_is_missing_is_named(missing):
    at = PATHS.index(missing)
    with pytest.raises(UserError, match=f"^{missing} is required; see --help.$"):
        parse(PATHS[:at] + PATHS[at + 2 :])


def test_a_mistake_is_told_before_any_notice(capsys):
    with pytest.raises(UserError):
        parsed("--deepspeed", "ds.json", "--tf32", "True", "--unheard_of")
    assert capsys.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--warmup_ratio 0.1 --learning_rat 1e-4", "--warmup_ratio 0.1 --lora_dropout 1.5"])
def test_the_program_tells_a_mistake_without_a_traceback(flags, tmp_path):
    command = [sys.executable, SCRIPT, *PATHS, "--output_dir", tmp_path / "out", *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert list(tmp_path.iterdir()) == []
    renamed = "--warmup_ratio is now --warmup_steps: using --warmup_steps=0.1.\n"
    assert done.stdout == ("" if "learning_rat " in flags else renamed)
    assert re.fullmatch("error: .+\n", done.stderr)


# ----------------------------------------------------------------------------------------------------------------------
# Help


def cpu_seconds(*command):
    """CPU seconds of a Python command, whatever else the machine does, and what it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def shown_by(*flags):
    return cpu_seconds(SCRIPT, *flags)[1]


def test_help_takes_no_longer_than_importing_the_arguments_of_transformers():
    imports = "import transformers; transformers.TrainingArguments"  # 5 s of a slow core, and a part of every start
    pairs = [(cpu_seconds(SCRIPT, "--help")[0], cpu_seconds("-c", imports)[0]) for _ in range(2)]
    assert min(ours / theirs for ours, theirs in pairs) < 1.1, pairs


@pytest.mark.parametrize("flags", ["--help", "run.yaml --use_lora -h"])
def test_help_shows_our_flags_first_and_each_once(flags):
    shown = shown_by(*flags.split())
    titles = re.findall(r"^(\w[\w. ]+):$", shown, re.MULTILINE)
    assert titles == [
        "model arguments",
        "data arguments",
        "training arguments",
        "lora arguments",
        "arguments inherited from transformers.TrainingArguments",
    ]
    ours, theirs = shown.split(titles[-1])
    for parts, part in ((finetune.ARGUMENTS, ours), ([transformers.TrainingArguments], theirs)):
        for name in (name for cls in parts for name in cls.__annotations__ if not name.startswith("_")):
            elsewhere = name in finetune.TrainingArguments.__annotations__ and part is theirs
            expected = 0 if elsewhere or name in command_line.RENAMED else 1
            assert len(re.findall(rf"^  --{name}\b", part, re.MULTILINE)) == expected, name


def test_help_shows_the_default_of_each_flag_of_ours_once():
    shown = re.sub(r"\s+", " ", shown_by("--help")).split(" arguments inherited from ")[0]
    texts = dict(re.findall(r" --(\w+) (.*?)(?= --\w+ [\[{A-Z]| \w+ arguments:|$)", shown))
    for field in (field for cls in finetune.ARGUMENTS for field in dataclasses.fields(cls)):
        if field.name in texts:
            told = re.findall(r"\(default: (.*?)\)", texts[field.name])
            assert told == [str(field.default)] * (field.default not in (None, "")), field.name
    assert len(texts) == sum(len(cls.__annotations__) for cls in finetune.ARGUMENTS)


OWN = [field for part in finetune.ARGUMENTS for field in dataclasses.fields(part) if field.name in part.__annotations__]


@pytest.mark.parametrize("field", OWN, ids=lambda field: field.name)
def test_help_is_short_and_says_what_an_unset_flag_means(field):
    text = field.metadata["help"]
    assert len(text) <= 220
    assert text.endswith(".")
    assert "default" not in text.replace("default prompt", "").lower()  # the formatter prints it


# ----------------------------------------------------------------------------------------------------------------------
# Defaults


def test_defaults_are_those_of_the_qwen_ancestor():
    args = parsed()
    assert (args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_bias) == (64, 16, 0.05, "none")
    assert (args.lora_weight_path, args.q_lora, args.use_lora, args.lazy_preprocess) == ("", False, False, False)
    assert (args.lr_scheduler_type, args.optim, args.report_to) == ("cosine", "adamw_torch", [])
    assert (args.learning_rate, args.num_train_epochs, args.warmup_steps) == (5e-5, 3, 0)
    assert (args.cache_dir, args.eval_data_path, args.eval_strategy) == (None, None, "no")


def test_flags_that_are_named_are_known_by_one_spelling_and_the_old_one(tmp_path):
    path = written(tmp_path / "run.yaml", "lora-r: 8\nseed: null\n")
    words = ["--local_rank=0", path, "--eval-strategy=no", "--no-cuda"]
    named = command_line.read(words, finetune.ARGUMENTS)
    assert named == {"local_rank": 0, "lora_r": 8, "eval_strategy": "no", "use_cpu": True, "no_cuda": True}


@pytest.mark.parametrize("flags", [["--eval_data_path", "held_out.jsonl"], ["--eval_ratio", 0.1]])
def test_evaluation_is_once_an_epoch_unless_said_otherwise(flags):
    args = parsed(*flags)
    assert (args.eval_strategy, args.do_eval) == ("epoch", True)
    assert parsed(*flags, "--eval_strategy", "steps", "--eval_steps", 5).eval_strategy == "steps"
    assert parsed(*flags, "--eval_strategy", "no").eval_strategy == "no"
    assert parsed(*flags, "--evaluation_strategy", "no").eval_strategy == "no"


def test_evaluation_once_an_epoch_is_what_other_flags_are_checked_against():
    best = ["--load_best_model_at_end", "--save_strategy", "epoch"]
    assert parsed("--eval_ratio", 0.1, *best).load_best_model_at_end
    assert parsed("--eval_ratio", 0.1, "--lr_scheduler_type", "reduce_lr_on_plateau").eval_strategy == "epoch"
    with pytest.raises(UserError, match="--load_best_model_at_end requires"):
        parsed(*best)


def test_a_ratio_of_zero_evaluates_nothing():
    args = parsed("--eval_ratio", 0)
    assert (args.eval_strategy, args.do_eval) == ("no", False)


def test_the_wrap_class_of_fsdp_is_left_to_the_model_and_said(capsys):
    parsed("--fsdp", "full_shard auto_wrap", "--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer")
    assert "--fsdp_transformer_layer_cls_to_wrap has no effect any more and is left out." in capsys.readouterr().out


LEAVING = """
import atexit, sys, threading, time
from recipe import console
class Torn:
    def __del__(self): print("the interpreter was torn down", flush=True)
sys.modules["torn"] = Torn()
atexit.register(print, "exit function")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
print("end", end=" ")
"""


def test_a_finished_run_ends_before_the_interpreter_is_torn_down():
    first, second = (
        subprocess.run([sys.executable, "-c", LEAVING + last], cwd=ROOT, capture_output=True, text=True)
        for last in ("console.leave()", "")
    )
    assert (first.returncode, first.stdout) == (0, "end thread\nexit function\n")
    assert (second.returncode, second.stdout) == (0, f"{first.stdout}the interpreter was torn down\n")


THREADS = """
import gc, glob, os, time, torch
from accelerate import Accelerator
def train():
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(torch.nn.Linear(8, 8))
    accelerator.backward(model(torch.ones(2, 8)).sum())
    accelerator.end_training()  # destroys the process group
train()
gc.collect()
time.sleep(0.5)
print("gloo" in " ".join(open(path).read() for path in glob.glob("/proc/self/task/*/comm")))
"""


@pytest.mark.slow
def test_threads_of_gloo_live_on_after_the_process_group_which_is_why_a_finished_run_leaves():
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launch, sys.executable, "-c", THREADS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True"], done.stderr[-2000:]


# ----------------------------------------------------------------------------------------------------------------------
# Use as a library


def test_arguments_can_be_built_again_and_again(tmp_path):
    """As in a notebook, in which a cell is run twice and an instance is copied with a change."""
    flags = {"output_dir": str(tmp_path), "deepspeed": "ds_config_zero2.json", "learning_rate": 1e-4, "bf16": None}
    before = dict(os.environ), torch.get_float32_matmul_precision(), torch.get_num_threads()
    first = finetune.TrainingArguments(**flags)
    second = finetune.TrainingArguments(**flags)
    third = dataclasses.replace(second, learning_rate=2e-4)
    assert (dict(os.environ), torch.get_float32_matmul_precision(), torch.get_num_threads()) == before
    assert not torch.distributed.is_initialized()
    assert second == first
    assert third.learning_rate == 2e-4
    assert dataclasses.replace(third, learning_rate=1e-4) == first


def test_a_plain_parser_of_transformers_takes_the_classes_and_checks_the_bounds(capsys):
    parser = transformers.HfArgumentParser(finetune.ARGUMENTS)
    _, data_args, _, lora_args = parser.parse_args_into_dataclasses(["--lora_r", "8", "--eval_ratio", "0.5"])
    assert (lora_args.lora_r, data_args.eval_ratio) == (8, 0.5)
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses(["--lora_r", "0"])
    assert "choose from 'at least 1'" in capsys.readouterr().err


def test_bounds_hold_for_an_edited_default():
    model_args, data_args, training_args, _ = parse(PATHS)
    edited = finetune.LoraArguments(lora_dropout=1.5)
    with pytest.raises(UserError, match="^--lora_dropout 1.5: expected a number of at least 0 and below 1.$"):
        flag_rules.check_and_complete(model_args, data_args, training_args, edited, {})
