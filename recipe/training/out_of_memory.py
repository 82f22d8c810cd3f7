"""An allocation that fails becomes one sentence: what was asked for, the longest row of the batch, what helps most."""

import contextlib
import errno
import re
from collections.abc import Iterator
from typing import Any

import torch

from recipe import console
from recipe.console import UserError
from recipe.dataset.packing import places
from recipe.training.plan import Plan

# Of torch's allocators, cuBLAS and NCCL, all of which raise a RuntimeError.
MESSAGE = re.compile(
    r"out of memory|can't allocate memory|not enough memory|ALLOC_FAILED|std::bad_alloc", re.IGNORECASE
)
REQUEST = re.compile(r"tried to allocate ([\d.]+) ?(bytes|[KMGT]iB)", re.IGNORECASE)
GENERAL = "Lower --per_device_train_batch_size, or add --q_lora"


class OutOfMemory(UserError):
    """The memory is used up. It is no mistake in a flag or a file, so the exit code is 1."""

    exit_code = 1


@contextlib.contextmanager
def explained(plan: Plan | None = None) -> Iterator[None]:
    """Raise an OutOfMemory in place of the error of an allocation that fails.

    Args:
        plan: of the training in the block; None: it does not train yet.

    Raises:
        OutOfMemory: what was asked for, and what helps.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not is_out_of_memory(error):
            raise
        # Only the text: its traceback holds the tensors of the step.
        problem = _asked_for(error)
    else:
        return
    if plan is None:
        raise OutOfMemory(f"{problem} before the first step. {GENERAL}.")
    raise OutOfMemory(f"{problem}{_batch(plan.trainer)}; checkpoints are untouched. {_remedy(plan)}.")


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that memory cannot be allocated, on a GPU or in main memory."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(MESSAGE.search(str(error)))


def _asked_for(error: Exception) -> str:
    found = REQUEST.search(str(error))
    size = f" ({found[1]} {found[2]} more were asked for)" if found else ""
    if found and found[2].lower() == "bytes":
        size = f" ({int(found[1]) / 1e9:.2f} GB more were asked for)"
    rank = f" on rank {console.rank()}" if console.launched() else ""
    return f"out of memory{rank}{size}"


def _batch(trainer: Any) -> str:
    watch = trainer.losses
    step = f" in step {trainer.state.global_step + 1}"
    try:
        found = [place for row in watch.rows for place in places(watch.dataset, row)]
        longest = max(found, key=lambda place: place.tokens)
    except Exception:  # whatever fails without memory: what is known is said
        return step
    of = f"the longest of {len(found)} conversations in the batch" if found[1:] else "the conversation in the batch"
    return f"{step}; {of} is {longest.where} with {longest.tokens:,} tokens"


def _remedy(plan: Plan) -> str:
    trainer = plan.trainer
    if trainer.losses.dataset is not trainer.train_dataset:
        return "Lower --per_device_eval_batch_size"
    try:
        choices = plan.remedies()[:2]
    except Exception:
        return GENERAL
    if not choices:
        return GENERAL
    return "By the estimate, " + ", and ".join(f"{flags} saves {saved / 1e9:.2g} GB" for flags, saved in choices)
