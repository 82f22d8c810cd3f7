"""What a run was, and what came of it: run.json, and what is made of it, the model card and report.html.

run.json lies in --output_dir. It is not the record of a checkpoint (`checkpoints.COMPLETE`), which says what a run that
is resumed must have in common with the one that wrote it.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recipe import command_line, console, signals
from recipe.dataset.files import Records
from recipe.model.prompt_mode import PromptMode
from recipe.training import curves, model_card, report_page, resources, staging

FILE = "run.json"
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "deepspeed", "bitsandbytes")


class RunRecord:
    """Collects the facts of a run and writes them beside its weights.

    Args:
        arguments: the instances of finetune.py's argument classes.
        named: the flags that the user set.
        train_dataset: the SupervisedDataset to train on.
        eval_dataset: those to evaluate on, {name: dataset}.
    """

    def __init__(
        self, arguments: Sequence[Any], named: Sequence[str], train_dataset: Any, eval_dataset: dict[str, Any] | None
    ):
        self.arguments, self.named, self.train_dataset = arguments, sorted(named), train_dataset
        self.prompt_mode = PromptMode.of(train_dataset)
        self.datasets = {"training": train_dataset, **(eval_dataset or {})}
        self._beginning: dict[str, Any] = {}  # only the process that writes needs it
        self._outcome: dict[str, Any] = {"saved": False}

    def write_about(self, trainer: Any, folder: str) -> None:
        """Write how to ask the model, and its card, into a folder of weights."""
        self.prompt_mode.save(folder)
        facts = self.facts(trainer)
        self._outcome["saved"] = self._outcome["saved"] or folder == trainer.args.output_dir
        model_card.write(facts, folder, staging.place_of(folder), command_line.run_yaml(self.arguments))

    @contextlib.contextmanager
    def reporting(self, trainer: Any) -> Iterator[None]:
        """Run the training within this context, on every rank; afterwards the record is written, also if it failed."""
        folder, start = trainer.args.output_dir, time.perf_counter()
        try:
            yield
        except BaseException as error:
            if trainer.args.should_save:
                self._outcome |= {"exit_reason": _failure(error), "seconds": round(time.perf_counter() - start, 1)}
                with contextlib.suppress(OSError):  # the disk may be full, and the error above matters more
                    if self._outcome["saved"]:
                        command_line.write_run_yaml(self.arguments, folder)
                    self._write(trainer)
            raise
        totals = trainer.throughput.totals()
        if trainer.args.should_save:
            self._outcome |= {"exit_reason": _exit_reason(trainer), **totals}
            self._outcome["seconds"] = round(time.perf_counter() - start, 1)
            command_line.write_run_yaml(self.arguments, folder)
            self._write(trainer)
            self.write_about(trainer, folder)
            curves.plot_loss(trainer.state.log_history, folder)
            facts = self.facts(trainer)
            usage = model_card.usage(facts, folder)
            report_page.write(facts, usage, trainer.state.log_history, self.datasets, folder)
            console.say("\n".join(f"{name}: {text}" for name, text in usage.items()))

    def _write(self, trainer: Any) -> None:
        with open(os.path.join(trainer.args.output_dir, FILE), "w", encoding="utf-8") as file:
            # A user's metric may be NaN, which JSON does not know.
            facts = json.loads(json.dumps(self.facts(trainer), default=str), parse_constant=lambda name: None)
            json.dump(facts, file, indent=2)

    def facts(self, trainer: Any) -> dict[str, Any]:
        """Return all that is known of the run by now, in types of JSON; no environment and no secret is in it."""
        self._beginning = self._beginning or {
            "arguments": command_line.resolved(self.arguments),
            "set_by_user": [name for name in self.named if name not in command_line.NOT_RECORDED],
            "versions": {"python": platform.python_version(), **_versions()},
            "commit": _commit(),
            "base": dict(zip(("name_or_path", "revision"), trainer.base, strict=True)),
            "prompt": dataclasses.asdict(self.prompt_mode),
            "template_variables": self.prompt_mode.variables(self.train_dataset.tokeniser.encoder),
            "data": {name: files_of(dataset) for name, dataset in self.datasets.items()},
            "hardware": hardware(trainer.args),
        }
        return self._beginning | {"adapter": model_card.adapter_facts(trainer)} | progress(trainer) | self._outcome


def progress(trainer: Any) -> dict[str, Any]:
    """Return what the log says of a run: losses, evaluations and the best step."""
    state, evaluations = trainer.state, dict[int, dict[str, float]]()
    for entry in state.log_history:
        if figures := {name: value for name, value in entry.items() if name.startswith("eval_")}:
            evaluations.setdefault(entry["step"], {"step": entry["step"]}).update(figures)
    measured = [entry for entry in evaluations.values() if "eval_loss" in entry]
    best = min(measured, key=lambda entry: entry["eval_loss"], default=None)
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    return {
        "steps": state.global_step,
        "epochs": round(state.epoch or 0, 3),
        "peak_memory_gb": round(resources.peak_memory(trainer.args.device) / 1e9, 2),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "evaluations": list(evaluations.values()),
        "best_step": best["step"] if best else None,
    }


def _failure(error: BaseException) -> str:
    if isinstance(error, signals.Interrupted):
        return f"ended by {signal.Signals(error.code - 128).name}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


def _exit_reason(trainer: Any) -> str:
    args, state = trainer.args, trainer.state
    if state.global_step >= state.max_steps:
        return "all steps are done"
    stopping = trainer.early_stopping
    if stopping and stopping.early_stopping_patience_counter >= stopping.early_stopping_patience:
        return f"early stopping: {stopping.early_stopping_patience} evaluations without a better {args.metric_for_best_model}"
    return f"stopped at step {state.global_step} of {state.max_steps}"


def files_of(dataset: Any) -> list[dict[str, Any]]:
    """Return path, hash, and rows and tokens in use of each file of a SupervisedDataset.

    Tokens are None where --lazy_preprocess has not counted all.
    """
    files, kept = dataset.conversations.files(), np.asarray(dataset.kept)
    rows = np.bincount(dataset.conversations.file_of(dataset.numbers()), minlength=len(files))
    sizes = np.asarray(dataset.sizes)[kept]
    tokens = np.bincount(dataset.conversations.file_of(kept), sizes, minlength=len(files))
    counted = dataset.examined == len(dataset.conversations)
    return [
        {"path": file.name, "hash": _hash(file), "rows": int(rows[n]), "tokens": int(tokens[n]) if counted else None}
        for n, file in enumerate(files)
    ]


def _hash(file: Records) -> str:
    """Return the SHA-256 of a file; of what is none (a hub dataset, a pipe), what its reader knows it by."""
    if not os.path.isfile(file.name):
        return file.fingerprint()
    with open(file.name, "rb") as content:
        return f"sha256:{hashlib.file_digest(content, 'sha256').hexdigest()}"


def hardware(args: Any) -> dict[str, Any]:
    """Return what a run trains on."""
    gpu = args.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if gpu else f"CPU ({platform.machine()})",
        "processes": args.world_size,
        "machines": console.node_count(),
        "cpu_cores": os.cpu_count(),
        "device_memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1) if gpu else None,
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _commit() -> str | None:
    """Return the commit of this repository, with a mark if files were changed since; None where it is no checkout."""
    git = ["git", "-C", str(Path(__file__).resolve().parents[2])]
    try:
        options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 10, "check": True}
        commit = subprocess.run([*git, "rev-parse", "HEAD"], **options).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], **options).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit} and changes" if changed else commit
