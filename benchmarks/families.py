"""Train tiny random models of many families with every engine, and print the table of docs/families.md.

python benchmarks/families.py                                        # every cell, into benchmarks/families.jsonl
python benchmarks/families.py --family qwen3 qwen3_5 --engine FSDP2  # these cells; lines of others stay
python benchmarks/families.py table                                  # what docs/families.md shows

A cell is a family, what is trained of it, and an engine. It takes two optimizer steps on rows of unequal length, in
float32 on the CPU, with two ranks under each engine that shares the training out.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import transformers

FOLDER = pathlib.Path(__file__).resolve().parent
ROOT = FOLDER.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import families as checkpoints  # noqa: E402

import finetune  # noqa: E402
from helpers import UNEVEN_ROWS, argv, reference, run_ranks, write  # noqa: E402
from recipe.dataset.conversations import Conversations  # noqa: E402
from recipe.dataset.encoding import ChatEncoder  # noqa: E402
from recipe.distributed.engines import ENGINES, Mode  # noqa: E402
from recipe.model import loading  # noqa: E402

RESULTS = FOLDER / "families.jsonl"
FAMILIES = {  # model_type in config.json, and a variant: models of it
    "qwen2": "Qwen1.5, Qwen2, Qwen2.5, QwQ",
    "qwen3": "Qwen3",
    "qwen3_5_text": "Qwen3.5, the text part alone",
    "qwen3_5": "Qwen3.5, Qwen3.6, Qwen3.8 of 0.8B to 27B",
    "qwen3_next": "Qwen3-Next, Qwen3-Coder-Next",
    "qwen2_moe": "Qwen1.5-MoE, Qwen2-57B-A14B",
    "qwen3_moe": "Qwen3-30B-A3B, 235B-A22B, Qwen3-Coder",
    "qwen3_5_moe_text": "Qwen3.5-MoE, the text part alone",
    "qwen3_5_moe": "Qwen3.5-35B-A3B, Qwen3.6-35B-A3B, 122B-A10B, 397B-A17B",
    "gpt_oss": "gpt-oss",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "qwen3_vl_moe": "Qwen3-VL-30B-A3B, 235B-A22B",
    "gemma3_text": "Gemma 3 of 270M and 1B",
    "gemma3": "Gemma 3 of 4B to 27B",
    "gemma4": "Gemma 4 31B",
    "gemma4 A4B": "Gemma 4 26B-A4B",
    "gemma4 E4B": "Gemma 4 E2B, E4B",
    "llama": "Llama 2 to 3.3, SmolLM2",
    "mistral": "Mistral",
    "qwen4_exp_text": "Qwen4-Exp, the text part alone",
    "qwen4_exp": "Qwen4-Exp",
    "kimi_linear": "Kimi-Linear",
}
FLAGS = {  # label of an engine: what chooses it
    "one process": ["--use_cpu", "True"],
    "DDP": ["--use_cpu", "True"],
    "ZeRO-2": ["--deepspeed", ROOT / "ds_config_zero2.json"],
    "ZeRO-3": ["--deepspeed", ROOT / "ds_config_zero3.json"],
    "FSDP2": ["--fsdp", "True", "--fsdp_config", ROOT / "recipe" / "distributed" / "fsdp_config.json"],
}
MODES = {
    Mode.FULL: [],
    Mode.LORA: ["--use_lora", "--lora_dropout", "0"],
    Mode.QLORA: ["--q_lora", "--lora_dropout", "0"],
}
PADDED = ": training with padded batches"  # end of the reason that a run prints
ALONE = "one process"
BATCH = 4  # rows of an optimizer step
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training: a key of FAMILIES, one of MODES and one of FLAGS."""

    family: str
    mode: str
    engine: str


def words(cell: Cell, model: pathlib.Path, data: pathlib.Path, output: pathlib.Path) -> list[str]:
    """Return the command line of a cell.

    Args:
        model: Folder of the checkpoint.
        data: File with the rows.
        output: Folder to save to.
    """
    rows = BATCH if cell.engine == ALONE else BATCH // 2
    return argv(
        model, data, output, "--per_device_train_batch_size", rows, "--max_steps", 2, *FLAGS[cell.engine],
        *MODES[Mode(cell.mode)], "--train_sampling_strategy", "sequential", "--lr_scheduler_type", "constant",
        "--adam_epsilon", "1e-3",  # with 1e-8 AdamW turns rounding of small gradients into whole steps
    )  # fmt: skip


