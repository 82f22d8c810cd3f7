"""How cost grows: with rows in the file, the length of documents and rows, documents in a row, turns, experts, ranks.

    python benchmarks/growth.py                    # all of it, some minutes on two cores and 3 GB of disk
    python benchmarks/growth.py rows --rows 1000 1000000

rows: the whole program on a file of 2 KB rows, until its first optimizer step is done, lazy and eager, where an eager
run comes twice (the second opens the tokens of the first); memory is the peak of the process. length, documents: one
optimizer step of a 0.1B model on the same number of tokens. one_row: a step on one document of more and more tokens.
experts: a step of a mixture in which a token always passes 4 experts. turns: one conversation to ids and labels. answers:
a step on a conversation whose template renders all earlier turns anew for every answer: each answer is a document with
them, which computes them itself or shares them. ranks: a step of a toy model under more and more ranks, each with a row
of its own, and all of them sharing one row.
"""

import argparse
import json
import os
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


def steps(work, shapes, config=None, repeats=3, answer=None, share=False):
    """Seconds of one forward and backward pass of a packed row, for lists of document lengths.

    The model is 0.1b, or one of a configuration; half of a document is supervised, or the last `answer` tokens.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from recipe.dataset.collator import Collator
    from recipe.model import attention, linear_attention, loss
    from recipe.model import experts as low_rank
    from recipe.model.loss import supervised_loss
    from recipe.model.precision import best_dtype

    attention.register()
    how = {"attn_implementation": attention.PACKED, "dtype": best_dtype(True)}
    if config is None:
        model = AutoModelForCausalLM.from_pretrained(model_folder("0.1b", work), **how)
    else:
        model = AutoModelForCausalLM.from_config(config, **how)
        low_rank.use_low_rank_forward(model)
        linear_attention.keep_documents_apart(model)
    model.requires_grad_(False)
    model.enable_input_require_grads()
    head = loss.fuse_loss_into_head(model)
    for lengths in shapes:
        ids = torch.randint(1000, 40_000, (sum(lengths),)).tolist()
        prompts = [n - answer if answer else n // 2 for n in lengths]
        labels = [[-100] * prompt + ids[prompt:n] for prompt, n in zip(prompts, lengths, strict=True)]
        documents = [[{"input_ids": ids[: len(part)], "labels": part}] for part in labels]
        batch, seconds = Collator(share_prefixes=share)(documents), []
        for _ in range(1 + repeats):
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


def one_row(work):
    lengths = (2048, 8192, 32_768)
    found = steps(work, [[n] for n in lengths], repeats=2)
    milliseconds = [f"{1000 * seconds / n:.2f}" for seconds, n in zip(found, lengths, strict=True)]
    table("tokens of one row, one document", "milliseconds a token", lengths, milliseconds)


def experts(work, tokens=4096):
    from transformers import Qwen3MoeConfig

    counts, found = (4, 16, 64), []
    for count in counts:
        config = Qwen3MoeConfig(
            hidden_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
            vocab_size=50_000, num_experts=count, num_experts_per_tok=4, moe_intermediate_size=256,
        )  # fmt: skip
        found += steps(work, [[512] * (tokens // 512)], config)
    table(f"experts, 4 for a token, {tokens:,} tokens", "seconds", counts, [f"{seconds:.2f}" for seconds in found])


OF_RANKS = """
import statistics, sys
sys.path.insert(0, sys.argv[1])
import bench
from recipe import console
console.configure_libraries()
import finetune

clock = bench.Clock()
bench.watched(clock)
finetune.train(sys.argv[2:])
if console.rank() == 0:
    print("milliseconds", 1000 * statistics.median(clock.seconds[5:]), flush=True)
"""


def ranks(work):
    counts, folder = (1, 2, 4), model_folder("toy", work)
    row = {"prompt": "say " * 100, "completion": "word " * 100}
    (work / "rows.jsonl").write_text((json.dumps(row) + "\n") * 120)
    (work / "ranks.py").write_text(OF_RANKS)
    for title, shares in (("ranks, each with a row", False), ("ranks that share a row", True)):
        found = []
        for count in counts:
            words = ["--model_name_or_path", folder, "--data_path", work / "rows.jsonl", "--output_dir", work / "out",
                     "--use_lora", "--max_steps", 30, "--per_device_train_batch_size", 1, "--save_strategy", "no",
                     "--disable_tqdm", "True", "--use_cpu", "True", "--sequence_parallel", count if shares else 1]  # fmt: skip
            launch = ["-m", "torch.distributed.run", f"--nproc_per_node={count}"] if count > 1 else []
            command = [sys.executable, *launch, work / "ranks.py", pathlib.Path(__file__).parent, *words]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True, env=environment)
            found.append(next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("milliseconds")))
        table(title, "milliseconds a step", counts, [f"{float(milliseconds):.0f}" for milliseconds in found])


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


def answers(work, tokens=128):
    import bench

    counts = (2, 8, 16)
    shapes = [[tokens * (n + 1) for n in range(count)] for count in counts]
    for model, config in (("full attention", None), ("gated delta nets", bench.configuration("0.1b-hybrid"))):
        for how, share in (("each with all turns before it", False), ("turns shared", True)):
            found = steps(work, shapes, config, answer=tokens // 2, share=share)
            milliseconds = [f"{1000 * seconds / count:.0f}" for seconds, count in zip(found, counts, strict=True)]
            table(f"answers, {how}, {model}", "milliseconds an answer", counts, milliseconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what", nargs="*", default=["rows", "length", "documents", "one_row", "experts", "turns", "answers", "ranks"]
    )
    parser.add_argument("--rows", nargs="+", type=int, default=[1000, 10_000, 100_000, 1_000_000])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        for what in args.what:
            globals()[what](work, *[args.rows] * (what == "rows"))


if __name__ == "__main__":
    main()
