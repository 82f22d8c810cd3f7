"""This recipe beside its peers: same weights, same tokens and labels, same adapter, same conversations in each step.

    python benchmarks/bench.py                 # every variant of every shape, interleaved; one JSON line a run
    python benchmarks/bench.py table           # what they have found, kept in peers.jsonl, in Markdown
    python benchmarks/bench.py --shape smollm2 --variant recipe --steps 4      # one run in this process

For a GPU, gpu.py calls this program with larger shapes.

Shapes: smollm2 (SmolLM2-135M-Instruct, real weights); toy, 0.1b, 0.5b, 1.5b, 7b: random Qwen2 layers, 151,936 words
(50,000 for toy). 0.1b-hybrid: Qwen3.5 layers, three gated delta nets to one of full attention; 0.1b-mixture: Qwen3-MoE
layers of 32 experts, 8 for a token, which the mode experts adapts as well. Qwen3.5-0.8B and its siblings: the language
model of that name with random weights. Variants: recipe; recipe_padded (the recipe with --padding_free False); trl
(SFTTrainer as it comes); trl_best (SFTTrainer in the recipe's precision, on a CPU without checkpointing); padded (the
loop of FastChat and Qwen: rows padded to the longest, all logits); llamafactory and unsloth (as they come), which pin
other versions and are left out where their environments .venv-llamafactory and .venv-unsloth are missing; unsloth needs
a GPU.
"""

import argparse
import contextlib
import datetime
import io
import itertools
import json
import os
import pathlib
import random
import re
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHAPES = {  # hidden, layers, intermediate, heads, kv heads
    "toy": (64, 2, 128, 4, 2),
    "0.1b": (512, 8, 2048, 8, 2),
    "0.1b-hybrid": (512, 8, 2048, 8, 2),
    "0.1b-mixture": (512, 6, 2048, 8, 2),
    "0.5b": (896, 24, 4864, 14, 2),
    "1.5b": (1536, 28, 8960, 12, 2),
    "7b": (3584, 28, 18944, 28, 4),
}
NAMED = ("Qwen3.5-0.8B", "Qwen3.5-4B", "Qwen3.5-9B", "Qwen3.6-35B-A3B")  # configurations of memory_table.py
RESULTS = pathlib.Path(__file__).parent / "peers.jsonl"
MODES = {"LoRA": ["--use_lora"], "QLoRA": ["--q_lora"], "full": []}  # the recipe's flags
EXPERTS = {"experts": ["--use_lora", "--lora_experts"]}  # a mode of mixtures
RATE = {"LoRA": 1e-4, "QLoRA": 1e-4, "full": 1e-5, "experts": 1e-4}
VARIANTS = ("recipe", "recipe_padded", "trl", "trl_best", "padded", "llamafactory", "unsloth")
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
    for _ in range(count):
        lines = max(1, int(chance.lognormvariate(1.6, 0.7)))
        numbers = [chance.randrange(2, 99) for _ in range(lines + 1)]
        question = " ".join(f"Parcel {i} holds {k} letters." for i, k in enumerate(numbers)) + " How many in all?"
        total, steps = 0, []
        for k in numbers:
            steps.append(f"{total} + {k} = {total + k}")
            total += k
        yield {"messages": [{"role": "user", "content": question},
                            {"role": "assistant", "content": f"{'; '.join(steps)}. The answer is {total}."}]}  # fmt: skip


