"""Train tiny random models of many families with every engine, and print the table of docs/families.md.

python benchmarks/families.py                                        # every cell, into benchmarks/families.jsonl
python benchmarks/families.py --family qwen3 qwen3_5 --engine FSDP2  # these cells; lines of others stay
python benchmarks/families.py table                                  # what docs/families.md shows, and the README

A cell is a family, what is trained of it, and an engine. It takes two optimizer steps on rows of unequal length, in
float32 on the CPU, with two ranks under each engine that shares the training out, and the second step once more from the
checkpoint of the first. Losses and weights are held against plain torch, which computes one conversation at a time.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import bitsandbytes
import peft
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

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
from recipe.training import merging  # noqa: E402

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
MIXTURES = {  # families whose routed experts can be adapted
    "qwen3_next", "qwen2_moe", "qwen3_moe", "qwen3_5_moe_text", "qwen3_5_moe", "gpt_oss", "qwen3_vl_moe", "gemma4 A4B",
    "qwen4_exp_text", "qwen4_exp", "kimi_linear",
}  # fmt: skip
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
    "LoRA of experts": ["--use_lora", "--lora_dropout", "0", "--lora_experts"],
    "QLoRA of experts": ["--q_lora", "--lora_dropout", "0", "--lora_experts"],
}
PADDED = ": training with padded batches"  # end of the reason that a run prints
ALONE = "one process"
BATCH = 4  # rows of an optimizer step
LEARNING_RATE, EPSILON = 1e-2, 1e-3  # with 1e-8 AdamW turns rounding of small gradients into whole steps
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes")


def modes(family: str) -> list[str]:
    """Return the keys of MODES that a family has."""
    return [mode for mode in MODES if family in MIXTURES or not mode.endswith("of experts")]


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
        *MODES[cell.mode], "--train_sampling_strategy", "sequential", "--lr_scheduler_type", "constant",
        "--learning_rate", LEARNING_RATE, "--adam_epsilon", EPSILON, "--save_strategy", "steps", "--save_steps", 1,
    )  # fmt: skip


def two_steps(
    mode: str, model: pathlib.Path, data: pathlib.Path, checkpoint: pathlib.Path, trained: Iterable[str]
) -> tuple[list[float], dict[str, tuple[Tensor, Tensor]]]:
    """Take the optimizer steps in plain torch, transformers and peft, one conversation at a time.

    Args:
        checkpoint: Folder of the first step's checkpoint. An adapter starts with the factors A that it holds: the first
            step leaves them alone, as the factors B are zero.
        trained: Names of the parameters that are trained.
    Returns:
        The losses; of each trained weight, where it started and where it is now.
    """
    encoder = ChatEncoder(transformers.AutoTokenizer.from_pretrained(model))
    rows = [conversation.documents for conversation in encoder.encode_batch(list(Conversations([str(data)])))]
    plain = automatic(model).from_pretrained(model, dtype=torch.float32).requires_grad_(False)
    if mode.startswith(Mode.QLORA):  # the weights that those in 4 bits stand for
        held, _ = loading.load(str(model), torch.float32, "cpu", quantize=finetune.nf4)
        for name, parameter in held.named_parameters():
            if hasattr(parameter, "quant_state"):
                whole = bitsandbytes.functional.dequantize_4bit(parameter.data, parameter.quant_state)
                plain.get_parameter(name).data = whole
    if mode != Mode.FULL:
        plain = peft.PeftModel.from_pretrained(plain, str(checkpoint), is_trainable=True)
    weights = {name: parameter.requires_grad_() for name, parameter in plain.named_parameters() if name in set(trained)}
    for name, parameter in weights.items():
        parameter.data.mul_("lora_B" not in name)
    start = {name: parameter.detach().clone() for name, parameter in weights.items()}
    optimizer = torch.optim.AdamW(weights.values(), LEARNING_RATE, eps=EPSILON, weight_decay=0)
    losses = []
    for batch in (rows[:BATCH], rows[BATCH : 2 * BATCH]):
        loss, gradients = reference(plain, batch)
        losses.append(loss)
        for name, parameter in weights.items():
            parameter.grad = gradients[name]
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
    return losses, {name: (start[name], parameter.detach()) for name, parameter in weights.items()}


def automatic(folder: pathlib.Path) -> type:
    """Return the class of transformers that loads a checkpoint."""
    return loading.auto_class(transformers.AutoConfig.from_pretrained(folder))


def load_plainly(mode: str, model: pathlib.Path, output: pathlib.Path) -> torch.nn.Module:
    """Load what a training saved with nothing but transformers and peft.

    Raises:
        ValueError: The files lack weights, or hold weights that have no place in the model.
    """
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


def judge(cell: Cell, left: dict[str, Any], model: pathlib.Path, data: pathlib.Path) -> dict[str, Any]:
    """Return the verdict on a cell and how far it is from what was expected, or what is wrong with it.

    Args:
        left: What tests/distributed/ranks.py wrote about the training, and about the `resumed` one.
        model: Folder of the checkpoint; data: file with the rows.
    """
    for one in (left, left["resumed"]):
        if "error" in one:
            kind, _, text = one["error"].partition(": ")
            early = kind == "UserError" and not re.search("in load_model|in add_adapter|trainer", one["traceback"])
            if not early:
                print(one["traceback"], file=sys.stderr)
            return {"verdict": f"refused: {text}" if early else f"failed: {one['error']}"}
    engine, wrong = ENGINES[cell.engine], []
    wrappers = {known.wrapped_class for known in ENGINES.values() if known.wrapped_class} & set(left["classes"])
    parts = left["parameters"] if engine.shards_weights else 0
    if (wrappers or {""}, left["stage"], left["partitioned"]) != (
        {engine.wrapped_class}, engine.deepspeed_stage, parts
    ):  # fmt: skip
        wrong.append(f"another engine ran: {left['classes'][0]}, stage {left['stage']}")
    found, again = ([entry["loss"] for entry in one["log"] if "loss" in entry] for one in (left, left["resumed"]))
    trained, resumed = (torch.load(one["weights"]) for one in (left, left["resumed"]))
    losses, expected = two_steps(cell.mode, model, data, left["output"] / "checkpoint-1", trained)
    differences = [abs(a - b) / abs(b) for a, b in zip(found, losses, strict=False)]
    if len(found) != 2 or not max(differences) < 1e-4:
        wrong.append(f"losses {found} and not {losses}")
    if again != found or any(not _same(resumed.get(name), trained[name]) for name in trained):
        wrong.append(f"resumed, the losses are {again} and not {found}, or the weights differ")
    distance = sum((trained[name] - end).square().sum() for name, (_, end) in expected.items()).sqrt()
    step = float(distance / sum((end - start).square().sum() for start, end in expected.values()).sqrt())
    if not step < 1e-3:
        wrong.append(f"the weights are {step} of the way from those of plain torch")
    try:
        loaded = dict(load_plainly(cell.mode, model, left["output"]).named_parameters())
        if different := [name for name in trained if not _same(loaded.get(name), trained[name])]:
            wrong.append(f"{len(different)} of {len(trained)} weights are not loaded as trained: {different[0]}")
        if cell.mode != Mode.FULL:
            merging.merge(str(left["output"]), str(left["output"] / "merged"))  # compares the logits
    except Exception as error:
        wrong.append(f"{type(error).__name__}: {error}")
    reason = next((line.partition(PADDED)[0] for line in left["said"].splitlines() if PADDED in line), None)
    verdict = f"failed: {'; '.join(wrong)}" if wrong else f"padded: {reason}" if reason else "trained"
    rounded = {"loss_difference": float(f"{max(differences):.1e}"), "step_difference": float(f"{step:.1e}")}
    return {"verdict": verdict, **rounded, "losses": found}


def run(engine: str, cells: list[Cell], work: pathlib.Path) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Train the cells of an engine in one process group, and the rest in a new one after a cell that failed.

    Yields:
        A cell, and what tests/distributed/ranks.py wrote about it, with the folder and the weights that it saved; and
        the same, as `resumed`, about the training that went on from the first step's checkpoint.
    """
    todo, data = list(cells), write(work / "rows.jsonl", UNEVEN_ROWS)
    while todo:
        folder = pathlib.Path(tempfile.mkdtemp(prefix=engine, dir=work))
        names, jobs = {f"{cell.family} {cell.mode}": cell for cell in todo}, {}
        for name, cell in names.items():
            again = f"{name} resumed"
            for job, more in ((name, []), (again, ["--resume_from_checkpoint", "auto"])):
                line = words(cell, work / cell.family, data, folder / job)
                jobs[job] = {"argv": [*line, *more], "gather": folder / f"{job}.pt"}
            jobs[again]["copy"] = [folder / run / "checkpoint-1" for run in (name, again)]
        left = run_ranks(folder, jobs, 1 if engine == ALONE else 2)
        for job in jobs:
            left.get(job, {}).update(output=folder / job, weights=folder / f"{job}.pt")
        finished = {name: left[name] for name in names if "error" in left.get(name, ()) or f"{name} resumed" in left}
        if not finished:  # the ranks ended before one could write why
            finished = {next(iter(names)): {"error": "it ended early", "traceback": left["problem"]}}
        for name, result in finished.items():
            todo.remove(names[name])
            yield names[name], {**result, "resumed": left.get(f"{name} resumed", {})}


