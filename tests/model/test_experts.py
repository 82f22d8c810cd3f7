"""Routed experts: adapters exactly as peft computes them, 4 bits, and what the default leaves as it is."""

import json
import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import finetune
from benchmarks.experts import LiveBytes
from helpers import ROWS, argv, history, write
from recipe.console import UserError
from recipe.dataset.collator import Collator
from recipe.model import experts, loading
from recipe.model.loss import fuse_loss_into_head, supervised_loss
from recipe.training import merging

SMALL = dict(
    vocab_size=1024, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
    num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=None, eos_token_id=997, pad_token_id=997,
    tie_word_embeddings=False,
)  # fmt: skip
MIXTURE = dict(moe_intermediate_size=16, num_experts=8, num_experts_per_tok=2)
SHARED = dict(shared_expert_intermediate_size=24)
HYBRID = dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
    linear_conv_kernel_dim=4, layer_types=["linear_attention", "full_attention"], **SHARED,
)  # fmt: skip
CONFIGS = {
    "qwen2_moe": ("Qwen2MoeConfig", MIXTURE | SHARED),
    "qwen3_moe": ("Qwen3MoeConfig", MIXTURE),
    "qwen3_next": ("Qwen3NextConfig", MIXTURE | HYBRID),
    "qwen3_5_moe_text": ("Qwen3_5MoeTextConfig", MIXTURE | HYBRID),
    "gpt_oss": ("GptOssConfig", dict(
        intermediate_size=16, num_local_experts=8, num_experts_per_tok=2, rope_parameters={"rope_theta": 1e4, "rope_type": "default"},
        layer_types=["sliding_attention", "full_attention"],
    )),
}  # fmt: skip
NF4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


@pytest.fixture(scope="module", params=CONFIGS)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder_of(small_tokenizer, tmp_path_factory):
    """Function from a family to the folder of a tiny random model of it, whose experts and router count."""
    folders = {}

    def of(family):
        if family not in folders:
            folders[family] = shutil.copytree(small_tokenizer, tmp_path_factory.mktemp(family), dirs_exist_ok=True)
            random_model(family).save_pretrained(folders[family])
        return folders[family]

    return of


def random_model(family, **more):
    kind, own = CONFIGS[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**{**SMALL, **own, **more}))
    for name, parameter in model.named_parameters():
        if ".mlp." in name:
            parameter.data.normal_(std=0.1)
    return model


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "rows.jsonl", ROWS)


def adapted(model, rank=4):
    """The model with random adapters on its experts and on q_proj, of which peft computes all."""
    options = experts.lora_options(model, 2 * rank, 16, False)
    with experts.whole_shapes(model):
        model = peft.get_peft_model(model, peft.LoraConfig(r=2 * rank, target_modules=["q_proj"], **options))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def computed_here(model):
    experts.use_low_rank_forward(model.get_base_model())
    experts.hand_over_factors(model)
    return model


IDS = torch.arange(60).reshape(2, 30) * 13 % 1000


def logits_and_gradients(model):
    """Logits and the gradients of what is trained, as one vector each."""
    model.zero_grad()
    logits = model(input_ids=IDS, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), IDS.flatten()).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient.any() for gradient in gradients)
    return logits.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


# ----------------------------------------------------------------------------------------------------------------------
# Forward pass and adapters


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_adapters_of_experts_compute_what_peft_computes(family, rank):
    by_peft = adapted(random_model(family), rank)
    here = computed_here(adapted(random_model(family), rank))
    expected, found = logits_and_gradients(by_peft), logits_and_gradients(here)
    assert distance(found[0], expected[0]) < 1e-6
    assert distance(found[1], expected[1]) < 1e-6
    with here.disable_adapter(), torch.no_grad():
        off = here(input_ids=IDS).logits
    here.get_base_model().set_experts_implementation("grouped_mm")
    with here.disable_adapter(), torch.no_grad():
        assert distance(off, here(input_ids=IDS).logits) < 1e-6
    assert not torch.equal(off, found[0])


def test_all_weights_are_trained_as_transformers_trains_them(family):
    model = random_model(family)
    expected = logits_and_gradients(model)
    experts.use_low_rank_forward(model)
    found = logits_and_gradients(model)
    assert distance(found[0], expected[0]) < 1e-6
    assert distance(found[1], expected[1]) < 1e-6


