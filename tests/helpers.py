"""What several test files use: rows, command lines, reference computations, chat templates."""

import copy
import functools
import html.parser
import importlib.resources
import json
import os
import pathlib
import subprocess
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCUMENTS = "\n".join(
    path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
)

ROWS = [
    {"messages": [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word * 2}]}
    for word in ("one", "two", "three", "four", "five", "six", "seven", "eight")
]


# Answers of very different length: where each micro-batch counts the same, every test below fails.
UNEVEN_ROWS = [
    {"prompt": f"question {n}", "completion": "word " * length} for n, length in enumerate([1, 30, 2, 60, 3, 9, 1, 25])
]


# The added tokens of the real Qwen tokenizers, in the order of their ids; 151643 to 151656 are special, the rest not.
CONTROL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
MARKUP = [
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>",
    "<|file_sep|>",
]  # fmt: skip
QWEN3_MARKUP = ["<tool_response>", "</tool_response>", "<think>", "</think>"]  # 151665 to 151668
LLAMA3_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
GEMMA_TOKENS = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>"]
PHI3_TOKENS = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]  # they swallow the white space that follows them
TEMPLATES = [
    "qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3_8", "llama3",
    "gemma", "gemma3", "phi3", "smollm2",
]  # fmt: skip
SMOLLM2 = (  # of SmolLM2-135M-Instruct
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def template(name):
    """A chat template by its name in the trl package, or that of SmolLM2."""
    if name == "smollm2":
        return SMOLLM2
    return (importlib.resources.files("trl") / "chat_templates" / f"{name}.jinja").read_text()


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def argv(model, data, output, *more):
    return [
        "--model_name_or_path", str(model), "--data_path", str(data), "--output_dir", str(output),
        "--per_device_train_batch_size", "4", "--num_train_epochs", "3", "--logging_steps", "1", "--bf16", "False",
        "--learning_rate", "1e-2", "--save_strategy", "no", "--disable_tqdm", "True", *map(str, more),
    ]  # fmt: skip


def parse(words):
    """The four argument instances of a command line, checked and completed."""
    import finetune
    from recipe import command_line, console, flag_rules

    named = command_line.read(words, finetune.ARGUMENTS, notice=console.say)
    return flag_rules.arguments_of(named, finetune.ARGUMENTS)


def history(output, key):
    log = json.loads((pathlib.Path(output) / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in log if key in entry]


def reference(model, documents):
    """Plain torch, one conversation at a time: (mean loss over supervised tokens, gradients of it)."""
    from recipe.dataset.encoding import IGNORE_INDEX

    model = copy.deepcopy(model).train()
    losses = []
    for (document,) in documents:
        ids, labels = torch.tensor([document["input_ids"]]), torch.tensor(document["labels"])
        logits = model(input_ids=ids, use_cache=False).logits[0]
        losses.append(
            torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="none", ignore_index=IGNORE_INDEX)
        )
    count = sum(label != IGNORE_INDEX for (document,) in documents for label in document["labels"])
    loss = torch.cat(losses).sum() / count
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def relative(found, expected):
    return max((found[name] - expected[name]).norm().item() / expected[name].norm().item() for name in expected)


def leave_pictures_out(setattr=setattr):
    """Let trainings in this process draw no loss.png and no report.html, which takes 0.2 s each."""
    from recipe.training import run_record

    setattr(run_record.curves, "plot_loss", lambda *args: None)
    setattr(run_record.report_page, "write", lambda *args: None)


@functools.cache
def _server():
    return subprocess.Popen(
        [sys.executable, ROOT / "tests" / "forked.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip


def run_forked(folder, program, words, ranks):
    """Run a program on so many ranks by tests/forked.py, in a folder; (exit codes, what they printed)."""
    out = pathlib.Path(folder, "printed.txt")
    out.unlink(missing_ok=True)
    request = {
        "program": str(program), "words": [str(word) for word in words], "ranks": ranks, "folder": str(folder),
        "environment": {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}, "out": str(out),
    }  # fmt: skip
    server = _server()
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline()), out.read_text()


def step(tmp_path, model, data, name, *more, ranks=1):
    """One optimizer step over all rows by SGD with rate 1, so that the change of the weights is the gradient."""
    import finetune

    words = argv(model, data, tmp_path / name, "--max_steps", 1, "--optim", "sgd", "--learning_rate", 1,
                 "--max_grad_norm", 0, "--lr_scheduler_type", "constant", "--train_sampling_strategy", "sequential", *more)  # fmt: skip
    if ranks == 1:
        finetune.train(words)
    else:
        codes, said = run_forked(tmp_path, ROOT / "finetune.py", words, ranks)
        assert codes == [0] * ranks and f"x {ranks} ranks" in said, said[-3000:]
    after = finetune.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
    before = finetune.transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    names = dict(before.named_parameters())
    return history(tmp_path / name, "loss")[0], {n: names[n].detach() - p.detach() for n, p in after.named_parameters()}


def call_back(callback):
    """Give every Trainer of finetune.py in this process one more callback."""
    import finetune

    class Watched(finetune.RecipeTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback(callback)

    finetune.RecipeTrainer = Watched


def run_ranks(folder, jobs, ranks):
    """Run the trainings of tests/distributed/ranks.py, {name: job}, in as many processes; {name: what each left}."""
    (folder / "jobs.json").write_text(json.dumps(jobs, default=str))
    words = [folder / "jobs.json", folder / "results.json"]
    codes, said = run_forked(folder, ROOT / "tests" / "distributed" / "ranks.py", words, ranks)
    results = folder / "results.json"
    left = json.loads(results.read_text()) if results.exists() else {}
    failed = [result["traceback"] for result in left.values() if "error" in result]
    return {"folder": folder, "problem": "".join(failed) or any(codes) and said[-4000:], **left}


class Page(html.parser.HTMLParser):
    """Collects tags, what they refer to, and whether all that are opened are closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.references, self.opened = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href", "xlink:href", "data")]
        if tag != "meta":
            self.opened.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.opened.pop()

    def handle_endtag(self, tag):
        assert self.opened.pop() == tag
