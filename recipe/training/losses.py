"""The loss of each micro-batch with its rows: which rows made it infinite, and which ones are far off."""

import collections
import math
import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object

from recipe.console import UserError
from recipe.dataset.packing import Place, places

WAITING = 512  # values that are kept on the device until someone looks at them; 512 bytes each on a GPU
HISTORY, ENOUGH = 256, 32  # micro-batches that a loss is compared with, and how many there must be
# A loss is a spike if it is this far above the median: in standard deviations, as the median absolute deviation
# estimates them (1.4826 MAD), and in nats.
DEVIATIONS, NATS = 10.0, 1.0
TOLD = 20  # spikes that are printed in a run
NAMED = 8  # conversations that a message names


class Value(NamedTuple):
    """A loss, or the gradient norm of a step, of which `rows` are the numbers in the dataset."""

    step: int
    name: str
    rows: list[int]
    value: torch.Tensor | float


class LossWatch:
    """Remembers losses and gradient norms on their device until `look`, so that nothing waits for a GPU.

    Args:
        trainer: whose training is watched.
    Attributes:
        rows: of the micro-batch that is computed, or was the last one; `dataset` is the one that they belong to.
    """

    def __init__(self, trainer: Any):
        self.trainer, self.rows, self.dataset = trainer, [], trainer.train_dataset
        self.values: list[Value] = []
        self.history: collections.deque[float] = collections.deque(maxlen=HISTORY)
        self.told: set[int] = set()

    def add(self, loss: torch.Tensor) -> None:
        """Remember the mean loss of a micro-batch, whose rows are `rows`. Every rank must call it equally often."""
        self.values.append(Value(self.trainer.state.global_step + 1, "loss", self.rows, loss))
        if len(self.values) >= WAITING:
            self.look()

    def add_norm(self, norm: torch.Tensor | float | None) -> None:
        """Remember the gradient norm of the optimizer step, before it is taken."""
        if norm is not None and not self.trainer.args.fp16:  # there an overflow skips its step and is normal
            step = self.trainer.state.global_step + 1
            rows = [row for value in self.values if value.step == step for row in value.rows]
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of FSDP2
            self.values.append(Value(step, "gradient norm", rows, norm))

    def look(self) -> None:
        """Look at all values since the last call. Every rank must call it.

        Raises:
            UserError: one is not finite; on all ranks, with the rows of the first such micro-batch or step.
        """
        values, self.values = [value for value in self.values if not self.trainer.args.logging_nan_inf_filter], []
        if not values:
            return
        device = self.trainer.args.device
        numbers = torch.stack([torch.as_tensor(v.value, dtype=torch.float32, device=device) for v in values]).tolist()
        values = [value._replace(value=number) for value, number in zip(values, numbers, strict=True)]
        infinite = [value for value in values if not math.isfinite(value.value)]
        flag = torch.tensor(float(bool(infinite)), device=device)
        if self.trainer.accelerator.reduce(flag):
            self._refuse(infinite[:1])
        self._tell_spikes(value for value in values if value.name == "loss" and value.rows)

    def _refuse(self, first: list[Value]) -> None:
        """Raise the error of the earliest of all ranks' first values that are not finite."""
        found = [(v.step, v.name, v.value, self._places(v.rows)) for v in first]
        found = gather_object(found)
        step, name = min(((step, name) for step, name, _, _ in found), key=lambda one: (one[0], one[1] != "loss"))
        earliest = [(number, where) for *key, number, where in found if key == [step, name]]
        named = list(dict.fromkeys(place for _, where in earliest for place in where))
        raise UserError(
            f"step {step}: the {name} is {earliest[0][0]} with {in_words(named)}; training is stopped, earlier "
            "checkpoints are untouched. Lower --learning_rate, use --bf16 in place of --fp16, or mend these rows."
        )

    def _tell_spikes(self, values: Iterable[Value]) -> None:
        for step, _, rows, loss in values:
            if len(self.history) >= ENOUGH:
                median = statistics.median(self.history)
                deviation = 1.4826 * statistics.median(abs(other - median) for other in self.history)
                new = set(rows) - self.told
                if loss > median + max(NATS, DEVIATIONS * deviation) and new and len(self.told) < TOLD:
                    self.told |= new
                    where = in_words(self._places(rows))
                    print(f"step {step}: the loss is {loss:.3g} with {where}; half are below {median:.3g}.", flush=True)
            self.history.append(loss)

    def _places(self, rows: list[int]) -> list[Place]:
        return [place for row in rows[:NAMED] for place in places(self.trainer.train_dataset, row)]


def in_words(named: list[Place]) -> str:
    """Name conversations by their files and records."""
    more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
    return ", ".join(place.where for place in named[:NAMED]) + more if named else "rows that are not known"
