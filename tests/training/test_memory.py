"""The memory that the formula names is the memory that is there."""

import gc
import json
import os
import runpy
import shutil
import subprocess
import sys

import pytest
import torch
import transformers

from benchmarks import memory_table
from benchmarks.memory_table import MEASURED, QWEN2_5, TINY
from helpers import DOCUMENTS, ROOT
from recipe.distributed import engines
from recipe.training import memory
from recipe.training.memory import GB, gpu_bytes, kept, peak

SHARED = {
    "ZeRO-2": "gradients optimizer",
    "ZeRO-3": "weights gradients optimizer",
    "FSDP2": "weights gradients optimizer",
}


def config_of(shape, tied):
    names = vars(shape.config)
    heads = {name: value for name, value in names.items() if name != "head_dim"}
    return transformers.Qwen2Config(**heads, tie_word_embeddings=tied, max_position_embeddings=512)


@pytest.mark.parametrize("size, tied", [("0.5B", True), ("3B", True), ("7B", False), ("72B", False)])
def test_the_parameters_are_those_of_the_models_themselves(size, tied):
    shape = QWEN2_5[size]
    with torch.device("meta"):
        model = transformers.Qwen2ForCausalLM(config_of(shape, tied))
    counted = memory.shape_of(model)
    assert shape.base == counted.base == sum(p.numel() for p in model.parameters())
    for part in ("linear", "other", "embedding", "head"):
        assert getattr(shape, part) == getattr(counted, part)
    assert shape.config.hidden_size // shape.config.num_attention_heads == shape.config.head_dim


def test_the_adapter_is_that_of_peft_on_every_linear_layer():
    import peft

    with torch.device("meta"):
        model = transformers.Qwen2ForCausalLM(config_of(QWEN2_5["0.5B"], True))
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=64, target_modules="all-linear"))
    assert memory.shape_of(model).adapter == QWEN2_5["0.5B"].adapter
    assert memory.shape_of(model).linear == QWEN2_5["0.5B"].linear


