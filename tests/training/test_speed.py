"""Head and loss in blocks give what plain torch gives; the log says how fast a run is."""

import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import finetune
from helpers import ROOT, ROWS, argv, history, write
from recipe.dataset.collator import Collator
from recipe.dataset.encoding import IGNORE_INDEX
from recipe.model import loss, precision
from recipe.model.loss import supervised_loss
from recipe.training import throughput


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setitem(loss.BLOCK, "cpu", 7)  # several blocks, the last one not full


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("trained", ["hidden", "weight", "both"])
def test_loss_and_gradients_are_those_of_torch(small_blocks, smoothing, with_bias, trained):
    torch.manual_seed(0)
    hidden = torch.randn(31, 16, requires_grad=trained != "weight")
    weight = torch.randn(50, 16, requires_grad=trained != "hidden")
    bias = torch.randn(50) if with_bias else None
    targets = torch.randint(50, (31,))
    targets[[0, 8, 30]] = IGNORE_INDEX
    found = loss.HeadLoss.apply(hidden, weight, bias, targets, smoothing)
    (found / 3).backward()
    grads = [tensor.grad for tensor in (hidden, weight)]
    hidden.grad = weight.grad = None
    logits = torch.nn.functional.linear(hidden, weight, bias)
    expected = torch.nn.functional.cross_entropy(
        logits, targets, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=smoothing
    )
    (expected / 3).backward()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    for grad, tensor in zip(grads, (hidden, weight), strict=True):
        assert (grad is None) == (tensor.grad is None)
        if grad is not None:
            torch.testing.assert_close(grad, tensor.grad, rtol=1e-4, atol=1e-5)


def test_nothing_to_learn_is_a_loss_of_zero_with_a_graph():
    hidden = torch.randn(3, 4, requires_grad=True)
    total = loss.HeadLoss.apply(hidden, torch.randn(5, 4), None, torch.full((3,), IGNORE_INDEX), 0.0)
    total.backward()
    assert total == 0 and not hidden.grad.any()


def test_under_bfloat16_the_reported_loss_keeps_float32(small_blocks):
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(40, 64), torch.randn(100, 64) / 8, torch.randint(100, (40,))
    with torch.autocast("cpu", torch.bfloat16):
        found = loss.HeadLoss.apply(hidden, weight, None, targets, 0.0)
    logits = (hidden.bfloat16() @ weight.bfloat16().T).float()
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(
        torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item(), rel=1e-5
    )


@pytest.mark.parametrize("padding_free", [True, False])
def test_the_models_head_takes_over_the_loss_and_still_gives_logits(tiny_model, small_blocks, padding_free):
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    taught = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    head = loss.attach(taught)
    rows = [
        [{"input_ids": list(range(5, 5 + n)), "labels": [IGNORE_INDEX] * 3 + list(range(8, 5 + n))}] for n in (9, 20)
    ]
    batch = Collator(padding_free)(rows)
    results = []
    for model, its_head in ((plain, None), (taught, head)):
        total, count = supervised_loss(model, batch, 0.1, its_head)
        total.backward()
        results.append((total.item(), count.item(), {name: p.grad for name, p in model.named_parameters()}))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6) and results[0][1] == results[1][1] == 23
    for name, gradient in results[0][2].items():
        torch.testing.assert_close(results[1][2][name], gradient, rtol=1e-3, atol=1e-5)
    ids = torch.arange(4)[None]
    assert torch.equal(plain(input_ids=ids).logits, taught(input_ids=ids).logits)


def test_a_head_that_is_more_than_a_linear_layer_keeps_its_logits(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config.final_logit_softcapping = 30.0
    assert loss.attach(model) is None
    model.config.final_logit_softcapping = None
    assert loss.attach(model) is model.get_output_embeddings()


@pytest.mark.parametrize("seconds, chosen", [([2.0, 1.0], "medium"), ([1.0, 2.0], "highest")])
def test_float32_is_multiplied_by_the_faster_library_and_exactly(monkeypatch, seconds, chosen):
    times = iter(seconds)
    monkeypatch.setattr(precision, "_matmul_seconds", lambda dtype: next(times))
    before = torch.get_float32_matmul_precision()
    numbers = torch.randn(300, 300)
    try:
        precision.choose_float32.__wrapped__()
        found = torch.get_float32_matmul_precision()
        error = (numbers @ numbers).double() - numbers.double() @ numbers.double()
    finally:
        torch.set_float32_matmul_precision(before)
    assert found == ("highest" if torch.cpu._is_amx_tile_supported() else chosen)
    assert error.abs().max() < 1e-4


def test_the_log_tells_speed_padding_memory_and_the_time_that_is_left(tiny_model, tmp_path, monkeypatch):
    counted = []
    add = throughput.Throughput.add

    def counting(self, batch, supervised):
        counted.append((batch["input_ids"].numel(), int(supervised)))
        add(self, batch, supervised)

    monkeypatch.setattr(throughput.Throughput, "add", counting)
    seconds = []
    entry = throughput.Throughput.entry

    def timed(self):
        seconds.append(self.seconds)
        return entry(self)

    monkeypatch.setattr(throughput.Throughput, "entry", timed)
    data, out = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "out"
    finetune.train(argv(tiny_model, data, out, "--use_lora", "--padding_free", "False"))
    for n, (positions, supervised) in enumerate(counted):
        share = 1 - history(out, "padding")[n]
        assert history(out, "tokens_per_second")[n] * seconds[n] == pytest.approx(positions * share, rel=0.01)
        assert history(out, "supervised_tokens_per_second")[n] * seconds[n] == pytest.approx(supervised, rel=0.01)
    assert len(counted) == 6 and 0 < history(out, "padding")[0] < 0.5
    assert history(out, "minutes_left")[-1] == 0 and 0.1 < history(out, "memory_gb")[0] < 30


def test_operations_are_six_a_trained_weight_and_four_a_frozen_one(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    body = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name)
    assert throughput._flops(model) == 6 * body
    model.requires_grad_(False)
    assert throughput._flops(model) == 4 * body


SLOW_TOKENISING = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
import finetune, cli
from recipe.dataset.encoding import ChatEncoder

encoded, encode_batch = [], ChatEncoder.encode_batch

def slowly(self, conversations):
    encoded.extend(conversations)
    time.sleep(0.25 * len(conversations))
    return encode_batch(self, conversations)

ChatEncoder.encode_batch = slowly
finetune.train(sys.argv[1:])
print("conversations encoded:", len(encoded), flush=True)
cli.leave()
"""


@pytest.mark.slow
def test_tokenising_on_one_rank_may_take_longer_than_a_collective(tiny_model, tmp_path):
    data = write(tmp_path / "rows.jsonl", [{"prompt": f"slow {n}", "completion": "a"} for n in range(40)])
    program = tmp_path / "program.py"
    program.write_text(SLOW_TOKENISING)
    words = argv(tiny_model, data, tmp_path / "out", "--max_steps", 1, "--ddp_timeout", 5)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    root = ROOT
    done = subprocess.run([*launch, program, root, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    few, many = sorted(map(int, re.findall("conversations encoded: (\\d+)", done.stdout)))
    assert many >= 40 and few < 40  # 10 seconds for the rank that writes, and the other only waited
    assert len(history(tmp_path / "out", "loss")) == 1
