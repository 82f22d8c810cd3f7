"""Serve what this recipe writes with vLLM on a CPU and compare with transformers; results go to benchmarks/served.jsonl.

    VENV=.venv-vllm ./setup.sh benchmarks/vllm.txt
    python benchmarks/served.py                # all families, some minutes on two cores
    python benchmarks/served.py qwen3_5 --work /tmp/served
    python benchmarks/served.py table          # what docs/outputs.md shows

For each family a small random checkpoint is trained for some steps with an adapter and merged. Both programs then
compute the log-probabilities of a fixed prompt with the base, with the adapter and with the merged folder. An adapter
that a server loads without an effect, as under names that no layer has, shows as a difference of zero.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
RESULTS = ROOT / "benchmarks" / "served.jsonl"
# What vLLM's kernels for CPUs take: heads of 64, and of 128 in gated delta nets.
SIZES = {"head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
DELTA = {
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [12, 10, 10]}}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64},
    "qwen3": SIZES,
    "qwen3_5_text": {**SIZES, **DELTA},
    "qwen3_5": {**SIZES, **DELTA},
    "qwen3_vl": {**SIZES, **MROPE},
}  # of a mixture, vLLM loads no adapter on a CPU: its kernel for them is one of Triton's
PROMPT = list(range(5, 45))  # ids of the small tokenizer
RANK = 16
# For every process of vLLM, which imports torchvision, torchaudio and torchcodec where they are: their wheels need
# operators and libraries that torch for CPUs lacks.
EVERYWHERE = """
import os, sys
os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1")
sys.modules.update(torchaudio=None, torchcodec=None)
import torch
library = torch.library.Library("torchvision", "DEF")
image = "Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width"
for schema in ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
               "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
               f"roi_align({image}, int sampling_ratio, bool aligned) -> Tensor",
               f"roi_pool({image}) -> (Tensor, Tensor)"):
    library.define(schema)
"""
SERVER = """
import json, sys
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.lora.request import LoRARequest

def main():
    job = json.load(open(sys.argv[1]))
    options = {"limit_mm_per_prompt": {"image": 0, "video": 0}} if job["vision"] else {}
    if job["adapter"]:
        options |= {"enable_lora": True, "max_lora_rank": job["rank"]}
    llm = LLM(model=job["model"], dtype="bfloat16", max_model_len=256, enforce_eager=True, **options)
    asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)

    def score(adapter):
        (answer,) = llm.generate([TokensPrompt(prompt_token_ids=job["prompt"])], asked, lora_request=adapter)
        pairs = zip(job["prompt"][1:], answer.prompt_logprobs[1:])
        return sum(found[token].logprob for token, found in pairs)

    found = {"model": score(None)}
    if job["adapter"]:
        found["adapter"] = score(LoRARequest("trained", 1, job["adapter"]))
    json.dump(found, open(sys.argv[2], "w"))

if __name__ == "__main__":
    main()
