"""Start finetune.py on one GPU, on all GPUs of this machine, or on several machines: what the launchers share.

    python -m recipe.launch LAUNCHER one|all WHAT [FLAG ...] -- [WORD ...]

WHAT is trained, FLAG ... are the flags that the launcher stands for, and WORD ... is the user's command line. A flag is
taken from the first of these that sets it: the command line, a config file, the launcher, an edited default in
finetune.py, launch_defaults.yaml, and the default of transformers.
"""

import contextlib
import os
import re
import runpy
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from recipe import command_line, console, signals
from recipe.console import UserError
from recipe.distributed import nodes

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DEFAULTS = os.path.join(ROOT, "recipe", "distributed", "launch_defaults.yaml")
SHORT = {
    "-m": "--model_name_or_path", "--model": "--model_name_or_path", "-d": "--data_path", "--data": "--data_path",
    "-e": "--eval_data_path", "--eval": "--eval_data_path", "-o": "--output_dir", "--output": "--output_dir",
}  # fmt: skip
MOST_PROCESSES = 4096  # on CPUs, and machines; more is a slip of the pen
HELP = """{what}.

usage: bash {launcher} -m MODEL -d DATA ... [-e EVAL ...] [-o OUTPUT] [any flag of finetune.py]
       bash {launcher} run.yaml [any flag of finetune.py]

  -m, --model MODEL    folder or hub name of the model to start from (--model_name_or_path)
  -d, --data DATA ...  one or more files of conversations to train on (--data_path)
  -e, --eval EVAL ...  one or more files to evaluate on (--eval_data_path)
  -o, --output OUTPUT  folder for what is trained (--output_dir; default output)
  -h, --help           this text; that of all flags: python finetune.py --help

Flags of this launcher, unless your command line or run.yaml sets them:
  {flags}

Flags from {defaults}, unless they are set there or their defaults in finetune.py are edited:
{values}
Environment:
  PYTHON                 the Python to use (default: .venv/bin/python beside this script, else python3)
  CUDA_VISIBLE_DEVICES   the GPUs to use (default: all)
"""
HELP_ALL = """\
  NPROC_PER_NODE         processes on this machine (default: one for each GPU; with --use_cpu True, 1)
  NNODES NODE_RANK       for several machines: how many there are, and this one's number, from 0; start the same
                         command on each, with the same checkout, model, data and output folder
  MASTER_ADDR MASTER_PORT  address of machine 0 as the others reach it, and a free port there
  NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME  the network interface to use (ip addr), on machines that have several
"""


def main() -> None:
    """Print the launcher's help or start the training; a user's mistake is one sentence and exit code 2."""
    launcher, gpus, what, *words = sys.argv[1:]
    end = words.index("--")
    case, words = words[:end], [long_form(word) for word in words[end + 1 :]]
    launcher = os.path.basename(launcher)
    if {"-h", "--help"} & set(words):
        with open(DEFAULTS, encoding="utf-8") as file:
            values = "".join(f"  {line}" for line in file if not line.startswith("#"))
        text = HELP.format(
            what=what, launcher=launcher, flags=" ".join(case), defaults=os.path.relpath(DEFAULTS, ROOT), values=values
        )
        print(text + HELP_ALL * (gpus == "all"), end="")
        return
    try:
        words, use_cpu = finetune_words(case, words, launcher)
        visible = usable_gpus(use_cpu)
        start_one(visible, words) if gpus == "one" else start_all(visible, words, launcher)
    except UserError as error:
        console.fail(error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def long_form(word: str) -> str:
    """Return a word of the command line, -m and the like as the flag of finetune.py."""
    name, equals, value = word.partition("=")
    return SHORT.get(name, name) + equals + value


def finetune_words(case: Sequence[str], words: Sequence[str], launcher: str) -> tuple[list[str], bool]:
    """Return the command line of finetune.py, and whether it asks for the CPU.

    Args:
        case: the launcher's own flags.
        words: the user's command line, in long flags.
        launcher: its file name, for messages.
    Raises:
        UserError: a flag that is unknown or has a wrong value, no model or no data, a Python without torch.
    """
    console.configure_libraries()
    try:
        import finetune
    except ImportError as error:
        raise UserError(
            f"{sys.executable} cannot import {error.name}; run {ROOT}/setup.sh requirements.txt, or name a Python that "
            "can: PYTHON=..."
        ) from None
    classes = finetune.ARGUMENTS
    path, words = command_line.split(words)
    config = [path] if path else []
    of_file, of_words = (command_line.read(part, classes, notice=_ignore) for part in (config, words))
    of_launcher = command_line.read(case, classes)
    values = command_line.defaults(classes) | of_launcher | of_file | of_words
    for name, short in (("model_name_or_path", "-m MODEL"), ("data_path", "-d DATA")):
        if values[name] in (None, "", [""]):
            raise UserError(f"{short} is missing (or --{name}, or an entry of a config file); see {launcher} --help.")
    added = _defaults(classes, values["use_lora"] or values["q_lora"]) | of_launcher
    # They stand on the command line, which wins over a config file: leave out what the file sets.
    flags = [f"--{name}" + f"={value}" * (value is not True) for name, value in added.items() if name not in of_file]
    return [*config, *flags, *words], values["use_cpu"]


def _ignore(notice: str) -> None:
    """finetune.py prints it."""


def _defaults(classes: Sequence[type], adapter: bool) -> dict[str, Any]:
    """Return the entries of launch_defaults.yaml whose defaults in finetune.py are still those of transformers."""
    import transformers
    import yaml

    with open(DEFAULTS, encoding="utf-8") as file:
        entries = yaml.safe_load(file)
    values = entries["all"] | entries["adapter" if adapter else "full"]
    ours, inherited = command_line.defaults(classes), command_line.defaults([transformers.TrainingArguments])
    return {name: value for name, value in values.items() if ours[name] == inherited[name]}


def usable_gpus(use_cpu: bool) -> int:
    """Return the number of GPUs to use, 0 for training on the CPU.

    Raises:
        UserError: there is no GPU and the CPU is not asked for.
    """
    import torch

    visible = torch.cuda.device_count()
    if use_cpu:
        print(f"{'--use_cpu' if visible else 'no GPU'}: training on the CPU", flush=True)
        return 0
    if not visible:
        devices = os.environ.get("CUDA_VISIBLE_DEVICES")
        now = "unset" if devices is None else repr(devices)
        raise UserError(
            f"no GPU found (CUDA_VISIBLE_DEVICES is {now}); see whether nvidia-smi lists one, or add --use_cpu True."
        )
    return visible


# ----------------------------------------------------------------------------------------------------------------------
# The start


def start_one(visible: int, words: Sequence[str]) -> None:
    """Run finetune.py in this process, on the first visible GPU."""
    if visible > 1:
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        os.environ["CUDA_VISIBLE_DEVICES"] = first
        print(f"{visible} GPUs are visible: using the first one (CUDA_VISIBLE_DEVICES={first})", flush=True)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)  # some clusters set them, and finetune.py would wait for others
    script = os.path.join(ROOT, "finetune.py")
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")


