"""Layers that an adapter changes by default."""

import shutil

import peft
import pytest
import transformers
from safetensors.torch import load_file

import finetune
from helpers import ROWS, argv, write
from recipe.console import UserError
from recipe.model import adapter

SMALL = dict(
    vocab_size=1024, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
    num_key_value_heads=2, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
    linear_value_head_dim=16, moe_intermediate_size=32, shared_expert_intermediate_size=32, num_experts=4,
    num_experts_per_tok=2, num_local_experts=4, kv_channels=16, layer_types=["linear_attention", "full_attention"],
    pad_token_id=997, bos_token_id=None, eos_token_id=997,
)  # fmt: skip
LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
DELTA = {"in_proj_qkv", "in_proj_z", "out_proj"}


def model_of(kind):
    config = transformers.CONFIG_MAPPING[kind]
    fixed = {} if kind.startswith("qwen3_5") else {"layer_types": None}
    values = {name: value for name, value in (SMALL | fixed).items() if value is not None}
    return transformers.AutoModelForCausalLM.from_config(config(**values))


@pytest.mark.parametrize("kind, expected", [("qwen3_5_text", LAYERS | DELTA), ("qwen3_5_moe_text", LAYERS | DELTA),
                                            ("qwen2_moe", LAYERS), ("phimoe", LAYERS - {"gate_proj", "up_proj", "down_proj"}),
                                            ("jetmoe", {"kv_proj"})])  # fmt: skip
def test_the_default_is_every_linear_layer_without_the_head_the_gates_and_the_routers(kind, expected):
    targets = adapter.default_targets(model_of(kind))
    assert {name.rpartition(".")[2] for name in targets} == expected


def test_a_model_without_gates_is_left_to_peft():
    assert adapter.default_targets(model_of("qwen3")) == "all-linear"


@pytest.mark.parametrize("named", [[], ["--lora_target_modules", "in_proj_a", "q_proj"]], ids=["default", "named"])
def test_the_start_block_says_which_gates_are_left_out_and_how_to_adapt_them(small_tokenizer, tmp_path, capsys, named):
    shutil.copytree(small_tokenizer, tmp_path / "model")
    model_of("qwen3_5_moe_text").save_pretrained(tmp_path / "model")
    data = write(tmp_path / "rows.jsonl", ROWS)
    finetune.train(argv(tmp_path / "model", data, tmp_path / "out", "--use_lora", "--max_steps", 1, *named))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("trained: "))
    left_out = ["in_proj_b", "shared_expert_gate"] if named else ["in_proj_a", "in_proj_b", "shared_expert_gate"]
    assert line.endswith(f"(not on the gates {', '.join(left_out)}, which --lora_target_modules can name)")
    names = {name for name in load_file(tmp_path / "out" / "adapter_model.safetensors") if ".lora_A" in name}
    assert names and any(".in_proj_a." in name for name in names) == bool(named)
    assert not any(f".{gate}." in name for name in names for gate in ("in_proj_b", "shared_expert_gate"))


NAMES = {
    "names": (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
    "commas": (["q_proj,v_proj", "o_proj"], {"q_proj", "v_proj", "o_proj"}),
    "longer names": (["self_attn.q_proj", "layers.0.mlp.up_proj"], {"q_proj", "up_proj"}),
    "regular expression": ([r".*\.layers\.1\..*(q|k)_proj"], {"q_proj", "k_proj"}),
    "all-linear": (["all-linear"], LAYERS),
}


@pytest.mark.parametrize("case", NAMES)
def test_layers_are_named_as_peft_has_them(case):
    names, expected = NAMES[case]
    model = model_of("qwen3")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=adapter.targets(model, names)))
    hit = {name for name, part in adapted.named_modules() if hasattr(part, "lora_A")}
    assert {name.rpartition(".")[2] for name in hit} == expected
    if case == "regular expression":
        assert all(".layers.1." in name for name in hit) and len(hit) == 2


@pytest.mark.parametrize(
    "words, sentence",
    [
        (
            "--lora_target_modules q_proj v_porj",
            "--lora_target_modules v_porj: the model has no layer .* did you mean v_proj?",
        ),
        ("--lora_target_modules q_proj,kproj", "--lora_target_modules kproj: .* did you mean k_proj?"),
        ("--lora_target_modules .*qproj$", "this regular expression matches no layer"),
        ("--modules_to_save lm_haed", "--modules_to_save lm_haed: .* did you mean lm_head?"),
    ],
)
def test_a_name_that_hits_no_layer_is_an_error_with_the_nearest(tiny_model, tmp_path, words, sentence):
    data = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(UserError, match=sentence.replace("?", r"\?")):
        finetune.train(argv(tiny_model, data, tmp_path / "out", "--use_lora", *words.split()))
