"""Layers that carry a state from token to token: in a packed row each document is computed as if it were alone.

PACKED and PADDED hold every model of transformers with such layers, tiny and random: packed rows are exact, or a reason
is found why they are not.
"""

import importlib.util
import pathlib
import re
import shutil
import sys

import pytest
import torch
import transformers
from transformers.modeling_layers import GradientCheckpointingLayer

from helpers import UNEVEN_ROWS, reference, relative, step, write
from recipe.dataset.collator import Collator
from recipe.dataset.conversations import Conversations
from recipe.dataset.encoding import ChatEncoder
from recipe.model import adapter, attention, linear_attention, loading
from recipe.training import checks

SIGNS = "causal_conv1d|create_recurrent_attention_mask|_is_stateful = True|update_(recurrent|conv)_state"
COMMON = dict(
    vocab_size=1024, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, head_dim=16,
    num_key_value_heads=2, max_position_embeddings=512, linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=16, linear_value_head_dim=16, linear_head_dim=16, linear_num_heads=4, moe_intermediate_size=32,
    shared_expert_intermediate_size=32, num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2,
    n_group=1, topk_group=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LATENT = dict(kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, num_key_value_heads=4)
LIQUID = dict(layer_types=["conv", "full_attention"] * 2, block_auto_adjust_ff_dim=False, num_dense_layers=1)
TOWER = dict(
    depth=1, hidden_size=32, intermediate_size=32, num_heads=2, num_hidden_layers=1, num_attention_heads=2, patch_size=4,
    image_size=28, num_position_embeddings=16, out_hidden_size=64, num_patches=16,
)  # fmt: skip
PACKED = {  # text models by their model type, then checkpoints with a vision tower
    "qwen3_5_text": {},
    "qwen3_5_moe_text": {},
    "qwen3_next": {},
    "olmo_hybrid": {},
    "kimi_linear": dict(LATENT, head_dim=None, layer_types=["linear_attention", "full_attention"] * 2),
    "bailing_hybrid": dict(LATENT, layer_group_size=4),
    "lfm2": LIQUID,
    "lfm2_moe": LIQUID,
    "lfm3": dict(LIQUID, layer_types=["conv", "full_attention", "conv", "sliding_attention"], sliding_window=8),
    "qwen3_5": {},
    "qwen3_5_moe": {},
    "minicpm_ocr": {},
    "minicpmv4_6": {},
    "minicpmv4_7": {},
}
MAMBA = dict(
    mamba_n_heads=8, mamba_d_head=16, mamba_d_ssm=128, mamba_d_state=16, mamba_chunk_size=16, mamba_num_heads=8,
    mamba_head_dim=16, ssm_state_size=16, n_groups=1, chunk_size=16, state_size=16, num_heads=8, mamba_dt_rank=8,
)  # fmt: skip
ZAMBA = dict(mamba_d_state=8, num_key_value_heads=4, attention_head_dim=32, layers_block_type=["mamba", "hybrid"] * 2)
PADDED = {
    "qwen4_exp_text": dict(
        indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=16, indexer_compress_ratio=4,
        ple_layer_ids=[1], heads_per_ngram=2, ngram_vocab_size_base=300, make_ngram_vocab_size_divisible_by=8,
        split_ngram_parts=4, hc_count=2, hc_lowrank=8,
    ),
    "glm5_next_text": dict(
        LATENT, head_dim=None, qk_rope_head_dim=0, q_lora_rank=16, index_topk=16, index_head_dim=16, index_n_heads=2,
        index_kpool=4, hc_mult=2,
    ),
    "bamba": dict(MAMBA, attn_layer_indices=[1, 3]),
    "falcon_h1": MAMBA,
    "falcon_mamba": dict(MAMBA, head_dim=None),
    "granitemoehybrid": dict(MAMBA, layer_types=["mamba", "attention"] * 2, head_dim=None, shared_intermediate_size=32),
    "jamba": dict(MAMBA, head_dim=None, attn_layer_period=2, attn_layer_offset=1),
    "mamba": dict(MAMBA, head_dim=None),
    "mamba2": dict(MAMBA, expand=2),
    "nemotron_h": dict(
        MAMBA, num_hidden_layers=None, layers_block_type=["mamba", "attention", "mamba", "moe"],
        moe_shared_expert_intermediate_size=32,
    ),
    "zamba": dict(ZAMBA, head_dim=None, n_mamba_heads=2),
    "zamba2": dict(ZAMBA, head_dim=None, n_mamba_heads=8, mamba_headdim=16, adapter_rank=8, chunk_size=16),
    "zaya": dict(num_experts_per_tok=1, router_hidden_size=16),
    "recurrent_gemma": dict(lru_width=64, num_key_value_heads=1),
    "rwkv": dict(attention_hidden_size=64, head_dim=None),
    "xlstm": dict(embedding_dim=64, num_heads=4, head_dim=None),
    "minimax": dict(block_size=16),
    "inkling_text": {},
    "inkling2_text": {},
    "deepseek_v4": {},
}  # fmt: skip
NO_TEXT_MODEL = {"nemotron3_5_transcribe", "nemotron_h_omni"}  # loaded by no class that the recipe uses
TOWERS = {"minicpm_ocr": "qwen3_5_text", "minicpmv4_6": "qwen3_5_text", "minicpmv4_7": "qwen3_5_text"}
ROWS = [row for row in UNEVEN_ROWS if len(row["completion"]) < 100]
LENGTHS = [70, 1, 2, 3, 5, 130, 2]  # shorter than the convolution, longer than a chunk of 64


def tiny(kind, **changes):
    """A random model of a model type, with the attention kernel that the recipe chooses for it."""
    torch.manual_seed(0)
    values = COMMON | {**PACKED, **PADDED}.get(kind, {}) | changes
    values = {name: value for name, value in values.items() if value is not None}
    family = transformers.CONFIG_MAPPING[kind]
    if "vision_config" in family.sub_configs:
        values |= {"model_type": TOWERS[kind]} if kind in TOWERS else {}
        values = {"text_config": values, "vision_config": TOWER}
    config = family(**values)
    mappings = [transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText, transformers.AutoModel]
    mapping = next(mapping for mapping in mappings if type(config) in mapping._model_mapping)
    attention.register()
    chosen = attention.choose(config.get_text_config())
    options = {} if chosen == "auto" else {"attn_implementation": chosen}
    return mapping.from_config(config, **options).eval()


def random_documents(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, COMMON["vocab_size"], (n,), generator=generator).tolist() for n in lengths]
    return [[{"input_ids": part, "labels": part}] for part in ids]


