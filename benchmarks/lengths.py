"""Memory and seconds for each length of conversation, as Qwen's own table of 2023 has them, and the speed of full rows.

    python benchmarks/lengths.py --shape 0.5b 1.5b 7b          # measures; one JSON line a run, into results.jsonl
    python benchmarks/lengths.py table                         # what results.jsonl holds, in Markdown

Every run is a process of `finetune.py` with random weights of a shape (see bench.py): one conversation of so many
tokens, half of them supervised, in each of 8 micro-batches of an optimizer step, as Qwen measured. With --pack_tokens
it is one row of so many tokens a step, filled with conversations of each length; tokens a second are what counts there.
"""

import argparse
import datetime
import json
import os
import pathlib
import sys
import tempfile

from bench import MODES, Clock, conversations, model_folder, peak_memory, recorded, watched

RESULTS = pathlib.Path(__file__).parent / "results.jsonl"
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
QWEN_2023 = {  # QwenLM/Qwen README, "Profiling of Memory and Speed": one A100-80G, FlashAttention 2; GB / seconds
    "1.8B LoRA": "6.7/1.0 7.4/1.0 8.4/1.1 11.0/1.7 16.2/3.3 21.8/6.8",
    "1.8B QLoRA": "5.8/1.4 6.0/1.4 6.6/1.4 7.8/2.0 10.2/3.4 15.8/6.5",
    "1.8B full": "43.5/2.1 43.5/2.2 43.5/2.2 43.5/2.3 47.1/2.8 48.3/5.6",
    "7B LoRA": "20.1/1.2 20.4/1.5 21.5/2.8 23.8/5.2 29.7/10.1 36.6/21.3",
    "7B QLoRA": "11.5/3.0 11.5/3.0 12.3/3.5 13.9/7.0 16.9/11.6 23.5/22.3",
}


def measure(shape, mode, length, pack_tokens, steps, work):
    """Train in this process and print one JSON line."""
    import torch
    from transformers import AutoTokenizer

    from recipe import console  # which bench has put on the path

    console.configure_libraries()  # as finetune.py does when it starts
    import finetune
    from recipe.model.precision import best_dtype, dtype_name

    folder = model_folder(shape, work)
    count = steps * (2 * pack_tokens // length if pack_tokens else 8)
    rows = conversations(AutoTokenizer.from_pretrained(folder), length, count)
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    clock = Clock()
    watched(clock)
    how = ["--pack_tokens", pack_tokens] if pack_tokens else ["--per_device_train_batch_size", 1]
    how += [] if pack_tokens else ["--gradient_accumulation_steps", 8]
    words = ["--model_name_or_path", folder, "--data_path", work / "rows.jsonl", "--output_dir", work / "out", *how,
             "--max_steps", steps, "--save_strategy", "no", "--disable_tqdm", "True", "--logging_steps", steps,
             "--lora_r" if mode != "full" else "--seed", 16, *MODES[mode]]  # fmt: skip
    finetune.train([str(word) for word in words])
    log = json.loads((work / "out" / "trainer_state.json").read_text())["log_history"][0]
    cuda, peak = torch.cuda.is_available(), peak_memory()
    seconds = sorted(clock.seconds[1:])[len(clock.seconds[1:]) // 2]  # the first step warms up
    print(json.dumps({
        "shape": shape, "mode": mode, "length": length, "pack_tokens": pack_tokens, "gb": round(peak / 1e9, 2),
        "seconds": round(seconds, 3), "tokens_per_second": round((pack_tokens or 8 * length) / seconds, 1),
        "mfu": log.get("mfu"), "device": torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} CPU cores",
        "dtype": dtype_name(best_dtype(not cuda)), "torch": torch.__version__, "date": str(datetime.date.today()),
    }))  # fmt: skip


def table(results=RESULTS):
    """The newest result of each run, by device, in Markdown, below Qwen's of 2023."""
    runs = {}
    for line in results.read_text().splitlines():
        run = json.loads(line)
        where = f"{run['device']}, {run['dtype']}, torch {run['torch']}, {run['date']}"
        row = f"{run['shape'].upper()} {run['mode']}"
        row += f", rows of {run['pack_tokens']:,}" if run["pack_tokens"] else ""
        cell = f"{run['tokens_per_second']:,.0f} tokens/s" if run["pack_tokens"] else f"{run['seconds']:.1f}"
        runs.setdefault(where, {}).setdefault(row, {})[run["length"]] = f"{run['gb']:.1f}/{cell}"
    lines = [f"| GB/seconds a step, by tokens | {' | '.join(f'{n:,}' for n in LENGTHS)} |", "|" + "---|" * 7]
    for name, cells in QWEN_2023.items():
        lines.append(f"| {name}, Qwen 2023, one A100 | {' | '.join(cells.split())} |")
    for where, rows in runs.items():
        lines.append(f"| **{where}** |{'  |' * len(LENGTHS)}")
        lines += [f"| {name} | {' | '.join(row.get(n, '') for n in LENGTHS)} |" for name, row in rows.items()]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="measure", choices=["measure", "table"])
    parser.add_argument("--shape", nargs="+", default=["0.5b"])
    parser.add_argument("--mode", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--length", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--pack_tokens", type=int)
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps, the first of them for warming up")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--work", type=pathlib.Path, help="folder for models and data; default: one that is removed")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # one run, in this process
    args = parser.parse_args()
    if args.what == "table":
        return print(table(args.results))
    if args.here:
        return measure(args.shape[0], args.mode[0], args.length[0], args.pack_tokens, args.steps, args.work)
    with tempfile.TemporaryDirectory() as folder:
        for run in [(s, m, n) for s in args.shape for m in args.mode for n in args.length]:
            words = [f"--{name}={value}" for name, value in zip(("shape", "mode", "length"), run, strict=True)]
            words += [f"--steps={args.steps}", f"--work={args.work or folder}", "--here"]
            words += [f"--pack_tokens={args.pack_tokens}"] if args.pack_tokens else []
            recorded([sys.executable, __file__, *words], args.results, " ".join(map(str, run)))


if __name__ == "__main__":
    main()
