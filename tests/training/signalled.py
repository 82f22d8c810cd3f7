"""Train, be signalled at a chosen moment, and go on; test_signals.py looks at what is left.

python signalled.py CASES.json RESULTS.json

Every run is a fork of this process, which has imported everything and computed nothing. CASES.json is
{name: {"words": command line, "when": [event, count], "signals": [...], "group": bool, "resumes": bool}}; with "group",
those who load rows are signalled, too.
"""

import contextlib
import gc
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parents[i]) for i in (2, 1)]
from recipe import console, signals  # noqa: E402

console.configure_libraries()  # as the program does, before the libraries are imported
import transformers  # noqa: E402

import finetune  # noqa: E402
from helpers import call_back, leave_pictures_out  # noqa: E402


class Signal(transformers.TrainerCallback):
    """Sends signals to this process, or to its group, when an event of the Trainer comes for the `count`-th time."""

    def __init__(self, event, count, numbers, group):
        self.left, self.numbers = count, numbers
        self.target = str(-os.getpid() if group else os.getpid())
        setattr(self, event, self.happens)

    def happens(self, *args, **kwargs):
        self.left -= 1
        if self.left:
            return
        for number in self.numbers:
            subprocess.run(["kill", "-s", number.removeprefix("SIG"), "--", self.target], start_new_session=True)
            time.sleep(0.7)
        if self.numbers[1:]:
            time.sleep(60)  # what a collective does that waits for a rank that is gone


def watch_files(part, numbers):
    """Send signals when a file whose path has this part is opened for the first time."""

    def hook(event, arguments):
        if event == "open" and left and part in str(arguments[0]):
            os.kill(os.getpid(), getattr(signal, left.pop()))
            time.sleep(0.3)

    left = list(numbers)
    sys.addaudithook(hook)


def program(case):
    """What `python finetune.py WORDS` does."""
    event, count = case.get("when", ["never", 1])
    if event.startswith("on_"):
        call_back(Signal(event, count, case["signals"], case.get("group")))
    elif event != "never":
        watch_files(event, case["signals"])
    sys.argv = ["finetune.py", *case["words"]]
    signals.watch()
    finetune.main()
    console.leave()


def forked(function, log):
    """Exit code of a function in a process of its own, and its seconds; what it prints goes into a file."""
    started = time.monotonic()
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        return os.waitstatus_to_exitcode(status), time.monotonic() - started
    os.setpgrp()
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(written, 1)
    os.dup2(written, 2)
    try:
        function()
    finally:
        os._exit(99)


def main(cases, results):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, under which the tests may run, lets programs ignore it
    leave_pictures_out()
    cases = json.loads(pathlib.Path(cases).read_text())
    imported = pathlib.Path(results).with_suffix(".modules")
    first = next(iter(cases.values()))["words"]
    forked(lambda: [finetune.train(first), imported.write_text("\n".join(sys.modules))], imported.with_suffix(".log"))
    for name in set(imported.read_text().splitlines()) - set(sys.modules):  # else every fork imports them again
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    gc.freeze()
    found = {}
    for name, case in cases.items():
        output = pathlib.Path(case["words"][case["words"].index("--output_dir") + 1])
        log = output.with_suffix(".log")
        code, seconds = forked(lambda case=case: program(case), log)
        found[name] = {
            "code": code, "seconds": seconds, "said": log.read_text(), "left": sorted(os.listdir(output.parent)),
            "checkpoints": sorted(path.name for path in output.glob("checkpoint-*")),
        }  # fmt: skip
        if case.get("resumes"):
            words = [*case["words"], "--resume_from_checkpoint", "auto"]
            found[name]["resumed"], _ = forked(lambda words=words: program({"words": words}), log)
            found[name]["then"] = log.read_text()
    pathlib.Path(results).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
