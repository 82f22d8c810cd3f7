"""One loader for training, evaluation, merging and chat: what one can load, all can, and by the same rules."""

import json
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import finetune
from helpers import ROOT, ROWS, argv, write
from recipe.console import UserError
from recipe.model import loading, rope

REMOTE = """
from transformers import Qwen2Config, Qwen2ForCausalLM

class OwnConfig(Qwen2Config):
    model_type = "own"

class OwnForCausalLM(Qwen2ForCausalLM):
    config_class = OwnConfig
"""
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)


@pytest.fixture
def rows(tmp_path):
    return write(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def remote_model(tiny_copy):
    """A model of a class that comes with it as Python code, and without a chat template."""
    config = json.loads((tiny_copy / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config.update(model_type="own", architectures=["OwnForCausalLM"], auto_map=names)
    (tiny_copy / "config.json").write_text(json.dumps(config))
    (tiny_copy / "own.py").write_text(REMOTE)
    (tiny_copy / "chat_template.jinja").unlink()
    return tiny_copy


@pytest.mark.slow
def test_a_model_with_its_own_code_and_a_given_template_is_trained_measured_and_talked_to(remote_model, rows, tmp_path):
    template = tmp_path / "mine.jinja"
    template.write_text(TEMPLATE)
    needed = ["--trust_remote_code", "True", "--chat_template", str(template)]
    out = tmp_path / "out"
    with pytest.raises(UserError, match="comes with its own Python code; .*--trust_remote_code True"):
        finetune.train(argv(remote_model, rows, out, "--use_lora", *needed[2:]))
    finetune.train(argv(remote_model, rows, out, "--use_lora", *needed))
    with pytest.raises(UserError, match="the base model of .* comes with its own Python code"):
        loading.load(str(out))
    measure = ["eval.py", "--data_path", str(rows), "--limit", "2", "--max_new_tokens", "4"]
    for program, model in ((measure, out), (["chat.py", "--max_new_tokens", "4"], remote_model)):
        words = [sys.executable, *program, "--model_name_or_path", str(model), *needed]
        done = subprocess.run(words, cwd=ROOT, input="Hi\n", capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]


def test_a_folder_that_lacks_weights_is_refused_by_every_tool(tiny_copy):
    weights = load_file(tiny_copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tiny_copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 weights, the first is model\.layers\.1\.mlp\.up_proj"):
        loading.load(str(tiny_copy))


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "model.safetensors").write_bytes(b"\x08" + bytes(30)),
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "config.json").write_text('{"model_type": "no_such_family"}'),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: save_file({"model.norm.weight": torch.ones(3)}, folder / "model.safetensors"),
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
    ],
    ids=["cut off", "no JSON", "unknown family", "no config", "no weights", "another shape", "no tokenizer"],
)
def test_files_that_cannot_be_read_are_one_sentence(tiny_copy, change):
    change(tiny_copy)
    with pytest.raises(UserError, match="cannot be loaded") as error:
        loading.load(str(tiny_copy))
    assert "\n" not in str(error.value)


def test_an_adapter_that_does_not_fit_its_base_is_refused_wherever_it_is_loaded(tiny_model, rows, tmp_path):
    out = tmp_path / "out"
    finetune.train(argv(tiny_model, rows, out, "--use_lora"))
    path = out / "adapter_model.safetensors"
    weights = load_file(path)
    weights["base_model.model.model.layers.99.mlp.up_proj.lora_A.weight"] = torch.ones(64, 64)
    save_file(weights, path)
    with pytest.raises(UserError, match=r"1 adapter weights do not match the base model, .*layers\.99"):
        loading.load(str(out))
    with pytest.raises(UserError, match=r"1 adapter weights do not match the base model, .*layers\.99"):
        finetune.train(argv(tiny_model, rows, tmp_path / "next", "--lora_weight_path", out))


def test_a_base_model_that_has_moved_can_be_named(tiny_model, tiny_copy, rows, tmp_path):
    finetune.train(argv(tiny_copy, rows, tmp_path / "out", "--use_lora"))
    tiny_copy.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"the base model of {tmp_path / 'out'}, {tiny_copy}: cannot be loaded"):
        loading.load(str(tmp_path / "out"))
    model, _ = loading.load(str(tmp_path / "out"), base=str(tiny_model))
    assert model.peft_config["default"].r == 64


