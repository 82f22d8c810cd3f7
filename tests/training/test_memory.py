"""What the estimate says is what torch keeps: every part of it is held against bytes that are counted here."""

import json
import shutil
import weakref

import pytest
import torch
import transformers
from families import family
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from training.memory_of_ranks import storages

import finetune
from benchmarks import memory_table
from helpers import ROOT, argv, run_forked, write
from recipe.distributed.engines import ENGINES, ONE_PROCESS, Mode
from recipe.model import long_rows, loss
from recipe.training import memory
from recipe.training.plan import Plan

COMMON = dict(
    vocab_size=1024, hidden_size=128, intermediate_size=320, num_hidden_layers=4, num_attention_heads=4, head_dim=32,
    num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=997, eos_token_id=997, pad_token_id=997,
)  # fmt: skip
MIXTURE = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=96, shared_expert_intermediate_size=64)
DELTA = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=64, linear_value_head_dim=64)
FAMILIES = {
    "qwen2": COMMON,
    "qwen3": COMMON,
    "llama": COMMON,
    "qwen3_moe": {**COMMON, **MIXTURE},
    "qwen3_5_text": {**COMMON, **DELTA},
    "qwen3_5_moe_text": {**COMMON, **DELTA, **MIXTURE},
}
MODES = {Mode.FULL: [], Mode.LORA: ["--use_lora"], Mode.QLORA: ["--q_lora"]}


def write_model(name, folder, tokenizer, **more):
    torch.manual_seed(0)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    config = transformers.CONFIG_MAPPING[name](**{**FAMILIES[name], **more})
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# Sizes


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["qwen2", "qwen3_5_moe_text"])
def test_every_parameter_is_in_one_part(name, tied):
    with torch.device("meta"):
        config = transformers.CONFIG_MAPPING[name](**{**FAMILIES[name], "tie_word_embeddings": tied})
        model = transformers.AutoModelForCausalLM.from_config(config)
    size = memory.model_size(model)
    assert size.base == sum(p.numel() for p in model.parameters()) and size.tower == size.adapter == 0
    assert size.embedding == model.get_input_embeddings().weight.numel()
    assert size.head == (0 if tied else size.embedding)


