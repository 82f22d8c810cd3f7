"""This recipe beside its peers: same weights, same tokens and labels, same adapter, same conversations in each step.

    python benchmarks/bench.py                 # every variant of every shape, interleaved; one JSON line a run
    python benchmarks/bench.py table           # what they have found, kept in peers.jsonl, in Markdown
    python benchmarks/bench.py --shape smollm2 --variant recipe --steps 4      # one run in this process

Shapes: smollm2 (SmolLM2-135M-Instruct, real weights); toy, 0.1b, 0.5b, 1.5b, 7b: random Qwen2 layers, 151,936 words
(50,000 for toy). Variants: recipe; trl (SFTTrainer as it comes); trl_best (SFTTrainer without checkpointing and in
the recipe's precision); padded (the loop of FastChat and Qwen: rows padded to the longest, all logits); llamafactory
and unsloth (as they come), which pin other versions and are left out where their environments .venv-llamafactory and
.venv-unsloth are missing; unsloth needs a GPU.
"""

import argparse
import datetime
import itertools
import json
import os
import pathlib
import random
import resource
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHAPES = {  # hidden, layers, intermediate, heads, kv heads
    "toy": (64, 2, 128, 4, 2),
    "0.1b": (512, 8, 2048, 8, 2),
    "0.5b": (896, 24, 4864, 14, 2),
    "1.5b": (1536, 28, 8960, 12, 2),
    "7b": (3584, 28, 18944, 28, 4),
}
RESULTS = pathlib.Path(__file__).parent / "peers.jsonl"
VARIANTS = ("recipe", "trl", "trl_best", "padded", "llamafactory", "unsloth")
OWN_VERSIONS = ("llamafactory", "unsloth")
BATCH, RANK = 8, 16


def rows(count, path=None, seed=0):
    """Conversations of a file, or else sums of letters in parcels, of very different length."""
    if path:
        with open(path, encoding="utf-8") as file:
            for line in itertools.islice(file, count):
                row = json.loads(line)
                yield {"prompt": row["question"], "completion": row["answer"]} if "question" in row else row
        return
    chance = random.Random(seed)
    for n in range(count):
        lines = max(1, int(chance.lognormvariate(1.6, 0.7)))
        numbers = [chance.randrange(2, 99) for _ in range(lines + 1)]
        question = " ".join(f"Parcel {i} holds {k} letters." for i, k in enumerate(numbers)) + " How many in all?"
        total, steps = 0, []
        for k in numbers:
            steps.append(f"{total} + {k} = {total + k}")
            total += k
        yield {"messages": [{"role": "user", "content": question},
                            {"role": "assistant", "content": f"{'; '.join(steps)}. The answer is {total}."}]}  # fmt: skip


def model_folder(shape, work):
    """Folder of the model: real weights for smollm2, random ones of a shape else (the tokenizer is SmolLM2's)."""
    import demo_model

    real = demo_model.demo_model()
    if shape == "smollm2":
        return real
    folder = work / shape
    if folder.exists():
        return folder
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    hidden, layers, wide, heads, groups = SHAPES[shape]
    tokenizer = AutoTokenizer.from_pretrained(real)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=50_000 if shape == "toy" else 151_936, hidden_size=hidden, intermediate_size=wide,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=groups, tie_word_embeddings=shape != "7b",
        max_position_embeddings=8192, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    cuda = torch.cuda.is_available()  # 7B random numbers take minutes elsewhere
    with torch.device("cuda" if cuda else "cpu"):
        model = Qwen2ForCausalLM(config)
    model.to(torch.bfloat16 if cuda else torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Clock:
    """A Trainer callback that keeps the seconds of each optimizer step, the first (warm-up) apart."""

    def __new__(cls):
        import transformers

        class Steps(transformers.TrainerCallback):
            seconds = []

            def on_step_begin(self, *args, **kwargs):
                self.start = time.perf_counter()

            def on_step_end(self, *args, **kwargs):
                self.seconds.append(time.perf_counter() - self.start)

        return Steps()


def watched(callback):
    """Give the recipe's Trainer one more callback."""
    import trainer

    create = trainer.RecipeTrainer.__init__

    def with_callback(self, *args, **kwargs):
        create(self, *args, **kwargs)
        self.add_callback(callback)

    trainer.RecipeTrainer.__init__ = with_callback


def recipe(folder, data, out, steps):
    import finetune

    clock = Clock()
    watched(clock)
    finetune.train(["--model_name_or_path", folder, "--data_path", data, "--output_dir", out, "--use_lora", "--lora_r",
                    str(RANK), "--lora_alpha", "32", "--lora_dropout", "0", "--max_steps", str(steps), "--save_strategy",
                    "no", "--per_device_train_batch_size", str(BATCH), "--logging_steps", "1", "--learning_rate", "1e-4",
                    "--train_sampling_strategy", "sequential", "--disable_tqdm", "True"])  # fmt: skip
    log = json.loads((pathlib.Path(out) / "trainer_state.json").read_text())["log_history"]
    return clock.seconds, [entry["loss"] for entry in log if "loss" in entry]


def encoded(folder, data):
    """The recipe's own tokens and labels, so that every variant learns the same."""
    from transformers import AutoTokenizer

    from conversations import Conversations
    from tokens import ChatEncoder

    encoder, conversations = ChatEncoder(AutoTokenizer.from_pretrained(folder)), Conversations([data])
    documents = [encoder.encode(conversations[n]).documents[0] for n in range(len(conversations))]
    return [{"input_ids": d["input_ids"], "labels": d["labels"]} for d in documents]


def adapter():
    import peft

    return peft.LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"
    )  # fmt: skip


