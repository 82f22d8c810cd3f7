"""What only a GPU shows, the most important first, so that a short lease of one gives the first rows.

    python benchmarks/gpu.py                       # `make bench-gpu`; a run that is on record for this GPU is left out
    python benchmarks/gpu.py --rehearse            # every run with a small model, to see on any machine that it starts
    python benchmarks/gpu.py table                 # what they have found, in Markdown

Runs are those of bench.py (LoRA and QLoRA with r 16, 8 conversations of 2,048 tokens a step, rows without padding) and
of long_rows.py (one row a step); each is a process, and a line of --results as soon as it has ended. The models have
random weights. A peer runs where its environment can be made (see bench.py). flash-linear-attention computes the gated
delta nets of Qwen3.5 and Qwen3.6, with this recipe and with its peers. Qwen3.6-35B-A3B takes 75 GB of --work.
"""

import argparse
import json
import os
import pathlib
import shutil
import sys

from bench import OWN_VERSIONS, ROOT, interpreter, recorded

FOLDER = pathlib.Path(__file__).parent
RESULTS = FOLDER / "gpu.jsonl"
SMALL = {"1.5b": "toy", "7b": "toy", "Qwen3.6-35B-A3B": "0.1b-mixture"}  # what rehearses a shape; others: 0.1b-hybrid
LENGTH, REHEARSED = 2048, 64
MODELS = [("7b", "LoRA"), ("1.5b", "LoRA"), ("Qwen3.5-0.8B", "LoRA"), ("Qwen3.5-4B", "LoRA"), ("Qwen3.5-9B", "LoRA"),
          ("Qwen3.6-35B-A3B", "QLoRA")]  # fmt: skip
RECIPE = [(*model, "recipe") for model in MODELS]
PEERS = [(*model, peer) for model in MODELS for peer in ("trl_best", "unsloth")]
ROWS = [("7b", "QLoRA", tokens, measure) for tokens in (32_768, 131_072) for measure in ("checkpointing alone", "both")]
RUNS = [*RECIPE, *PEERS[:2], *ROWS, *PEERS[2:]]


def command(run, args):
    """Return a run of RUNS as the words of a command, and the fields by which its line is known."""
    shape, mode, *rest = run
    shape = SMALL.get(shape, "0.1b-hybrid") if args.rehearse else shape
    where = ["--shape", shape, "--mode", mode, "--work", args.work]
    if run in ROWS:
        tokens, measure = 2 * REHEARSED if args.rehearse else rest[0], rest[1]
        words = [sys.executable, FOLDER / "long_rows.py", *where, "--tokens", tokens, "--measures", measure, "--here"]
        return words, {"shape": shape, "mode": mode, "tokens": tokens, "measures": measure}
    length = REHEARSED if args.rehearse else LENGTH
    words = [interpreter(*rest), FOLDER / "bench.py", *where, "--variant", *rest, "--length", length]
    steps = 2 if args.rehearse else 6
    known = {"shape": shape, "mode": mode, "variant": rest[0], "data": f"{length} tokens"}
    return [*words, "--steps", steps], known


def measure(args):
    """Run what is not on record for this device yet, in the order of RUNS."""
    import torch

    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} CPU cores"
    lines = args.results.read_text(encoding="utf-8").splitlines() if args.results.exists() else []
    found = [json.loads(line) for line in lines]
    for run in RUNS[: args.first]:
        words, known = command(run, args)
        what = " ".join(map(str, known.values()))
        if any((known | {"device": device}).items() <= line.items() for line in found):
            print(f"{what}: on record for {device}", flush=True)
        elif run[2] in OWN_VERSIONS and not words[0].exists():
            print(f"{what}: left out, as {words[0].relative_to(ROOT)} is missing", flush=True)
        elif line := recorded(words, args.results, what):
            found.append(line)


def table(results):
    """Every run: tokens a second, and memory beside the formula, in Markdown."""
    lines = [
        "| device | model | tool | tokens a row | tokens/s | GB | by the formula |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in map(json.loads, results.read_text(encoding="utf-8").splitlines()):
        tool, tokens = run.get("variant") or run["measures"], run.get("tokens") or 8 * int(run["data"].split()[0])
        speed = run.get("tokens_per_second") or run["tokens"] / run["seconds"]
        formula = run.get("estimated_gb", run.get("estimated"))
        memory = f"{run.get('peak_gb') or run['gb']:.1f} | {formula:.1f}" if formula else f"{run['peak_gb']:.1f} | "
        where = f"{run['device']}, torch {run['torch']}, {run['date']} | {run['shape']} {run['mode']}"
        lines.append(f"| {where} | {tool} | {tokens:,} | {speed:,.0f} | {memory} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="measure", choices=["measure", "table"])
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--first", type=int, help="stop after so many runs")
    parser.add_argument("--results", type=pathlib.Path, help="default: gpu.jsonl beside this file, or in --work")
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "output" / "bench", help="for models and data")
    args = parser.parse_args()
    args.results = args.results or (args.work / "rehearsed.jsonl" if args.rehearse else RESULTS)
    if args.what == "table":
        return print(table(args.results))
    if not args.rehearse and not shutil.which("nvidia-smi"):
        parser.error("found no GPU; --rehearse runs everything with small models on any machine.")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    args.work.mkdir(parents=True, exist_ok=True)
    measure(args)


if __name__ == "__main__":
    main()