SMALL = dict(vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
UNUSUAL = {  # other names of layers, no head size, no feed-forward width, no weight in a norm
    "gpt2": dict(vocab_size=512, n_embd=64, n_layer=2, n_head=4),
    "falcon": SMALL,
    "bloom": dict(vocab_size=512, hidden_size=64, n_layer=2, n_head=4),
    "phi3": {**SMALL, "intermediate_size": 128, "pad_token_id": 0},
    "mamba2": dict(vocab_size=512, hidden_size=64, num_hidden_layers=2, num_heads=8, head_dim=16),
    "gemma3n_text": {},
    "qwen3_next": {**COMMON, **MIXTURE},
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_a_model_of_any_architecture_is_estimated(name):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING[name](**UNUSUAL[name]))
    size = memory.model_size(model)
    assert size.base == sum(p.numel() for p in model.parameters())
    assert len(size.layers) == model.config.num_hidden_layers
    shorter, longer = (memory.estimate(size, ONE_PROCESS, Mode.FULL, 1, tokens).activations for tokens in (100, 200))
    assert 0 < shorter < longer


def test_the_tower_of_a_vision_checkpoint_is_counted_apart_and_never_trained():
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(memory_table.CONFIGS["Qwen3.5-0.8B"])
    size = memory.model_size(model)
    assert size.base == sum(p.numel() for p in model.parameters())
    assert size.tower == sum(p.numel() for p in model.model.visual.parameters()) > 1e8
    parts = memory.estimate(size, ONE_PROCESS, Mode.FULL, 1, 1)
    assert parts.optimizer == 8 * (size.base - size.tower) and parts.weights == 4 * size.base


@pytest.mark.parametrize("name", ["qwen2", "qwen3_5"])
def test_linear_layers_are_those_that_bitsandbytes_packs(small_tokenizer, tmp_path, prepared, name):
    data = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}] * 4)
    folder = family(name, tmp_path / "model", small_tokenizer)
    sizes = [
        memory.model_size(prepared(argv(folder, data, tmp_path / "out", *MODES[mode])).model)
        for mode in (Mode.LORA, Mode.QLORA)
    ]
    plain, packed = sizes
    assert (packed.linear, packed.largest, packed.base, packed.tower, packed.adapter, packed.layers) == (
        plain.linear, plain.largest, plain.base, plain.tower, plain.adapter, plain.layers
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# A micro-batch, through the recipe's own loading, adapter, collator and loss


@pytest.fixture
def micro_batch(small_tokenizer, tmp_path, prepared):
    """Function from a family and flags to (trainer, a micro-batch of four documents, what is estimated for it)."""
    row = {"prompt": "say " * 60, "completion": "and so on " * 30}
    data = write(tmp_path / "rows.jsonl", [row] * 4)

    def of(name, mode, *more):
        model = write_model(name, tmp_path / "model", small_tokenizer)
        more = [*more, *["--lora_r", 8] * (mode != Mode.FULL)]
        trainer = prepared(argv(model, data, tmp_path / "out", *MODES[mode], *more))
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
        lora_args = finetune.LoraArguments(q_lora=mode == Mode.QLORA)
        if "--lora_dropout" in more:
            lora_args.lora_dropout = more[more.index("--lora_dropout") + 1]
        dtype = torch.bfloat16 if trainer.args.bf16 else torch.float32
        parts = (planned := Plan(trainer, dtype, lora_args)).estimate(planned.measures)
        trainer.model.train()
        if trainer.args.gradient_checkpointing:
            trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
        return trainer, batch, parts

    return of


def loss_of(trainer, batch):
    with trainer.accelerator.autocast():
        return trainer.compute_loss(trainer.model, batch)


def saved_for_backward(trainer, batch):
    """Bytes of what autograd saves, without weights and their copies in another precision."""
    weights = [*trainer.model.parameters(), *trainer.model.buffers()]
    known = {tensor.untyped_storage().data_ptr() for tensor in weights}
    shapes = {shape for p in weights for shape in (p.shape, p.shape[::-1])}
    sizes, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and tensor.shape not in shapes:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(trainer, batch)
    alive.clear()  # the graph, the hooks and this list would keep each other alive
    return sum(sizes.values())


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations create while they live; what is given at the start does not count."""

    def __init__(self, *tensors):
        super().__init__()
        self.given = {tensor.untyped_storage()._cdata for tensor in tensors}
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes and storage._cdata not in self.given:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.forget, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result

    def forget(self, address):
        self.now -= self.sizes.pop(address)


def peak_of_the_passes(trainer, batch):
    """Bytes at the worst moment of forward and backward pass, besides weights and gradients of an earlier pass."""
    loss_of(trainer, batch).backward()
    given = [*trainer.model.parameters(), *trainer.model.buffers()]
    given += [p.grad for p in trainer.model.parameters() if p.grad is not None]
    given += [value for value in batch.values() if torch.is_tensor(value)]
    with LiveBytes(*given) as live:
        loss_of(trainer, batch).backward()
    return live.peak


CASES = [(Mode.FULL, None), (Mode.LORA, 0.0), (Mode.LORA, 0.05), (Mode.QLORA, 0.05)]


@pytest.mark.parametrize("bf16", ["False", "True"])
@pytest.mark.parametrize("mode, dropout", CASES[:3])
@pytest.mark.parametrize("name", FAMILIES)
def test_activations_are_what_autograd_saves(micro_batch, name, mode, dropout, bf16):
    more = [] if dropout is None else ["--lora_dropout", dropout]
    trainer, batch, parts = micro_batch(name, mode, "--bf16", bf16, "--gradient_checkpointing", "False", *more)
    dtype, stream = (torch.bfloat16 if trainer.args.bf16 else torch.float32), 4 * (mode == Mode.FULL)
    layers = memory.model_size(trainer.model).layers
    of_layers = sum(memory.kept_bytes(layer, mode, dtype, dropout or 0.0, "cpu", stream) for layer in layers)
    hidden = (
        batch["logits_to_keep"].numel() * COMMON["hidden_size"] * dtype.itemsize
    )  # the gradient of the head's input
    assert batch["input_ids"].numel() * of_layers + hidden == pytest.approx(
        saved_for_backward(trainer, batch), rel=0.12
    )


@pytest.mark.slow
@pytest.mark.parametrize("bf16, checkpointing", [("False", "False"), ("True", "True")])
@pytest.mark.parametrize("mode, dropout", CASES)
@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "qwen3_5_text"])
def test_the_passes_take_what_is_estimated(micro_batch, name, mode, dropout, checkpointing, bf16):
    more = [] if dropout is None else ["--lora_dropout", dropout]
    trainer, batch, parts = micro_batch(name, mode, "--bf16", bf16, "--gradient_checkpointing", checkpointing, *more)
    assert parts.passes == pytest.approx(peak_of_the_passes(trainer, batch), rel=0.15)


LONG = [["activation_offloading"], ["activation_offloading", "tiled_mlp"], ["without", "tiled_mlp"]]


@pytest.mark.slow
@pytest.mark.parametrize("measures", LONG, ids=" ".join)
@pytest.mark.parametrize("bf16, mode", [("False", Mode.LORA), ("True", Mode.LORA), ("False", Mode.FULL)])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "qwen3_5_text"])
def test_what_lets_long_rows_fit_takes_what_is_estimated(micro_batch, monkeypatch, name, mode, bf16, measures):
    monkeypatch.setattr(long_rows, "PIECE", 64)  # of rows of 600 tokens
    monkeypatch.setattr(long_rows, "SMALL", 1024)
    more = [word for measure in measures if measure != "without" for word in (f"--{measure}", "True")]
    more += ["--gradient_checkpointing", "False" if "without" in measures else "True"]
    trainer, batch, parts = micro_batch(name, mode, "--bf16", bf16, *more)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, long_rows.Inputs):
            callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    # Of torch's functions for the delta rule, what they pad to whole chunks is not counted.
    assert parts.passes == pytest.approx(peak_of_the_passes(trainer, batch), rel=0.15 if "qwen3_5" in name else 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("bf16, checkpointing", [("False", "False"), ("True", "True")])
@pytest.mark.parametrize("mode", [Mode.LORA, Mode.QLORA])
def test_adapters_of_experts_take_what_is_estimated(micro_batch, mode, checkpointing, bf16):
    more = ["--lora_experts", "True", "--lora_dropout", 0.0, "--bf16", bf16, "--gradient_checkpointing", checkpointing]
    trainer, batch, parts = micro_batch("qwen3_moe", mode, *more)
    assert parts.passes == pytest.approx(peak_of_the_passes(trainer, batch), rel=0.15)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"]])
def test_layers_without_an_adapter_keep_no_input(micro_batch, targets):
    trainer, batch, parts = micro_batch("qwen3", Mode.LORA, "--bf16", "False", "--lora_target_modules", *targets)
    assert parts.passes == pytest.approx(peak_of_the_passes(trainer, batch), rel=0.1)


# ----------------------------------------------------------------------------------------------------------------------
# Logits, weights, gradients and optimizer of one process


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("mode", [Mode.FULL, Mode.LORA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_takes_the_logits_of_a_block(monkeypatch, device, mode, dtype):
    """On a CPU as there, and with the blocks of a GPU."""
    monkeypatch.setitem(loss.BLOCK, "cpu", loss.BLOCK[device])
    monkeypatch.setattr(loss, "ROWS", {"cpu": loss.ROWS[device]} if device in loss.ROWS else {})
    config = transformers.Qwen2Config(**{**COMMON, "vocab_size": 5000, "num_hidden_layers": 1})
    with torch.device("meta"):
        size = memory.model_size(transformers.Qwen2ForCausalLM(config))
    positions, full = 3000, mode == Mode.FULL
    hidden = torch.randn(positions, config.hidden_size, dtype=dtype, requires_grad=True)
    weight = torch.randn(config.vocab_size, config.hidden_size, dtype=dtype, requires_grad=full)
    targets = torch.randint(config.vocab_size, (positions,))
    with LiveBytes(hidden, weight, targets) as live:
        total = loss.HeadLoss.apply(hidden, weight, None, targets, 0.0)
    head = memory._head_gradients(size, full, dtype, positions)
    assert live.now == pytest.approx(head, rel=0.01) and total.isfinite()
    assert live.peak == pytest.approx(head + memory._logits(size, full, dtype, positions, device, True), rel=0.1)


def test_without_a_fused_head_all_logits_exist(micro_batch, monkeypatch):
    trainer, batch, parts = micro_batch("qwen2", Mode.LORA, "--bf16", "False", "--gradient_checkpointing", "False")
    monkeypatch.setattr(trainer, "head", None)
    whole = Plan(trainer, torch.float32, finetune.LoraArguments()).estimate([])
    assert whole.passes == pytest.approx(peak_of_the_passes(trainer, batch), rel=0.1)
    assert whole.logits > 10 * parts.logits


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe", "qwen3_5"])
def test_one_process_holds_the_weights_gradients_and_optimizer_of_the_estimate(
    small_tokenizer, tmp_path, prepared, name, mode
):
    data = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}] * 4)
    folder = family(name, tmp_path / "model", small_tokenizer)
    before = storages()
    trainer = prepared(argv(folder, data, tmp_path / "out", *MODES[mode]))
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    trainer.create_optimizer().step()
    held = sum(size for _, size in storages() - before)
    size = memory.model_size(trainer.model)
    assert (size.tower > 0) == (name == "qwen3_5")
    expected = memory.estimate(size, ONE_PROCESS, mode, 1, 100, dtype=torch.float32).kept
    assert held == pytest.approx(expected, rel=0.03)


# ----------------------------------------------------------------------------------------------------------------------
# Two ranks, each of which counts what it holds


RANKS = {
    "DDP": [],
    "ZeRO-2": ["--deepspeed", ROOT / "ds_config_zero2.json"],
    "ZeRO-3": ["--deepspeed", ROOT / "ds_config_zero3.json"],
    "FSDP2": ["--fsdp", "True", "--fsdp_config", ROOT / "recipe" / "distributed" / "fsdp_config.json"],
}


@pytest.mark.slow
@pytest.mark.parametrize("label", RANKS)
def test_a_rank_holds_what_is_estimated(label, small_tokenizer, tmp_path, prepared):
    sizes, jobs, engine = {}, {}, ENGINES[label]
    model = write_model("qwen2", tmp_path / "model", small_tokenizer, hidden_size=256, intermediate_size=1024)
    data = write(tmp_path / "rows.jsonl", [{"prompt": "one", "completion": "two"}] * 8)
    for mode, flags in MODES.items():
        words = argv(model, data, tmp_path / mode, "--max_steps", 2, "--per_device_train_batch_size", 2, *flags)
        sizes[mode] = memory.model_size(prepared(words).model)
        jobs[mode] = [*words, *map(str, RANKS[label]), *["--use_cpu", "True"] * (not RANKS[label])]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    program = ROOT / "tests" / "training" / "memory_of_ranks.py"
    codes, said = run_forked(tmp_path, program, [tmp_path / "jobs.json", tmp_path / "results.json"], 2)
    assert codes == [0, 0], said[-8000:]
    results = json.loads((tmp_path / "results.json").read_text())
    for mode, size in sizes.items():
        parts = memory.estimate(size, engine, mode, 2, 100, dtype=torch.float32, device="cpu")
        expected = parts.kept + results[mode]["buckets"]
        if (label, mode) == ("ZeRO-3", Mode.QLORA):
            expected += memory.NF4 * size.linear  # gathered, and not released before the step
        assert results[mode]["kept"] == pytest.approx(expected, rel=0.03), mode
        if mode == Mode.FULL:  # a layer, and the file that is being written: 1 of 4 layers, where all took 4 of 4
            layer = 4 * size.linear / 4
            assert layer * engine.shards_weights < results[mode]["saving"] + 1 < 1.5 * layer, engine
        if engine.copies_gradients:
            assert results[mode]["buckets"] == parts.gathered - 4 * size.largest * (mode == Mode.QLORA)
        if engine.deepspeed_stage:
            zero = results[mode]["zero"]
            assert zero["bucket"] == 256**2 and (zero["live"], zero["group"]) == (memory.ZERO3_LIVE,) * 2
            assert zero["overlap"]  # which takes two buckets


# ----------------------------------------------------------------------------------------------------------------------
# The table


def test_known_totals():
    """Full training takes 16 bytes a parameter, and 4 more in the step; QLoRA 0.516 for a weight of a linear layer."""
    size = memory_table.size_of("Qwen2.5-3B")
    full = memory.estimate(size, ONE_PROCESS, Mode.FULL, 1, 1)
    assert full.kept == 16 * size.base and full.peak == 20 * size.base
    packed = memory.estimate(size, ONE_PROCESS, Mode.QLORA, 1, 1).weights - 2 * (size.base - size.linear)
    assert (packed - 4 * size.adapter) / size.linear == pytest.approx(0.516, abs=5e-4)


@pytest.mark.parametrize("name", memory_table.PUBLISHED)
def test_the_estimate_is_near_published_figures(name):
    assert memory_table.beside_published(name) == pytest.approx(memory_table.PUBLISHED[name], rel=0.15)


@pytest.mark.slow
def test_the_documents_have_the_tables_that_the_program_prints():
    sized, published, rows = (
        text().strip() for text in (memory_table.table, memory_table.published, memory_table.rows)
    )
    text = (ROOT / "docs" / "performance.md").read_text()
    assert sized in text and published in text and rows in text
    readme = (ROOT / "README.md").read_text().partition("**How large a model fits**")[2].partition("## Speed")[0]
    found = {line for line in readme.splitlines() if line.startswith("|")}
    assert found <= {*sized.splitlines(), *rows.splitlines()}
    assert any("Qwen3.6-27B" in line for line in found) and any("Qwen3.6-27B QLoRA" in line for line in found)


def test_a_long_row_fits_where_it_was_asked_for():
    """64k tokens of a 7B in 4 bits in 24 GB and 256k in 80 GB, 100k of a 32B in 80 GB; each measure lets a row grow."""
    for name, gb, tokens in (("Qwen2.5-7B", 24, 65_536), ("Qwen2.5-7B", 80, 262_144), ("Qwen2.5-32B", 80, 100_000)):
        found = [memory_table.longest(name, Mode.QLORA, gb, **measures) for measures in memory_table.MEASURES]
        assert found == sorted(found) and found[-1] >= tokens
