"""One rank of two is signalled, under every kind of engine: all save and end, and the run goes on bit for bit."""

import os
import signal
import subprocess
import sys

import pytest
from safetensors import safe_open

from helpers import ROOT, ROWS, argv, run_ranks, write
from recipe.distributed.engines import ENGINES

pytestmark = pytest.mark.slow
FLAGS = {
    "DDP": ["--use_cpu", "True"],
    "ZeRO-3": ["--deepspeed", ROOT / "ds_config_zero3.json"],
    "FSDP2": ["--fsdp", "True", "--fsdp_config", ROOT / "recipe" / "distributed" / "fsdp_config.json"],
}


@pytest.fixture(scope="module", params=FLAGS)
def ran(request, tiny_model, tmp_path_factory):
    """(engine, what ranks.py found of a run whose rank 1 is signalled, of its second half, of an undisturbed one)."""
    folder = tmp_path_factory.mktemp(request.param)
    rows = write(folder / "rows.jsonl", ROWS)

    def words(name, *more):
        return argv(tiny_model, rows, folder / name, *FLAGS[request.param], "--use_lora", "--max_steps", 5, *more)

    todo = {
        "signalled": {"argv": words("broken"), "signalled": (1, 2, "SIGTERM")},
        "resumed": {"argv": words("broken", "--resume_from_checkpoint", "auto")},
        "whole": {"argv": words("whole")},
    }
    for job in todo.values():
        job["argv"][job["argv"].index("--per_device_train_batch_size") + 1] = "1"
    found = run_ranks(folder, todo, 2)
    assert not found["problem"], found["problem"]
    return ENGINES[request.param], found


def test_every_rank_saves_and_ends_with_the_code_of_the_signal_that_one_has_received(ran):
    engine, found = ran
    assert engine.wrapped_class in found["signalled"]["classes"]
    assert found["signalled"]["stage"] == engine.deepspeed_stage
    assert found["signalled"]["partitioned"] == (found["signalled"]["parameters"] if engine.shards_weights else 0)
    assert found["signalled"]["code"] == 143
    assert [path.name for path in (found["folder"] / "broken").glob("checkpoint-*")] == ["checkpoint-2"]


def test_the_run_goes_on_as_an_undisturbed_one_bit_for_bit(ran):
    _, found = ran
    losses, norms = (
        [[entry[key] for entry in found[name]["log"] if key in entry] for name in ("resumed", "whole")]
        for key in ("loss", "grad_norm")
    )
    assert len(losses[0]) == 5
    assert losses[0] == losses[1]
    assert norms[0] == norms[1]
    files = [safe_open(found["folder"] / name / "adapter_model.safetensors", "pt") for name in ("broken", "whole")]
    assert all(files[0].get_tensor(name).equal(files[1].get_tensor(name)) for name in files[1].keys())


def test_a_launcher_passes_a_signal_on_and_takes_the_exit_code_of_its_processes(tiny_model, tmp_path):
    rows = write(tmp_path / "rows.jsonl", ROWS)
    words = [*argv(tiny_model, rows, tmp_path / "out", "--use_cpu", "True"), "--num_train_epochs", "500"]
    environment = {**os.environ, "PYTHON": sys.executable, "NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1"}
    command = ["bash", ROOT / "finetune_fsdp.sh", *words, "--gradient_accumulation_steps", "1"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "'loss'" in line:
            process.send_signal(signal.SIGUSR1)
            break
    said = process.stdout.read()
    assert process.wait(60) == 138
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert f"SIGUSR1: {checkpoint.name} is saved in " in said
