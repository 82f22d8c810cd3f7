"""Merging tensor by tensor: every kind of adapter that training can make, on every family, by the base's own files."""

import itertools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import peft
import pytest
import torch
import transformers
from families import SIZE, TEXT, VISION, family
from safetensors.torch import load_file, save_file

import finetune
from helpers import ROOT
from recipe.console import UserError
from recipe.model.adapter import default_targets, targets
from recipe.model.rope import extend_window
from recipe.training import merge_proof, merging
from recipe.training.merging import merge

FAMILIES = ["qwen3", "qwen3_moe", *[name for name in VISION if "moe" not in name and " " not in name]]
NOISE = 5e-5  # of float32, in the logits of random models that are changed as much as here


@pytest.fixture(scope="session")
def base_of(small_tokenizer, tmp_path_factory):
    """Function from a family to the folder of a random model in several shards, with what comes with one of the hub."""
    made = {}

    def of(name, tied=False, dtype=torch.float32, shard="60KB"):
        key = (name, tied, dtype, shard)
        if key not in made:
            folder = tmp_path_factory.mktemp(name)
            options = {"initializer_range": 0.1, "max_position_embeddings": 512}
            made[key] = family(name, folder, small_tokenizer, dtype, tied, shard, **options)
            (folder / "LICENSE").write_text("free")
            (folder / "README.md").write_text("# the base model")
        return made[key]

    return of


def load(folder, **options):
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0])
    return kind.from_pretrained(folder, **{"dtype": torch.float32, **options}).eval()


