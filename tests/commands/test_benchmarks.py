"""The benchmarks run, at the size of a toy; what they find on real sizes is in benchmarks/RESULTS.md."""

import json
import subprocess
import sys

import pytest

from helpers import DOCUMENTS, ROOT

FOLDER = ROOT / "benchmarks"

pytestmark = pytest.mark.slow


def output(program, *words):
    done = subprocess.run([sys.executable, FOLDER / program, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_lengths_measures_each_length_and_full_rows_and_tabulates_them(tmp_path):
    where = ["--results", tmp_path / "results.jsonl"]
    few = ["--shape", "toy", "--mode", "LoRA", "--steps", 2, *where]
    output("lengths.py", *few, "--length", 256)
    output("lengths.py", *few, "--length", 256, "--pack_tokens", 1024)
    runs = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(run["length"], run["pack_tokens"]) for run in runs] == [(256, None), (256, 1024)]
    for run in runs:
        tokens = run["pack_tokens"] or 8 * run["length"]
        assert run["tokens_per_second"] * run["seconds"] == pytest.approx(tokens, rel=0.01)
    table = output("lengths.py", "table", *where)
    assert f"| TOY LoRA | {runs[0]['gb']:.1f}/{runs[0]['seconds']:.1f} |  |" in table
    assert f"| TOY LoRA, rows of 1,024 | {runs[1]['gb']:.1f}/{runs[1]['tokens_per_second']:,.0f} tokens/s |" in table
    assert "Qwen 2023" in table


def test_variants_start_from_the_same_loss_and_are_tabulated(tmp_path):
    where = ["--results", tmp_path / "peers.jsonl"]
    both = ["--variant", "recipe", "padded", "--repeats", 1, "--work", tmp_path]
    output("bench.py", "--shape", "toy", "--mode", "full", "--length", 200, "--steps", 2, *both, *where)
    ours, padded = (json.loads(line) for line in (tmp_path / "peers.jsonl").read_text().splitlines())
    assert ours["first_loss"] == pytest.approx(padded["first_loss"], rel=5e-3)  # bfloat16, where that is fast
    assert ours["tokens_per_second"] > 2 * ours["supervised_tokens_per_second"]  # of 200 tokens the answer is less
    speed, slower = (run["supervised_tokens_per_second"] for run in (ours, padded))
    assert f"| padded | {slower:,.0f}, {speed / slower:.1f} x slower, " in output("bench.py", "table", *where)


@pytest.mark.parametrize("program", ["bench.py", "lengths.py", "served.py", "soak.py", "long_rows.py"])
def test_the_tables_in_the_documents_are_those_of_the_results(program):
    assert output(program, "table") in DOCUMENTS


def test_rows_grow(tmp_path):
    lines = output("growth.py", "rows", "--rows", 100).splitlines()
    assert lines[-1].startswith("| 100 |") and lines[-1].count("|") == 9


def test_what_a_gpu_is_to_show_is_rehearsed_anywhere_and_nothing_is_measured_twice(tmp_path):
    rehearse = ["--rehearse", "--first", 1, "--work", tmp_path]
    assert '"shape": "toy", "mode": "LoRA", "variant": "recipe"' in output("gpu.py", *rehearse)
    assert output("gpu.py", *rehearse).startswith("toy LoRA recipe 64 tokens: on record for ")
    (line,) = (tmp_path / "rehearsed.jsonl").read_text().splitlines()
    speed, estimated = (json.loads(line)[name] for name in ("tokens_per_second", "estimated_gb"))
    (row,) = output("gpu.py", "table", "--results", tmp_path / "rehearsed.jsonl").splitlines()[2:]
    assert f"| toy LoRA | recipe | 512 | {speed:,.0f} | " in row and row.endswith(f"| {estimated:.1f} |")


def test_tokenising_is_measured_beside_the_tokenizer_alone(qwen_folder):
    *_, row = output("tokenising.py", qwen_folder, "--chats", 200, "--repeat", 1).splitlines()
    documents, alone, whole, rate = row.split(" | ")[1:5]
    assert documents == "1" and float(rate) == pytest.approx(float(alone) / float(whole), abs=0.02)