def logits_and_gradients(model, rows, autocast=False):
    """Logits of rows, one after the other, and the gradients of a weighted sum over all of them."""
    model.zero_grad()
    logits, weights = [], torch.Generator().manual_seed(2)
    for row in rows:
        inputs = {
            name: value for name, value in row.items() if name not in ("labels", "shift_labels", "logits_to_keep")
        }
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits.append(model(**inputs, use_cache=False).logits[0])
    logits = torch.cat(logits)
    (logits * torch.randn(logits.shape, generator=weights)).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def apart(found, expected):
    """Largest difference of logits relative to the largest logit, and norm of that of all gradients, likewise."""
    (logits, gradients), (expected_logits, expected_gradients) = found, expected
    assert gradients.keys() == expected_gradients.keys()
    difference = torch.cat([(gradients[name] - expected_gradients[name]).flatten() for name in gradients]).norm()
    norm = torch.cat([gradient.flatten() for gradient in expected_gradients.values()]).norm()
    return ((logits - expected_logits).abs().max() / expected_logits.abs().max()).item(), (difference / norm).item()


def alone(documents):
    return [{"input_ids": torch.tensor([document["input_ids"]])} for (document,) in documents]


@pytest.mark.parametrize("kind", PACKED)
def test_packed_logits_and_gradients_are_those_of_each_document_alone(kind):
    model, documents = tiny(kind), random_documents()
    linear_attention.keep_documents_apart(model)
    expected = logits_and_gradients(model, alone(documents))
    assert max(apart(logits_and_gradients(model, [Collator()(documents)]), expected)) < 1e-6
    assert checks.packing_fault(model, Collator()) is None
    mixed = [{"input_ids": torch.tensor([sum((document["input_ids"] for (document,) in documents), [])])}]
    assert min(apart(logits_and_gradients(model, mixed), expected)) > 1e-3