def test_no_tensor_as_large_as_the_experts_is_made(family):
    """peft sums up weights for all experts; here a pass over one token makes nothing of their size."""
    sizes = {}
    for name, prepare in (("peft", lambda model: model), ("here", computed_here)):
        more = {"num_local_experts" if family == "gpt_oss" else "num_experts": 64, "hidden_size": 128}
        more["intermediate_size" if family == "gpt_oss" else "moe_intermediate_size"] = 128
        model = prepare(adapted(random_model(family, **more)))
        with LiveBytes() as live:
            model(input_ids=IDS[:1, :1], use_cache=False).logits.sum().backward()
        adapter = sum(p.numel() for p in model.parameters() if p.requires_grad) * 4
        sizes[name] = live.peak - 2 * adapter  # their gradients, and a copy that the product takes
    largest = max(p.numel() * 4 for p in model.parameters())
    assert sizes["peft"] > largest
    assert sizes["here"] < largest / 2


def test_bfloat16_under_autocast_is_as_near_to_float32_as_peft_is(family):
    """On one layer, as the router would send a token elsewhere where two experts are nearly equal."""
    generator = torch.Generator().manual_seed(2)
    hidden, chosen = torch.randn(600, 32, generator=generator), torch.arange(1200).reshape(600, 2) % 8

    def output_and_gradients(prepare, dtype):
        layer = prepare(adapted(random_model(family).to(dtype))).get_base_model().model.layers[0].mlp.experts
        for parameter in layer.parameters():
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = layer(hidden.to(dtype), chosen, torch.full((600, 2), 0.5, dtype=dtype))
        output.float().square().sum().backward()
        return output.float(), torch.cat([p.grad.flatten() for p in layer.parameters() if p.requires_grad])

    exact = output_and_gradients(computed_here, torch.float32)
    by_peft, here = (output_and_gradients(prepare, torch.bfloat16) for prepare in (lambda model: model, computed_here))
    for found, theirs, expected in zip(here, by_peft, exact, strict=True):
        assert distance(found, expected) < min(1.2 * distance(theirs, expected), 0.02)


# ----------------------------------------------------------------------------------------------------------------------
# 4 bits


def quantised(folder, storage=torch.uint8, dtype=torch.float32):
    experts.quantise_experts_as_well()
    config = transformers.BitsAndBytesConfig(
        **NF4, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_storage=storage
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=dtype, device_map={"": "cpu"}
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    experts.use_low_rank_forward(model)
    return model.requires_grad_(False)


def dequantised(folder, packed):
    """The model with the weights that the packed ones stand for, by bitsandbytes alone."""
    from bitsandbytes.functional import dequantize_4bit

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, parameter in packed.named_parameters():
        if hasattr(parameter, "quant_state"):
            model.get_parameter(name).data = dequantize_4bit(parameter.data, parameter.quant_state)
    return model.requires_grad_(False)


@pytest.mark.parametrize("storage", [torch.uint8, torch.float32], ids=["bytes", "floats"])
def test_experts_in_4_bits_compute_with_the_weights_they_stand_for(family, folder_of, storage):
    packed = quantised(folder_of(family), storage)
    stacks = [name for name, parameter in packed.named_parameters() if name.endswith(("gate_up_proj", "down_proj"))]
    assert len(stacks) == 4
    assert all(type(packed.get_parameter(name)).__name__ == "Params4bit" for name in stacks)
    plain = dequantised(folder_of(family), packed)
    found, expected = (logits_and_gradients(computed_here(adapted(model))) for model in (packed, plain))
    assert distance(found[0], expected[0]) < 1e-6
    assert distance(found[1], expected[1]) < 1e-6


def test_loading_in_4_bits_holds_few_layers_in_16_bits(small_tokenizer, tmp_path):
    model = random_model("qwen3_moe", num_hidden_layers=24, hidden_size=128).bfloat16()
    layer = 2 * sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    model.save_pretrained(tmp_path)
    with LiveBytes() as live:
        model = quantised(tmp_path, dtype=torch.bfloat16)
    assert sum(type(parameter).__name__ == "Params4bit" for parameter in model.parameters()) == 24 * 6
    assert live.peak < live.live + 2 * layer


# ----------------------------------------------------------------------------------------------------------------------
# A training from the command line


def train(folder, data, output, *more):
    finetune.train(argv(folder, data, output, "--use_cpu", "True", "--max_steps", 3, *more))
    return history(output, "loss")


def test_by_default_routed_experts_and_routers_stay_as_they_are(family, folder_of, data, tmp_path, capsys):
    train(folder_of(family), data, tmp_path / "out", "--use_lora")
    said = capsys.readouterr().out
    names = list(load_file(tmp_path / "out" / "adapter_model.safetensors"))
    assert any("q_proj" in name or "in_proj" in name for name in names)
    assert not [name for name in names if ".experts." in name or ".gate." in name or "router" in name]
    assert not [name for name in names if "shared_expert_gate" in name]
    line = next(line for line in said.splitlines() if line.startswith("routed experts:"))
    assert "frozen; --lora_experts adapts them at rank 32" in line


@pytest.mark.parametrize("flags", [["--use_rslora", "True"], ["--q_lora"]], ids=["rsLoRA", "QLoRA"])
def test_adapters_of_experts_load_in_plain_peft_and_merge(family, folder_of, data, tmp_path, capsys, flags):
    losses = train(
        folder_of(family), data, tmp_path / "out", "--lora_experts", "--lora_r", 6, "--lora_alpha", 12, *flags
    )
    assert losses[-1] < losses[0]
    assert "with adapters of rank 3" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["lora_dropout"] == 0
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    routed = {name: weight for name, weight in weights.items() if ".experts." in name}
    assert len(routed) == 8
    assert all(weight.any() for weight in routed.values())
    assert not [name for name in weights if ".gate." in name or "router" in name or "shared_expert_gate" in name]

    base = transformers.AutoModelForCausalLM.from_pretrained(folder_of(family), dtype=torch.float32)
    stock = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    scales = {layer.scaling["default"] for layer in stock.modules() if isinstance(layer, peft.tuners.lora.LoraLayer)}
    assert all(scale == pytest.approx(12 / 6**0.5 if "--use_rslora" in flags else 2) for scale in scales)
    ours, _ = loading.load(str(tmp_path / "out"), torch.float32, "cpu")
    assert distance(ours(input_ids=IDS).logits, stock(input_ids=IDS).logits) < 1e-6
    assert merging.merge(str(tmp_path / "out"), str(tmp_path / "merged"), torch.float32) < 1e-5


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--use_dora", "True"], "--use_dora"),
        (["--lora_bias", "all"], "--lora_bias all"),
        (["--init_lora_weights", "pissa"], "--init_lora_weights pissa"),
        (["--init_lora_weights", "olora"], "--init_lora_weights olora"),
        (["--init_lora_weights", "orthogonal"], "--init_lora_weights orthogonal"),
    ],
)
def test_what_peft_cannot_do_on_experts_is_refused_by_name(data, tmp_path, flags, named):
    with pytest.raises(UserError, match=named):
        finetune.train(argv("no_such_model", data, tmp_path, "--lora_experts", *flags))