def strong(model):
    """Change every trained weight by so much that the adapter's logits are far from the base's."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def train(base, folder, model=None, convert=False, **options):
    """An adapter on `base` in `folder`, as a training would leave it."""
    model = model or load(base)
    start = {"r": 4, "lora_alpha": 8, "target_modules": None, "task_type": "CAUSAL_LM", **options}
    if start["target_modules"] is None and not start.get("target_parameters"):
        start["target_modules"] = default_targets(model)
    if isinstance(start["target_modules"], list):
        start["target_modules"] = targets(model, start["target_modules"])  # not those of a vision tower
    adapted = peft.get_peft_model(model, peft.LoraConfig(**start))
    if convert:
        initial = folder.parent / "initial"
        adapted.peft_config["default"].init_lora_weights = True
        adapted.save_pretrained(initial)
        adapted.peft_config["default"].init_lora_weights = options["init_lora_weights"]
    strong(adapted)
    more = {"path_initial_model_for_weight_conversion": str(initial)} if convert else {}
    adapted.save_pretrained(folder, **more)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model):
    torch.manual_seed(2)
    return model(input_ids=torch.randint(10, 900, (2, 24)), use_cache=False).logits


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def adapted(base, adapter):
    return peft.PeftModel.from_pretrained(load(base), adapter).eval()


def tensors(folder):
    found = {}
    for path in sorted(pathlib.Path(folder).glob("model*.safetensors")):
        found |= load_file(path)
    return found


def header(path):
    with open(path, "rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def check(base, adapter, output, **options):
    """Merge; the folder acts as the adapter does, and nothing but what it trained is another than in the base."""
    difference = merge(str(adapter), str(output), **options)
    expected = logits(adapted(base, adapter))
    assert distance(logits(load(base)), expected) > 0.05, "the adapter does nothing that could be seen"
    assert difference < NOISE
    assert distance(logits(load(output)), expected) < NOISE
    return expected


def changed(base, output):
    """Names of the tensors that differ between two folders, or are in one of them alone."""
    before, after = tensors(base), tensors(output)
    return {
        name
        for name in before | after
        if name not in before or name not in after or not same(before[name], after[name])
    }


# ----------------------------------------------------------------------------------------------------------------------
# Every adapter, every family

ADAPTERS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 8, r"layers\.1\..*down_proj": 2}, "alpha_pattern": {"q_proj": 32}},
    "regular expression": {"target_modules": r".*\.(q_proj|up_proj)"},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "bias": {"bias": "all"},
    "lora_only": {"bias": "lora_only"},
    "lora_bias": {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
    "tokens": {"trainable_token_indices": [3, 5, 1000]},
    "rs dora tokens": {"use_rslora": True, "use_dora": True, "trainable_token_indices": [3, 5]},
    "other tokens in the head": {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [7]}},
    "head": {"modules_to_save": ["lm_head"]},
    "embeddings": {"modules_to_save": ["embed_tokens"]},
    "embeddings and head": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embeddings tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "lora on embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "lora on the head": {"target_modules": ["q_proj", "lm_head"]},
    "lora on both, tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "norms": {"modules_to_save": ["norm", "input_layernorm"]},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_kind_of_adapter_acts_as_it_did(base_of, tmp_path, kind, tied):
    base = base_of("qwen2", tied)
    adapter = train(base, tmp_path / "adapter", **ADAPTERS[kind])
    check(base, adapter, tmp_path / "merged")
    if not tied:  # of a tied model peft's own merge is wrong for some of these adapters
        expected = adapted(base, adapter).merge_and_unload().state_dict()
        found = load(tmp_path / "merged").state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.allclose(found[name], expected[name], rtol=1e-6, atol=1e-6) for name in found)


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "lora") for name in {**TEXT, **VISION}), *itertools.product(FAMILIES, ["tokens", "head"])],
)
def test_every_family_keeps_what_was_not_trained_to_the_byte(base_of, tmp_path, name, kind):
    base = base_of(name)
    adapter = train(base, tmp_path / "adapter", **ADAPTERS[kind])
    check(base, adapter, tmp_path / "merged")
    trained = {"lora": ["self_attn", "linear_attn", "mlp"], "tokens": ["embed_tokens"], "head": ["lm_head"]}
    names = changed(base, tmp_path / "merged")
    of_family = [
        "block_sparse_moe",
        "hyper_connection",
        "ple",
        "per_layer",
    ]  # where Kimi, Qwen4 and Gemma 4 have layers
    parts = trained["lora"] + trained[kind] + of_family
    assert names and all(any(re.search(rf"\b(attn_|mlp_)?{part}", name) for part in parts) for name in names)
    assert not any("visual" in name or "vision" in name or "mtp" in name for name in names)
    assert any(trained[kind][0] in name for name in names)
    for path in base.iterdir():
        if path.suffix != ".safetensors" and not path.name.startswith(("tokenizer", "chat_template", "README")):
            assert (tmp_path / "merged" / path.name).read_bytes() == path.read_bytes(), path.name
    assert {path.name for path in base.iterdir()} - {path.name for path in (tmp_path / "merged").iterdir()} == {
        "README.md"
    }
    for path in base.glob("*.safetensors"):  # names, order, shapes, places and metadata
        assert header(tmp_path / "merged" / path.name) == header(path)


@pytest.mark.parametrize("kind", ["tokens", "head", "lora on embeddings"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_head_that_is_no_longer_the_embeddings_gets_its_own_tensor(base_of, tmp_path, name, kind):
    base = base_of(name, tied=True)
    check(base, train(base, tmp_path / "adapter", **ADAPTERS[kind]), tmp_path / "merged")
    new = set(tensors(tmp_path / "merged")) - set(tensors(base))
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    tied = [part["tie_word_embeddings"] for part in (config, config.get("text_config", config))]
    if kind == "tokens":  # trained in the embeddings and the head at once, as one
        assert not new and all(tied)
    else:
        (name,) = new
        index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
        assert name.endswith("lm_head.weight") and name in index["weight_map"] and not any(tied)


@pytest.mark.parametrize("kind", ["tokens", "head"])
def test_a_tied_head_that_is_in_the_files_all_the_same_follows_the_embeddings(base_of, tmp_path, kind):
    base = pathlib.Path(shutil.copytree(base_of("qwen2", tied=True, shard="1GB"), tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    check(base, train(base, tmp_path / "adapter", **ADAPTERS[kind]), tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"]) == (kind == "tokens")
    assert not torch.equal(merged["lm_head.weight"], weights["lm_head.weight"])


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_5_moe", "qwen3_vl_moe", "gpt_oss"])
def test_an_adapter_on_experts_changes_each_of_them(base_of, tmp_path, name):
    base = base_of(name)
    experts = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    adapter = train(base, tmp_path / "adapter", target_parameters=experts, target_modules=["q_proj"])
    check(base, adapter, tmp_path / "merged")
    of_experts = {name for name in tensors(base) if ".experts." in name and "bias" not in name}
    assert of_experts and of_experts <= changed(base, tmp_path / "merged")


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_change_the_base_must_be_converted(base_of, tmp_path, start):
    base = base_of("qwen2")
    converted = train(base, tmp_path / "converted", convert=True, init_lora_weights=start, lora_alpha=2)
    check(base, converted, tmp_path / "merged")
    as_it_is = train(base, tmp_path / "as it is", init_lora_weights=start)
    with pytest.raises(UserError, match=f"the adapter starts as {start} .* path_initial_model_for_weight_conversion"):
        merge(str(as_it_is), str(tmp_path / "other"))


@pytest.mark.parametrize("patterns", [False, True])
def test_an_adapter_of_the_text_only_class_is_merged_into_the_vision_checkpoint(base_of, tmp_path, patterns):
    base = base_of("qwen3_5")
    text = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    options = {"rank_pattern": {r"model\.layers\.0\.mlp.up_proj": 8}, "alpha_pattern": {r"^model\.layers\.1\..*": 16}}
    train(base, tmp_path / "adapter", model=text, trainable_token_indices=[5], **(options if patterns else {}))
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(name.startswith("base_model.model.model.layers.") for name in names)
    assert merge(str(tmp_path / "adapter"), str(tmp_path / "merged")) < NOISE
    text = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = logits(peft.PeftModel.from_pretrained(text, tmp_path / "adapter").eval())
    assert distance(logits(load(base)), expected) > 0.05
    assert distance(logits(load(tmp_path / "merged")), expected) < NOISE
    assert set(tensors(tmp_path / "merged")) == set(tensors(base))


# ----------------------------------------------------------------------------------------------------------------------
# Precision, memory, proof


def test_the_base_decides_the_precision_of_each_tensor(base_of, tmp_path):
    base = pathlib.Path(shutil.copytree(base_of("qwen3_5", dtype=torch.bfloat16), tmp_path / "base"))
    for path in base.glob("*.safetensors"):  # as in the files of the hub
        kept = {name: value.float() if "A_log" in name else value for name, value in load_file(path).items()}
        save_file(kept, path, metadata={"format": "pt"})
    adapter = train(base, tmp_path / "adapter")
    assert 1e-4 < merge(str(adapter), str(tmp_path / "merged")) < 0.2  # by rounding
    kinds = {name: value.dtype for name, value in tensors(tmp_path / "merged").items()}
    assert kinds == {name: value.dtype for name, value in tensors(base).items()}
    expected = adapted(base, adapter).merge_and_unload().to(torch.bfloat16).state_dict()
    found = load(tmp_path / "merged").state_dict()
    assert all(torch.equal(found[name], value.float()) for name, value in expected.items() if "A_log" not in name)


def test_a_precision_that_was_asked_for_holds_for_the_whole_model(base_of, tmp_path, capsys):
    base = base_of("qwen3_5", dtype=torch.bfloat16)
    adapter = train(base, tmp_path / "adapter")
    assert merge(str(adapter), str(tmp_path / "merged"), torch.float32) < NOISE
    merged = tensors(tmp_path / "merged")
    assert {value.dtype for value in merged.values()} == {torch.float32}
    assert all(torch.equal(merged[name], value.float()) for name, value in tensors(base).items() if "visual" in name)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "merged").dtype == torch.float32
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    before = json.loads((base / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == before["metadata"]["total_size"] + 2 * sum(
        v.numel() for v in merged.values()
    )
    base = base_of("qwen2", dtype=torch.float32)
    adapter = train(base, tmp_path / "large")
    weights = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in weights if "lora_B" in name)
    save_file({**weights, name: weights[name] * 1e7}, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match="is not finite in torch.float16; use --dtype bfloat16"):
        merge(str(adapter), str(tmp_path / "half"), torch.float16)
    assert not (tmp_path / "half").exists()


MEMORY = """
import re, sys
import torch, transformers, peft
from recipe.training import merge_proof, merging
import transformers.models.qwen2.modeling_qwen2

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

