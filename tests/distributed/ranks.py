"""What every rank of tests/test_engines.py runs: many short trainings under one engine, and what is compared of them.

torchrun --nproc_per_node 2 tests/ranks.py jobs.json results.json
"""

import json
import os
import pathlib
import shutil
import sys
import traceback

from recipe import console
from recipe.distributed import weights

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
import finetune  # isort: skip
import torch
from accelerate.state import AcceleratorState

RANK = int(os.environ.get("RANK", 0))


class Watched(finetune.RecipeTrainer):
    """Leaves itself to be looked at when training has ended."""

    last = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        Watched.last = self


def engine(trainer):
    """What really ran: the classes of the wrapped model and of its parameters, and how many of them are in parts."""
    parameters = list(trainer.model.parameters())
    return {
        "wrapped": type(trainer.model_wrapped).__name__,
        "stage": trainer.model_wrapped.zero_optimization_stage() if trainer.is_deepspeed_enabled else None,
        "partitioned": sum(hasattr(p, "ds_id") or type(p).__name__ == "DTensor" for p in parameters),
        "parameters": len(parameters),
        "leaves": sorted(type(m).__name__ for m in trainer.model.modules() if getattr(m, "_z3_leaf", False)),
    }


def run(job):
    if "copy" in job:
        if RANK == 0:
            shutil.copytree(*job["copy"])
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
    finetune.RecipeTrainer = Watched
    finetune.train(job["argv"])
    trainer = Watched.last
    if "gather" in job:
        model = trainer.accelerator.unwrap_model(trainer.model)
        weights = {n: weights.whole(p).cpu() for n, p in model.named_parameters() if p.requires_grad}
        if RANK == 0:
            torch.save(weights, job["gather"])
    return engine(trainer) | {"log": trainer.state.log_history}


def main(jobs, results):
    done = {}
    for name, job in json.loads(pathlib.Path(jobs).read_text()).items():
        AcceleratorState._reset_state()
        try:
            done[name] = run(job)
        except Exception as error:
            done[name] = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        if RANK == 0:
            pathlib.Path(results).write_text(json.dumps(done))
        if "error" in done[name]:
            os._exit(1)  # ranks may stand at different places now: nothing can follow


if __name__ == "__main__":
    main(*sys.argv[1:])
    console.leave()