def test_adapters_that_a_model_cannot_have_are_refused_before_its_weights_are_read(
    folder_of, tiny_model, data, tmp_path, monkeypatch
):
    monkeypatch.setattr(finetune, "load_model", lambda *_: pytest.fail("the weights are loaded"))
    with pytest.raises(UserError, match="--lora_target_modules up_proj: .*--lora_experts"):
        train(folder_of("qwen3_moe"), data, tmp_path / "out", "--lora_target_modules", "q_proj", "up_proj")
    with pytest.raises(UserError, match="--lora_experts: qwen2 has no routed experts"):
        train(tiny_model, data, tmp_path / "out", "--lora_experts")


def test_a_shared_expert_that_peft_takes_for_routed_experts_is_named(folder_of, data, tmp_path, capsys):
    train(folder_of("qwen3_next"), data, tmp_path / "out", "--use_lora")
    assert "(not on down_proj, gate_proj, up_proj, which peft takes for routed experts)" in capsys.readouterr().out
    assert not [name for name in load_file(tmp_path / "out" / "adapter_model.safetensors") if "shared_expert" in name]


def test_an_adapter_of_experts_that_the_loss_does_not_reach_stops_the_run(folder_of, data, tmp_path, monkeypatch):
    monkeypatch.setattr(experts, "use_low_rank_forward", lambda model: None)  # factors are handed over to nobody
    with pytest.raises(UserError, match=r"8 trained tensors are not reached by the loss.*\.experts\..*lora_"):
        train(folder_of("qwen3_moe"), data, tmp_path / "out", "--lora_experts")


@pytest.mark.parametrize("mode", [["--use_lora"], ["--q_lora"]], ids=["LoRA", "QLoRA"])
def test_checkpointing_and_compiling_change_no_loss_of_adapted_experts(folder_of, data, tmp_path, mode):
    def losses(name, *more):
        more = [*mode, "--lora_experts", "--lr_scheduler_type", "constant", *more]
        return train(folder_of("qwen3_moe"), data, tmp_path / name, *more)

    expected = losses("plain", "--gradient_checkpointing", "False")
    for reentrant in (False, True):
        kind = json.dumps({"use_reentrant": reentrant})
        again = losses(f"{reentrant}", "--gradient_checkpointing", "True", "--gradient_checkpointing_kwargs", kind)
        assert again == pytest.approx(expected, rel=1e-6)
    assert losses("compiled", "--torch_compile", "True") == pytest.approx(expected, rel=1e-5)


