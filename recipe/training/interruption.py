"""A run that a signal ends: its optimizer step ends, a checkpoint is saved, and every rank leaves with the same code."""

from contextlib import AbstractContextManager
from typing import Any

import torch
import transformers
from transformers import IntervalStrategy, TrainerControl
from transformers.trainer_callback import DefaultFlowCallback

from recipe import signals
from recipe.console import say


def deferred(args: Any) -> AbstractContextManager[None]:
    """Return a context in which a signal waits for the end of the optimizer step, if --save_on_signal says so."""
    notice = (
        "this optimizer step ends, a checkpoint is saved, and the run ends; a second Ctrl-C ends it at once."
        if args.save_on_signal
        else ""
    )
    unsaved = "ended at once (--save_on_signal False); the newest complete checkpoint stays."
    return signals.deferred(notice, f"the trained model is in {args.output_dir}.", unsaved)


class Interruption(transformers.TrainerCallback):
    """Let all ranks agree on a signal that one of them has received, save, and raise `signals.Interrupted`.

    transformers has a callback of its own for --enable_jit_checkpoint. It acts on SIGTERM alone, three seconds later,
    and on the rank that was signalled alone, so the other ranks wait for it forever; it saves between the backward pass
    and the optimizer's step, whose gradients are lost, and into the folder's final name.

    What the run would have evaluated at the step where it ended is evaluated when it goes on.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.number = 0  # of the signal that ends the run
        self.first_step = 0  # the step that the run went on from
        self.pending: tuple[torch.Tensor, torch.cuda.Event] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first_step = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.number = self._agreed()
        if self.number:
            control.should_training_stop = True
            control.should_evaluate = control.should_save = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.number:  # the Trainer comes here from the step that ended it
            control.should_save, control.should_evaluate = state.global_step < state.max_steps, False
            control.should_log &= float(state.epoch).is_integer()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if number := self._agreed():
            self.number = number
            raise signals.Interrupted(number)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.number = self.number or self._agreed(at_once=True)
        if self.number and state.global_step < state.max_steps:  # else the trained model is saved next
            self.leave(f"checkpoint-{state.global_step} is saved")

    def evaluate_if_due(self) -> None:
        """Evaluate the step of the checkpoint that the run goes on from, if it ended before that evaluation."""
        trainer, control = self.trainer, self.trainer.control
        if _evaluation_is_due(trainer.args, trainer.state):
            control.should_evaluate, control.should_log = True, False
            trainer._maybe_log_save_evaluate(None, None, trainer.model_wrapped, None, trainer.state.epoch, None, 0.0)

    def save_unevaluated(self) -> None:
        """Save the step whose evaluation was interrupted, if it was taken in this run. Every rank must call it.

        Raises:
            signals.Interrupted: always.
        """
        state, step = self.trainer.state, self.trainer.state.global_step
        state.log_history = [e for e in state.log_history if e["step"] < step or not any("eval_" in key for key in e)]
        if step == self.first_step:
            self.leave("what it went on from stays" if step else "there is no checkpoint yet")
        self.trainer._save_checkpoint(self.trainer.model, None)
        self.leave(f"checkpoint-{step} is saved")

    def leave(self, what: str) -> None:
        """End the run after a sentence that says how to go on. Every rank must call it.

        Raises:
            signals.Interrupted: always.
        """
        trainer = self.trainer
        trainer.control = trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
        name = signals.signal.Signals(self.number).name
        say(f"{name}: {what} in {trainer.args.output_dir}; to go on, add --resume_from_checkpoint auto.")
        raise signals.Interrupted(self.number)

    def _agreed(self, at_once: bool = False) -> int:
        """Return the number of a signal that a rank has received, the same on every rank, or 0.

        On a GPU, waiting for the answer would leave it without work between two steps. So the answer to the call before
        is returned, unless `at_once`.
        """
        if self.trainer.args.world_size == 1:
            return signals.received()
        flag = torch.full((), signals.received(), dtype=torch.int32, device=self.trainer.args.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        if at_once or flag.device.type == "cpu":
            return int(flag)
        before, copied = self.pending, torch.cuda.Event()
        self.pending = flag.to("cpu", non_blocking=True), copied
        copied.record()
        if before is None:
            return 0
        before[1].synchronize()
        return int(before[0])


def _evaluation_is_due(args: Any, state: Any) -> bool:
    """Return whether the run that wrote a checkpoint ended before the evaluation that belongs to its step."""
    if any("eval_loss" in entry for entry in state.log_history if entry["step"] == state.global_step):
        return False
    control = TrainerControl()
    if args.eval_strategy == IntervalStrategy.EPOCH and float(state.epoch).is_integer():
        DefaultFlowCallback().on_epoch_end(args, state, control)
    elif args.eval_strategy == IntervalStrategy.STEPS:
        DefaultFlowCallback().on_step_end(args, state, control)
    return control.should_evaluate