def storages():
    """{address: bytes} of all memory under tensors; of a bucket, which may be larger than its use, what views see."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    sizes = {}
    for tensor in tensors:
        tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if tensor.device.type == "meta":
            continue
        storage = tensor.untyped_storage()
        if storage.nbytes() < GB:
            sizes[storage.data_ptr()] = storage.nbytes()
        elif tensor.nbytes < GB:
            sizes[tensor.data_ptr()] = tensor.nbytes
    return sizes


@pytest.mark.parametrize("mode", list(engines.Mode))
def test_one_process_holds_the_weights_gradients_and_optimizer_of_the_formula(mode, tmp_path):
    import peft

    before = set(storages())
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config_of(TINY, True)).save_pretrained(tmp_path)
    options = {"dtype": torch.float32 if mode == "full" else torch.bfloat16}
    if mode == "QLoRA":
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    if mode != "full":
        model.requires_grad_(False)
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=64, target_modules="all-linear"))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = sum(size for address, size in storages().items() if address not in before)
    assert held == pytest.approx(kept(gpu_bytes(TINY, engines.ENGINES["one process"], mode, 1, 100)), rel=0.02)


@pytest.mark.parametrize("mode", list(engines.Mode))
@pytest.mark.parametrize("engine", SHARED)
def test_the_shares_of_all_gpus_are_the_whole(engine, mode):
    shape = QWEN2_5["7B"]
    alone, eight = (
        gpu_bytes(shape, engines.ENGINES[engine], mode, 1, 100),
        gpu_bytes(shape, engines.ENGINES[engine], mode, 8, 100),
    )
    scales = memory.NF4_SCALES * shape.linear * (mode == "QLoRA")  # on every GPU whole
    for part in ("weights", "gradients", "optimizer"):
        common = scales if part == "weights" else 0
        parts = 8 if part in SHARED[engine] else 1
        assert parts * (eight[part] - common) == pytest.approx(alone[part] - common)
    for part in ("gathered", "activations", "logits"):
        assert eight[part] == alone[part]


@pytest.mark.parametrize("mode", list(engines.Mode))
@pytest.mark.parametrize("engine", engines.ENGINES)
def test_more_gpus_need_no_more_memory_on_each_and_larger_models_more(engine, mode):
    gpus, shapes = (1, 2, 8, 64), QWEN2_5.values()
    needed = [
        [peak(gpu_bytes(shape, engines.ENGINES[engine], mode, count, 2048)) for count in gpus] for shape in shapes
    ]
    for row in needed:
        assert row == sorted(row, reverse=True)
    for column in zip(*needed, strict=True):
        assert list(column) == sorted(column)


@pytest.mark.parametrize("engine", ["ZeRO-2", "ZeRO-3", "FSDP2"])
def test_offload_leaves_on_the_gpu_what_it_computes_with(engine):
    parts = gpu_bytes(QWEN2_5["7B"], engines.ENGINES[f"{engine} offload"], "full", 8, 2048)
    weights = 2 * QWEN2_5["7B"].base if engine == "ZeRO-2" else 0
    assert (parts["weights"], parts["gradients"], parts["optimizer"], parts["step"]) == (weights, 0, 0, 0)
    buckets = 2 * 2 * QWEN2_5["7B"].config.hidden_size ** 2  # two, in bf16
    assert parts["gathered"] == buckets if engine == "ZeRO-2" else parts["gathered"] >= 2e9


def test_known_totals():
    """Full training takes 16 bytes a parameter, and 4 more in the step; QLoRA 0.516 for a weight of a layer."""
    shape = QWEN2_5["3B"]
    full = gpu_bytes(shape, engines.ENGINES["one process"], "full", 1, 1)
    assert kept(full) == 16 * shape.base and peak(full) == 20 * shape.base
    quarter = gpu_bytes(shape, engines.ENGINES["one process"], "QLoRA", 1, 1)["weights"] - 2 * (
        shape.base - shape.linear
    )
    assert (quarter - 4 * shape.adapter) / shape.linear == pytest.approx(0.516, abs=5e-4)
    assert gpu_bytes(shape, engines.ENGINES["DDP"], "LoRA", 8, 1)["gathered"] == (2 + 4) * shape.adapter


def test_checkpointing_and_fewer_tokens_save_activations():
    plain, checkpointed, half = (
        gpu_bytes(QWEN2_5["7B"], engines.ENGINES["DDP"], "LoRA", 8, tokens, how)["activations"]
        for tokens, how in ((2048, False), (2048, True), (1024, True))
    )
    assert plain > 10 * checkpointed and checkpointed == 2 * half


def test_the_buckets_are_those_of_the_configurations():
    for name in ("ds_config_zero2", "ds_config_zero2_offload"):
        zero = json.loads(next(ROOT.rglob(f"{name}.json")).read_text())["zero_optimization"]
        assert zero["reduce_bucket_size"] == "auto" and zero["overlap_comm"]  # two of the square of the hidden size
    for name in ("ds_config_zero3", "ds_config_zero3_offload"):
        zero = json.loads(next(ROOT.rglob(f"{name}.json")).read_text())["zero_optimization"]
        assert zero["reduce_bucket_size"] == "auto"  # the square of the hidden size
        assert not zero.keys() & {"stage3_max_live_parameters", "stage3_max_reuse_distance", "sub_group_size"}
    assert json.loads((ROOT / "recipe" / "distributed" / "fsdp_config.json").read_text())["reshard_after_forward"]


def test_the_table_names_every_model_and_column(capsys):
    runpy.run_path(str(ROOT / "benchmarks" / "memory_table.py"), run_name="__main__")
    assert capsys.readouterr().out.strip() == memory_table.table()
    rows = [line.strip("| ").split(" | ") for line in memory_table.table().splitlines() if line.startswith("|")]
    assert rows[0][1:] == list(memory_table.COLUMNS) and [row[0] for row in rows[2:]] == list(QWEN2_5)
    for row in rows[2:]:
        assert len(row) == len(memory_table.COLUMNS) + 1 and all(float(cell) > 0 for cell in row[1:])


@pytest.mark.parametrize("point", MEASURED, ids=lambda point: " ".join(map(str, point[1:5])))
def test_what_was_measured_is_what_the_formula_says(point):
    shape, engine, mode, gpus, tokens, dtype, what, gb, _ = point
    assert what(gpu_bytes(shape, engines.ENGINES[engine], mode, gpus, tokens, dtype=dtype)) / GB == pytest.approx(
        gb, rel=0.05
    )


# ----------------------------------------------------------------------------------------------------------------------
# Two ranks, each of which counts what it holds before the optimizer's second step

RANK = """
import json, pathlib, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests", sys.argv[1] + "/tests/training"]
import finetune
from test_memory import storages

