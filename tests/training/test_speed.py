"""The log reports how fast a run is, how much of it is padding, and how much memory it takes."""

import os
import re
import subprocess
import sys
import time

import pytest
import torch
from families import family
from torch.utils.flop_counter import FlopCounterMode

import finetune
from helpers import ROOT, UNEVEN_ROWS, argv, history, write
from recipe.training import memory, resources
from recipe.training.throughput import flops_per_token


def test_the_log_counts_tokens_and_padding_of_each_step(tiny_model, documents, tmp_path):
    data, out = write(tmp_path / "rows.jsonl", UNEVEN_ROWS), tmp_path / "out"
    words = ["--padding_free", "False", "--train_sampling_strategy", "sequential", "--num_train_epochs", 1]
    finetune.train(argv(tiny_model, data, out, *words))
    rows = [document for (document,) in documents]
    for step, part in enumerate((rows[:4], rows[4:])):
        lengths = [len(row["input_ids"]) for row in part]
        supervised = sum(label != -100 for row in part for label in row["labels"])
        assert history(out, "padding")[step] == pytest.approx(1 - sum(lengths) / (4 * max(lengths)), abs=1e-3)
        rates = (history(out, f"{kind}tokens_per_second")[step] for kind in ("supervised_", ""))
        assert next(rates) / next(rates) == pytest.approx(supervised / sum(lengths), rel=0.01)
    left = history(out, "minutes_left")
    assert len(left) == 2 and left[1] == 0 <= left[0]


@pytest.mark.timing
def test_the_log_reports_the_tokens_of_a_second_of_optimizer_steps(tiny_model, documents, tmp_path, monkeypatch):
    seconds, marks = [], []

    class Clock(finetune.transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            marks.append(time.perf_counter())

        def on_step_end(self, *args, **kwargs):
            seconds.append(time.perf_counter() - marks[-1])

    create = finetune.RecipeTrainer.__init__
    monkeypatch.setattr(
        finetune.RecipeTrainer,
        "__init__",
        lambda self, **options: [create(self, **options), self.add_callback(Clock())] and None,
    )
    data, out = write(tmp_path / "rows.jsonl", UNEVEN_ROWS), tmp_path / "out"
    finetune.train(argv(tiny_model, data, out, "--num_train_epochs", 10, "--logging_steps", 20))
    tokens = 10 * sum(len(document["input_ids"]) for (document,) in documents)
    assert len(seconds) == 20
    assert history(out, "tokens_per_second")[0] == pytest.approx(tokens / sum(seconds), rel=0.25)


def test_the_reported_memory_is_the_peak_of_the_process_since_training_began(tiny_model, tmp_path):
    before = resources.used_memory()
    hoard = b"x" * 1_500_000_000
    assert resources.peak_memory(torch.device("cpu")) > before + 1.4e9
    del hoard
    data, out = write(tmp_path / "rows.jsonl", UNEVEN_ROWS), tmp_path / "out"
    finetune.train(argv(tiny_model, data, out, "--num_train_epochs", 1))
    reported = history(out, "memory_gb")[-1] * 1e9
    assert before - 5e7 < reported < before + 1e9  # which is rounded; and not of what was there before
    assert reported == pytest.approx(resources.peak_memory(torch.device("cpu")), rel=0.05)


def test_the_peak_of_a_program_is_not_that_of_the_program_which_started_it():
    hoard = b"x" * 1_500_000_000
    code = "import torch; from recipe.training import resources; print(resources.peak_memory(torch.device('cpu')))"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert 1e8 < int(said) < len(hoard)


MANY_SHAPES = """
import sys
from recipe import console
if sys.argv[1] == "bounded":
    console.configure_libraries()
import torch
from recipe.training import resources

rows, weight = torch.randn(600, 256, dtype=torch.bfloat16), torch.randn(256, 256, dtype=torch.bfloat16)
for count in (1, 600):
    for length in range(1, count + 1):
        torch.nn.functional.linear(rows[:length], weight)
    print(resources.used_memory())
"""


def test_products_of_many_shapes_do_not_fill_the_memory(tmp_path):
    grown = {}
    # conftest.py bounds the caches of the tests, and a program would inherit that
    environment = {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}
    for caches in ("bounded", "unbounded"):
        command = [sys.executable, "-c", MANY_SHAPES, caches]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        first, last = map(int, done.stdout.split())
        grown[caches] = last - first
    assert grown["bounded"] < memory.KERNELS
    assert grown["bounded"] < 0.5 * grown["unbounded"] or grown["unbounded"] < 1e8  # a CPU that oneDNN does not serve


@pytest.mark.parametrize("mode", ["full", "LoRA"])
@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe", "qwen3_5"])
def test_operations_are_those_that_torch_counts(small_tokenizer, tmp_path, prepared, name, mode):
    """Matrix products of a forward and backward pass of the decoder; k of E experts, and no vision tower."""
    data = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}] * 4)
    folder = family(name, tmp_path / "model", small_tokenizer)
    more = ["--use_lora", "--lora_dropout", 0] if mode == "LoRA" else []
    model = prepared(argv(folder, data, tmp_path / "out", *more)).model
    base = model.get_base_model() if mode == "LoRA" else model
    base.enable_input_require_grads()
    if name == "qwen3_moe":
        base.set_experts_implementation("eager")  # torch counts no grouped product
    ids = torch.randint(900, (1, 128))
    with FlopCounterMode(display=False) as counter:
        base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()
    operations = counter.get_flop_counts()["Global"]
    products = sum(count for operation, count in operations.items() if str(operation) in ("aten.mm", "aten.addmm"))
    assert flops_per_token(model) == pytest.approx(products / ids.numel(), rel=0.02)


SLOW_TOKENISING = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
import finetune
from recipe import console
from recipe.dataset.encoding import ChatEncoder

encoded, encode_batch = [], ChatEncoder.encode_batch

def slowly(self, conversations):
    encoded.extend(conversations)
    time.sleep(0.25 * len(conversations))
    return encode_batch(self, conversations)

ChatEncoder.encode_batch = slowly
finetune.train(sys.argv[1:])
print("conversations encoded:", len(encoded), flush=True)
console.leave()
"""


@pytest.mark.slow
def test_tokenising_on_one_rank_may_take_longer_than_a_collective(tiny_model, tmp_path):
    data = write(tmp_path / "rows.jsonl", [{"prompt": f"slow {n}", "completion": "a"} for n in range(40)])
    program = tmp_path / "program.py"
    program.write_text(SLOW_TOKENISING)
    words = argv(tiny_model, data, tmp_path / "out", "--max_steps", 1, "--ddp_timeout", 5)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launch, program, ROOT, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    few, many = sorted(map(int, re.findall("conversations encoded: (\\d+)", done.stdout)))
    assert many >= 40 and few < 40  # 10 seconds for the rank that writes, and the other only waited
    assert len(history(tmp_path / "out", "loss")) == 1
