"""How cost grows: with rows in the file, length of documents, documents in a row, turns in a conversation.

    python benchmarks/growth.py                    # all of it, some minutes on two cores and 3 GB of disk
    python benchmarks/growth.py rows --rows 1000 1000000

rows: the whole program on a file of 2 KB rows, until its first optimizer step is done, lazy and eager, where an eager
run comes twice (the second opens the tokens of the first); memory is the peak of the process. length, documents: one
optimizer step of a 0.1B model on the same number of tokens. turns: one conversation to ids and labels.
"""

import argparse
import json
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time

from bench import model_folder

WORDS = [f"{a}{b}" for a in "ba de fi go lu mo ne pi ro su ta ve".split() for b in "bel dan for gil kon lem".split()]
FIRST_STEP = """
import json, sys, time
start = time.time()
sys.path.insert(0, sys.argv[1])
import bench
from recipe import console
console.configure_libraries()
import finetune

class Done(finetune.transformers.TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        print(json.dumps({"seconds": time.time() - start, "megabytes": bench.peak_memory() / 1e6}), flush=True)

bench.watched(Done())
finetune.train(sys.argv[2:])
"""


def text(chance, size):
    return " ".join(chance.choices(WORDS, k=size // 6))


def rows(work, counts):
    """Seconds and megabytes until the first optimizer step is done."""
    folder = model_folder("toy", work)
    print("\n| rows | file, GB | lazy, s | lazy, MB | eager, s | eager, MB | again, s | again, MB |\n|" + "---|" * 8)
    for count in counts:
        path, chance = work / f"rows-{count}.jsonl", random.Random(0)
        with open(path, "w") as file:
            some = [text(chance, 800) for _ in range(1000)]
            for n in range(count):
                messages = [("user", f"{n} {some[n % 1000]}"), ("assistant", some[n * 7 % 1000]), ("user", "?"),
                            ("assistant", some[n * 3 % 1000][:250])]  # fmt: skip
                file.write(
                    json.dumps({"messages": [{"role": role, "content": said} for role, said in messages]}) + "\n"
                )
        words = ["--model_name_or_path", folder, "--data_path", path, "--output_dir", work / "out", "--max_steps", "1",
                 "--save_strategy", "no", "--disable_tqdm", "True", "--per_device_train_batch_size", "4"]  # fmt: skip
        cells = []
        for more in [["--lazy_preprocess"]] if count > 300_000 else [["--lazy_preprocess"], [], []]:
            command = [sys.executable, "-c", FIRST_STEP, str(pathlib.Path(__file__).parent), *map(str, words), *more]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"seconds"')))
            cells += [f"{found['seconds']:.1f}", f"{found['megabytes']:.0f}"]
        print(f"| {count:,} | {path.stat().st_size / 1e9:.2f} | {' | '.join(cells)} |", flush=True)
        path.unlink()


def steps(work, shapes):
    """Seconds of one forward and backward pass of a packed row, for lists of document lengths."""
    import torch
    from transformers import AutoModelForCausalLM

    from recipe.dataset.collator import Collator
    from recipe.model import attention, loss
    from recipe.model.loss import supervised_loss
    from recipe.model.precision import best_dtype

    attention.register()
    model = AutoModelForCausalLM.from_pretrained(
        model_folder("0.1b", work), attn_implementation=attention.PACKED, dtype=best_dtype(True)
    )
    model.requires_grad_(False)
    model.enable_input_require_grads()
    head = loss.fuse_loss_into_head(model)
    for lengths in shapes:
        ids = torch.randint(1000, 40_000, (sum(lengths),)).tolist()
        documents = [[{"input_ids": ids[:n], "labels": [-100] * (n // 2) + ids[n // 2 : n]}] for n in lengths]
        batch, seconds = Collator()(documents), []
        for _ in range(4):
            start = time.perf_counter()
            supervised_loss(model, batch, head=head)[0].backward()
            seconds.append(time.perf_counter() - start)
        yield statistics.median(seconds[1:])


def table(title, unit, values, seconds):
    print(f"\n| {title} | {' | '.join(f'{value:,}' for value in values)} |\n|{'---|' * (len(values) + 1)}")
    print(f"| {unit} | {' | '.join(seconds)} |", flush=True)


def length(work, tokens=8192):
    lengths = (256, 512, 1024, 2048, 4096, 8192)
    found = steps(work, [[n] * (tokens // n) for n in lengths])
    table(f"tokens a document, {tokens:,} in all", "seconds", lengths, [f"{seconds:.2f}" for seconds in found])


def documents(work, tokens=4096):
    counts = (16, 64, 256, 1024)
    found = steps(work, [[tokens // n] * n for n in counts])
    table(f"documents, {tokens:,} tokens in all", "seconds", counts, [f"{seconds:.2f}" for seconds in found])


def turns(work):
    from transformers import AutoTokenizer

    from recipe.dataset.encoding import ChatEncoder

    encoder, chance = ChatEncoder(AutoTokenizer.from_pretrained(model_folder("toy", work))), random.Random(0)
    counts, found = (2, 8, 32, 128, 512), []
    for count in counts:
        messages = [{"role": ("user", "assistant")[n % 2], "content": text(chance, 400)} for n in range(count)]
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            encoder.encode({"messages": messages})
            seconds.append(time.perf_counter() - start)
        found.append(f"{1000 * min(seconds) / count:.2f}")
    table("turns", "milliseconds a turn", counts, found)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["rows", "length", "documents", "turns"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1000, 10_000, 100_000, 1_000_000])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        for what in args.what:
            globals()[what](work, *[args.rows] * (what == "rows"))


if __name__ == "__main__":
    main()
