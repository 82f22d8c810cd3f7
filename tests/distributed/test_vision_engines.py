"""Checkpoints with a vision tower under the engines that hold weights in parts, on two CPU ranks."""

import subprocess
import sys

import families
import pytest
import torch
from safetensors.torch import load_file

from helpers import ROOT, ROWS, run_ranks, write
from recipe.distributed.engines import ENGINES

FLAGS = {  # label of an engine: what chooses it
    "one process": ["--use_cpu", "True"],
    "ZeRO-3": ["--deepspeed", ROOT / "ds_config_zero3.json"],
    "FSDP2": ["--fsdp", "True", "--fsdp_config", ROOT / "recipe" / "distributed" / "fsdp_config.json"],
}
MODES = {"full": [], "LoRA": ["--use_lora", "--lora_dropout", "0"]}
NAMES = ["qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma3"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoints(small_tokenizer, tmp_path_factory):
    return {
        name: families.family(name, tmp_path_factory.mktemp(name), small_tokenizer, torch.bfloat16) for name in NAMES
    }


@pytest.fixture(scope="module")
def ran(checkpoints, tmp_path_factory):
    """Function from an engine's label to {"family mode": what it left}; an engine runs when it is first asked for."""
    results = {}

    def start(label):
        folder = tmp_path_factory.mktemp(label)
        data = write(folder / "rows.jsonl", ROWS)
        ranks = 1 if label == "one process" else 2
        jobs = {}
        for name in NAMES:
            for mode, flags in MODES.items():
                out = folder / f"{name} {mode}"
                words = [
                    "--model_name_or_path", checkpoints[name], "--data_path", data, "--output_dir", out, "--bf16", "False",
                    "--per_device_train_batch_size", 4 // ranks, "--logging_steps", "1", "--learning_rate", "1e-2",
                    "--disable_tqdm", "True", "--max_steps", "3", "--save_strategy", "no", *FLAGS[label], *flags,
                    "--adam_epsilon", "1e-3",  # with 1e-8 AdamW turns rounding of small gradients into whole steps
                ]  # fmt: skip
                jobs[f"{name} {mode}"] = {"argv": list(map(str, words)), "gather": folder / f"{name} {mode}.pt"}
        return run_ranks(folder, jobs, ranks)

    def of(label):
        if label not in results:
            results[label] = {"problem": "it did not end"}  # not again for each test
            results[label] = start(label)
        assert not results[label]["problem"], results[label]["problem"]
        return results[label]

    return of


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("engine", ["ZeRO-3", "FSDP2"])
def test_a_vision_checkpoint_trains_as_in_one_process_and_keeps_its_names_and_its_tower(
    ran, checkpoints, engine, name, mode
):
    result, alone = ran(engine)[f"{name} {mode}"], ran("one process")[f"{name} {mode}"]
    assert ENGINES[engine].wrapped_class in result["classes"] and result["partitioned"] == result["parameters"]
    losses, expected = ([entry["loss"] for entry in left["log"] if "loss" in entry] for left in (result, alone))
    assert len(losses) == 3 and losses == pytest.approx(expected, rel=1e-4)
    folder = ran(engine)["folder"]
    file = "model.safetensors" if mode == "full" else "adapter_model.safetensors"
    saved, single = (load_file(ran(label)["folder"] / f"{name} {mode}" / file) for label in (engine, "one process"))
    assert saved.keys() == single.keys()
    gathered = torch.load(folder / f"{name} {mode}.pt", weights_only=True)
    assert sum(tensor.numel() for tensor in gathered.values()) > 100_000
    if mode == "full":
        before = load_file(checkpoints[name] / "model.safetensors")
        kept = {key for key in before if saved[key].dtype == torch.bfloat16}
        assert before.keys() == saved.keys() and len(kept) == len(before) - len(gathered)
        assert all(torch.equal(saved[key], before[key]) for key in kept)
        saved = {key: tensor for key, tensor in saved.items() if key not in kept}
    ends = sorted((tensor.double().sum().item(), tensor.shape) for tensor in saved.values())
    assert ends == sorted((tensor.double().sum().item(), tensor.shape) for tensor in gathered.values())


UNUSED = """
import sys
import deepspeed, torch, transformers
from transformers.integrations import HfDeepSpeedConfig

config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_batch_size": 1})
deepspeed.init_distributed("gloo")
model = transformers.AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype=torch.float32)
print("unused:", sum(not conversion.was_used() for conversion in model._weight_conversions))
"""


def test_transformers_still_keeps_conversions_under_zero3_that_no_weight_needed(checkpoints, tmp_path):
    """When this fails, transformers has mended it: the line in `recipe/model/loading.py` that drops them can go."""
    program = tmp_path / "program.py"
    program.write_text(UNUSED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    done = subprocess.run([*launch, program, checkpoints["qwen3_5"]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.rpartition("unused: ")[2]) > 0
