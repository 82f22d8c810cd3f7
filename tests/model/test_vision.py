"""Checkpoints with a vision tower, trained on text: the losses of the text alone, names and towers of the checkpoint."""

import json

import families
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import finetune
from helpers import UNEVEN_ROWS, argv, history, reference, relative, write
from recipe.console import UserError
from recipe.dataset.collator import Collator
from recipe.dataset.conversations import Conversations
from recipe.dataset.encoding import ChatEncoder
from recipe.model import attention, loading
from recipe.model.loss import fuse_loss_into_head, supervised_loss

NAMES = ["qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma3"]
TEXT_CLASS = ["qwen3_5", "gemma3"]  # those whose text part transformers also knows as a class of its own


@pytest.fixture(scope="module")
def checkpoint(small_tokenizer, tmp_path_factory):
    """Function from the name of a family to the folder of a checkpoint in bfloat16."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = families.family(name, tmp_path_factory.mktemp(name), small_tokenizer, torch.bfloat16)
        return made[name]

    return of


@pytest.fixture(scope="module")
def trained(checkpoint, tmp_path_factory):
    """Function from a family and flags to the folder of a run of three steps."""
    made = {}

    def of(name, *flags):
        if (name, flags) not in made:
            folder = tmp_path_factory.mktemp(name)
            data = write(folder / "rows.jsonl", UNEVEN_ROWS)
            finetune.train(argv(checkpoint(name), data, folder / "out", "--max_steps", 3, *flags))
            made[name, flags] = folder / "out"
        return made[name, flags]

    return of


def documents_of(folder, data):
    """The documents of UNEVEN_ROWS by a checkpoint's own tokenizer, whose class depends on the family."""
    encoder = ChatEncoder(transformers.AutoTokenizer.from_pretrained(folder))
    return [encoded.documents for encoded in encoder.encode_batch(list(Conversations([str(data)])))]