merge_proof.free_memory = lambda device: 0  # the proof by logits would load the model
before = peak()
merging.merge(sys.argv[1], sys.argv[2])
print("grown by", peak() - before)
"""


@pytest.mark.slow
def test_memory_is_that_of_the_adapter_and_a_few_tensors(small_tokenizer, tmp_path):
    """Less than one shard of the base, and far less than the model."""
    torch.manual_seed(0)
    size = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 14, "vocab_size": 30_000}
    config = transformers.Qwen2Config(**{**SIZE, **size})
    base = pathlib.Path(shutil.copytree(small_tokenizer, tmp_path / "base"))
    transformers.Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(base, max_shard_size="300MB")
    adapter = train(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    command = [sys.executable, "-c", MEMORY, str(adapter), str(tmp_path / "merged")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    files = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    largest = max(path.stat().st_size for path in base.glob("*.safetensors"))
    grown = int(done.stdout.split("grown by")[1])
    print(f"{files / 1e6:.0f} MB of weights, largest shard {largest / 1e6:.0f} MB, grown by {grown / 1e6:.0f} MB")
    assert grown < largest < 0.8 * files


SAMPLED = ["lora", "rslora", "dora", "patterns", "experts"]


def sampled(base_of, tmp_path, kind):
    base = base_of("qwen3_moe" if kind == "experts" else "qwen2", dtype=torch.bfloat16)
    experts = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    options = {"target_parameters": experts, "target_modules": ["q_proj"]} if kind == "experts" else ADAPTERS[kind]
    return base, train(base, tmp_path / "adapter", **options)


@pytest.mark.parametrize("kind", SAMPLED)
def test_a_model_that_does_not_fit_in_memory_is_proved_by_samples(base_of, tmp_path, kind, monkeypatch, capsys):
    base, adapter = sampled(base_of, tmp_path, kind)
    monkeypatch.setattr(merge_proof, "free_memory", lambda device: 0)
    assert 0 < merge(str(adapter), str(tmp_path / "merged")) < 5e-3  # rounding to bfloat16
    assert "logits are not compared" in capsys.readouterr().out
    expected = dict(adapted(base, adapter).merge_and_unload().named_parameters())
    found = dict(load(tmp_path / "merged").named_parameters())
    assert all(torch.equal(found[name], value.to(torch.bfloat16).float()) for name, value in expected.items())


@pytest.mark.parametrize("kind", SAMPLED)
def test_samples_find_a_wrong_merge(base_of, tmp_path, kind, monkeypatch):
    base, adapter = sampled(base_of, tmp_path, kind)
    monkeypatch.setattr(merge_proof, "free_memory", lambda device: 0)
    for kind in (peft.tuners.lora.Linear, peft.tuners.lora.layer.ParamWrapper):

        def stronger(layer, name, *args, update=kind.update_layer, **options):
            update(layer, name, *args, **options)
            layer.scaling[name] *= 1.01

        monkeypatch.setattr(kind, "update_layer", stronger)
    with pytest.raises(UserError, match="what was written differs from what was merged"):
        merge(str(adapter), str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_the_proof_reads_the_files_that_were_written(base_of, tmp_path, monkeypatch):
    base = base_of("qwen3_moe")
    adapter = train(base, tmp_path / "adapter", target_parameters=["mlp.experts.down_proj"], target_modules=["q_proj"])
    write = merging.WeightFiles.write

    def other(files, shard, folder, dtypes, changed, added):
        name = next(name for name in changed if "down_proj" in name)
        write(files, shard, folder, dtypes, {**changed, name: lambda dtype: 1.1 * changed[name](dtype)}, added)

    monkeypatch.setattr(merging.WeightFiles, "write", other)
    with pytest.raises(UserError, match="what was written differs from what was merged"):
        merge(str(adapter), str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_what_4_bits_change_is_said(base_of, tmp_path, capsys):
    base = base_of("qwen2", dtype=torch.bfloat16)
    adapter = train(base, tmp_path / "best")
    (tmp_path / "run.yaml").write_text("use_lora: true\nq_lora: true\n")
    merge(str(adapter), str(tmp_path / "merged"), quantize=finetune.nf4)
    (apart,) = re.findall(
        r"trained on the base in 4 bits; .* differ from the merged model's by (\S+),", capsys.readouterr().out
    )
    assert 1e-2 < float(apart) < 1
    (tmp_path / "run.yaml").write_text("use_lora: true\nq_lora: false\n")
    merge(str(adapter), str(tmp_path / "merged"), quantize=finetune.nf4)
    assert "4 bits" not in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# The base: where it is, what it is


def edit(path, **entries):
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_a_base_that_has_moved_is_named_with_the_entry_and_given_with_base(base_of, tmp_path, capsys):
    base = pathlib.Path(shutil.copytree(base_of("qwen2"), tmp_path / "old"))
    adapter = train(base, tmp_path / "adapter")
    moved = base.rename(tmp_path / "new")
    with pytest.raises(UserError, match=r"adapter_config\.json: base_model_name_or_path is '.*old'.*--base"):
        merge(str(adapter), str(tmp_path / "merged"))
    assert merge(str(adapter), str(tmp_path / "merged"), base=str(moved)) < NOISE
    assert f"--base {moved} is used in place of" in capsys.readouterr().out
    assert json.loads((tmp_path / "merged" / "merge.json").read_text())["base"] == str(moved)
    with pytest.raises(UserError, match="--base is 'no/where', which is no folder"):
        merge(str(adapter), str(tmp_path / "other"), base="no/where")
    edit(adapter / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(UserError, match="base_model_name_or_path is empty; .*--base"):
        merge(str(adapter), str(tmp_path / "other"))


def test_another_base_is_refused_by_its_shapes_its_layers_and_its_revision(base_of, tmp_path):
    base = base_of("qwen2")
    adapter = train(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    for change, found in (
        ({"intermediate_size": 96}, "size mismatch"),
        ({"num_hidden_layers": 1}, r"do not match .*layers\.1"),
        ({"num_hidden_layers": 3}, r"do not match .*layers\.2"),
    ):
        other = pathlib.Path(shutil.copytree(base, tmp_path / str(change), ignore=shutil.ignore_patterns("model*")))
        transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**{**SIZE, **change})).save_pretrained(other)
        with pytest.raises(UserError, match=found):
            merge(str(adapter), str(tmp_path / "merged"), base=str(other))
    edit(adapter / "adapter_config.json", revision="a" * 40)
    local = pathlib.Path(shutil.copytree(base, tmp_path / "local"))
    notes = local / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    (notes / "config.json.metadata").write_text("b" * 40 + "\netag\n1.0\n")
    with pytest.raises(UserError, match="is revision bbb.*, expected aaa"):
        merge(str(adapter), str(tmp_path / "merged"), base=str(local))
    (notes / "config.json.metadata").write_text("a" * 40 + "\netag\n1.0\n")
    merge(str(adapter), str(tmp_path / "merged"), base=str(local))


def test_a_base_of_the_hub_is_found_in_the_cache_at_its_revision(base_of, tmp_path):
    base, commits = base_of("qwen2"), ("a" * 40, "b" * 40)
    repository = tmp_path / "cache" / "models--org--tiny"
    for commit in commits:
        shutil.copytree(base, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commits[1])
    adapter = train(base, tmp_path / "adapter")
    edit(adapter / "adapter_config.json", base_model_name_or_path="org/tiny", revision=commits[0])
    (repository / "snapshots" / commits[0] / "LICENSE").write_text("of revision a")
    assert merge(str(adapter), str(tmp_path / "merged"), cache_dir=str(tmp_path / "cache")) < NOISE
    assert (tmp_path / "merged" / "LICENSE").read_text() == "of revision a"
    edit(adapter / "adapter_config.json", revision="c" * 40)
    with pytest.raises(UserError, match="no model of the hub that can be had at revision ccc"):
        merge(str(adapter), str(tmp_path / "other"), cache_dir=str(tmp_path / "cache"))


QUANTISED = {
    "Qwen3-8B-bnb-4bit": ({"load_in_4bit": True, "quant_method": "bitsandbytes"}, "Qwen3-8B"),
    "Qwen3-8B-unsloth-bnb-4bit": ({"load_in_4bit": True}, "Qwen3-8B"),
    "Qwen3-8B-FP8": ({"quant_method": "fp8"}, "Qwen3-8B"),
    "Qwen2.5-7B-Instruct-GPTQ-Int4": ({"quant_method": "gptq", "bits": 4}, "Qwen2.5-7B-Instruct"),
    "Qwen2.5-7B-Instruct-AWQ": ({"quant_method": "awq"}, "Qwen2.5-7B-Instruct"),
    "gpt-oss-20b": ({"quant_method": "mxfp4"}, None),
}


@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_base_is_refused_and_the_other_one_named(base_of, tmp_path, name):
    settings, plain = QUANTISED[name]
    base = pathlib.Path(shutil.copytree(base_of("qwen2"), tmp_path / name))
    adapter = train(base, tmp_path / "adapter")
    edit(base / "config.json", quantization_config=settings)
    remedy = f"such as --base {tmp_path / plain}" if plain else "with --base"
    with pytest.raises(UserError, match=rf"its weights are quantised .* made from,? {re.escape(remedy)}\.$"):
        merge(str(adapter), str(tmp_path / "merged"))


def test_weights_that_were_dequantised_are_merged_and_no_longer_called_quantised(base_of, tmp_path):
    base = pathlib.Path(shutil.copytree(base_of("qwen2"), tmp_path / "base"))
    edit(base / "config.json", quantization_config={"quant_method": "gguf"})
    adapter = train(base_of("qwen2"), tmp_path / "adapter")
    assert merge(str(adapter), str(tmp_path / "merged"), base=str(base)) < NOISE
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


def test_one_file_several_files_and_files_that_cannot_be_read(base_of, tmp_path):
    several = base_of("qwen2")
    adapter = train(several, tmp_path / "adapter")
    single = base_of("qwen2", shard="1GB")
    assert [path.name for path in single.glob("model*")] == ["model.safetensors"]
    assert merge(str(adapter), str(tmp_path / "single"), base=str(single)) < NOISE
    assert [path.name for path in (tmp_path / "single").glob("model*")] == ["model.safetensors"]
    shard = sorted(several.glob("model-*.safetensors"))[1].name

    def broken(change):
        folder = pathlib.Path(shutil.copytree(several, tmp_path / "broken", dirs_exist_ok=True))
        change(folder)
        with pytest.raises(UserError) as error:
            merge(str(adapter), str(tmp_path / "merged"), base=str(folder))
        shutil.rmtree(folder)
        assert not (tmp_path / "merged").exists()
        return str(error.value)

    def only_bin(folder):
        torch.save(tensors(folder), folder / "pytorch_model.bin")
        for path in folder.glob("model*"):
            path.unlink()

    assert "expected weights in safetensors files" in broken(only_bin)
    assert f"{shard}: cannot be read" in broken(lambda folder: (folder / shard).unlink())
    assert re.search(r"has [\d,]+ bytes, expected [\d,]+", broken(lambda folder: os.truncate(folder / shard, 30_000)))
    assert "is no safetensors file" in broken(lambda folder: (folder / shard).write_text("version https://git-lfs\n"))
    assert "holds no config.json" in broken(lambda folder: (folder / "config.json").unlink())


# ----------------------------------------------------------------------------------------------------------------------
# The adapter and the output folder


def test_what_is_no_adapter_that_can_be_merged_is_refused(base_of, tmp_path):
    base = base_of("qwen2")
    adapter = train(base, tmp_path / "adapter")
    with pytest.raises(UserError, match="holds no adapter_config.json"):
        merge(str(base), str(tmp_path / "merged"))
    model = peft.get_peft_model(load(base), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    model.save_pretrained(tmp_path / "ia3")
    with pytest.raises(UserError, match="peft_type is IA3; expected LORA"):
        merge(str(tmp_path / "ia3"), str(tmp_path / "merged"))
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no adapter_model.safetensors"):
        merge(str(adapter), str(tmp_path / "merged"))


def test_only_a_new_an_empty_or_an_earlier_merges_folder_is_written(base_of, tmp_path):
    base = pathlib.Path(shutil.copytree(base_of("qwen2"), tmp_path / "base"))
    adapter = train(base, tmp_path / "adapter")
    other = train(base, tmp_path / "other")
    for output, reason in ((adapter, "is the folder of the adapter"), (base, "is the folder of the base model"),
                           (other, "holds .* which no earlier merge wrote"), (adapter / "README.md", "is a file")):  # fmt: skip
        before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
        with pytest.raises(UserError, match=reason):
            merge(str(adapter), str(output))
        assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before
    (tmp_path / "merged").mkdir()
    merge(str(adapter), str(tmp_path / "merged"))
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    single = base_of("qwen2", shard="1GB")
    merge(str(adapter), str(tmp_path / "merged"), base=str(single))  # in one file: nothing of the first is left
    assert {path.name for path in (tmp_path / "merged").glob("model*")} == {"model.safetensors"} != names
    (tmp_path / "merged" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds notes.txt, which no earlier merge wrote"):
        merge(str(adapter), str(tmp_path / "merged"))
    assert distance(logits(load(tmp_path / "merged")), logits(adapted(base, adapter))) < NOISE


STOPPED = """
import os, signal, sys
from recipe.training import merging
from recipe.model.weight_files import WeightFiles
write, count = WeightFiles.write, [0]
def stop(files, *args):
    count[0] += 1
    if count[0] == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    write(files, *args)
