"""Signals that end a run: Ctrl-C, a scheduler's SIGTERM or SIGUSR1, a terminal that closes.

A Python handler runs when the main thread comes back from C code, which may be a collective that waits for a rank that
is gone. The C part of a handler writes the number of the signal into a pipe at once (`signal.set_wakeup_fd`), and a
thread reads it there. So a run can be ended at any moment.

The exit code is that of shells, 128 + the number of the signal: 130 for Ctrl-C, 143 for SIGTERM, 138 for SIGUSR1.
"""

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Iterator

from recipe import console

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# Seconds in which another SIGINT is the same Ctrl-C, that came by way of the terminal and of a launcher.
SAME = 0.5


class Interrupted(SystemExit):
    """End the program because of a signal; raised on all ranks at the same place.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int):
        super().__init__(128 + number)


@dataclasses.dataclass
class _State:
    """What the thread and the main thread share, under `lock`.

    Attributes:
        received: the first signal that waits to be acted on, or 0.
        since: when it came, in seconds of time.monotonic().
        notice: what is printed when one comes, if the run ends later; "" if it ends at once.
        ended: what is printed when the run ends at once.
        parent: in a forked child, the process that it comes from.
    """

    received: int = 0
    since: float = 0.0
    notice: str = ""
    ended: str = ""
    parent: int = 0
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)


_state = _State()


def watch(ended: str = "nothing was to be saved yet.") -> None:
    """Let signals end this program with one sentence and their exit code. Call it in the main thread.

    SIGHUP stays ignored where it is, as under nohup.

    Args:
        ended: the sentence.
    """
    _state.ended = ended
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    os.register_at_fork(before=_remember_parent, after_in_child=_leave_to_parent)
    for number in ENDING:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    threading.Thread(target=_read, args=[reader], daemon=True).start()


def _remember_parent() -> None:
    _state.parent = os.getpid()


def _leave_to_parent() -> None:
    """In a forked child, such as one that loads rows: let only the parent end it, which needs it for its last step.

    Terminals and schedulers signal all processes of a run. Without its parent the child ends, too.
    """

    def wait() -> None:
        while os.getppid() == parent:
            found = signal.sigtimedwait(ENDING, 1)
            if found and found.si_pid == parent:
                break
        os._exit(0)

    parent = _state.parent
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    threading.Thread(target=wait, daemon=True).start()


def _read(reader: int) -> None:
    while True:
        number = os.read(reader, 1)[0]
        if number in ENDING:
            _receive(number)


def _receive(number: int) -> None:
    with _state.lock:
        now = time.monotonic()
        if not _state.notice:
            _end(number, _state.ended)
        if not _state.received:
            _state.received, _state.since = number, now
            _print(f"{signal.Signals(number).name}: {_state.notice}")
        elif number == signal.SIGINT and now - _state.since > SAME:
            _end(number, "ended at once; the newest complete checkpoint stays.")


def received() -> int:
    """Return the number of the signal that this process has received and not acted on, or 0."""
    return _state.received


@contextlib.contextmanager
def deferred(notice: str, afterwards: str, at_once: str) -> Iterator[None]:
    """Let a signal wait until someone asks for it with `received`, or until the end of the block.

    Args:
        notice: what to print when one comes; "" lets it end the program at once.
        afterwards: what to print when one ends the program at the end of the block, or later.
        at_once: the same within the block, if notice is "".

    Raises:
        Interrupted: one came in the block, which has come to its end; in this process alone.
    """
    with _state.lock:
        _state.notice, _state.ended = notice, at_once
    completed = False
    try:
        yield
        completed = True
    finally:
        with _state.lock:
            _state.notice, _state.ended = "", afterwards if completed else at_once
            number, _state.received = _state.received, 0  # an error, or `Interrupted`, may have ended the block already
    if number:
        _print(f"{signal.Signals(number).name}: {afterwards}")
        raise Interrupted(number)


def _print(text: str) -> None:
    if console.rank() == 0:
        console.write_line(text)


def _end(number: int, text: str) -> None:
    _print(f"{signal.Signals(number).name}: {text}")
    os._exit(128 + number)
