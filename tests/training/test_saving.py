"""What is written is opened again; what changed since a checkpoint was saved is refused before weights load."""

import ast
import dataclasses
import errno
import json
import os
import pathlib
import pickle
import shutil

import families
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import finetune
from helpers import ROOT, ROWS, argv, history, parse, write
from recipe.console import UserError
from recipe.dataset.conversations import Conversations
from recipe.dataset.encoding import ChatEncoder
from recipe.distributed import weights
from recipe.distributed.engines import ENGINES
from recipe.model.base_files import BaseFiles
from recipe.model.weight_files import ShardWriter
from recipe.training import checkpoints, staging


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)


@pytest.fixture(scope="module")
def trained(tiny_model, data, tmp_path_factory):
    """Folder of a LoRA run of six steps with checkpoints at each second."""
    out = tmp_path_factory.mktemp("trained") / "out"
    finetune.train([*argv(tiny_model, data, out, "--use_lora", "--save_steps", 2), "--save_strategy", "steps"])
    return out


@pytest.fixture
def run(trained, tmp_path):
    """The same in a folder of its own, to be changed by a test."""
    return pathlib.Path(shutil.copytree(trained, tmp_path / "out"))


def again(run, model, data, *more, resume="auto"):
    options = ["--use_lora", "--resume_from_checkpoint", resume, "--save_strategy", "no"]
    return finetune.train(argv(model, data, run, *options, *more))


# ----------------------------------------------------------------------------------------------------------------------
# Saving


def spoilt(folder, change):
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    change(weights, next(name for name in weights if "lora_B" in name))
    save_file(weights, path)


@pytest.mark.parametrize(
    "change, found",
    [
        (lambda w, name: w.update({name: torch.zeros(0)}), "is empty"),
        (lambda w, name: w.update({name: w[name] * float("nan")}), "is not finite"),
        (lambda w, name: w.update({name: w[name] * float("inf")}), "is not finite"),
        (lambda w, name: w.pop(name), "expected the"),
        (lambda w, name: w.update({f"{name}.other": w.pop(name)}), "expected the"),
        (lambda w, name: [w[key].zero_() for key in w if "lora_B" in key], "every lora_B is still zero"),
    ],
    ids=["empty", "nan", "infinite", "missing", "renamed", "unmoved"],
)
def test_a_file_that_does_not_hold_what_was_trained_is_refused(run, change, found):
    state = load_file(run / "adapter_model.safetensors")
    checkpoints.verify_saved(run, state, moved=True)
    spoilt(run, change)
    with pytest.raises(UserError, match=found):
        checkpoints.verify_saved(run, state, moved=True)


def test_a_file_that_ends_early_or_is_not_there_is_refused(run):
    path = run / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read again"):
        checkpoints.verify_saved(run)
    path.unlink()
    with pytest.raises(UserError, match="no weights were written"):
        checkpoints.verify_saved(run)