def loaded(folder):
    source = loading.Pretrained(str(folder))
    config = source.config()
    return source.model(config, torch.float32, attention.choose(config.get_text_config()))


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_of_a_packed_row_are_those_of_each_document_alone(checkpoint, documents, name):
    plain = AutoModelForImageTextToText.from_pretrained(checkpoint(name), dtype=torch.float32)
    expected_loss, expected = reference(plain, documents)
    model = loaded(checkpoint(name)).train()
    frozen = {n for n, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {n for n, gradient in expected.items() if gradient is None} and len(frozen) >= 30
    total, count = supervised_loss(model, Collator()(documents), head=fuse_loss_into_head(model))
    total.backward()
    assert total.item() / count.item() == pytest.approx(expected_loss, rel=1e-5)
    found = {n: p.grad / count for n, p in model.named_parameters() if p.requires_grad}
    assert relative(found, {n: expected[n] for n in found}) < 1e-3


@pytest.mark.parametrize("name", TEXT_CLASS)
def test_the_first_loss_is_that_of_the_text_class(trained, checkpoint, name):
    config = transformers.AutoConfig.from_pretrained(checkpoint(name)).get_text_config()
    text = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = AutoModelForImageTextToText.from_pretrained(checkpoint(name), dtype=torch.float32).state_dict()
    inside = "model.language_model."
    state = {n.replace(inside, "model."): w for n, w in weights.items() if n.startswith((inside, "lm_head"))}
    text.load_state_dict(state)
    out = trained(name, "--per_device_train_batch_size", "8")
    expected, _ = reference(text, documents_of(checkpoint(name), out.parent / "rows.jsonl"))
    assert history(out, "loss")[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_full_save_is_the_checkpoint_but_for_the_text_part(trained, checkpoint, name):
    base, out = checkpoint(name), trained(name, "--per_device_train_batch_size", "8")
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    towers = ("visual.", "model.visual.", "vision_tower.", "multi_modal_projector.", "mtp.")
    kept = {key for key in before if key.startswith(towers)}
    text = before.keys() - kept
    assert len(kept) >= 30 and any(key.startswith("mtp.") for key in kept) == (name in families.MTP)
    assert all(after[key].dtype == torch.bfloat16 and torch.equal(before[key], after[key]) for key in kept)
    assert all(not torch.equal(before[key].float(), after[key]) for key in text)
    assert (out / "preprocessor_config.json").read_text() == (base / "preprocessor_config.json").read_text()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (base, out)]
    changed = {key for key in configs[0].keys() | configs[1].keys() if configs[0].get(key) != configs[1].get(key)}
    assert changed == {"dtype", "text_config", "vision_config"}
    texts = [config["text_config"] for config in configs]
    assert {key for key in texts[0] if texts[0][key] != texts[1].get(key)} == {"dtype", "eos_token_id"}
    model = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
    assert type(model).__name__ == configs[0]["architectures"][0]


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_has_the_checkpoints_names_and_plain_peft_gives_it_the_same_effect(trained, checkpoint, name):
    out = trained(name, "--use_lora")
    saved = load_file(out / "adapter_model.safetensors")
    assert all(key.startswith("base_model.model.model.language_model.layers.") for key in saved)
    base = AutoModelForImageTextToText.from_pretrained(checkpoint(name), dtype=torch.float32).eval()
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        without = base(input_ids=ids).logits
        expected = peft.PeftModel.from_pretrained(base, str(out)).eval()(input_ids=ids).logits
        model, _ = loading.load(str(out), torch.float32)
        found = model(input_ids=ids).logits
    assert (expected - without).norm() > 0.05 * without.norm()
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_layers_that_are_named_are_those_of_the_text_part(checkpoint, tmp_path, capsys):
    data = write(tmp_path / "rows.jsonl", UNEVEN_ROWS)
    words = argv(checkpoint("gemma3"), data, tmp_path / "out", "--max_steps", 1, "--lora_target_modules")
    finetune.train([*words, "q_proj", "v_proj"])  # names that the vision tower has, too
    assert "text only: images are left as they are" in capsys.readouterr().out
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(saved) == 2 * 2 * 2 and all("language_model" in key for key in saved)
    with pytest.raises(UserError, match="outside the text part of the model.* Linear layers are"):
        finetune.train([*words, "out_proj"])


def as_text_class(folder, out):
    """The adapter of the text class of Qwen3.5, as an older version of this recipe wrote it for a vision checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    return model.eval()


@pytest.mark.parametrize("short_names", [False, True])
def test_an_adapter_that_was_trained_as_the_text_class_is_put_into_its_place(checkpoint, tmp_path, short_names):
    old = as_text_class(checkpoint("qwen3_5"), tmp_path / "old")
    saved = load_file(tmp_path / "old" / "adapter_model.safetensors")
    assert all(key.startswith("base_model.model.model.layers.") for key in saved)
    if short_names:  # what peft writes for a model with more than a few layers
        path = tmp_path / "old" / "adapter_config.json"
        config = json.loads(path.read_text())
        config["target_modules"] = sorted({name.rpartition(".")[2] for name in config["target_modules"]})
        path.write_text(json.dumps(config))
    ids = torch.arange(5, 45)[None]
    model, _ = loading.load(str(tmp_path / "old"), torch.float32)
    with torch.no_grad():
        expected, found = old(input_ids=ids).logits, model(input_ids=ids).logits
    assert (found - expected).norm() < 1e-5 * expected.norm()
    data = write(tmp_path / "rows.jsonl", UNEVEN_ROWS)
    more = ["--lora_weight_path", tmp_path / "old", "--max_steps", 1]
    finetune.train(argv(checkpoint("qwen3_5"), data, tmp_path / "new", *more))
    continued = load_file(tmp_path / "new" / "adapter_model.safetensors")
    assert {key.replace("language_model.", "") for key in continued} == saved.keys()
    assert all("model.language_model.layers." in key for key in continued)


def test_names_that_nothing_could_load_stop_the_run_before_its_first_step(checkpoint, tmp_path, monkeypatch):
    from transformers.core_model_loading import WeightRenaming

    add = loading._work_around_libraries

    def doubled(model):
        add(model)
        model._weight_conversions = [WeightRenaming("^model.language_model", "model")]  # as under ZeRO-3

    monkeypatch.setattr(loading, "_work_around_libraries", doubled)
    data = write(tmp_path / "rows.jsonl", UNEVEN_ROWS)
    with pytest.raises(UserError, match="weights would be saved under names that .* does not have"):
        finetune.train(argv(checkpoint("qwen3_5"), data, tmp_path / "out"))
    assert not (tmp_path / "out" / "trainer_state.json").exists()


def test_files_with_other_names_than_the_base_models_are_refused(trained, checkpoint, tmp_path):
    from recipe.model.base_files import BaseFiles
    from recipe.training import checkpoints

    names = BaseFiles(loaded(checkpoint("qwen3_5"))).names()
    weights = load_file(trained("qwen3_5", "--per_device_train_batch_size", "8") / "model.safetensors")
    save_file(weights, tmp_path / "model.safetensors")
    checkpoints.verify_saved(tmp_path, base_names=names)
    weights["mtp.norm.weights"] = weights.pop("mtp.norm.weight")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="2 names of weights are not those of the base model, the first is mtp.norm"):
        checkpoints.verify_saved(tmp_path, base_names=names)