def trained(trainer, clock):
    trainer.add_callback(clock)
    trainer.train()
    return clock.seconds, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trl(folder, data, out, steps, best=False):
    import datasets
    import torch
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    more = {}
    if best:
        from hardware import best_dtype

        fast = best_dtype(not torch.cuda.is_available())
        more = {"gradient_checkpointing": False, "bf16": fast == torch.bfloat16, "model_init_kwargs": {"dtype": fast}}
    config = SFTConfig(
        output_dir=out, per_device_train_batch_size=BATCH, max_steps=steps, logging_steps=1, learning_rate=1e-4,
        save_strategy="no", report_to="none", max_length=None, train_sampling_strategy="sequential", disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(), **more,
    )  # fmt: skip
    rows = datasets.Dataset.from_list(encoded(folder, data))
    trainer = SFTTrainer(
        str(folder), args=config, train_dataset=rows, peft_config=adapter(),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )  # fmt: skip
    return trained(trainer, Clock())


def trl_best(folder, data, out, steps):
    return trl(folder, data, out, steps, best=True)


def padded(folder, data, out, steps):
    import datasets
    import peft
    import torch
    import transformers

    from hardware import best_dtype

    fast = best_dtype(not torch.cuda.is_available())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=fast)
    args = transformers.TrainingArguments(
        output_dir=out, per_device_train_batch_size=BATCH, max_steps=steps, logging_steps=1, learning_rate=1e-4,
        save_strategy="no", report_to="none", train_sampling_strategy="sequential", disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(), bf16=fast == torch.bfloat16, label_names=["labels"],
    )  # fmt: skip
    trainer = transformers.Trainer(
        peft.get_peft_model(model, adapter()), args, train_dataset=datasets.Dataset.from_list(encoded(folder, data)),
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer),
    )  # fmt: skip
    return trained(trainer, Clock())


def llamafactory(folder, data, out, steps):
    import datasets
    import torch
    from llamafactory.train.tuner import run_exp

    tokens = pathlib.Path(out).with_name("llamafactory-tokens")
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"]), "images": None, "videos": None, "audios": None}
            for row in encoded(folder, data)]  # fmt: skip
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(str(tokens))
    clock = Clock()
    run_exp(
        dict(
            stage="sft", do_train=True, model_name_or_path=folder, dataset="rows",
            tokenized_path=str(tokens), template="empty",
            finetuning_type="lora", lora_rank=RANK, lora_alpha=32, lora_dropout=0.0, lora_target="all",
            disable_shuffling=True, output_dir=out, overwrite_output_dir=True, per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=1, max_steps=steps, learning_rate=1e-4, logging_steps=1, save_strategy="no",
            report_to="none", disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
            bf16=torch.cuda.is_available(),
        ),
        [clock],
    )  # fmt: skip
    log = json.loads((pathlib.Path(out) / "trainer_state.json").read_text())["log_history"]
    return clock.seconds, [entry["loss"] for entry in log if "loss" in entry]