def conversations(tokenizer, length, count):
    """Conversations of `length` tokens or a few fewer, half of them the answer, that begin differently."""
    from recipe.dataset.encoding import ChatEncoder

    encoder = ChatEncoder(tokenizer)

    def of(words, number=0):
        said = f"{number:06}", " a" * (words // 2), " b" * (words - words // 2)
        roles = zip(("system", "user", "assistant"), said, strict=True)
        return {"messages": [{"role": role, "content": text} for role, text in roles]}

    words = length
    while (found := len(encoder.encode(of(words)).documents[0]["input_ids"])) > length:
        words -= max(1, found - length)
    return [of(words, number) for number in range(count)]


def model_folder(shape, work):
    """Folder of the model: real weights for smollm2, random ones of a shape else (the tokenizer is SmolLM2's)."""
    from demo import demo_model

    real = demo_model.demo_model()
    if shape == "smollm2":
        return real
    folder = work / shape
    if folder.exists():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real)
    config = configuration(shape)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    torch.manual_seed(0)
    cuda = torch.cuda.is_available()  # billions of random numbers take minutes elsewhere
    with torch.device("cuda" if cuda else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if cuda else torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def configuration(shape):
    """The transformers configuration of a shape with random weights."""
    from transformers import Qwen2Config, Qwen3_5TextConfig, Qwen3MoeConfig

    if shape in NAMED:
        import memory_table

        return memory_table.CONFIGS[shape].get_text_config()
    hidden, layers, wide, heads, groups = SHAPES[shape]
    kinds = {"0.1b-hybrid": Qwen3_5TextConfig, "0.1b-mixture": Qwen3MoeConfig}
    more = {
        "0.1b-hybrid": dict(head_dim=64, linear_num_key_heads=8, linear_num_value_heads=8, linear_key_head_dim=64,
                            linear_value_head_dim=64),
        "0.1b-mixture": dict(head_dim=64, num_experts=32, num_experts_per_tok=8, moe_intermediate_size=256),
    }  # fmt: skip
    return kinds.get(shape, Qwen2Config)(
        vocab_size=50_000 if shape == "toy" else 151_936, hidden_size=hidden, intermediate_size=wide,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=groups, tie_word_embeddings=shape != "7b",
        max_position_embeddings=8192, **more.get(shape, {}),
    )  # fmt: skip


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
    """Give the recipe's Trainer one more callback, and let its peaks of memory include what loading takes."""
    from recipe.training import resources, trainer

    resources.start_peak = lambda device: None
    create = trainer.RecipeTrainer.__init__

    def with_callback(self, *args, **kwargs):
        create(self, *args, **kwargs)
        self.add_callback(callback)

    trainer.RecipeTrainer.__init__ = with_callback


def fine_tuned(out, *words):
    """Train with finetune.py in this process.

    Returns:
        (seconds of each step, losses, GB of memory that the start block estimates, those of them for Python itself).
    """
    from recipe import console

    console.configure_libraries()  # as finetune.py does when it starts
    import finetune

    clock = Clock()
    watched(clock)
    words = [*words, "--output_dir", out, "--save_strategy", "no", "--disable_tqdm", "True", "--logging_steps", 1]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        finetune.train([str(word) for word in words])
    line = next(line for line in said.getvalue().splitlines() if line.startswith("memory: "))
    total, libraries = (re.search(p, line) for p in (r"about ([\d.]+) GB", r"its libraries ([\d.]+)"))
    log = json.loads((pathlib.Path(out) / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    return clock.seconds, losses, float(total[1]), float(libraries[1]) if libraries else 0.0


def recipe(folder, data, out, steps, mode, *more):
    lora = ["--lora_r", RANK, "--lora_alpha", 32, "--lora_dropout", 0] if mode != "full" else []
    return fine_tuned(
        out, "--model_name_or_path", folder, "--data_path", data, "--max_steps", steps, "--per_device_train_batch_size",
        BATCH, "--train_sampling_strategy", "sequential", "--learning_rate", RATE[mode], *{**MODES, **EXPERTS}[mode], *lora,
        *more,
    )[:3]  # fmt: skip


def recipe_padded(folder, data, out, steps, mode):
    return recipe(folder, data, out, steps, mode, "--padding_free", "False")


def encoded(folder, data):
    """The recipe's own tokens and labels, so that every variant learns the same."""
    from transformers import AutoTokenizer

    from recipe.dataset.conversations import Conversations
    from recipe.dataset.encoding import ChatEncoder

    encoder, conversations = ChatEncoder(AutoTokenizer.from_pretrained(folder)), Conversations([data])
    documents = [encoder.encode(conversations[n]).documents[0] for n in range(len(conversations))]
    return [{"input_ids": d["input_ids"], "labels": d["labels"]} for d in documents]


def adapter(mode):
    import peft

    experts = ".*experts.*"
    more = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "rank_pattern": {experts: RANK // 8}, "alpha_pattern": {experts: 4}} if mode == "experts" else {}  # fmt: skip
    return peft.LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", **more
    )  # fmt: skip


def loading(mode, dtype):
    """What from_pretrained is told: weights that are trained are float32 in every variant."""
    import torch
    import transformers

    if mode == "QLoRA":
        nf4 = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        return {"dtype": dtype, "quantization_config": nf4}
    return {"dtype": torch.float32 if mode == "full" else dtype}


def trained(trainer, clock):
    trainer.add_callback(clock)
    trainer.train()
    return clock.seconds, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trl(folder, data, out, steps, mode, best=False):
    import datasets
    import torch
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from recipe.model.precision import best_dtype

    fast = best_dtype(not torch.cuda.is_available())
    more = {"model_init_kwargs": loading(mode, fast)} if best or mode == "QLoRA" else {}
    if best:
        more |= {"gradient_checkpointing": torch.cuda.is_available(), "bf16": fast == torch.bfloat16}
    config = SFTConfig(
        output_dir=out, per_device_train_batch_size=BATCH, max_steps=steps, logging_steps=1, learning_rate=RATE[mode],
        save_strategy="no", report_to="none", max_length=None, train_sampling_strategy="sequential", disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(), **more,
    )  # fmt: skip
    rows = datasets.Dataset.from_list(encoded(folder, data))
    trainer = SFTTrainer(
        str(folder), args=config, train_dataset=rows, peft_config=adapter(mode) if mode != "full" else None,
        processing_class=AutoTokenizer.from_pretrained(folder),
    )  # fmt: skip
    return trained(trainer, Clock())


def trl_best(folder, data, out, steps, mode):
    return trl(folder, data, out, steps, mode, best=True)


def padded(folder, data, out, steps, mode):
    import datasets
    import peft
    import torch
    import transformers

    from recipe.model.precision import best_dtype

    fast = best_dtype(not torch.cuda.is_available())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **loading(mode, fast))
    args = transformers.TrainingArguments(
        output_dir=out, per_device_train_batch_size=BATCH, max_steps=steps, logging_steps=1, learning_rate=RATE[mode],
        save_strategy="no", report_to="none", train_sampling_strategy="sequential", disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(), bf16=fast == torch.bfloat16, label_names=["labels"],
    )  # fmt: skip
    trainer = transformers.Trainer(
        peft.get_peft_model(model, adapter(mode)) if mode != "full" else model, args,
        train_dataset=datasets.Dataset.from_list(encoded(folder, data)),
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer),
    )  # fmt: skip
    return trained(trainer, Clock())


def llamafactory(folder, data, out, steps, mode):
    import datasets
    import torch
    from llamafactory.train.tuner import run_exp

    tokens = pathlib.Path(out).with_name("llamafactory-tokens")
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"]), "images": None, "videos": None, "audios": None}
            for row in encoded(folder, data)]  # fmt: skip
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(str(tokens))
    clock = Clock()
    cuda = torch.cuda.is_available()
    how = dict(finetuning_type="full") if mode == "full" else dict(
        finetuning_type="lora", lora_rank=RANK, lora_alpha=32, lora_dropout=0.0, lora_target="all"
    )  # fmt: skip
    how |= dict(quantization_bit=4) if mode == "QLoRA" else {}
    run_exp(
        dict(
            stage="sft", do_train=True, model_name_or_path=folder, dataset="rows", tokenized_path=str(tokens),
            template="empty", disable_shuffling=True, output_dir=out, overwrite_output_dir=True,
            per_device_train_batch_size=BATCH, gradient_accumulation_steps=1, max_steps=steps, learning_rate=RATE[mode],
            logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=not cuda, bf16=cuda, **how,
        ),
        [clock],
    )  # fmt: skip
    log = json.loads((pathlib.Path(out) / "trainer_state.json").read_text())["log_history"]
    return clock.seconds, [entry["loss"] for entry in log if "loss" in entry]


