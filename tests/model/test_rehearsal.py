"""What is wrong with a model's files or an adapter's flags is found before rows are tokenised and weights are read."""

import json
import os
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import finetune
from helpers import ROWS, argv, write
from recipe.console import UserError


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)


@pytest.fixture(scope="module")
def sharded_model(tiny_model, tmp_path_factory):
    """The tiny model in three weight files and an index."""
    folder = tmp_path_factory.mktemp("sharded")
    shutil.copytree(tiny_model, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) == 3
    return folder


@pytest.fixture
def no_rows(monkeypatch):
    """Let a run fail that comes to its rows."""
    monkeypatch.setattr(finetune, "make_datasets", lambda *_: pytest.fail("the rows are read"))


def without_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def of_another_shape(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cut_off(folder):
    os.truncate(folder / "model.safetensors", os.path.getsize(folder / "model.safetensors") - 1)


DAMAGES = {
    "a weight is not there": (without_a_weight, r"lack 1 weights, the first is model\.norm\.weight"),
    "another shape": (of_another_shape, "cannot be loaded: "),
    "cut off": (cut_off, r"model\.safetensors: has [\d,]+ bytes, expected [\d,]+; download the model again"),
    "a pointer of git-lfs": (
        lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        r"model\.safetensors: is no safetensors file",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded: Error no file named"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_found_before_the_rows_are_read(tiny_copy, rows, tmp_path, no_rows, damage):
    change, sentence = DAMAGES[damage]
    change(tiny_copy)
    with pytest.raises(UserError, match=sentence):
        finetune.train(argv(tiny_copy, rows, tmp_path / "out", "--validate_only"))


WRONG_FLAGS = {
    "--lora_target_modules q_proj v_porj": r"v_porj: the model has no layer of this name; did you mean v_proj\?",
    "--use_lora --modules_to_save lm_haed": r"lm_haed: the model has no layer of this name; did you mean lm_head\?",
    "--lora_target_modules .*nothing": "this regular expression matches no layer",
    "--lora_target_modules model.layers.0": "no adapter: Target module Qwen2DecoderLayer",
    "--use_lora --trainable_token_indices 5 1024": "1024: expected ids below 1024, the model's embeddings",
    "--use_lora --lora_experts": "qwen2 has no routed experts",
}


@pytest.mark.parametrize("flags", WRONG_FLAGS)
def test_adapters_that_the_model_cannot_have_are_found_before_the_rows_are_read(
    tiny_model, rows, tmp_path, no_rows, flags
):
    with pytest.raises(UserError, match=WRONG_FLAGS[flags]):
        finetune.train(argv(tiny_model, rows, tmp_path / "out", "--validate_only", *flags.split()))


def test_an_adapter_of_another_model_is_found_before_the_rows_are_read(tiny_model, rows, tmp_path, monkeypatch):
    finetune.train(argv(tiny_model, rows, tmp_path / "one", "--use_lora", "--max_steps", "1"))
    weights = load_file(tmp_path / "one" / "adapter_model.safetensors")
    weights["base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"] = torch.ones(64, 64)
    save_file(weights, tmp_path / "one" / "adapter_model.safetensors")
    monkeypatch.setattr(finetune, "make_datasets", lambda *_: pytest.fail("the rows are read"))
    with pytest.raises(UserError, match="1 adapter weights do not match the base model"):
        finetune.train(argv(tiny_model, rows, tmp_path / "two", "--lora_weight_path", tmp_path / "one"))


def test_trusting_code_that_is_not_there_leaves_out_no_check(tiny_model, rows, tmp_path, no_rows):
    words = ["--trust_remote_code", "True", "--lora_target_modules", "q_porj", "--validate_only"]
    with pytest.raises(UserError, match="q_porj: the model has no layer of this name"):
        finetune.train(argv(tiny_model, rows, tmp_path / "out", *words))


@pytest.mark.parametrize("start", ["gaussian", "pissa", "olora", "orthogonal"])
def test_starts_that_need_the_numbers_of_the_base_pass_the_rehearsal(tiny_model, rows, tmp_path, start):
    options = ["--use_lora", "--init_lora_weights", start, "--validate_only"]
    assert finetune.train(argv(tiny_model, rows, tmp_path / "out", *options)) == {}


@pytest.mark.parametrize("flags", [[], ["--use_lora"]], ids=str)
def test_the_rehearsal_holds_no_numbers_and_loads_nothing(tiny_model, rows, tmp_path, monkeypatch, capfd, flags):
    made = []
    skeleton = finetune.loading.Pretrained.skeleton

    def kept(self, config):
        made.append(skeleton(self, config))
        return made[-1]

    monkeypatch.setattr(finetune.loading.Pretrained, "skeleton", kept)
    monkeypatch.setattr(finetune, "load_model", lambda *_: pytest.fail("the weights are loaded"))
    finetune.train(argv(tiny_model, rows, tmp_path / "out", "--validate_only", *flags))
    assert {p.device.type for name, p in made[0].named_parameters() if "lora_" not in name} == {"meta"}
    assert "Loading weights" not in capfd.readouterr().err


def test_a_token_beyond_the_embeddings_is_named_with_its_record(tiny_copy, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_copy)
    tokenizer.add_tokens([f"<new{n}>" for n in range(1030 - len(tokenizer))])
    tokenizer.save_pretrained(tiny_copy)
    token = tokenizer.convert_ids_to_tokens(1029)
    rows = [{"prompt": "say", "completion": text} for text in ("hello", f"hello {token}")]
    data = write(tmp_path / "rows.jsonl", rows)
    sentence = (
        rf"record 2 \(line 2\): the token {token} has the id 1029, and the model has embeddings for 1024 tokens; use"
    )
    for lazy in ("False", "True"):
        options = ["--lazy_preprocess", lazy, "--validate_only"]
        with pytest.raises(UserError, match=sentence):
            finetune.train(argv(tiny_copy, data, tmp_path / "out", *options))
    model = AutoModelForCausalLM.from_pretrained(tiny_copy)
    model.resize_token_embeddings(1032)  # as Qwen's, which are longer than their vocabularies
    model.save_pretrained(tiny_copy)
    assert finetune.train(argv(tiny_copy, data, tmp_path / "out", "--max_steps", "1"))["train_loss"] > 0


def test_the_layers_that_each_name_hits_are_counted(tiny_model, rows, tmp_path, capsys):
    options = ["--lora_target_modules", "q_proj,v_proj", "layers.1.mlp.up_proj", "--max_steps", "1"]
    finetune.train(argv(tiny_model, rows, tmp_path / "out", *options))
    assert "on q_proj (2), up_proj (1), v_proj (2)" in capsys.readouterr().out


def _paths(node, path=()):
    """All places in a JSON value; of a list the first three."""
    pairs = node.items() if isinstance(node, dict) else list(enumerate(node))[:3] if isinstance(node, list) else ()
    for key, value in pairs:
        yield (*path, key)
        yield from _paths(value, (*path, key))


def _damage(file, draw):
    kind = draw(st.sampled_from(["entry", "entry", "entry", "cut", "removed", "bytes", "other"]))
    content = file.read_bytes()
    if kind == "entry" and file.suffix == ".json":
        value = json.loads(content)
        *parents, last = draw(st.sampled_from(list(_paths(value))))
        node = value
        for key in parents:
            node = node[key]
        new = draw(st.sampled_from([None, -1, 0, 7, 1.5, "", "x", [], ["a"], {}, {"a": 1}, True, ...]))
        if new is ...:
            del node[last]
        else:
            node[last] = new
        content = json.dumps(value).encode()
    elif kind == "cut":
        content = content[: draw(st.integers(0, len(content)))]
    elif kind == "other":
        content = draw(st.sampled_from([b"", b"[]", b"{}", b"null", b"\xff\xfe", b"version https://git-lfs"]))
    elif kind == "bytes":
        end = 8 + int.from_bytes(content[:8], "little") if file.suffix == ".safetensors" else len(content)
        at = draw(st.integers(0, end - 1))
        content = content[:at] + bytes([draw(st.integers(0, 255))]) + content[at + 1 :]
    file.unlink()
    if kind != "removed":
        file.write_bytes(content)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_to_a_models_folder_is_harmless_or_one_sentence(sharded_model, rows, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    shutil.copytree(sharded_model, folder, dirs_exist_ok=True)
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    _damage(folder / data.draw(st.sampled_from(names)), data.draw)
    try:
        finetune.train(argv(folder, rows, folder / "out", "--validate_only"))
    except UserError as error:
        assert "\n" not in str(error)
    shutil.rmtree(folder)
