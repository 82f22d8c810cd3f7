"""Start the ranks of a program as torch.distributed.run does, but as forks of one process that has imported everything.

An import of finetune.py and DeepSpeed takes a rank 8 seconds. tests/distributed/test_launchers.py starts real ones.

python forked.py    # a line of JSON in: {program, words, ranks, folder, environment, out}; a line out: exit codes
"""

import contextlib
import gc
import importlib
import json
import os
import pathlib
import runpy
import signal
import socket
import sys
import traceback

ROOT = pathlib.Path(__file__).resolve().parent.parent


def become(request, rank, port, modules):
    """Run the program in this process, and end it."""
    code = 1
    try:
        os.environ.clear()
        os.environ.update(request["environment"])
        if request["ranks"] > 1:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(request["ranks"]), MASTER_ADDR="127.0.0.1",
                LOCAL_WORLD_SIZE=str(request["ranks"]), GROUP_RANK="0", MASTER_PORT=str(port),
            )  # fmt: skip
        file = os.open(request["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.chdir(request["folder"])
        sys.argv = [request["program"], *request["words"]]
        leave = os._exit

        def leave_with_names(code):
            with contextlib.suppress(OSError):
                os.write(modules, "\n".join(sys.modules).encode())
            leave(code)

        if modules is not None:
            os._exit = leave_with_names
        runpy.run_path(request["program"], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(request, modules=None):
    """Exit code of each rank; when one fails, the others are ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = {}
    for rank in range(request["ranks"]):
        child = os.fork()
        if not child:
            become(request, rank, port, modules if rank == 0 else None)
        children[child] = rank
    codes = [None] * request["ranks"]
    while None in codes:
        child, status = os.wait()
        codes[children[child]] = os.waitstatus_to_exitcode(status)
        if codes[children[child]]:
            for other, rank in children.items():
                if codes[rank] is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(other, signal.SIGKILL)
    return codes


def main():
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    import deepspeed  # noqa: F401

    import finetune  # noqa: F401

    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        file = os.memfd_create("modules")
        codes = run(request, file)
        names = os.pread(file, os.fstat(file).st_size, 0).decode().splitlines()
        os.close(file)
        print(json.dumps(codes), file=answers, flush=True)
        for name in set(names) - set(sys.modules):  # else every fork imports them again
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        gc.freeze()


if __name__ == "__main__":
    main()