def test_whole_models_are_checked_shard_by_shard(tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    state = weights.gather_state_dict(model, keep=True)
    model.save_pretrained(tmp_path, state_dict=state, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    checkpoints.verify_saved(tmp_path, state)
    next(iter(sorted(tmp_path.glob("model-*.safetensors")))).unlink()
    with pytest.raises(UserError, match="lacks model-00001"):
        checkpoints.verify_saved(tmp_path, state)


def test_a_whole_model_is_written_file_by_file_as_save_pretrained_would(tmp_path, small_tokenizer, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(ShardWriter, "LARGEST", 100_000)
    # Shared weights, experts that the files hold one by one, a vision tower.
    for name in ("qwen2", "qwen3_moe", "gemma3"):
        folder = families.family(name, tmp_path / name, small_tokenizer, torch.float32)
        kind = AutoModelForCausalLM if name != "gemma3" else transformers.AutoModelForImageTextToText
        model = kind.from_pretrained(folder)
        model.save_pretrained(tmp_path / "wanted" / name)
        wanted = load_file(tmp_path / "wanted" / name / "model.safetensors")
        out = tmp_path / "out" / name
        with BaseFiles(model).written(out, weights.gather(model, keep=True)) as state:
            assert not list(out.glob("model*")) and state.keys() == wanted.keys()
        files = sorted(out.glob("model-*.safetensors"))
        assert len(files) > 3 and files[-1].name == f"model-{len(files):05}-of-{len(files):05}.safetensors"
        found = {name: tensor for file in files for name, tensor in load_file(file).items()}
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
        model.config.save_pretrained(out)
        again, report = kind.from_pretrained(out, output_loading_info=True)
        assert not any(report.values()), report
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_a_save_that_fails_leaves_the_weights_that_were_there(tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    shutil.copytree(tiny_model, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    layers = weights.gather(model, keep=True)
    with pytest.raises(UserError, match="no longer finite"), torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
        with BaseFiles(model).written(tmp_path / "out", map(weights.refuse_infinite, layers)):
            raise AssertionError("never")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_an_error_after_the_weights_are_written_keeps_them(tiny_model, data, tmp_path, monkeypatch):
    out, save = tmp_path / "out", finetune.RecipeTrainer._save
    finetune.train(argv(tiny_model, data, out, "--max_steps", 1))
    earlier = load_file(out / "model.safetensors")
    (out / "unfinished-7.safetensors").write_bytes(b"of a save that was killed")

    def full_disk(self, output_dir, state_dict):
        save(self, output_dir, state_dict)
        if pathlib.Path(output_dir) == out:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(finetune.RecipeTrainer, "_save", full_disk)
    with pytest.raises(UserError, match="No space left"):
        finetune.train(argv(tiny_model, data, out, "--max_steps", 2))
    later = load_file(out / "model.safetensors")
    assert later.keys() == earlier.keys() and any(not torch.equal(later[name], earlier[name]) for name in later)
    assert not list(out.glob("unfinished-*"))


def test_a_folder_is_replaced_while_somebody_reads_its_files(tmp_path, monkeypatch):
    """NFS keeps a deleted file that is open, and then refuses to delete its folder."""

    def refuses(folder, ignore_errors=False):
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", folder)

    monkeypatch.setattr(shutil, "rmtree", refuses)
    for number in "123":
        folder = pathlib.Path(staging.unfinished(str(tmp_path)), "best")
        folder.mkdir(parents=True)
        (folder / "file").write_text(number)
        staging.publish(str(tmp_path), "best")
        assert (tmp_path / "best" / "file").read_text() == number
    assert staging.recover(str(tmp_path)) == []


@pytest.mark.parametrize("mode", ["full", "LoRA"])
def test_saving_is_rehearsed_before_the_first_step(tiny_model, data, tmp_path, monkeypatch, mode):
    written, save = [], finetune.RecipeTrainer._save

    def failing(self, output_dir, state_dict):
        written.append((os.path.basename(output_dir), self.state.global_step))
        save(self, output_dir, state_dict)
        if len(written) == 1 and mode == "LoRA":
            spoilt(pathlib.Path(output_dir), lambda w, name: w.update({name: torch.zeros(0)}))

    monkeypatch.setattr(finetune.RecipeTrainer, "_save", failing)
    if mode == "LoRA":
        with pytest.raises(UserError, match=r"\.rehearsal.* is empty"):
            finetune.train(argv(tiny_model, data, tmp_path / "out", "--use_lora"))
        assert written == [(".rehearsal", 0)]
    else:
        finetune.train(argv(tiny_model, data, tmp_path / "out"))
        assert written == [(".rehearsal", 0), ("out", 6)] and not (tmp_path / "out" / ".rehearsal").exists()


def test_a_folder_that_cannot_be_written_to_is_told_before_training(tiny_model, data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".rehearsal").write_text("a file where a folder is wanted")
    with pytest.raises(UserError, match="cannot be saved"):
        finetune.train(argv(tiny_model, data, tmp_path / "out", "--use_lora"))


def test_an_adapter_that_never_moves_is_an_error_at_the_end(tiny_model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    with pytest.raises(UserError, match="every lora_B is still zero"):
        finetune.train(argv(tiny_model, data, tmp_path / "out", "--use_lora"))


def test_weights_that_are_not_finite_replace_nothing(tiny_model, data, run, monkeypatch):
    before = (run / "adapter_model.safetensors").read_bytes()

    def overflow(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            parameter.data.fill_(float("nan"))

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    with pytest.raises(UserError, match="is no longer finite; nothing was written"):
        finetune.train(argv(tiny_model, data, run, "--use_lora", "--max_steps", 1))
    assert (run / "adapter_model.safetensors").read_bytes() == before


def test_an_evaluation_that_fails_at_the_end_costs_no_weights(tiny_model, data, tmp_path, monkeypatch):
    def failing(*args, **kwargs):
        raise RuntimeError("no room for the logits")

    monkeypatch.setattr(finetune.RecipeTrainer, "evaluate", failing)
    options = ["--use_lora", "--eval_data_path", data, "--eval_strategy", "no"]
    with pytest.raises(RuntimeError, match="no room"):
        finetune.train(argv(tiny_model, data, tmp_path / "out", *options))
    checkpoints.verify_saved(tmp_path / "out", moved=True)


def calls(tree, *names):
    """Calls in a module of a function or method with one of these names, such as `torch.load`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(names):
            yield node


def test_nothing_replaces_a_models_state_dict_and_no_pickle_is_loaded():
    modules = [*ROOT.glob("*.py"), *(ROOT / "recipe").rglob("*.py"), *(ROOT / "demo").glob("*.py")]
    assert len(modules) > 30
    for path in modules:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        targets = [t for node in ast.walk(tree) if isinstance(node, ast.Assign) for t in node.targets]
        assert not [t for t in targets if isinstance(t, ast.Attribute) and t.attr == "state_dict"], path
        assert not list(calls(tree, "torch.load", "pickle.load", "pickle.loads", "Unpickler")), path


# ----------------------------------------------------------------------------------------------------------------------
# Adapters of any type, and names


ADAPTERS = {
    "VeRA": lambda peft: peft.VeraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "o_proj"]),
    "OFT": lambda peft: peft.OFTConfig(task_type="CAUSAL_LM", oft_block_size=16, target_modules=["q_proj", "v_proj"]),
    "IA3": lambda peft: peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "trainable tokens": lambda peft: peft.TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[999]),
    "AdaLoRA": lambda peft: peft.AdaLoraConfig(
        task_type="CAUSAL_LM", total_step=6, init_r=8, target_r=4, target_modules=["q_proj"]
    ),
    "LoHa": lambda peft: peft.LoHaConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]),
}


def test_a_trained_tensor_that_peft_would_not_save_stops_the_run_before_its_first_step(
    tiny_model, data, tmp_path, monkeypatch
):
    add_adapter = finetune.add_adapter

    def with_norm(model, *args):
        model = add_adapter(model, *args)
        model.base_model.model.model.norm.weight.requires_grad_(True)
        return model

    monkeypatch.setattr(finetune, "add_adapter", with_norm)
    with pytest.raises(UserError, match="1 tensors are trained that peft does not save .*model.norm.weight"):
        finetune.train(argv(tiny_model, data, tmp_path / "out", "--use_lora"))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_of_other_types_are_continued_saved_and_resumed(tiny_model, data, tmp_path, capsys, kind):
    import peft
    from transformers import AutoModelForCausalLM

    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), ADAPTERS[kind](peft))
    model.save_pretrained(tmp_path / "start")
    more = ["--lora_weight_path", tmp_path / "start", "--save_steps", 3, "--save_strategy", "steps", "--seed", 1]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    finetune.train([*argv(tiny_model, data, whole), *map(str, more)])
    assert "parameters (" in capsys.readouterr().out
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    finetune.train([*argv(tiny_model, data, resumed), *map(str, more), "--resume_from_checkpoint", "auto"])
    assert history(resumed, "loss") == pytest.approx(history(whole, "loss"), rel=1e-5)
    start, trained = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "start", whole))
    assert start.keys() == trained.keys()
    assert any(not torch.equal(start[name], trained[name]) for name in start)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(whole)
    saved = peft.get_peft_model_state_dict(loaded)
    assert all(torch.equal(saved[name], trained[name]) for name in trained)


def test_a_whole_model_has_the_names_of_the_base_models_files(tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    state = weights.gather_state_dict(model, keep=True)
    model.save_pretrained(tmp_path, state_dict=state)
    names = BaseFiles(model).names()
    checkpoints.verify_saved(tmp_path, state, base_names=names)
    path = tmp_path / "model.safetensors"
    renamed = {
        name.replace("model.layers", "model.language_model.model.layers"): t for name, t in load_file(path).items()
    }
    save_file(renamed, path, metadata={"format": "pt"})
    checkpoints.verify_saved(tmp_path, state)
    with pytest.raises(
        UserError,
        match="48 names of weights are not those of the base model, the first is model.language_model.model.layers",
    ):
        checkpoints.verify_saved(tmp_path, state, base_names=names)


def test_a_base_model_without_an_output_head_has_names_without_its_prefix(tiny_model, data, tmp_path):
    from transformers import AutoModel

    shutil.copytree(tiny_model, tmp_path / "bare")
    AutoModel.from_pretrained(tiny_model).save_pretrained(tmp_path / "bare")
    assert "embed_tokens.weight" in load_file(tmp_path / "bare" / "model.safetensors")
    finetune.train(argv(tmp_path / "bare", data, tmp_path / "out", "--max_steps", 1))
    assert "model.embed_tokens.weight" in load_file(tmp_path / "out" / "model.safetensors")


# ----------------------------------------------------------------------------------------------------------------------
# Resuming


def test_auto_takes_the_newest_complete_checkpoint(tiny_model, data, run, capsys):
    assert sorted(p.name for p in run.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert checkpoints.find_checkpoint("auto", run) == str(run / "checkpoint-6")
    (run / "checkpoint-6" / checkpoints.COMPLETE).unlink()
    assert checkpoints.find_checkpoint("auto", run) == str(run / "checkpoint-4")
    assert "checkpoint-6: left out: it was not written to its end" in capsys.readouterr().out
    path = run / "checkpoint-4" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        checkpoints.find_checkpoint("auto", run)


class Bomb:
    """A pickle that makes a folder when it is read."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("record", [None, "", "[]", '{"flags": {}}', "{"])
@pytest.mark.parametrize("auto", [False, True])
def test_nothing_of_a_checkpoint_that_this_recipe_did_not_write_is_unpickled(
    tiny_model, data, run, tmp_path, record, auto
):
    shutil.rmtree(run / "checkpoint-4")
    folder = run / "checkpoint-6"
    for path in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (folder / path).write_bytes(pickle.dumps(Bomb(tmp_path / "went off")))
    (folder / checkpoints.COMPLETE).unlink()
    if record is not None:
        (folder / checkpoints.COMPLETE).write_text(record)
    if auto:  # what was not written to its end counts as not there
        assert checkpoints.find_checkpoint("auto", run) is None
    else:
        with pytest.raises(UserError, match=r"another program wrote it.*--lora_weight_path"):
            again(run, tiny_model, data, resume=folder)
    assert not (tmp_path / "went off").exists()


def test_the_same_data_and_model_under_other_paths_are_resumed(tiny_model, data, run, tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    model = shutil.copytree(tiny_model, tmp_path / "elsewhere" / "model")
    rows = shutil.copy(data, tmp_path / "elsewhere" / "other.jsonl")
    os.utime(rows, (0, 0))  # a clock that differs
    moved = shutil.move(run, tmp_path / "elsewhere" / "run")
    shutil.rmtree(pathlib.Path(moved) / "checkpoint-6")
    whole = history(moved, "loss")
    again(moved, model, rows)
    assert history(moved, "loss") == whole
    assert "changed since" not in capsys.readouterr().out
    write(pathlib.Path(rows), ROWS[::-1])
    with pytest.raises(UserError, match="the data changed since it was saved"):
        again(moved, model, rows)


def test_auto_starts_from_the_beginning_where_there_is_no_checkpoint(tiny_model, data, tmp_path, capsys):
    again(tmp_path / "out", tiny_model, data)
    assert "holds no complete checkpoint: training from the beginning" in capsys.readouterr().out
    assert len(history(tmp_path / "out", "loss")) == 6


TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"


@pytest.mark.parametrize(
    "more, told",
    [
        (["--lora_r", 8], r"--lora_r \(64 then, 8 now\) changed since it was saved; set it back.*--lora_weight_path"),
        (["--q_lora"], r"the mode \(LoRA then, QLoRA now\) changed"),
        (["--lora_bias", "all"], r"--lora_bias \(none then, all now\)"),
        (["--rope_scaling", "yarn"], r"--rope_scaling \(None then, yarn now\)"),
        (["--optim", "adafactor"], r"--optim \(adamw_torch then, adafactor now\)"),
        (["--per_device_train_batch_size", 2], r"rows a step \(4 then, 2 now\).*--ignore_data_skip True"),
        (["--seed", 7], r"--seed \(42 then, 7 now\)"),
        (["--thinking", "strip"], r"--thinking \(auto then, strip now\).*--ignore_data_skip True"),
        (["--train_on", "last_turn"], r"--train_on \(all_turns then, last_turn now\)"),
        (["--model_max_length", 100], r"--model_max_length \(2048 then, 100 now\)"),
        (["--overlong", "truncate"], r"--overlong \(drop then, truncate now\)"),
        (["--pack_tokens", 2048], r"--pack_tokens \(None then, 2048 now\)"),
        (["--train_sampling_strategy", "sequential"], r"--train_sampling_strategy \(random then, sequential now\)"),
        (["--chat_template", "mine.jinja"], "the chat template changed"),
        (
            ["--lora_r", 8, "--seed", 7],
            r"--lora_r .*, --seed .* changed since it was saved; set them back, or start a new",
        ),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_what_cannot_be_resumed_is_told_before_weights_load(tiny_model, data, run, monkeypatch, more, told):
    monkeypatch.setattr(finetune, "load_model", lambda *args: pytest.fail("weights were loaded"))
    monkeypatch.chdir(run)
    (run / "mine.jinja").write_text(TEMPLATE)
    with pytest.raises(UserError, match=told):
        again(run, tiny_model, data, *more)


def test_what_changes_the_course_of_training_is_printed_and_what_changes_nothing_is_not(
    tiny_model, data, run, monkeypatch, capsys
):
    monkeypatch.setattr(finetune.precision, "has_bf16", lambda cpu: True)  # slow on some processors, and right on all
    (run / "checkpoint-6" / checkpoints.COMPLETE).unlink()
    again(run, tiny_model, data, "--logging_steps", 2, "--save_total_limit", 1, "--run_name", "other")
    assert "there have changed" not in capsys.readouterr().out
    more = ["--label_smoothing_factor", 0.1, "--max_grad_norm", 0.5, "--learning_rate", 1e-3, "--lora_dropout", 0.1]
    more += ["--neftune_noise_alpha", 5, "--num_train_epochs", 4, "--bf16", "True"]
    again(run, tiny_model, data, *more)
    said = capsys.readouterr().out
    for part in (
        "the precision (float32 then, bfloat16 now)", "--label_smoothing_factor (0.0 then, 0.1 now)",
        "--max_grad_norm (1.0 then, 0.5 now)", "--neftune_noise_alpha (None then, 5.0 now)",
        "--learning_rate (0.01 then, 0.001 now; the optimizer keeps what it has)",
        "--lora_dropout (0.05 then, 0.1 now)", "--num_train_epochs (3.0 then, 4.0 now)",
    ):  # fmt: skip
        assert part in said
    assert "--weight_decay" not in said.split("there have changed")[1].split("\n")[0]


def test_other_rows_are_gone_on_with_where_the_user_says_so(tiny_model, data, run, capsys):
    (run / "checkpoint-6" / checkpoints.COMPLETE).unlink()
    again(run, tiny_model, data, "--seed", 7, "--train_on", "last_turn", "--ignore_data_skip", "True")
    assert "--train_on (all_turns then, last_turn now), --seed (42 then, 7 now)" in capsys.readouterr().out.replace(
        "\n", " "
    )


def edited(run, change):
    path = run / "checkpoint-6" / checkpoints.COMPLETE
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_a_flag_that_was_added_since_had_its_default(tiny_model, data, run):
    edited(run, lambda record: [record["flags"].pop(name) for name in ("lora_bias", "overlong", "neftune_noise_alpha")])
    again(run, tiny_model, data)
    with pytest.raises(UserError, match=r"--lora_bias \(none then, all now\) changed"):
        again(run, tiny_model, data, "--lora_bias", "all")
    with pytest.raises(UserError, match=r"--overlong \(drop then, truncate now\) changed"):
        again(run, tiny_model, data, "--overlong", "truncate")


def test_every_flag_is_compared_or_left_out_on_purpose(tiny_model, data, tmp_path):
    """A new flag is compared without being listed anywhere."""
    added = dataclasses.make_dataclass(
        "LoraArguments", [("lora_new", int, dataclasses.field(default=3))], bases=(finetune.LoraArguments,)
    )
    arguments = parse(argv(tiny_model, data, tmp_path, "--use_lora"))
    tokenizer = finetune.pretrained(arguments[0], arguments[2]).tokenizer()
    dataset = finetune.SupervisedDataset(Conversations([str(data)]), ChatEncoder(tokenizer), 512)
    old = checkpoints.describe_run(*arguments, dataset)
    (tmp_path / checkpoints.COMPLETE).write_text(json.dumps(old))
    classes = (*finetune.ARGUMENTS[:3], added)
    now = checkpoints.describe_run(*arguments[:3], added(), dataset)
    checkpoints.refuse_changed_run(str(tmp_path), now, classes, False)
    with pytest.raises(UserError, match=r"--lora_new \(3 then, 4 now\) changed"):
        now = checkpoints.describe_run(*arguments[:3], added(lora_new=4), dataset)
        checkpoints.refuse_changed_run(str(tmp_path), now, classes, False)
    known = {field.name for part in finetune.ARGUMENTS for field in dataclasses.fields(part)}
    newest = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # since transformers 5.23
    assert (
        checkpoints.NOT_COMPARED - newest <= known and checkpoints.FLAGS.keys() | checkpoints.KEPT_BY_OPTIMIZER <= known
    )


def test_a_checkpoint_without_flags_is_resumed_as_far_as_it_says(tiny_model, data, run, capsys):
    edited(run, lambda record: record.pop("flags"))
    again(run, tiny_model, data, "--train_on", "last_turn")
    assert "what has changed since is not known" in capsys.readouterr().out
    with pytest.raises(UserError, match="rows a step"):
        again(run, tiny_model, data, "--per_device_train_batch_size", 2)


def test_a_resumed_run_computes_in_the_precision_it_was_saved_in(tiny_model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune.precision, "has_bf16", lambda cpu: True)  # slow on some processors, and right on all
    for precision in ("True", "False"):
        out = tmp_path / precision
        words = argv(tiny_model, data, out, "--use_lora", "--save_strategy", "steps", "--save_steps", 2)
        words[words.index("--bf16") + 1] = precision
        finetune.train([*words, "--max_steps", "2"])
        del words[words.index("--bf16") : words.index("--bf16") + 2]
        args = parse([*words, "--resume_from_checkpoint", "auto"])[2]
        assert (args.bf16, args.fp16) == (precision == "True", False)


def test_other_data_and_another_base_model_are_noticed(tiny_model, tiny_copy, data, run, tmp_path):
    other = write(tmp_path / "other.jsonl", [*ROWS[1:], ROWS[0]])
    with pytest.raises(UserError, match="the data changed"):
        again(run, tiny_model, other)
    shutil.copy(data, tmp_path / "moved.jsonl")
    again(run, tiny_model, tmp_path / "moved.jsonl")  # the same rows in another place are the same data
    config = json.loads((tiny_copy / "config.json").read_text())
    (tiny_copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    with pytest.raises(UserError, match="the base model changed"):
        again(run, tiny_copy, data)


@pytest.mark.parametrize("then", ENGINES.values(), ids=lambda engine: engine.label)
@pytest.mark.parametrize("now", ENGINES.values(), ids=lambda engine: engine.label)
def test_another_engine_or_number_of_processes_is_resumed_where_the_engine_can(tmp_path, then, now):
    facts = {**dict.fromkeys(checkpoints.FACTS, "same"), "processes": 2, "flags": {}}
    (tmp_path / checkpoints.COMPLETE).write_text(json.dumps({**facts, "mode": "LoRA", "engine": then.label}))
    resumed = {**facts, "mode": "LoRA", "engine": now.label}
    labels = {then.label.split()[0], now.label.split()[0]}
    if labels == {then.label.split()[0]} or labels == {"one", "DDP"}:
        checkpoints.refuse_changed_run(str(tmp_path), resumed, finetune.ARGUMENTS, False)
    else:
        with pytest.raises(UserError, match=rf"the engine \({then.label} then, {now.label} now\) changed"):
            checkpoints.refuse_changed_run(str(tmp_path), resumed, finetune.ARGUMENTS, False)
    if then == now and "ZeRO" in now.label:
        with pytest.raises(UserError, match=r"the processes \(2 then, 4 now\) changed .*--lora_weight_path"):
            checkpoints.refuse_changed_run(str(tmp_path), {**resumed, "processes": 4}, finetune.ARGUMENTS, False)
    elif then == now:
        checkpoints.refuse_changed_run(str(tmp_path), {**resumed, "processes": 4}, finetune.ARGUMENTS, False)


def test_a_checkpoint_of_wholes_is_not_resumed_as_one_of_parts(tmp_path):
    facts = {**dict.fromkeys(checkpoints.FACTS, "same"), "mode": "full", "engine": "FSDP2", "flags": {}}
    older = {name: fact for name, fact in facts.items() if name != "state_dict_type"}  # before it was recorded
    now = {**facts, "state_dict_type": "SHARDED_STATE_DICT"}
    for then in (older, {**facts, "state_dict_type": "FULL_STATE_DICT"}):
        (tmp_path / checkpoints.COMPLETE).write_text(json.dumps(then))
        with pytest.raises(UserError, match=r"the state_dict_type \(FULL_STATE_DICT then, SHARDED_STATE_DICT now\)"):
            checkpoints.refuse_changed_run(str(tmp_path), now, finetune.ARGUMENTS, False)
    (tmp_path / checkpoints.COMPLETE).write_text(json.dumps(now))
    checkpoints.refuse_changed_run(str(tmp_path), now, finetune.ARGUMENTS, False)


def test_rows_that_are_skipped_on_resume_are_not_tokenised(tiny_model, tmp_path, monkeypatch):
    rows = [{"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": f"{n}"}]}
            for n in range(10_040)]  # fmt: skip
    data = write(tmp_path / "rows.jsonl", rows)
    asked = []
    monkeypatch.setattr(finetune.tokenised, "SCAN", 8)
    get = finetune.LazySupervisedDataset.__getitem__
    monkeypatch.setattr(
        finetune.LazySupervisedDataset, "__getitem__", lambda self, index: asked.append(index) or get(self, index)
    )
    short = argv(tiny_model, data, tmp_path / "out", "--use_lora", "--lazy_preprocess", "--save_steps", 1)
    short[short.index("--num_train_epochs") + 1] = "1"
    finetune.train([*short, "--save_strategy", "steps", "--max_steps", "1"])
    checkpoint = tmp_path / "out" / "checkpoint-1"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    state["global_step"] = 2500  # as if 10,000 rows had been trained
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    asked.clear()
    finetune.train([*short, "--max_steps", "2502", "--save_strategy", "no", "--resume_from_checkpoint", "auto"])
    assert len(asked) <= 3 * 4
