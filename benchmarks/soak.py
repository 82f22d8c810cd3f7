"""An hour of training with evaluations and checkpoints, undisturbed, and again with kills, signals and resumes.

    python benchmarks/soak.py                       # an hour on one core; --minutes and --seed change it
    python benchmarks/soak.py table                 # the rows of benchmarks/soak.jsonl

The undisturbed run shows whether memory, file descriptors and threads stay flat. Then the same command is started again
and again, with --resume_from_checkpoint auto: each start is ended by a signal at a step and a moment drawn with --seed,
until one comes to the end of the run. Its losses, evaluations and weights must be those of the undisturbed run, bit for
bit. A line with what was found is appended to benchmarks/soak.jsonl; the exit code is 1 if something was not flat or
not equal.
"""

import argparse
import collections
import datetime
import filecmp
import importlib.metadata
import json
import os
import pathlib
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time

from bench import model_folder

ROOT = pathlib.Path(__file__).resolve().parent.parent
CODES = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 138, signal.SIGHUP: 129}
LIVES = 12  # how many starts the disturbed run is aimed at
GROWTH = 1.02  # of resident memory after warm-up, at most


class Life:
    """One start of the program: what it printed, and what it held from second to second.

    Args:
        words: command line of finetune.py.
        ends: (signal, log lines with a loss before it is sent, seconds after the last of them), or None.
    """

    def __init__(self, words, ends=None):
        self.held, self.said, self.losses = [], collections.deque(maxlen=40), 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, "finetune.py", *map(str, words)], cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        threading.Thread(target=self.look, daemon=True).start()
        for line in self.process.stdout:
            self.said.append(line)
            self.losses += "'loss':" in line
            if ends and self.losses == ends[1]:
                time.sleep(ends[2])
                self.process.send_signal(ends[0])
                ends = None
        self.code = self.process.wait()

    def look(self):
        """Note resident memory in MB, file descriptors and threads, every second once there are losses."""
        folder = pathlib.Path("/proc", str(self.process.pid))
        while self.process.poll() is None:
            try:
                status = dict(line.split(":\t", 1) for line in (folder / "status").read_text().splitlines())
                numbers = int(status["VmRSS"].split()[0]) / 1e3, len(os.listdir(folder / "fd")), int(status["Threads"])
            except (OSError, KeyError):  # it has ended
                break
            if self.losses:
                self.held.append(numbers)
            time.sleep(1)

    def growth(self):
        """Return {name: the median of the last quarter of the time over that of the second}."""
        quarter = len(self.held) // 4
        second, last = self.held[quarter : 2 * quarter], self.held[-quarter:]
        medians = [[statistics.median(column) for column in zip(*part, strict=True)] for part in (second, last)]
        names = ("memory", "descriptors", "threads")
        return {name: round(b / a, 4) for name, a, b in zip(names, *medians, strict=True)}


def curve(output):
    """Return [(step, loss or evaluation)] of a run."""
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry.get("loss"), entry.get("eval_loss"), entry.get("eval_exact_match")) for entry in log]


def soak(work, minutes, seed):
    """Return what was found in so many minutes, as a dict."""
    chance = random.Random(seed)
    folder = model_folder("toy", work)
    common = ["--model_name_or_path", folder, "--data_path", "data/train.jsonl", "--use_lora", "--lora_dropout", "0.1",
              "--eval_data_path", "data/validation.jsonl", "--eval_strategy", "steps", "--eval_steps", "100",
              "--eval_generate", "2", "--save_strategy", "steps", "--save_steps", "50", "--logging_steps", "1",
              "--per_device_train_batch_size", "4", "--dataloader_num_workers", "1", "--disable_tqdm", "True",
              "--bf16", "False", "--seed", seed]  # fmt: skip

    def words(name, steps):
        return [*common, "--output_dir", work / name, "--max_steps", steps]

    # How long a start, and 100 steps with an evaluation and two checkpoints, take.
    seconds = {}
    for steps in (1, 201):
        began = time.monotonic()
        life = Life(words("rate", steps))
        seconds[steps] = time.monotonic() - began
        if life.code:
            raise SystemExit("".join(life.said))
        shutil.rmtree(work / "rate")
    each = (seconds[201] - seconds[1]) / 200
    steps = max(100, int((minutes * 60 - (LIVES + 3) * seconds[1]) / 2 / each))

    undisturbed = Life(words("undisturbed", steps))
    if undisturbed.code:
        raise SystemExit("".join(undisturbed.said))
    expected, ends, failed = curve(work / "undisturbed"), collections.Counter(), []
    while True:
        number = chance.choice(list(CODES))
        after, moment = chance.randint(5, max(6, 2 * steps // LIVES)), chance.uniform(0, 3 * each)
        life = Life([*words("disturbed", steps), "--resume_from_checkpoint", "auto"], (number, after, moment))
        if life.code == 0:
            break
        ends[number.name] += 1
        if life.code != CODES[number]:
            failed.append(f"{number.name} after {after} losses: exit code {life.code}\n{''.join(life.said)}")
        if len(failed) > 3:
            break
    flat = undisturbed.growth()
    equal = not failed and curve(work / "disturbed") == expected
    weights = [work / name / "adapter_model.safetensors" for name in ("undisturbed", "disturbed")]
    result = {
        "minutes": minutes, "seed": seed, "steps": steps, "seconds a step": round(each, 3),
        "evaluations": sum(entry[2] is not None for entry in expected), "checkpoints": steps // 50,
        "ended by": dict(ends), "other exit codes": len(failed), "losses equal": equal,
        "weights equal": not failed and filecmp.cmp(*weights, shallow=False), "growth": flat,
        "megabytes": round(statistics.median(held[0] for held in undisturbed.held)),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    print(*failed, sep="\n", file=sys.stderr)
    return result


def table(results):
    print("| steps | ended by | losses and weights | memory | descriptors | threads |\n|" + "---|" * 6)
    for line in results.read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        ended = ", ".join(f"{count} {name}" for name, count in sorted(run["ended by"].items()))
        equal = "equal, bit for bit" if run["losses equal"] and run["weights equal"] else "DIFFER"
        print(f"| {run['steps']:,} | {ended} | {equal} | {' | '.join(f'x {n:.3f}' for n in run['growth'].values())} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["run", "table"], default="run")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the training, and of the signals and their moments")
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "benchmarks" / "soak.jsonl")
    args = parser.parse_args()
    if args.what == "table":
        return table(args.results)
    with tempfile.TemporaryDirectory() as work:
        result = soak(pathlib.Path(work), args.minutes, args.seed)
    with open(args.results, "a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
    print(json.dumps(result, indent=2))
    good = result["losses equal"] and result["weights equal"] and result["growth"]["memory"] <= GROWTH
    raise SystemExit(0 if good and max(result["growth"][name] for name in ("descriptors", "threads")) <= 1 else 1)


if __name__ == "__main__":
    main()