def start_all(visible: int, words: Sequence[str], launcher: str) -> NoReturn:
    """Run finetune.py in a process for each GPU, after all machines have met.

    Raises:
        UserError: an environment variable is missing or wrong, or another machine does not come.
        SystemExit: with the exit code of the process that failed first; torch.distributed.run's own is always 1.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # torch.distributed.run kills processes that save for longer than 30 s after a signal, and knows no SIGUSR1.
    options = [*torchrun_options(visible, launcher), "--signals_to_handle", "SIGQUIT"]
    for number in signals.ENDING:
        if signal.getsignal(number) != signal.SIG_IGN or number != signal.SIGHUP:
            signal.signal(number, _pass_on)
    try:
        run(parse_args([*options, os.path.join(ROOT, "finetune.py"), *words]))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        raise SystemExit(code if code > 0 else 128 - code) from None  # for a signal, what shells give
    raise SystemExit(0)


def _pass_on(number: int, frame: Any) -> None:
    """Hand a signal to the processes that train; they end the run, and this program with it."""
    import psutil

    ranks = psutil.Process().children()
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.send_signal(number)
    if not ranks:
        raise SystemExit(128 + number)


def torchrun_options(visible: int, launcher: str) -> list[str]:
    """Return the options of torch.distributed.run for this machine; when there are several, wait until all have come.

    Raises:
        UserError: an environment variable is missing or wrong, or another machine does not come.
    """
    import torch

    most = visible or MOST_PROCESSES
    processes = _number("NPROC_PER_NODE", 1, most, visible or 1)
    if not os.environ.get("OMP_NUM_THREADS"):  # torch.distributed.run would set 1, slow for an optimizer on the CPU
        os.environ["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // processes))
    machines = _number("NNODES", 1, MOST_PROCESSES, 1)
    if machines == 1:
        if os.environ.get("NODE_RANK", "0") not in ("", "0"):
            raise UserError(f"NODE_RANK={os.environ['NODE_RANK']}, but NNODES, the number of machines, is not set.")
        return ["--standalone", "--nproc_per_node", str(processes)]
    for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UserError(
                f"{name} is not set; NNODES={machines} machines need it on each of them, see {launcher} --help."
            )
    machine, port = _number("NODE_RANK", 0, machines - 1), _number("MASTER_PORT", 1, 65535)
    address = os.environ["MASTER_ADDR"]
    if not re.fullmatch(r"[\w.:-]+", address, re.ASCII):
        raise UserError(f"MASTER_ADDR={address}: expected a name or an address.")
    nodes.meet(machines, machine, address, port)
    return [
        *("--nnodes", str(machines), "--node_rank", str(machine)),
        *("--master_addr", address, "--master_port", str(port), "--nproc_per_node", str(processes)),
    ]


def _number(name: str, lowest: int, highest: int, default: int | None = None) -> int:
    """Return the whole number in an environment variable."""
    value = os.environ.get(name) or str(default)
    if not re.fullmatch(r"0|[1-9]\d{0,8}", value, re.ASCII) or not lowest <= int(value) <= highest:
        raise UserError(f"{name}={value}: expected a whole number from {lowest} to {highest}.")
    return int(value)


if __name__ == "__main__":
    main()
