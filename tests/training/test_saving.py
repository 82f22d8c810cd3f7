"""What is written is opened again; what changed since a checkpoint is told before weights load; engines' settings."""

import json
import os
import pathlib
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import finetune
from helpers import ROOT, ROWS, argv, history, write
from recipe.console import UserError
from recipe.distributed import weights
from recipe.training import checkpoints


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
        (lambda w, name: [w[key].zero_() for key in w if "lora_B" in key], "every lora_B is still zero"),
    ],
    ids=["empty", "nan", "infinite", "missing", "unmoved"],
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


def test_nothing_replaces_a_models_state_dict_and_no_pickle_is_loaded():
    for path in ROOT.glob("*.py"):
        assert "state_dict =" not in path.read_text().replace("state_dict=", ""), path
        assert "torch.load(" not in path.read_text(), path


# ----------------------------------------------------------------------------------------------------------------------
# Resuming


def test_auto_takes_the_newest_complete_checkpoint(tiny_model, data, run, capsys):
    assert sorted(p.name for p in run.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert checkpoints.find("auto", run) == str(run / "checkpoint-6")
    (run / "checkpoint-6" / checkpoints.COMPLETE).unlink()
    assert checkpoints.find("auto", run) == str(run / "checkpoint-4")
    assert "checkpoint-6: left out: it was not written to its end" in capsys.readouterr().out
    path = run / "checkpoint-4" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        checkpoints.find("auto", run)


def test_auto_starts_from_the_beginning_where_there_is_no_checkpoint(tiny_model, data, tmp_path, capsys):
    again(tmp_path / "out", tiny_model, data)
    assert "holds no checkpoint: training from the beginning" in capsys.readouterr().out
    assert len(history(tmp_path / "out", "loss")) == 6


@pytest.mark.parametrize(
    "more, told",
    [
        (["--lora_r", 8], r"the adapter changed since it was saved \(lora_r 64 then, 8 now\); .*--lora_weight_path"),
        (["--q_lora"], r"the mode changed .*\(LoRA then, QLoRA now\)"),
        (["--per_device_train_batch_size", 2], r"rows a step changed .*\(4 then, 2 now\).*--ignore_data_skip True"),
        (["--seed", 7], "the seed changed"),
    ],
    ids=["adapter", "mode", "batch", "seed"],
)
def test_what_cannot_be_resumed_is_told_before_weights_load(tiny_model, data, run, monkeypatch, more, told):
    monkeypatch.setattr(finetune, "load_model", lambda *args: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match=told):
        again(run, tiny_model, data, *more)


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


@pytest.mark.parametrize(
    "engine, then, now, fits",
    [
        ("DDP", 2, 4, True),
        ("ZeRO-2", 2, 4, False),
        ("ZeRO-3", 4, 2, False),
        ("FSDP2", 2, 4, True),
    ],
)
def test_other_numbers_of_processes_are_resumed_where_the_engine_can(tmp_path, engine, then, now, fits):
    record = {
        "base model": "m", "mode": "LoRA", "adapter": {}, "engine": engine, "processes": then, "rows a step": 8,
        "seed": 1, "data": "d", "schedule": [],
    }  # fmt: skip
    (tmp_path / checkpoints.COMPLETE).write_text(json.dumps(record))
    if fits:
        checkpoints.compare(tmp_path, {**record, "processes": now}, False)
    else:
        with pytest.raises(UserError, match=f"the processes changed .*{then} then, {now} now.*--lora_weight_path"):
            checkpoints.compare(tmp_path, {**record, "processes": now}, False)
    with pytest.raises(UserError, match="the engine changed"):
        checkpoints.compare(tmp_path, {**record, "engine": "FSDP2" if engine != "FSDP2" else "ZeRO-2"}, False)


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
