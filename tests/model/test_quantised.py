"""Models whose files hold quantised weights: 4-bit ones of bitsandbytes and MXFP4 are trained, others refused by name."""

import json

import families
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import finetune
from helpers import ROWS, argv, history, write
from recipe.console import UserError

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]  # sign, two bits of exponent, one of mantissa


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)


@pytest.fixture(scope="module")
def four_bit_model(tiny_model, tmp_path_factory):
    """The tiny model as bitsandbytes writes it in 4 bits."""
    folder = tmp_path_factory.mktemp("quantised") / "tiny-bnb-4bit"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_model, quantization_config=finetune.nf4(torch.float16), device_map={"": "cpu"}, dtype=torch.float32
    )
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    assert any(name.endswith("quant_state.bitsandbytes__nf4") for name in load_file(folder / "model.safetensors"))
    return folder


def test_a_base_in_4_bits_is_trained_as_with_q_lora(four_bit_model, tiny_model, rows, tmp_path, capsys):
    steps = ["--max_steps", "2", "--logging_steps", "1", "--lora_r", "4"]
    finetune.train(argv(four_bit_model, rows, tmp_path / "its own", "--use_lora", *steps))
    said = capsys.readouterr().out
    assert f"{four_bit_model}: its weights are quantised (bitsandbytes in its config.json): training as with" in said
    assert "base in 4 bits (NF4)" in said
    finetune.train(argv(tiny_model, rows, tmp_path / "ours", "--q_lora", "True", *steps))
    assert history(tmp_path / "its own", "loss") == pytest.approx(history(tmp_path / "ours", "loss"), rel=1e-6)
    model, _ = finetune.loading.load(str(tmp_path / "its own"))
    assert model.get_base_model().is_loaded_in_4bit


def test_full_training_of_a_base_in_4_bits_is_refused(four_bit_model, rows, tmp_path):
    plain = str(four_bit_model).removesuffix("-bnb-4bit")
    sentence = rf"full training cannot change them; add --use_lora, or name .*, such as --model_name_or_path {plain}\.$"
    with pytest.raises(UserError, match=sentence):
        finetune.train(argv(four_bit_model, rows, tmp_path / "out", "--validate_only"))


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "compressed-tensors", "bitsandbytes"])
def test_other_quantised_weights_are_refused_with_the_model_to_name(tiny_copy, rows, tmp_path, method):
    folder = tiny_copy.rename(tmp_path / f"tiny-{method.upper()}")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"quantised \({method} in its config\.json\), and cannot be trained; name"):
        finetune.train(argv(folder, rows, tmp_path / "out", "--use_lora", "--validate_only"))


MXFP4 = {"quant_method": "mxfp4"}
ODD = [{"quantization_config": entry} for entry in ("x", 7, {"quant_method": 7})]
ODD += [{"compression_config": MXFP4}, {"text_config": {"quantization_config": MXFP4}}, {"compression_config": "x"}]


@pytest.mark.parametrize("entries", ODD, ids=str)
def test_entries_that_transformers_does_not_read_are_refused_in_one_sentence(tiny_copy, rows, tmp_path, entries):
    config = json.loads((tiny_copy / "config.json").read_text()) | entries
    (tiny_copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        finetune.train(argv(tiny_copy, rows, tmp_path / "out", "--use_lora", "--validate_only"))
    assert "\n" not in str(error.value)


def test_gpt_oss_in_mxfp4_is_trained_as_the_16_bit_weights_that_it_holds(small_tokenizer, rows, tmp_path, capsys):
    """gpt-oss is published in MXFP4 alone: two 4-bit numbers a byte, and a shared exponent for 32 numbers."""
    plain = families.family("gpt_oss", tmp_path / "plain", small_tokenizer)
    packed = families.family("gpt_oss", tmp_path / "packed", small_tokenizer)
    weights, numbers = load_file(plain / "model.safetensors"), torch.tensor(E2M1)
    generator = torch.Generator().manual_seed(0)
    in_4_bits = dict(weights)
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, rows_in, rows_out = weights[name].shape
        assert rows_in % 32 == 0
        blocks = torch.randint(0, 256, (experts, rows_out, rows_in // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(119, 122, blocks.shape[:-1], dtype=torch.uint8, generator=generator)
        halves = torch.stack([numbers[(blocks & 15).long()], numbers[(blocks >> 4).long()]], dim=-1).flatten(-2)
        whole = (halves * 2.0 ** (scales.float() - 127)[..., None]).flatten(-2)
        weights[name] = whole.transpose(1, 2).contiguous().to(weights[name].dtype)
        del in_4_bits[name]
        in_4_bits |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(in_4_bits, packed / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (packed / "config.json").write_text(json.dumps(config))
    for folder in (plain, packed):
        options = ["--use_lora", "--max_steps", "2", "--logging_steps", "1"]
        finetune.train(argv(folder, rows, tmp_path / f"{folder.name}-out", *options))
    assert "(mxfp4 in its config.json); they are trained as 16-bit weights" in capsys.readouterr().out
    assert history(tmp_path / "packed-out", "loss") == pytest.approx(history(tmp_path / "plain-out", "loss"), rel=1e-4)
    with pytest.raises(UserError, match="full training cannot change them; add --use_lora"):
        finetune.train(argv(packed, rows, tmp_path / "full"))
    with pytest.raises(UserError, match="cannot make 4-bit weights of them; leave --q_lora out"):
        finetune.train(argv(packed, rows, tmp_path / "full", "--q_lora", "True"))