def table() -> str:
    """Return the table of all results in Markdown, with a note for each reason."""
    lines = [f"| `model_type` | models | {' | '.join(FLAGS)} |", "|---" * (2 + len(FLAGS)) + "|"]
    results, notes = read(), {}
    for family, models in FAMILIES.items():
        cells = []
        for engine in FLAGS:
            verdicts = {mode: results[Cell(family, mode, engine)]["verdict"] for mode in modes(family)}
            marks = []
            for verdict in dict.fromkeys(verdicts.values()):  # each once, behind the modes that have it
                having = [mode for mode in verdicts if verdicts[mode] == verdict]
                text = "all" if len(having) == len(verdicts) else ", ".join(having)
                if verdict != "trained":
                    text += f": {verdict.partition(':')[0]} [{notes.setdefault(verdict, len(notes) + 1)}]"
                marks.append(text)
            cells.append("; ".join(marks))
        lines.append(f"| {family} | {models} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {verdict}" for verdict, number in notes.items())])


def summary() -> str:
    """Return the families by their verdict over all modes and engines, in Markdown."""
    found: dict[str, list[str]] = {}
    for family in FAMILIES:
        verdicts = {
            (cell.engine, result["verdict"].partition(":")[0])
            for cell, result in read().items()
            if cell.family == family
        }
        words = ["trained, on padded rows" if "padded" in dict(verdicts).values() else "trained"]
        words += [f"not with {engine}" for engine, verdict in sorted(verdicts) if verdict == "refused"]
        found.setdefault("; ".join(words), []).append(family)
    lines = [f"| {', '.join(families)} | {verdict} |" for verdict, families in found.items()]
    return "\n".join(
        [
            "| families, by the `model_type` of their `config.json` | full, LoRA, QLoRA, every engine |",
            "|---|---|",
            *lines,
        ]
    )


def read() -> dict[Cell, dict[str, Any]]:
    """Return the committed results."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    entries = [json.loads(line) for line in lines]
    return {Cell(entry.pop("family"), entry.pop("mode"), entry.pop("engine")): entry for entry in entries}


def record(new: dict[Cell, dict[str, Any]]) -> None:
    """Write results in the place of older ones of the same cells."""
    order = [Cell(family, mode, engine) for family in FAMILIES for engine in FLAGS for mode in modes(family)]
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
        print(table(), summary(), sep="\n\n")
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
            cells = [
                Cell(family, mode, engine) for family in args.family for mode in modes(family) if mode in args.mode
            ]
            for cell, left in run(engine, cells, work):
                result = judge(cell, left, work / cell.family, work / "rows.jsonl") | facts
                record({cell: result})
                differences = (result.get("loss_difference"), result.get("step_difference"))
                print(*dataclasses.astuple(cell), result["verdict"], *differences, flush=True)


if __name__ == "__main__":
    main()
