"""What every room may use: the error for a user's mistake, and printing once a run."""

import atexit
import logging
import os
import sys
import threading
import time
import warnings


class UserError(Exception):
    """A mistake in the user's files or flags, told in one sentence; the scripts print it and exit with code 2."""


def fail(error):
    """Print a user's mistake as one sentence and leave with exit code 2.

    When all ranks found the same, the first one ends, the launcher ends the others, and it is told once.
    """
    if rank() > 0:
        time.sleep(3)
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)


def leave():
    """End the program with exit code 0, as the interpreter does, but at once when the last output is written.

    A thread of gloo may still let go of a tensor. If the interpreter is taken apart meanwhile, that thread ends the
    finished run with SIGABRT ("terminate called without an active exception").
    """
    threading._shutdown()  # waits for the threads that the interpreter would wait for
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def quiet():
    """Leave out what libraries say of themselves at import, which no user of this script can act on.

    For --help leave out peft, too: transformers would import it, and a compiler with it, which takes seconds.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        sys.modules["peft"] = None
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.* is deprecated")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of kernels for CPU inference
    if not os.path.exists("/dev/nvidiactl"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no GPU


def say(text):
    """Print once a run, not once a rank."""
    if rank() == 0:
        print(text, flush=True)


def rank():
    """Number of this process among all that train together, before and without torch.distributed."""
    return int(os.environ.get("RANK", "0"))