def unsloth(folder, data, out, steps, mode):
    from unsloth import FastLanguageModel  # isort: skip
    import datasets
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = FastLanguageModel.from_pretrained(
        folder, max_seq_length=8192, load_in_4bit=mode == "QLoRA", full_finetuning=mode == "full"
    )
    if mode != "full":
        model = FastLanguageModel.get_peft_model(model, r=RANK, lora_alpha=32, lora_dropout=0)
    config = SFTConfig(
        output_dir=out, per_device_train_batch_size=BATCH, max_steps=steps, logging_steps=1, learning_rate=RATE[mode],
        save_strategy="no", report_to="none", max_length=None, disable_tqdm=True, shuffle_dataset=False,
    )  # fmt: skip
    rows = datasets.Dataset.from_list(encoded(folder, data))
    return trained(SFTTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer), Clock())


def peak_memory():
    """Most bytes of tensors on the GPU, or of this process in main memory; also in an environment of a peer."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with open(
        "/proc/self/status"
    ) as file:  # not ru_maxrss, which begins with the peak of the program that started this
        return 1024 * int(next(line.split()[1] for line in file if line.startswith("VmHWM:")))


def one(shape, variant, mode, args):
    """Run one variant in this process and print its JSON line."""
    import torch
    from transformers import AutoTokenizer

    data, count = args.work / "rows.jsonl", BATCH * args.steps
    folder = str(model_folder(shape, args.work))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    known = conversations(tokenizer, args.length, count) if args.length else rows(count, args.data)
    data.write_text("".join(json.dumps(row) + "\n" for row in known))
    labels = [row["labels"] for row in encoded(folder, str(data))[BATCH:]]
    out = str(args.work / f"out-{variant}-{mode}")
    seconds, losses, *estimated = globals()[variant](folder, str(data), out, args.steps, mode)
    cuda, peak = torch.cuda.is_available(), peak_memory()
    supervised, tokens = sum(label != -100 for row in labels for label in row), sum(map(len, labels))
    print(json.dumps({
        "shape": shape, "mode": mode, "variant": variant, "steps": args.steps, "supervised_tokens_per_second":
        round(supervised / sum(seconds[1:]), 1), "tokens_per_second": round(tokens / sum(seconds[1:]), 1),
        "seconds_per_step": round(statistics.median(seconds[1:]), 3), "peak_gb": round(peak / 1e9, 2),
        **({"estimated_gb": estimated[0]} if estimated else {}), "first_loss": losses[0], "last_loss": losses[-1],
        "data": f"{args.length} tokens" if args.length else os.path.basename(args.data) if args.data else "made up",
        "torch": torch.__version__, "device": torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} CPU cores",
        "date": str(datetime.date.today()),
    }))  # fmt: skip


def recorded(command, results, what):
    """Run a program that prints a JSON line last; print that line, append it to `results` and return it as a dict.

    Where it fails, its last line of errors is printed behind `what`, and None returned.
    """
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        print(f"{what} failed: {done.stderr.strip().splitlines()[-1][:200]}", flush=True)
        return None
    print(line := done.stdout.strip().splitlines()[-1], flush=True)
    with open(results, "a", encoding="utf-8") as file:
        file.write(line + "\n")
    return json.loads(line)


def interpreter(variant):
    """The Python of a variant: that of its own environment, where it has one."""
    return ROOT / f".venv-{variant}" / "bin" / "python" if variant in OWN_VERSIONS else pathlib.Path(sys.executable)


def compare(args):
    """Every variant in a process of its own, in turns; each must start from the same loss."""
    variants = [variant for variant in args.variant if variant not in OWN_VERSIONS or interpreter(variant).exists()]
    for shape, mode in itertools.product(args.shape, args.mode):
        first = []
        same = [v for v in variants if mode not in EXPERTS or v not in OWN_VERSIONS]  # these would not adapt experts
        for variant in same * args.repeats:
            words = ["--shape", shape, "--mode", mode, "--variant", variant, "--steps", args.steps, "--work", args.work]
            words += ["--data", args.data] if args.data else []
            words += ["--length", args.length] if args.length else []
            command = [interpreter(variant), __file__, *words]
            if run := recorded(command, args.results, f"{shape} {mode} {variant}"):
                first.append(run["first_loss"])
        spread = (max(first) - min(first)) / max(first) if first else 0
        print(f"{shape} {mode}: first losses within {spread:.1e} of each other", flush=True)
        if spread > 0.01:  # bfloat16 leaves 0.003
            sys.exit("error: the variants do not start from the same loss, so they do not do the same work")


def table(results=RESULTS):
    """Medians of all runs in a file, and how much slower each peer is than the recipe, in Markdown."""
    runs = {}
    for line in results.read_text().splitlines():
        run = json.loads(line)
        work = f"{run['shape']} {run['mode']}, {run['data']}, {run['device']}"
        found = runs.setdefault(work, {}).setdefault(run["variant"], [])
        found.append((run["supervised_tokens_per_second"], run["peak_gb"]))
    cells = {}
    for columns in runs.values():
        medians = {
            name: [statistics.median(values) for values in zip(*found, strict=True)] for name, found in columns.items()
        }
        for name in VARIANTS:
            speed, memory = medians.get(name, (None, None))
            slower = f", {medians['recipe'][0] / speed:.1f} x slower" if speed and name != "recipe" else ""
            cells.setdefault(name, []).append(f"{speed:,.0f}{slower}, {memory:.1f} GB" if speed else "")
    lines = [f"| supervised tokens/s | {' | '.join(runs)} |", "|---|" + "---|" * len(runs)]
    return "\n".join(lines + [f"| {name} | {' | '.join(row)} |" for name, row in cells.items() if any(row)])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="measure", choices=["measure", "table"])
    shapes = ["smollm2", *SHAPES, *NAMED]
    parser.add_argument("--shape", nargs="+", default=["smollm2", "0.1b", "0.5b"], choices=shapes)
    parser.add_argument("--mode", nargs="+", default=["LoRA"], choices=[*MODES, *EXPERTS])
    parser.add_argument("--variant", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps, the first of them for warming up")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--data", help="JSON Lines with messages, or with question and answer; default: made up")
    parser.add_argument("--length", type=int, help="tokens of each made-up conversation")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "output" / "bench")
    args = parser.parse_args()
    if args.what == "table":
        return print(table(args.results))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    args.work.mkdir(parents=True, exist_ok=True)
    if len(args.shape) == len(args.variant) == len(args.mode) == 1:
        one(args.shape[0], args.variant[0], args.mode[0], args)
    else:
        compare(args)


if __name__ == "__main__":
    main()