def unsloth(folder, data, out, steps):
    from unsloth import FastLanguageModel  # isort: skip
    import datasets
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = FastLanguageModel.from_pretrained(folder, max_seq_length=8192, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=RANK, lora_alpha=32, lora_dropout=0)
    config = SFTConfig(
        output_dir=out, per_device_train_batch_size=BATCH, max_steps=steps, logging_steps=1, learning_rate=1e-4,
        save_strategy="no", report_to="none", max_length=None, disable_tqdm=True, shuffle_dataset=False,
    )  # fmt: skip
    rows = datasets.Dataset.from_list(encoded(folder, data))
    return trained(SFTTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer), Clock())


def one(shape, variant, steps, work, path=None):
    """Run one variant in this process and print its JSON line."""
    import torch

    data = work / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(BATCH * steps, path)))
    folder = str(model_folder(shape, work))
    supervised = sum(label != -100 for row in encoded(folder, str(data))[BATCH:] for label in row["labels"])
    seconds, losses = globals()[variant](folder, str(data), str(work / "out"), steps)
    cuda = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({
        "shape": shape, "variant": variant, "steps": steps, "supervised_tokens_per_second":
        round(supervised / sum(seconds[1:]), 1), "seconds_per_step": round(statistics.median(seconds[1:]), 3),
        "peak_gb": round(peak / 1e9, 2), "first_loss": losses[0], "last_loss": losses[-1],
        "data": os.path.basename(path) if path else "made up", "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} CPU cores",
        "date": str(datetime.date.today()),
    }))  # fmt: skip


def interpreter(variant):
    """The Python of a variant: that of its own environment, where it has one."""
    return ROOT / f".venv-{variant}" / "bin" / "python" if variant in OWN_VERSIONS else pathlib.Path(sys.executable)


def compare(shapes, variants, steps, repeats, work, results, path=None):
    """Every variant in a process of its own, in turns; each must start from the same loss."""
    variants = [variant for variant in variants if variant not in OWN_VERSIONS or interpreter(variant).exists()]
    for shape in shapes:
        first = []
        for variant in [*variants] * repeats:
            words = ["--shape", shape, "--variant", variant, "--steps", str(steps), "--work", work]
            words += ["--data", path] if path else []
            done = subprocess.run([interpreter(variant), __file__, *words], capture_output=True, text=True)
            if done.returncode:
                print(f"{shape} {variant} failed: {done.stderr.strip().splitlines()[-1][:200]}", flush=True)
                continue
            print(line := done.stdout.strip().splitlines()[-1], flush=True)
            first.append(json.loads(line)["first_loss"])
            with open(results, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        spread = (max(first) - min(first)) / max(first)
        print(f"{shape}: first losses within {spread:.1e} of each other", flush=True)
        if spread > 0.01:  # bfloat16 leaves 0.003
            sys.exit("error: the variants do not start from the same loss, so they do not do the same work")


def table(results=RESULTS):
    """Medians of all runs in a file, and how much slower each peer is than the recipe, in Markdown."""
    runs = {}
    for line in results.read_text().splitlines():
        run = json.loads(line)
        found = runs.setdefault(f"{run['shape']}, {run['device']}", {}).setdefault(run["variant"], [])
        found.append((run["supervised_tokens_per_second"], run["peak_gb"]))
    cells = {}
    for columns in runs.values():
        medians = {name: [statistics.median(values) for values in zip(*found)] for name, found in columns.items()}
        for name in VARIANTS:
            speed, memory = medians.get(name, (None, None))
            slower = f", {medians['recipe'][0] / speed:.1f} x slower" if speed and name != "recipe" else ""
            cells.setdefault(name, []).append(f"{speed:,.0f}{slower}, {memory:.1f} GB" if speed else "")
    lines = [f"| supervised tokens/s | {' | '.join(runs)} |", "|---|" + "---|" * len(runs)]
    return "\n".join(lines + [f"| {name} | {' | '.join(row)} |" for name, row in cells.items() if any(row)])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="measure", choices=["measure", "table"])
    parser.add_argument("--shape", nargs="+", default=["smollm2", "0.1b", "0.5b"], choices=["smollm2", *SHAPES])
    parser.add_argument("--variant", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps, the first of them for warming up")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--data", help="JSON Lines with messages, or with question and answer; default: made up")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "output" / "bench")
    args = parser.parse_args()
    if args.what == "table":
        return print(table(args.results))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    args.work.mkdir(parents=True, exist_ok=True)
    if len(args.shape) == len(args.variant) == 1:
        one(args.shape[0], args.variant[0], args.steps, args.work, args.data)
    else:
        compare(args.shape, args.variant, args.steps, args.repeats, args.work, args.results, args.data)


if __name__ == "__main__":
    main()
