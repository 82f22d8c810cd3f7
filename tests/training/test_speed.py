"""The log says how fast a run is."""

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
