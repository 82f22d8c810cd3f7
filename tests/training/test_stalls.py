"""A training that really stands still, in a collective or in the loading of rows, ends with its reason and its stacks."""

import os
import signal
import subprocess
import sys

import pytest

from helpers import ROOT, ROWS, argv, write

pytestmark = pytest.mark.slow

STOPPED_WORKER = """
import signal, sys, psutil, transformers
sys.path.insert(0, "tests")
import finetune, helpers
class Stop(transformers.TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        for child in psutil.Process().children():
            child.send_signal(signal.SIGSTOP)
helpers.call_back(Stop())
finetune.main()
"""
SLEEPING_METRIC = """
import os, time
def score(answer, reference, messages):
    if os.environ["RANK"] == "1":
        time.sleep(300)
    return 0
"""


def run(command, folder):
    """Exit code and all that is printed; whatever the program leaves behind is ended."""
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    try:
        return process.communicate(timeout=120)[0], process.returncode
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None


@pytest.fixture
def words(tiny_model, tmp_path):
    rows = write(tmp_path / "rows.jsonl", ROWS)
    more = ["--use_lora", "--use_cpu", "True", "--per_device_train_batch_size", "1", "--stall_minutes", "0.1"]
    return [*argv(tiny_model, rows, tmp_path / "out"), *more]


def test_a_worker_that_loads_no_more_rows_ends_the_run(words, tmp_path):
    said, code = run([sys.executable, "-c", STOPPED_WORKER, *words, "--dataloader_num_workers", 1], tmp_path)
    assert code == 4, said[-3000:]
    assert "error: rank 0 of 1 has made no progress for 0.1 minutes (--stall_minutes) after step" in said
    assert "when rows are loaded" in said
    assert "torch/utils/data/dataloader.py" in said  # where the main thread stands


def test_a_rank_that_hangs_and_the_one_that_waits_for_it_say_where_they_stand(words, tmp_path):
    (tmp_path / "metric.py").write_text(SLEEPING_METRIC)
    held_out = write(tmp_path / "held_out.jsonl", ROWS[:2])
    more = ["--eval_data_path", held_out, "--eval_generate", 2, "--metric", f"{tmp_path}/metric.py:score"]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        2,
        ROOT / "finetune.py",
    ]
    said, code = run([*launch, *words, *more], tmp_path)
    assert code == 1, said[-3000:]  # that of torch.distributed.run
    assert "exitcode  : 4" in said
    for rank in (0, 1):
        assert f"error: rank {rank} of 2 has made no progress" in said
    assert "gather_object" in said  # what rank 0 waits in
    assert "metric.py" in said  # and where rank 1 is
