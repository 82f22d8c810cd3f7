"""Train and be killed at every file that is written, renamed or deleted; test_killed.py looks at what is left.

python killed.py results.json OUTPUT WORD ...    # the command line of finetune.py but for --output_dir

Every run is a fork of this process, which has imported everything and computed nothing.
"""

import contextlib
import gc
import importlib
import json
import os
import pathlib
import shutil
import signal
import sys

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parents[i]) for i in (2, 1)]
import finetune  # noqa: E402
from helpers import leave_pictures_out  # noqa: E402
from recipe.training import checkpoints, staging  # noqa: E402

CHANGES = {"os.mkdir": 0, "os.rename": 0, "os.remove": 0, "os.rmdir": 0, "os.chmod": 0, "shutil.rmtree": 0}


def watch(output, count, events):
    """Count what happens in the folder of a checkpoint or of the staging area; end with SIGKILL at number `count`."""

    def hook(event, arguments):
        if event == "open":
            path, mode, flags = arguments
            if not isinstance(path, (str, os.PathLike)) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in CHANGES:
            path = arguments[CHANGES[event]]
        else:
            return
        path = str(path)
        happened = f"{event} {path.removeprefix(output)}"
        if path.startswith(output) and (staging.SAVING in path or "checkpoint-" in path) and happened not in seen:
            seen.add(happened)
            events.write(f"{happened}\n")
            events.flush()
            if len(seen) == count:
                os.kill(os.getpid(), signal.SIGKILL)

    seen = set()
    sys.addaudithook(hook)


def forked(function):
    """Exit status of a function in a process of its own: minus the signal, or the exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        function()
        code = 0
    except SystemExit as error:
        code = error.code
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def main(results, output, *words):
    leave_pictures_out()
    train = lambda *more: finetune.train([*words, "--output_dir", output, *more])  # noqa: E731
    log = pathlib.Path(results).with_suffix(".events")
    imported = pathlib.Path(results).with_suffix(".modules")
    forked(lambda: [train(), imported.write_text("\n".join(sys.modules))])
    for name in set(imported.read_text().splitlines()) - set(sys.modules):  # else every fork imports them again
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    gc.freeze()
    found, count = [], 0
    while True:
        count += 1
        shutil.rmtree(output, ignore_errors=True)
        with open(log, "w") as events:

            def killed(count=count, events=events):
                watch(output, count, events)
                train()

            status = forked(killed)
        if status != -signal.SIGKILL:
            break  # all events of an undisturbed run have been seen
        left = sorted(pathlib.Path(output).glob("checkpoint-*"))
        problems = {path.name: checkpoints.why_incomplete(str(path)) for path in left}
        resumed = forked(lambda: train("--resume_from_checkpoint", "auto"))
        found.append(
            {
                "event": log.read_text().splitlines()[-1],
                "left": [name for name, problem in problems.items() if problem is None],
                "incomplete": [name for name, problem in problems.items() if problem],
                "resumed": resumed,
                "staging": os.path.exists(os.path.join(output, staging.SAVING)),
                "log": json.loads((pathlib.Path(output) / "trainer_state.json").read_text())["log_history"],
                "checkpoints": sorted(path.name for path in pathlib.Path(output).glob("checkpoint-*")),
            }
        )
        pathlib.Path(results).write_text(json.dumps(found))
    state = json.loads((pathlib.Path(output) / "trainer_state.json").read_text())
    pathlib.Path(results).write_text(json.dumps({"undisturbed": [status, state["log_history"]], "killed": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
