"""`make demo`: a real small model learns to turn text into JSON, measured before and after.

Everything here is what a user would run by hand; the commands are printed. About three minutes on two CPU cores.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable

from recipe import console
from recipe.model import loading

OUTPUT = "output/demo"
TRAINING = {
    "--data_path": "data/train.jsonl", "--eval_data_path": "data/validation.jsonl", "--output_dir": OUTPUT,
    "--use_lora": "True", "--lora_r": "16", "--lora_alpha": "32", "--lora_dropout": "0.0",
    "--learning_rate": "2e-3", "--per_device_train_batch_size": "4", "--num_train_epochs": "1",
    "--warmup_steps": "0.1", "--eval_strategy": "epoch", "--save_strategy": "no",
    "--logging_steps": "10", "--disable_tqdm": "True",
}  # fmt: skip


def main() -> None:
    """Run the demo; a user's mistake is one sentence and exit code 2."""
    from recipe.console import UserError

    console.quiet()
    seconds = {}

    def stage(name, function, *args):
        print(f"\n== {name}", flush=True)
        start = time.perf_counter()
        result = function(*args)
        gc.collect()
        seconds[name] = round(time.perf_counter() - start, 1)
        return result

    try:
        run(stage, seconds)
    except UserError as error:
        console.fail(error)


def run(stage: Callable, seconds: dict[str, float]) -> None:
    """Run each stage by `stage(name, function, ...)`, and print what changed; `seconds` is filled by it."""
    from demo.demo_model import demo_model

    model = stage("get the model", demo_model)
    import torch
    import transformers

    import finetune
    from recipe.dataset.conversations import Conversations
    from recipe.dataset.encoding import ChatEncoder
    from recipe.training import answers  # imports torch: after the download, which does not need it
    from recipe.training.merging import merge

    transformers.utils.logging.disable_progress_bar()
    source = Conversations([TRAINING["--data_path"].replace("train", "validation")])
    held_out = [source[i] for i in range(len(source))]

    def measure(folder):
        model, tokenizer = loading.load(folder)
        return answers.measure(model, ChatEncoder(tokenizer), held_out, max_new_tokens=56, batch_size=60)

    before, answers_before, asked = stage("measure before", measure, model)
    argv = ["--model_name_or_path", model, *(word for pair in TRAINING.items() for word in pair)]
    print("\npython finetune.py " + " ".join(argv))
    stage("fine-tune", finetune.train, argv)
    after, answers_after, _ = stage("measure after", measure, OUTPUT)
    difference = stage("merge", merge, OUTPUT, OUTPUT + "-merged", torch.bfloat16)

    print("\n60 held-out conversations   before    after")
    for name in ("exact_match", "valid_json", "eval_loss"):
        print(f"  {name:<24} {before[name]:8.4f} {after[name]:8.4f}")
    for i in range(3):
        print(f"\nprompt: {asked[i].messages[-1]['content']}")
        print(f"before: {answers_before[i].strip()[:200]}")
        print(f"after:  {answers_after[i]}")
        print(f"wanted: {asked[i].reference}")
    print(f"\nadapter       {OUTPUT} (best by held-out loss: {OUTPUT}/best)")
    print(f"merged model  {OUTPUT}-merged (its logits differ from the adapter's by {difference:.1e})")
    print(f"loss curve    {OUTPUT}/loss.png")
    print("seconds       " + ", ".join(f"{name} {value}" for name, value in seconds.items()))
    with open(os.path.join(OUTPUT, "metrics.json"), "w", encoding="utf-8") as file:
        json.dump({"before": before, "after": after, "seconds": seconds}, file, indent=2)


if __name__ == "__main__":
    os.chdir(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    sys.exit(main())
