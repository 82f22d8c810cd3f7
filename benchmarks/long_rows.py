"""One long row with each of the measures that let it fit, side by side: memory and seconds a step.

    python benchmarks/long_rows.py                          # SmolLM2, a row of 8,192 tokens; into long_rows.jsonl
    python benchmarks/long_rows.py --shape 7b --mode QLoRA --tokens 32768 131072   # a GPU
    python benchmarks/long_rows.py table                    # what docs/performance.md shows

Every run is a process of finetune.py, LoRA r 16, one conversation a step, half of its tokens supervised; the runs of a
repeat follow one another. `gb` is the peak of the device: on a GPU all tensors, on a CPU the whole process; `libraries` is
the start block's figure for Python and its libraries, `estimated` that for all the rest.
"""

import argparse
import datetime
import json
import os
import pathlib
import statistics
import sys
import tempfile

from bench import MODES, conversations, fine_tuned, model_folder, peak_memory, recorded

WINDOW = 8192  # of all shapes
RESULTS = pathlib.Path(__file__).parent / "long_rows.jsonl"
MEASURES = {
    "checkpointing alone": (False, False),
    "activation offloading": (True, False),
    "tiled MLP": (False, True),
    "both": (True, True),
}


def measure(args):
    """Train in this process and print one JSON line."""
    import torch
    from transformers import AutoTokenizer

    from recipe.model.precision import best_dtype, dtype_name  # which bench has put on the path

    (shape,), (mode,), (tokens,), (name,) = args.shape, args.mode, args.tokens, args.measures
    folder, (offloading, tiled) = model_folder(shape, args.work), MEASURES[name]
    rows = args.work / "rows.jsonl"
    found = conversations(AutoTokenizer.from_pretrained(folder), tokens, args.steps)
    rows.write_text("".join(json.dumps(row) + "\n" for row in found))
    seconds, losses, estimated, libraries = fine_tuned(
        args.work / "out", "--model_name_or_path", folder, "--data_path", rows, "--max_steps", args.steps,
        "--per_device_train_batch_size", 1, "--lora_r" if mode != "full" else "--seed", 16, *MODES[mode],
        "--gradient_checkpointing", "True", "--activation_offloading", offloading, "--tiled_mlp", tiled,
        "--model_max_length", tokens, *["--rope_scaling", "yarn"] * (tokens > WINDOW),
    )  # fmt: skip
    cuda = torch.cuda.is_available()
    print(json.dumps({
        "shape": shape, "mode": mode, "tokens": tokens, "measures": name, "gb": round(peak_memory() / 1e9, 3),
        "libraries": libraries, "estimated": round(estimated - libraries, 3),
        "seconds": round(statistics.median(seconds[1:]), 3), "loss": losses[0],
        "device": torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} CPU cores",
        "dtype": dtype_name(best_dtype(not cuda)), "torch": torch.__version__, "date": str(datetime.date.today()),
    }))  # fmt: skip


def table(results=RESULTS):
    """The median of each measure, beside checkpointing alone, in Markdown."""
    runs = {}
    for line in results.read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        where = f"{run['shape']} {run['mode']}, {run['dtype']}, {run['device']}, torch {run['torch']}, {run['date']}"
        runs.setdefault((where, run["tokens"]), {}).setdefault(run["measures"], []).append(run)
    title = "| | tokens of the row | GB besides Python and its libraries | by the formula | seconds a step |"
    lines = [title, "|---|---|---|---|---|"]
    for (where, tokens), found in runs.items():
        lines.append(f"| **{where}** | | | | |")
        for run in (run for some in found.values() for run in some):
            run["gb"] -= run["libraries"]
        middle = {
            name: {key: statistics.median(run[key] for run in found[name]) for key in ("gb", "estimated", "seconds")}
            for name in MEASURES
            if name in found
        }
        plain = middle.get("checkpointing alone")
        for name, run in middle.items():
            beside = {key: f" (x {run[key] / plain[key]:.2f})" if plain and run is not plain else "" for key in run}
            lines.append(
                f"| {name} | {tokens:,} | {run['gb']:.2f}{beside['gb']} | {run['estimated']:.2f} | "
                f"{run['seconds']:.1f}{beside['seconds']} |"
            )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="measure", choices=["measure", "table"])
    parser.add_argument("--shape", nargs="+", default=["smollm2"])
    parser.add_argument("--mode", nargs="+", default=["LoRA"], choices=list(MODES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192])
    parser.add_argument("--measures", nargs="+", default=list(MEASURES), choices=list(MEASURES))
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps, the first of them for warming up")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--work", type=pathlib.Path, help="folder for models and data; default: one that is removed")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # one run, in this process
    args = parser.parse_args()
    if args.what == "table":
        return print(table(args.results))
    if args.here:
        return measure(args)
    with tempfile.TemporaryDirectory() as folder:
        runs = [(s, m, n) for s in args.shape for m in args.mode for n in args.tokens]
        for shape, mode, tokens, name in [
            (*run, name) for run in runs for _ in range(args.repeats) for name in args.measures
        ]:
            words = ["--shape", shape, "--mode", mode, "--tokens", tokens, "--measures", name, "--steps", args.steps]
            words += ["--work", args.work or folder, "--here"]
            recorded([sys.executable, __file__, *words], args.results, f"{shape} {mode} {tokens} {name}")


if __name__ == "__main__":
    main()
