"""What every room may use: the error for a user's mistake, printing once a run, and which process this is."""

import atexit
import functools
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import NoReturn

OTHER_RANKS_WAIT = 10  # seconds in which the launcher, after rank 0 has failed, ends the other ranks


class UserError(Exception):
    """A mistake in the user's files or flags, described in one sentence; the scripts print it, exit code 2."""

    exit_code = 2


def fail(error: UserError) -> NoReturn:
    """Print a user's mistake as one sentence and exit with its code.

    When all ranks find the same mistake, rank 0 prints it and the launcher ends the others before they print it again.
    An error with another code than 2 is that of one rank.

    Raises:
        SystemExit: always.
    """
    if rank() > 0 and error.exit_code == 2:
        time.sleep(OTHER_RANKS_WAIT)
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(error.exit_code)


def run(program: Callable[[], object]) -> None:
    """Run a program, and end the process after a user's mistake (see `fail`) or where it ends itself.

    Raises:
        SystemExit: after a user's mistake, or with the sentence that a library ends the program with.
    """
    try:
        program()
    except UserError as error:
        fail(error)
    except SystemExit as end:
        if isinstance(end.code, str):
            raise
        leave(end.code or 0)


def leave(code: int = 0) -> NoReturn:
    """End a finished program: wait for threads, run exit functions, and skip the interpreter's teardown.

    gloo's threads live on after destroy_process_group. One that still frees a tensor when the interpreter is torn down
    ends the finished run with SIGABRT ("terminate called without an active exception"), in about 1 of 80 runs.
    """
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def write_line(text: str) -> None:
    """Print a line to stderr from any thread, whatever the main thread does and holds."""
    flush = threading.Thread(target=sys.stdout.flush, daemon=True)  # in a thread, as it may wait for a lock
    flush.start()
    flush.join(1)
    os.write(2, f"\n{text}\n".encode())  # starts a new line, below a progress bar


def configure_libraries() -> None:
    """Set what libraries read when they load or first compute; call it before they load.

    * What they print at import, and a user of the scripts cannot act on, is silenced.
    * On a CPU, oneDNN compiles a kernel for each shape of a product and caches 1,024 of them, and torch's own layer
      another 1,024: with rows of many lengths, 0.7 MB a shape. 128 are enough for the products of one step.
    * torch aligns tensors of 2 MB and more to large pages. glibc reuses these blocks better: a training of SmolLM2-135M
      took 1.85 GB instead of 2.05 GB with gradient checkpointing, and 4.5 GB instead of 4.8 GB without. Its steps were as
      fast, and its start took up to 3 seconds longer.
    * --help needs no peft, which transformers would import, and a compiler with it, in seconds.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        sys.modules["peft"] = None  # type: ignore[assignment]
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.* is deprecated")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # about kernels for inference on a CPU
    if not os.path.exists("/dev/nvidiactl"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns that it found no GPU
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "128")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def import_bitsandbytes() -> None:
    """Import bitsandbytes, which peft would import, without torch's compiler: a fifth of the time of all imports.

    bitsandbytes compiles some of its functions, and would import the compiler for that; now they are compiled when they
    are called for the first time.
    """
    import torch

    def compile_later(function=None, **options):
        if function is None:
            return functools.partial(compile_later, **options)
        compiled = functools.cache(lambda: compile_now(function, **options))
        return functools.wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    compile_now, torch.compile = torch.compile, compile_later
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        pass
    finally:
        torch.compile = compile_now


def say(text: str) -> None:
    """Print once a run, not once a rank."""
    if rank() == 0:
        print(text, flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Which process this is, from the environment that torchrun sets; valid before torch.distributed is initialised


def launched() -> bool:
    """Return whether torchrun (or another launcher) has started this process as a rank, perhaps the only one."""
    return "RANK" in os.environ


def rank() -> int:
    """Return the number of this process among all processes of the run."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return the number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """Return the number of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """Return the number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def node_rank() -> int:
    """Return the number of this machine among those of the run."""
    if "GROUP_RANK" in os.environ:
        return int(os.environ["GROUP_RANK"])
    return rank() // local_world_size() if "LOCAL_WORLD_SIZE" in os.environ else 0


def node_count() -> int:
    """Return the number of machines of the run, 1 where the launcher does not say."""
    return world_size() // local_world_size() if "LOCAL_WORLD_SIZE" in os.environ else 1


def store_address() -> tuple[str, int]:
    """Return host and port of the store that torch.distributed.run keeps on node 0."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def restart_count() -> int:
    """Return how many times torch.distributed.run has started the processes again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