def loss_alone(mode: str, model: pathlib.Path, data: pathlib.Path) -> float:
    """Compute the loss of the first optimizer step in plain torch, one conversation at a time, without the engine."""
    encoder = ChatEncoder(transformers.AutoTokenizer.from_pretrained(model))
    encoded = encoder.encode_batch(list(Conversations([str(data)])))
    if mode == Mode.QLORA:  # the weights as they are held in 4 bits
        plain, _ = loading.load(str(model), torch.float32, "cpu", quantize=finetune.nf4)
    else:
        plain = automatic(model).from_pretrained(model, dtype=torch.float32)
    for parameter in plain.parameters():
        parameter.requires_grad_(parameter.is_floating_point() and mode != Mode.QLORA)
    plain.enable_input_require_grads()
    return reference(plain, [conversation.documents for conversation in encoded][:BATCH])[0]


def automatic(folder: pathlib.Path) -> type:
    """Return the class of transformers that loads a checkpoint."""
    return loading.auto_class(transformers.AutoConfig.from_pretrained(folder))


def load_plainly(mode: str, model: pathlib.Path, output: pathlib.Path) -> torch.nn.Module:
    """Load what a training saved with nothing but transformers and peft.

    Raises:
        ValueError: The files lack weights, or hold weights that have no place in the model.
    """
    import peft
    from safetensors.torch import load_file

    folder = output if mode == Mode.FULL else model
    plain, report = automatic(folder).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    odd = {kind: names for kind, names in report.items() if names}
    if mode != Mode.FULL:
        plain = peft.PeftModel.from_pretrained(plain, str(output))
        saved, placed = load_file(output / "adapter_model.safetensors"), peft.get_peft_model_state_dict(plain)
        if wrong := [name for name in saved.keys() | placed.keys() if not _same(saved.get(name), placed.get(name))]:
            odd["adapter"] = wrong
    if odd:
        raise ValueError(f"{output}: {odd}")
    return plain


def _same(one, other):
    return one is not None and other is not None and torch.equal(one, other)


def judge(cell: Cell, left: dict[str, Any], losses: list[float], model: pathlib.Path) -> dict[str, Any]:
    """Return the verdict on a cell and how far its losses are from those expected, or what is wrong with it.

    Args:
        left: What tests/distributed/ranks.py wrote about the training, and its `output` and `weights`.
        losses: Those expected of its first steps.
        model: Folder of the checkpoint.
    """
    if "error" in left:
        kind, _, text = left["error"].partition(": ")
        early = kind == "UserError" and not re.search("in load_model|in add_adapter|trainer", left["traceback"])
        if not early:
            print(left["traceback"], file=sys.stderr)
        return {"verdict": f"refused: {text}" if early else f"failed: {left['error']}"}
    engine, wrong = ENGINES[cell.engine], []
    wrappers = {known.wrapped_class for known in ENGINES.values() if known.wrapped_class} & set(left["classes"])
    parts = left["parameters"] if engine.shards_weights else 0
    if (wrappers or {""}, left["stage"], left["partitioned"]) != (
        {engine.wrapped_class}, engine.deepspeed_stage, parts
    ):  # fmt: skip
        wrong.append(f"another engine ran: {left['classes'][0]}, stage {left['stage']}")
    found = [entry["loss"] for entry in left["log"] if "loss" in entry]
    difference = max((abs(a - b) / abs(b) for a, b in zip(found, losses, strict=False)), default=math.nan)
    if len(found) != 2 or not difference < 1e-4:
        wrong.append(f"losses {found} and not {losses}")
    try:
        loaded = dict(load_plainly(cell.mode, model, left["output"]).named_parameters())
        trained = torch.load(left["weights"])
        if different := [name for name in trained if not _same(loaded.get(name), trained[name])]:
            wrong.append(f"{len(different)} of {len(trained)} weights are not loaded as trained: {different[0]}")
    except Exception as error:
        wrong.append(f"{type(error).__name__}: {error}")
    reason = next((line.partition(PADDED)[0] for line in left["said"].splitlines() if PADDED in line), None)
    verdict = f"failed: {'; '.join(wrong)}" if wrong else f"padded: {reason}" if reason else "trained"
    return {"verdict": verdict, "loss_difference": float(f"{difference:.1e}"), "losses": found}


