"""The benchmarks run, at the size of a toy; what they find on real sizes is in benchmarks/RESULTS.md."""

import json
import pathlib
import subprocess
import sys

import pytest

import finetune

FOLDER = pathlib.Path(finetune.__file__).parent / "benchmarks"

pytestmark = pytest.mark.slow


def output(program, *words):
    done = subprocess.run([sys.executable, FOLDER / program, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_lengths_measures_each_length_and_full_rows_and_tabulates_them(tmp_path):
    where = ["--results", tmp_path / "results.jsonl"]
    few = ["--shape", "toy", "--mode", "LoRA", "--steps", 2, *where]
    output("lengths.py", *few, "--length", 256, 512)
    output("lengths.py", *few, "--length", 256, "--pack_tokens", 1024)
    runs = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(run["length"], run["pack_tokens"]) for run in runs] == [(256, None), (512, None), (256, 1024)]
    for run in runs:
        tokens = run["pack_tokens"] or 8 * run["length"]
        assert run["tokens_per_second"] * run["seconds"] == pytest.approx(tokens, rel=0.01)
    table = output("lengths.py", "table", *where)
    assert f"| TOY LoRA | {runs[0]['gb']:.1f}/{runs[0]['seconds']:.1f} | {runs[1]['gb']:.1f}/" in table
    assert "| TOY LoRA, rows of 1,024 | " in table and "Qwen 2023" in table


def test_variants_start_from_the_same_loss(tmp_path):
    losses = []
    for variant in ("recipe", "padded"):
        words = ["--shape", "toy", "--variant", variant, "--steps", 2, "--work", tmp_path]
        losses.append(json.loads(output("bench.py", *words).splitlines()[-1])["first_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)  # bfloat16, where that is fast


def test_rows_grow(tmp_path):
    lines = output("growth.py", "rows", "--rows", 100).splitlines()
    assert lines[-1].startswith("| 100 |") and lines[-1].count("|") == 9