def test_a_shared_head_that_is_trained_beside_the_adapter_stays_shared(tiny_model, rows, tmp_path):
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*tie_word_embeddings.*|.*ensure_weight_tying.*")
        finetune.train(argv(tiny_model, rows, out, "--use_lora", "--modules_to_save", "lm_head"))
        adapted, _ = loading.load(str(out), torch.float32)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        adapted.merge_and_unload().save_pretrained(out / "merged")
        merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)
        found = merged(input_ids=ids).logits
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_a_run_that_trains_a_shared_head_can_be_resumed(tiny_model, rows, tmp_path):
    more = ["--use_lora", "--modules_to_save", "lm_head", "--save_steps", 3, "--max_steps", 6]
    words = [*argv(tiny_model, rows, tmp_path / "out", *more), "--save_strategy", "steps"]
    finetune.train(words)
    finetune.train([*words, "--max_steps", "7", "--resume_from_checkpoint", "auto"])


def test_positions_that_are_scaled_already_or_by_kind_of_layer_are_extended_right_or_refused():
    from transformers import Gemma3TextConfig, Qwen3Config

    gemma = Gemma3TextConfig(max_position_embeddings=1024)
    rope.extend_window(gemma, "linear", 2048)
    assert gemma.rope_parameters["full_attention"]["factor"] == 2.0 and rope.is_extended(gemma)
    assert gemma.rope_parameters["sliding_attention"] == {"rope_type": "default", "rope_theta": 10000.0}
    scaled = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 1024}
    qwen = Qwen3Config(max_position_embeddings=4096, rope_parameters=dict(scaled))
    with pytest.raises(UserError, match="the model's positions are scaled by 'yarn' already"):
        rope.extend_window(qwen, "linear", 8192)
    rope.extend_window(qwen, "yarn", 8192)
    assert qwen.rope_parameters == {**scaled, "factor": 8.0} and qwen.max_position_embeddings == 8192


@pytest.mark.parametrize(
    "config, theta, scaling",
    [
        (transformers.Qwen2Config(rope_parameters={"rope_type": "default", "rope_theta": 1e6}), 1e6, None),
        (
            transformers.Qwen2Config(
                rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 5e5, rope.ORIGINAL: 1024}
            ),
            5e5,
            {"rope_type": "yarn", "factor": 2.0, rope.ORIGINAL: 1024},
        ),
        (transformers.Gemma3Config(), 1e6, None),
        (
            transformers.Qwen2_5_VLConfig(
                text_config={
                    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
                }
            ),
            1e6,
            {"rope_type": "default", "mrope_section": [16, 24, 24]},
        ),
    ],
    ids=["plain", "yarn", "by layer", "of three kinds"],
)
def test_a_saved_configuration_names_the_rotary_base_as_transformers_4_does_and_is_still_the_same(
    tmp_path, config, theta, scaling
):
    """transformers 4 takes 10,000 in silence where it does not find `rope_theta`."""
    config.save_pretrained(tmp_path)
    rope.write_old_names(config, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    part = written.get("text_config", written)
    assert part["rope_theta"] == theta and part["rope_scaling"] == scaling
    assert part.get("rope_local_base_freq") == (1e4 if written["model_type"] == "gemma3" else None)
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    assert again.get_text_config().rope_parameters == config.get_text_config().rope_parameters


# The first five name the rotary parameters by kind of layer, and some classes take a second name for all of them.
BY_LAYER = ["gemma4_text", "mellum", "mimo_v2_flash", "modernbert", "gemma3"]


@pytest.mark.parametrize("name", [*BY_LAYER, "olmo3", "phi3", "qwen3_next", "qwen3_vl", "gpt_oss", "llama4"])
def test_old_names_are_left_out_where_a_configuration_would_change_its_meaning(tmp_path, name):
    config = transformers.CONFIG_MAPPING[name]()
    config.save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_text()
    rope.write_old_names(config, tmp_path)
    after = type(config).from_pretrained(tmp_path).get_text_config()
    assert after.rope_parameters == config.get_text_config().rope_parameters
    if name in ("gemma4_text", "mellum", "mimo_v2_flash"):
        assert (tmp_path / "config.json").read_text() == before
