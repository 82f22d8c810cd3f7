"""Teach a real small model to turn text into JSON, and measure it before and after: `make demo`.

Each stage prints the command that does the same by hand. A few minutes on two CPU cores.
"""

import gc
import json
import os
import time
from collections.abc import Callable
from typing import Any

from recipe import console

OUTPUT, MERGED = "output/demo", "output/demo-merged"
LONGEST, TOGETHER = 56, 60  # tokens of an answer; prompts that are answered together
TRAINING = {
    "--data_path": "data/train.jsonl", "--eval_data_path": "data/validation.jsonl", "--output_dir": OUTPUT,
    "--bf16": "False", "--use_lora": "True", "--lora_r": "16", "--lora_alpha": "32", "--lora_dropout": "0.0",
    "--learning_rate": "2e-3", "--per_device_train_batch_size": "4", "--num_train_epochs": "1",
    "--warmup_steps": "0.1", "--eval_strategy": "epoch", "--save_strategy": "no",
    "--logging_steps": "10", "--disable_tqdm": "True",
}  # fmt: skip


class Stages:
    """Runs the stages of the demo, one after the other, and keeps the seconds of each."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def run(self, name: str, command: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Print the name and the command of a stage, call its function and return the result."""
        print(f"\n== {name}", *[f"\n$ python {command}"] * bool(command), flush=True)
        start = time.perf_counter()
        result = function(*arguments)
        gc.collect()
        self.seconds[name] = round(time.perf_counter() - start, 1)
        return result


def run() -> None:
    """Get the model, measure it, train it, measure it again, merge the adapter, and print what was found."""
    from demo.demo_model import demo_model

    stages = Stages()
    model = stages.run("get the model", "", demo_model)
    # These import torch: after the download, which does not need it.
    import torch
    import transformers

    import finetune
    from recipe.dataset.conversations import Conversations
    from recipe.dataset.encoding import ChatEncoder
    from recipe.model import loading
    from recipe.training import answers
    from recipe.training.merging import merge

    transformers.utils.logging.disable_progress_bar()
    source = Conversations([TRAINING["--eval_data_path"]])
    held_out = [source[i] for i in range(len(source))]

    def measure(folder):
        model, tokenizer = loading.load(folder)
        return answers.measure(model, ChatEncoder(tokenizer), held_out, max_new_tokens=LONGEST, batch_size=TOGETHER)

    def measuring(folder):
        return (
            f"eval.py --model_name_or_path {folder} --data_path {TRAINING['--eval_data_path']} "
            f"--max_new_tokens {LONGEST} --batch_size {TOGETHER}"
        )

    before, answers_before, questions, _ = stages.run("measure before", measuring(model), measure, model)
    argv = ["--model_name_or_path", model, *(word for pair in TRAINING.items() for word in pair)]
    stages.run("fine-tune", f"finetune.py {' '.join(argv)}", finetune.train, argv)
    after, answers_after, *_ = stages.run("measure after", measuring(OUTPUT), measure, OUTPUT)
    merging = f"merge.py --adapter {OUTPUT} --output {MERGED} --dtype bfloat16"
    difference = stages.run("merge", merging, merge, OUTPUT, MERGED, torch.bfloat16)

    print(f"\n{len(held_out)} held-out conversations   before    after")
    for name in ("exact_match", "valid_json", "eval_loss"):
        print(f"  {name:<24} {before[name]:8.4f} {after[name]:8.4f}")
    for i in range(3):
        print(f"\nprompt: {questions[i].messages[-1]['content']}")
        print(f"before: {answers_before[i].strip()[:200]}")
        print(f"after:  {answers_after[i]}")
        print(f"wanted: {questions[i].reference}")
    print(f"\nadapter       {OUTPUT} (best by held-out loss: {OUTPUT}/best)")
    print(f"merged model  {MERGED} (its logits differ from the adapter's by {difference:.1e})")
    print(f"the run       {OUTPUT}/report.html")
    print("seconds       " + ", ".join(f"{name} {value}" for name, value in stages.seconds.items()))
    with open(os.path.join(OUTPUT, "metrics.json"), "w", encoding="utf-8") as file:
        json.dump({"before": before, "after": after, "seconds": stages.seconds}, file, indent=2)


def main() -> None:
    """Run the demo; a user's mistake is one sentence."""
    console.configure_libraries()
    console.run(run)


if __name__ == "__main__":
    os.chdir(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    main()
    console.leave()