def test_an_adapter_of_experts_is_continued_and_resumed(folder_of, data, tmp_path):
    more = ["--q_lora", "--lora_experts", "--save_strategy", "steps", "--save_steps", 2, "--max_steps", 4]
    whole = train(folder_of("qwen3_moe"), data, tmp_path / "whole", *more)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed = train(folder_of("qwen3_moe"), data, tmp_path / "resumed", *more, "--resume_from_checkpoint", "auto")
    assert resumed == pytest.approx(whole, rel=1e-6)
    first, last = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.allclose(first[name], last[name], atol=1e-6) for name in first)
    path = ["--lora_weight_path", tmp_path / "whole", "--q_lora", "--learning_rate", 0]
    (continued, *_) = train(folder_of("qwen3_moe"), data, tmp_path / "continued", *path)
    assert continued < whole[0]
    assert set(load_file(tmp_path / "continued" / "adapter_model.safetensors")) == set(first)


# ----------------------------------------------------------------------------------------------------------------------
# Load-balancing loss


def batch_of(*texts):
    documents = [{"input_ids": text, "labels": [-100, -100, *text[2:]]} for text in texts]
    return Collator(padding_free=False)([[document] for document in documents])


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_the_load_balancing_loss_is_that_of_transformers(family, fused):
    model = random_model(family, output_router_logits=True, router_aux_loss_coef=0.1)
    ids = IDS[:1]
    labels = torch.cat([torch.full((1, 2), -100), ids[:, 2:]], 1)
    expected = model(input_ids=ids, labels=labels, use_cache=False)
    assert expected.aux_loss > 0.5
    expected.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    routers = [name for name in gradients if ".mlp.gate.weight" in name or ".mlp.router.weight" in name]
    assert len(routers) == 2
    model.zero_grad()
    experts.use_low_rank_forward(model)
    head = fuse_loss_into_head(model) if fused else None
    weight = experts.balancing_weight(model.config)
    total, count = supervised_loss(model, batch_of(ids[0].tolist()), head=head, balancing=weight)
    (total / count).backward()
    assert (total / count).item() == pytest.approx(expected.loss.item(), rel=1e-6)
    for names in (routers, list(gradients)):
        found, wanted = (
            torch.cat([of(name).flatten() for name in names])
            for of in (lambda name: model.get_parameter(name).grad, gradients.get)
        )
        assert distance(found, wanted) < 1e-6


def test_the_load_balancing_loss_counts_once_in_an_optimizer_step(small_tokenizer, data, tmp_path):
    """Four micro-batches of two equal rows balance as one of eight does, each by its supervised tokens."""
    folder = shutil.copytree(small_tokenizer, tmp_path / "model")
    rows = write(tmp_path / "rows.jsonl", [ROWS[0]] * 8)
    random_model("qwen3_moe", output_router_logits=True, router_aux_loss_coef=1.0).save_pretrained(folder)

    def first(name, *more):
        finetune.train(argv(folder, rows, tmp_path / name, "--use_cpu", "True", "--max_steps", 1, *more))
        return history(tmp_path / name, "loss")[0], history(tmp_path / name, "grad_norm")[0]

    step = first("whole", "--per_device_train_batch_size", 8)
    parts = first("parts", "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 4)
    assert parts == pytest.approx(step, rel=1e-5)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"output_router_logits": False}))
    without, _ = first("without", "--per_device_train_batch_size", 8)
    assert step[0] - without > 1.5  # two of eight experts compute a token: a balanced router has 2


def test_evaluation_and_adapters_leave_the_load_balancing_loss_out(small_tokenizer, data, tmp_path, capsys):
    folder, rate = shutil.copytree(small_tokenizer, tmp_path / "model"), ["--learning_rate", 0]
    random_model("qwen3_moe", output_router_logits=True, router_aux_loss_coef=1.0).save_pretrained(folder)
    train(folder, data, tmp_path / "full", *rate, "--eval_data_path", data, "--per_device_train_batch_size", 8)
    assert "load-balancing loss, weight 1" in capsys.readouterr().out
    (evaluated, *_), trained = history(tmp_path / "full", "eval_loss"), history(tmp_path / "full", "loss")
    assert trained[0] - evaluated > 1.5
    adapter = train(folder, data, tmp_path / "lora", *rate, "--use_lora", "--per_device_train_batch_size", 8)
    assert "the load-balancing loss is left out" in capsys.readouterr().out
    assert adapter[0] == pytest.approx(evaluated, rel=1e-5)


def test_reentrant_checkpointing_would_cut_the_load_balancing_loss_off_and_is_refused(small_tokenizer, data, tmp_path):
    folder = shutil.copytree(small_tokenizer, tmp_path / "model")
    random_model("qwen3_moe", output_router_logits=True).save_pretrained(folder)
    kind = ["--gradient_checkpointing", "True", "--gradient_checkpointing_kwargs", '{"use_reentrant": true}']
    with pytest.raises(UserError, match="output_router_logits"):
        train(folder, data, tmp_path / "out", *kind)
    train(folder, data, tmp_path / "out", "--gradient_checkpointing", "True")