def run(engine: str, cells: list[Cell], work: pathlib.Path) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Train the cells of an engine in one process group, and the rest in a new one after a cell that failed.

    Yields:
        A cell, and what tests/distributed/ranks.py wrote about it, with the folder and the weights that it saved.
    """
    todo, data = list(cells), write(work / "rows.jsonl", UNEVEN_ROWS)
    while todo:
        folder = pathlib.Path(tempfile.mkdtemp(prefix=engine, dir=work))
        names = {f"{cell.family} {cell.mode}": cell for cell in todo}
        jobs = {
            name: {"argv": words(cell, work / cell.family, data, folder / name), "gather": folder / f"{name}.pt"}
            for name, cell in names.items()
        }
        left = run_ranks(folder, jobs, 1 if engine == ALONE else 2)
        finished = {name: result for name, result in left.items() if name in names}
        if not finished:  # both ranks ended before one could write why
            finished = {next(iter(names)): {"error": "it ended early", "traceback": left["problem"]}}
        for name, result in finished.items():
            todo.remove(names[name])
            yield names[name], {**result, "output": folder / name, "weights": folder / f"{name}.pt"}


def table() -> str:
    """Return the table of all results in Markdown, with a note for each reason."""
    lines = [f"| `model_type` | models | {' | '.join(FLAGS)} |", "|---" * (2 + len(FLAGS)) + "|"]
    results, notes = read(), {}
    for family, models in FAMILIES.items():
        cells = []
        for engine in FLAGS:
            verdicts = {mode: results[Cell(family, mode, engine)]["verdict"] for mode in MODES}
            marks = {  # each verdict once, behind the modes that have it
                verdict: ", ".join(mode for mode in MODES if verdicts[mode] == verdict)
                + (
                    ""
                    if verdict == "trained"
                    else f": {verdict.partition(':')[0]} [{notes.setdefault(verdict, len(notes) + 1)}]"
                )
                for verdict in dict.fromkeys(verdicts.values())
            }
            cells.append("; ".join(marks.values()))
        lines.append(f"| {family} | {models} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {verdict}" for verdict, number in notes.items())])


def read() -> dict[Cell, dict[str, Any]]:
    """Return the committed results."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    entries = [json.loads(line) for line in lines]
    return {Cell(entry.pop("family"), entry.pop("mode"), entry.pop("engine")): entry for entry in entries}


def record(new: dict[Cell, dict[str, Any]]) -> None:
    """Write results in the place of older ones of the same cells."""
    order = [Cell(family, mode, engine) for family in FAMILIES for engine in FLAGS for mode in MODES]
    results = {**read(), **new}
    lines = [json.dumps(dataclasses.asdict(cell) | results[cell]) for cell in order if cell in results]
    RESULTS.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def main() -> None:
    """Train the cells that the command line names, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["train", "table"], default="train")
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--engine", nargs="+", choices=FLAGS, default=list(FLAGS))
    parser.add_argument("--mode", nargs="+", choices=list(map(str, MODES)), default=list(MODES))
    args = parser.parse_args()
    if args.what == "table":
        print(table())
        return
    facts = {"versions": {name: importlib.metadata.version(name) for name in LIBRARIES}}
    facts["date"] = datetime.date.today().isoformat()
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        os.environ["HF_DATASETS_CACHE"] = str(work / "tokens")  # the user's own cache stays as it is
        tokenizer = checkpoints.small_tokenizer(work / "tokenizer")
        for family in args.family:
            checkpoints.family(family, work / family, tokenizer)
        for engine in args.engine:
            cells = [Cell(family, mode, engine) for family in args.family for mode in args.mode]
            for cell, left in run(engine, cells, work):
                model = work / cell.family
                if engine == ALONE:
                    losses = [loss_alone(cell.mode, model, work / "rows.jsonl")]
                else:
                    losses = read()[dataclasses.replace(cell, engine=ALONE)].get("losses", [])
                result = judge(cell, left, losses, model) | facts
                record({cell: result})
                print(*dataclasses.astuple(cell), result["verdict"], result.get("loss_difference"), flush=True)


if __name__ == "__main__":
    main()