held = []

def count(steps):
    if steps == 1:  # from the second step on the optimizer has its averages
        held.append(sum(storages().values()))

class Watch(finetune.transformers.TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        count(state.global_step)

class Watched(finetune.RecipeTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(Watch())

if "--deepspeed" in sys.argv:  # it steps before Watch is asked; the first count is the one
    from deepspeed.runtime.engine import DeepSpeedEngine
    step = DeepSpeedEngine.step
    DeepSpeedEngine.step = lambda engine, *args, **kwargs: [count(engine.global_steps), step(engine, *args, **kwargs)][1]
finetune.RecipeTrainer = Watched
finetune.train(sys.argv[3:])
pathlib.Path(sys.argv[2]).write_text(json.dumps(held[0]))
finetune.console.leave()
"""
ENGINES = {
    "ZeRO-2": ["--deepspeed", ROOT / "ds_config_zero2.json"],
    "ZeRO-3": ["--deepspeed", ROOT / "ds_config_zero3.json"],
    "FSDP2": ["--fsdp", "True", "--fsdp_config", ROOT / "recipe" / "distributed" / "fsdp_config.json"],
}
MODES = {"full": [], "QLoRA": ["--q_lora"]}


@pytest.mark.slow
@pytest.mark.parametrize("engine, mode", [("ZeRO-2", "full"), ("ZeRO-3", "full"), ("FSDP2", "QLoRA")])
def test_a_rank_holds_what_the_formula_says(engine, mode, small_tokenizer, tmp_path):
    shutil.copytree(small_tokenizer, tmp_path / "model")
    transformers.Qwen2ForCausalLM(config_of(TINY, True)).save_pretrained(tmp_path / "model")
    row = {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 8)
    (tmp_path / "rank.py").write_text(RANK)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, tmp_path / "rank.py",
        ROOT, tmp_path / "held.json", "--model_name_or_path", tmp_path / "model", "--data_path", tmp_path / "rows.jsonl",
        "--output_dir", tmp_path / "output", "--bf16", "False", "--max_steps", 2, "--save_strategy", "no",
        "--per_device_train_batch_size", 2, *ENGINES[engine], *MODES[mode],
    ]  # fmt: skip
    done = subprocess.run(
        list(map(str, command)), check=False, capture_output=True, text=True, timeout=200, cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    held = json.loads((tmp_path / "held.json").read_text())
    print(engine, mode, held, "bytes")  # for memory_table.MEASURED
    expected = kept(gpu_bytes(TINY, engines.ENGINES[engine], mode, 2, 100, dtype=torch.float32))
    if (engine, mode) == ("ZeRO-3", "QLoRA"):
        expected += memory.NF4 * TINY.linear  # gathered, and not let go before the step
    assert held == pytest.approx(expected, rel=0.02)


def test_the_table_in_the_readme_is_the_one_that_is_computed():
    assert memory_table.table() in DOCUMENTS