WeightFiles.write = stop
merging.merge(sys.argv[1], sys.argv[2])
"""


@pytest.mark.slow
def test_a_merge_that_is_killed_leaves_nothing_that_looks_complete(base_of, tmp_path):
    adapter = train(base_of("qwen2"), tmp_path / "adapter")
    done = subprocess.run([sys.executable, "-c", STOPPED, str(adapter), str(tmp_path / "merged")], cwd=ROOT)
    assert done.returncode == -9
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["merge.incomplete"]
    assert not (tmp_path / "merged" / "merge.incomplete" / "config.json").exists()
    merge(str(adapter), str(tmp_path / "merged"))
    assert not (tmp_path / "merged" / "merge.incomplete").exists()
    load(tmp_path / "merged")


def test_a_merge_that_fails_leaves_an_earlier_one_as_it_was(base_of, tmp_path, monkeypatch):
    adapter = train(base_of("qwen2"), tmp_path / "adapter")
    merge(str(adapter), str(tmp_path / "merged"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()}
    write, count = merging.WeightFiles.write, []

    def interrupted(files, *args):
        count.append(args)
        if len(count) == 4:
            raise KeyboardInterrupt
        write(files, *args)

    monkeypatch.setattr(merging.WeightFiles, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(str(adapter), str(tmp_path / "merged"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()} == before


def test_an_output_that_cannot_be_written_is_one_sentence(base_of, tmp_path):
    adapter = train(base_of("qwen2"), tmp_path / "adapter")
    with pytest.raises(UserError, match="--output /proc/merged: cannot be written"):
        merge(str(adapter), "/proc/merged")


def test_tokenizer_template_and_stop_tokens_are_those_of_the_training(base_of, tmp_path):
    base = pathlib.Path(shutil.copytree(base_of("qwen2"), tmp_path / "base"))
    (base / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}')
    (base / "chat_template.json").write_text('{"chat_template": "old"}')
    (base / "pytorch_model.bin").write_text("the same weights, not merged")
    (base / "trainer_state.json").write_text("{}")
    (base / "modeling_own.py").write_text("")
    adapter = train(base, tmp_path / "adapter")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template, tokenizer.eos_token = "{{ messages }}", "<|im_end|>"
    tokenizer.save_pretrained(adapter)
    (adapter / "generation_config.json").write_text('{"eos_token_id": [7]}')
    umask = os.umask(0o027)
    try:
        merge(str(adapter), str(tmp_path / "merged"))
    finally:
        os.umask(umask)
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert found.chat_template == "{{ messages }}" and found.eos_token == "<|im_end|>"
    assert (tmp_path / "merged" / "generation_config.json").read_text() == '{"eos_token_id": [7]}'
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"modeling_own.py", "LICENSE"} <= names
    assert (
        not {"pytorch_model.bin", "trainer_state.json", "chat_template.json", "README.md", "adapter_config.json"}
        & names
    )
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "merged").iterdir()} == {0o640}


@pytest.mark.parametrize("spelling", ["version 5", "version 4"])
@pytest.mark.parametrize("name", ["qwen2", "qwen3_vl", "gemma3"])
def test_the_rope_settings_of_the_training_are_those_of_the_merged_model(base_of, tmp_path, name, spelling):
    base = pathlib.Path(shutil.copytree(base_of(name), tmp_path / "base"))
    written = json.loads((base / "config.json").read_text())
    text = written.get("text_config", written)
    if spelling == "version 4":
        rope = text.pop("rope_parameters")
        if name == "gemma3":
            text["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
            rope = rope["full_attention"]
        text["rope_theta"] = rope.pop("rope_theta")
        text["rope_scaling"] = rope if "mrope_section" in rope else None
        (base / "config.json").write_text(json.dumps(written))
    config = transformers.AutoConfig.from_pretrained(base)
    extend_window(config.get_text_config(), "yarn", 1024)
    adapter = train(base, tmp_path / "adapter", model=load(base, config=config))
    config.save_pretrained(adapter)
    assert merge(str(adapter), str(tmp_path / "merged")) < NOISE
    expected = peft.PeftModel.from_pretrained(load(base, config=config), adapter).eval()
    assert distance(logits(adapted(base, adapter)), logits(expected)) > 1e-3, "the scaling changes nothing"
    merged = load(tmp_path / "merged")
    assert distance(logits(merged), logits(expected)) < NOISE
    assert merged.config.get_text_config().max_position_embeddings == 1024
    changed = json.loads((tmp_path / "merged" / "config.json").read_text())
    for part in (written, changed):
        for field in ("rope_parameters", "rope_scaling", "max_position_embeddings"):
            part.get("text_config", part).pop(field, None)
    assert changed == written  # nothing else, such as the dtype, is the training's


@pytest.mark.slow
def test_the_command_says_a_mistake_in_one_sentence(tmp_path):
    words = [sys.executable, "merge.py", "--adapter", str(tmp_path), "--output", str(tmp_path / "merged")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.strip().count("\n") == 0
    assert done.stderr.startswith(f"error: {tmp_path}: holds no adapter_config.json")
