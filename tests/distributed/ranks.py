"""What every rank of test_engines.py runs: many short trainings under one engine, and what is compared of them.

torchrun --nproc_per_node 2 tests/distributed/ranks.py jobs.json results.json    # by hand; tests start it by forked.py
"""

import contextlib
import dataclasses
import gc
import io
import json
import os
import pathlib
import shutil
import signal
import sys
import traceback

import torch
import transformers
from accelerate.state import AcceleratorState

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parents[level]) for level in (2, 1)]
import finetune  # noqa: E402
from helpers import leave_pictures_out, parse  # noqa: E402
from recipe import console, signals  # noqa: E402
from recipe.distributed import engines, weights  # noqa: E402
from recipe.model import long_rows  # noqa: E402
from recipe.model.experts import is_routed_weight  # noqa: E402

RANK = int(os.environ.get("RANK", 0))


class Watched(finetune.RecipeTrainer):
    """Leaves itself to be looked at when training has ended."""

    last = signalled = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        Watched.last = self
        if Watched.signalled:
            self.add_callback(Signal(*Watched.signalled))


class Signal(transformers.TrainerCallback):
    """Sends a signal to one rank when its n-th optimizer step begins."""

    def __init__(self, rank, step, number):
        self.rank, self.step, self.number = rank, step, number

    def on_step_begin(self, args, state, control, **kwargs):
        if self.rank == RANK and self.step == state.global_step + 1:
            os.kill(os.getpid(), getattr(signal, self.number))


def bytes_here(parameter):
    """Bytes of a parameter, or of the part of it, that this process holds."""
    part = getattr(parameter, "ds_tensor", parameter)
    part = part.to_local() if hasattr(part, "to_local") else part
    return part.numel() * part.element_size()


def engine(trainer):
    """What really ran: the classes of the wrapped model and of its parameters, and how many of them are in parts."""
    parameters = list(trainer.model.parameters())
    return {
        "classes": [kind.__name__ for kind in type(trainer.model_wrapped).__mro__],
        "stage": trainer.model_wrapped.zero_optimization_stage() if trainer.is_deepspeed_enabled else 0,
        "partitioned": sum(hasattr(p, "ds_id") or type(p).__name__ == "DTensor" for p in parameters),
        "parameters": len(parameters),
        "expert_bytes": sum(bytes_here(p) for name, p in trainer.model.named_parameters() if is_routed_weight(name)),
        "leaves": sorted(type(m).__name__ for m in trainer.model.modules() if getattr(m, "_z3_leaf", False)),
    }


def built_twice(argv):
    """What a first building of TrainingArguments changes in the environment, and in what further ones differ from it."""
    before = dict(os.environ)
    args = parse(argv)[2]
    first = dict(os.environ)
    facts = [
        [
            engines.engine_of(one).label,
            one.deepspeed,
            one.fsdp_config,
            one.accelerator_config.to_dict(),
            one.bf16,
            one.world_size,
            str(one.distributed_state.distributed_type),
        ]
        for one in (args, parse(argv)[2], dataclasses.replace(args))
    ]
    return {
        "environment": sorted(name for name in {**before, **first} if before.get(name) != first.get(name)),
        "later": sorted(name for name in {**first, **os.environ} if first.get(name) != os.environ.get(name)),
        "equal": facts[0] == facts[1] == facts[2],
        "facts": facts,
    }


def run(job):
    if "twice" in job:
        return built_twice(job["argv"])
    if "copy" in job:
        if RANK == 0:
            shutil.copytree(*job["copy"])
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
    long_rows.PIECE, long_rows.SMALL = job.get("long", (2048, 1 << 16))
    finetune.RecipeTrainer = Watched
    Watched.signalled = job.get("signalled")
    try:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            finetune.train(job["argv"])
    except signals.Interrupted as interrupted:
        return engine(Watched.last) | {"code": interrupted.code}
    trainer = Watched.last
    if "gather" in job:
        model = trainer.accelerator.unwrap_model(trainer.model)
        whole = {n: weights.gather_full(p).cpu() for n, p in model.named_parameters() if p.requires_grad}
        if RANK == 0:
            torch.save(whole, job["gather"])
    return engine(trainer) | {"log": trainer.state.log_history, "said": said.getvalue()}


def main(jobs, results):
    done, todo = {}, json.loads(pathlib.Path(jobs).read_text())
    leave_pictures_out()
    gc.freeze()  # the libraries collect garbage in each training, and need not look through what was imported
    if any("signalled" in job for job in todo.values()):
        signals.watch()
    for name, job in todo.items():
        AcceleratorState._reset_state()
        try:
            done[name] = run(job)
        except Exception as error:
            done[name] = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        if RANK == 0:
            pathlib.Path(results).write_text(json.dumps(done))
        if "error" in done[name]:
            print(done[name]["traceback"], file=sys.stderr, flush=True)  # rank 0 may fail because another one did
            os._exit(1)  # ranks may stand at different places now: nothing can follow


if __name__ == "__main__":
    main(*sys.argv[1:])
    console.leave()