"""


def main() -> None:
    """Compare the families of the command line, or all, and append a line for each to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(FAMILIES), help=f"some of {', '.join(FAMILIES)}; or table")
    parser.add_argument("--python", default=str(ROOT / ".venv-vllm" / "bin" / "python"), help="Python with vLLM")
    parser.add_argument("--work", type=pathlib.Path, help="folder for models; a temporary one by default")
    args = parser.parse_args()
    if args.families == ["table"]:
        print(table())
        return
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.families:
            try:
                result = compare(name, (args.work or pathlib.Path(temporary)) / name, args.python)
            except RuntimeError as error:  # the others are tried all the same
                print(f"{name}: {error}", flush=True)
                continue
            with open(RESULTS, "a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            print(json.dumps(result, indent=2), flush=True)


def table() -> str:
    """Return the newest result of each family as a Markdown table."""
    with open(RESULTS, encoding="utf-8") as file:
        newest = {line["family"]: line for line in map(json.loads, file)}
    rows = [
        "| family | effect of the adapter, transformers | vLLM | merged less adapter, vLLM |",
        "|---|---:|---:|---:|",
    ]
    for name, line in sorted(newest.items()):
        merged = line["vllm"]["merged"] - line["vllm"]["adapter"]
        rows.append(f"| {name} | {line['effect_transformers']:+.2f} | {line['effect_vllm']:+.2f} | {merged:+.2f} |")
    versions = sorted({(line["versions"]["vllm"], line["versions"]["transformers"]) for line in newest.values()})
    used = "; ".join(f"vLLM {vllm}, transformers {transformers}" for vllm, transformers in versions)
    last = max(line["date"] for line in newest.values())
    return "\n".join([*rows, "", f"{used}, bfloat16 on a CPU, {last}."])


def compare(name: str, folder: pathlib.Path, python: str) -> dict[str, Any]:
    """Train, merge and score one family with both programs.

    Args:
        name: key of FAMILIES.
        folder: empty folder for its models.
        python: interpreter with vLLM.
    """
    import families
    import torch

    import finetune
    from helpers import ROWS, argv, write
    from recipe.training.merging import merge

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = families.small_tokenizer(folder / "tokenizer")
    base = families.family(name, folder / "base", tokenizer, torch.bfloat16, **FAMILIES[name])
    adapter, merged = folder / "adapter", folder / "merged"
    strong = ["--learning_rate", "3e-2", "--lora_r", RANK, "--lora_alpha", 128, "--lora_dropout", 0, "--max_steps", 40]
    finetune.train(argv(base, write(folder / "rows.jsonl", ROWS), adapter, *strong))
    merge(str(adapter), str(merged), dtype=torch.bfloat16)
    plain = {"base": score(base), "adapter": score(adapter), "merged": score(merged)}
    vision = name in families.VISION
    served = serve(python, folder, {"model": base, "adapter": adapter, "rank": RANK, "vision": vision})
    merged_served = serve(python, folder, {"model": merged, "adapter": None, "vision": vision})
    found = {"base": served["model"], "adapter": served["adapter"], "merged": merged_served["model"]}
    return {
        "family": name,
        "transformers": {key: round(value, 2) for key, value in plain.items()},
        "vllm": {key: round(value, 2) for key, value in found.items()},
        "effect_transformers": round(plain["adapter"] - plain["base"], 2),
        "effect_vllm": round(found["adapter"] - found["base"], 2),
        "versions": {
            "transformers": importlib.metadata.version("transformers"),
            "vllm": version(python, "vllm-cpu"),
            "torch": torch.__version__,
        },
        "date": datetime.date.today().isoformat(),
    }


def score(folder: pathlib.Path) -> float:
    """Sum the log-probabilities of the prompt, computed by transformers (and peft) in bfloat16."""
    import torch

    from recipe.model import loading

    model, _ = loading.load(str(folder), torch.bfloat16, "cpu")
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        logits = model(input_ids=ids).logits.float()
    return float(logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).sum())


def serve(python: str, folder: pathlib.Path, job: dict[str, Any]) -> dict[str, float]:
    """Sum the log-probabilities of the prompt, computed by vLLM in a process of its own."""
    (folder / "job.json").write_text(json.dumps({**job, "prompt": PROMPT}, default=str))
    (folder / "server.py").write_text(SERVER)
    (folder / "sitecustomize.py").write_text(EVERYWHERE)
    words = [python, folder / "server.py", folder / "job.json", folder / "found.json"]
    done = subprocess.run(
        list(map(str, words)), capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(folder)}
    )
    if done.returncode:
        raise RuntimeError(f"vLLM ended with {done.returncode}: {(done.stdout + done.stderr)[-20000:]}")
    return json.loads((folder / "found.json").read_text())


def version(python: str, package: str) -> str:
    """Return the version of a package in another environment."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