@pytest.mark.parametrize("kind", PADDED)
def test_a_model_whose_documents_cannot_be_kept_apart_is_found_and_padded_rows_of_it_are_exact(kind):
    model, documents = tiny(kind), random_documents([9, 4, 6])
    linear_attention.keep_documents_apart(model)
    assert "apart" in (fault := checks.packing_fault(model, Collator())) or "mixes" in fault
    batch = Collator(padding_free=False)(documents)
    with torch.no_grad():
        states = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)[0]
        for row, document in zip(states, alone(documents), strict=True):
            expected = model(**document, use_cache=False)[0][0]
            assert (row[: len(expected)] - expected).abs().max() < 1e-5 * expected.abs().max()


INDEXED = dict(q_lora_rank=16, index_topk=16, index_head_dim=16, index_n_heads=2, head_dim=None)


@pytest.mark.parametrize(
    "kind, changes", [("qwen4_exp_text", {}), ("deepseek_v32", LATENT | INDEXED), ("glm_moe_dsa", LATENT | INDEXED)]
)
def test_the_loss_reaches_all_weights_but_those_of_indexers(kind, changes):
    model = tiny(kind, **changes).train()
    _, gradients = logits_and_gradients(model, alone(random_documents([70])))  # enough for every expert
    frozen, names = loading.never_trained(model), {name for name, _ in model.named_parameters()}
    assert frozen and all(".indexer." in name for name in frozen)
    assert names - gradients.keys() == frozen.keys()
    targets = adapter.targets(model, None)
    assert targets and not any(".indexer." in name for name in targets)
    with pytest.raises(ValueError, match="or in indexers"):
        adapter.targets(model, sorted({name.split(".")[-2] for name in frozen if "proj" in name})[:1])


def test_every_model_of_transformers_with_such_layers_is_in_one_of_the_tables():
    folder = pathlib.Path(transformers.__file__).parent / "models"
    found = {path.parent.name for path in folder.glob("*/modeling_*.py") if re.search(SIGNS, path.read_text())}
    assert len(found) > 20
    assert found - {kind.removesuffix("_text") for kind in [*PACKED, *PADDED, *NO_TEXT_MODEL]} == set()


@pytest.fixture(params=["qwen3_5_text", "qwen3_next", "olmo_hybrid", "kimi_linear", "lfm2"])
def untouched(request, monkeypatch):
    """A model whose modelling file has the functions of transformers, as if nothing had been replaced before."""
    model = tiny(request.param)
    current = sys.modules[type(model).__module__]
    spec = importlib.util.spec_from_file_location(f"{current.__package__}.fresh", current.__file__)
    fresh = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, fresh)
    spec.loader.exec_module(fresh)
    for name in linear_attention.KERNELS.keys() & vars(current).keys():
        monkeypatch.setattr(current, name, getattr(fresh, name))
    return model


def test_replacing_the_functions_twice_is_replacing_them_once_and_generation_stays_as_it_was(untouched):
    ids = torch.tensor([random_documents([9])[0][0]["input_ids"]] * 2)
    options = dict(
        max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True, eos_token_id=-1
    )
    before = untouched.generate(ids, **options)
    linear_attention.keep_documents_apart(untouched)
    functions = dict(vars(sys.modules[type(untouched).__module__]))
    assert linear_attention.KERNELS.keys() & {n for n, f in functions.items() if hasattr(f, "keeps_documents_apart")}
    linear_attention.keep_documents_apart(untouched)
    assert vars(sys.modules[type(untouched).__module__]) == functions
    after = untouched.generate(ids, **options)
    assert torch.equal(before.sequences, after.sequences) and before.sequences.shape == (2, 21)
    assert all(map(torch.equal, before.logits, after.logits))


def test_a_kernel_that_raises_an_error_or_mixes_documents_is_found_before_training(untouched):
    fault = checks.packing_fault(untouched, Collator())
    assert fault.startswith(
        "its kernels cannot compute such rows (ValueError: `chunk_gated_delta_rule` can't keep packed sequences apart"
        if hasattr(sys.modules[type(untouched).__module__], "torch_chunk_gated_delta_rule")
        else "this model mixes the documents of a row"
    )
    linear_attention.keep_documents_apart(untouched)
    assert checks.packing_fault(untouched, Collator()) is None


