"""A training that stands still ends with its reason and the stacks of all threads, and does not hang for hours."""

import faulthandler
import multiprocessing
import os
import threading
import time
from types import TracebackType
from typing import Any, Self

import transformers

from recipe import console

STALLED = 4  # exit code


class StallWatch(transformers.TrainerCallback):
    """End this process when no micro-batch, evaluation batch, log line or save comes for too long; every rank has one.

    Progress is what the Trainer's events tell. A thread looks at the time since the last one, without the time in which
    this process was stopped. It starts and ends with the context.

    Args:
        minutes: how long training may make no progress; 0: it is not watched.
    """

    def __init__(self, minutes: float):
        self.limit = 60 * minutes
        self.interval = min(5.0, self.limit / 10)
        self.clock = self.last = 0.0  # seconds that this process has run, and when it made progress
        self.doing = "before the first step"
        self.ending = threading.Event()

    def __enter__(self) -> Self:
        if self.limit:
            self.ending.clear()
            self.last = self.clock
            threading.Thread(target=self._check, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ending.set()

    def progress(self, doing: str) -> None:
        """Note that training goes on, and with what."""
        self.doing, self.last = doing, self.clock

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress(f"in step {state.global_step + 1}")

    on_substep_end = on_step_begin

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress(f"after step {state.global_step}, when rows are loaded, evaluated or weights are saved")

    on_log = on_save = on_evaluate = on_train_begin = on_epoch_begin = on_step_end

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress(f"in an evaluation after step {state.global_step}")

    def _check(self) -> None:
        before = time.monotonic()
        while not self.ending.wait(self.interval):
            now = time.monotonic()
            self.clock += min(now - before, 2 * self.interval)
            before = now
            if self.clock - self.last > self.limit:
                self._stop()

    def _stop(self) -> None:
        console.write_line(
            f"error: rank {console.rank()} of {console.world_size()} has made no progress for {self.limit / 60:g} minutes "
            f"(--stall_minutes) {self.doing}; the newest complete checkpoint stays. What its threads do:"
        )
        faulthandler.dump_traceback(2)
        for worker in multiprocessing.active_children():  # that loads rows, and may be what hangs
            worker.kill()
        if console.world_size() > 1:
            time.sleep(console.OTHER_RANKS_WAIT)  # for the ranks that wait for this one to print the same
        os._exit(STALLED)