WAYS = {
    "reentrant checkpoints": lambda model: model.gradient_checkpointing_enable({"use_reentrant": True}),
    "checkpoints": lambda model: model.gradient_checkpointing_enable({"use_reentrant": False}),
    "compiled layers": lambda model: [
        module.compile(backend="aot_eager")
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer)
    ],
}


@pytest.mark.parametrize(
    "kind, way",
    [(kind, way) for kind in ("qwen3_5_text", "kimi_linear", "lfm2") for way in WAYS if "checkpoints" in way]
    + [pytest.param("qwen3_5_text", "compiled layers", marks=pytest.mark.slow)],
)
def test_checkpointed_and_compiled_layers_compute_the_same(kind, way):
    few = dict(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"]) if "compiled" in way else {}
    model, row = tiny(kind, **few).train(), Collator()(random_documents())
    linear_attention.keep_documents_apart(model)
    model.enable_input_require_grads()
    expected = logits_and_gradients(model, [row])
    WAYS[way](model)
    assert model.is_gradient_checkpointing or "compiled" in way
    assert max(apart(logits_and_gradients(model, [row]), expected)) < 1e-6
    other = random_documents([5, 1, 40])  # compiled code, too, takes rows of other documents
    expected = logits_and_gradients(tiny(kind, **few), alone(other))
    assert max(apart(logits_and_gradients(model, [Collator()(other)]), expected)) < 1e-6


@pytest.fixture
def folder_of(small_tokenizer, tmp_path):
    """Function from a model type to a folder with a tiny random model of it."""

    def folder(kind):
        shutil.copytree(small_tokenizer, tmp_path / "model")
        tiny(kind).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return folder


def train_one_step(folder, tmp_path, *more):
    """Train one step of the recipe on ROWS; its loss and gradients must be those of each document alone."""
    data = write(tmp_path / "rows.jsonl", ROWS)
    encoder, conversations = ChatEncoder(transformers.AutoTokenizer.from_pretrained(folder)), Conversations([str(data)])
    documents = [encoder.encode(conversations[row]).documents for row in range(len(ROWS))]
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected_loss, expected = reference(plain, documents)
    loss, gradients = step(tmp_path, folder, data, "out", "--use_cpu", "True", *more)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert relative(gradients, {name: gradient for name, gradient in expected.items() if gradient.norm() > 1e-2}) < 1e-4


@pytest.mark.parametrize("kind", ["qwen3_5_text", "qwen3_next", "kimi_linear", "lfm2"])
def test_a_step_of_training_on_packed_rows_is_that_of_plain_torch(folder_of, tmp_path, capsys, kind):
    more = ["--pack_tokens", 100, "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 8]
    train_one_step(folder_of(kind), tmp_path, *more)
    said = capsys.readouterr().out
    assert "linear attention: torch functions, each document by itself\n" in said and "padded" not in said


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("bamba", "this model mixes the documents of a row"),
        ("zaya", "layers of the kind hybrid are not known to keep the documents of a row apart"),
    ],
)
def test_training_says_that_and_why_rows_are_padded(folder_of, tmp_path, capsys, kind, reason):
    train_one_step(folder_of(kind), tmp_path, "--per_device_train_batch_size", 8)
    said = capsys.readouterr().out
    assert f"\n{reason}: training with padded batches, a row for each document, which takes time and memory" in said
    assert "sliding window" not in said


@pytest.mark.parametrize("kind", PACKED)
def test_in_bfloat16_packed_rows_differ_from_documents_alone_by_rounding(kind):
    model, documents = tiny(kind), random_documents()
    linear_attention.keep_documents_apart(model)
    expected = logits_and_gradients(model, alone(documents), autocast=True)
    logits, gradients = apart(logits_and_gradients(model, [Collator()(documents)], autocast=True), expected)
    assert logits < 2e-2 and gradients < 2e-2
    with torch.autocast("cpu", torch.bfloat16):
        assert checks.packing_fault(model, Collator()) is None
