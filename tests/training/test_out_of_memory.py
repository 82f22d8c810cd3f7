"""Memory that runs out, for real on a CPU, is one sentence with the row and the flags that help."""

import os
import re
import subprocess
import sys

import pytest
import torch

from helpers import ROOT, ROWS, argv, parse, write
from recipe.console import UserError
from recipe.training import checkpoints, out_of_memory
from recipe.training.plan import Plan

LIMITED = """
import resource, sys, transformers
sys.path.insert(0, "tests")
import finetune, helpers
class Limit(transformers.TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + 40_000_000, resource.RLIM_INFINITY))
helpers.call_back(Limit())
finetune.main()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit of a process is Linux's")
def test_a_row_that_does_not_fit_is_named_with_the_flags_that_help_and_the_checkpoint_stays(tiny_model, tmp_path):
    long = {"prompt": "a " * 1500, "completion": "b"}
    rows = write(tmp_path / "rows.jsonl", [*ROWS[:3], long])
    more = ["--per_device_train_batch_size", "2", "--train_sampling_strategy", "sequential", "--use_cpu", "True",
            "--attn_implementation", "eager", "--save_strategy", "steps", "--save_steps", "1"]  # fmt: skip
    words = [*argv(tiny_model, rows, tmp_path / "out"), *more]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *words], capture_output=True, text=True, cwd=ROOT, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr[-3000:]
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    tokens = 1000 * int(re.search(r"with (\d),\d\d\d tokens", sentence)[1])
    assert 1000 <= tokens <= 2000
    assert re.match(r"error: out of memory \(0\.\d\d GB more were asked for\) in step 2; the longest of 2", sentence)
    assert f"is {rows}: record 4 (line 4)" in sentence
    assert re.search(r"By the estimate, --\S+ .*saves .* GB, and --\S+ .*saves .* GB\.$", sentence)
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / "checkpoint-1" / checkpoints.COMPLETE).exists()


@pytest.mark.parametrize(
    "error, asked",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), " (2.00 GiB more"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8000000000 bytes."),
            " (8.00 GB",
        ),
        (MemoryError(), " before"),
        (OSError(12, "Cannot allocate memory"), " before"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), " before"),
    ],
)
def test_every_kind_of_memory_is_recognised(error, asked):
    with pytest.raises(UserError) as raised, out_of_memory.explained():
        raise error
    assert str(raised.value).startswith(f"out of memory{asked}")
    assert raised.value.exit_code == 1


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), OSError(28, "No space left"), UserError("out of memory")]
)
def test_other_errors_stay_as_they_are(error):
    with pytest.raises(type(error)) as raised, out_of_memory.explained():
        raise error
    assert raised.value is error


def test_the_flags_are_those_that_the_plan_finds_best(tiny_model, tmp_path, prepared):
    rows = write(tmp_path / "rows.jsonl", ROWS)

    def best(*more):
        words = argv(tiny_model, rows, tmp_path / "out", "--gradient_checkpointing", "False", *more)
        arguments = parse(words)
        found = Plan(prepared(words), torch.float32, arguments[3]).remedies()
        assert [saved for _, saved in found] == sorted((saved for _, saved in found), reverse=True)
        return [flags for flags, _ in found]

    full = best()
    assert "--per_device_train_batch_size 1 with --gradient_accumulation_steps 4" in full
    assert {"--gradient_checkpointing True", "--use_lora", "--q_lora"} <= set(full)
    packed = best("--q_lora", "--pack_tokens", "512", "--per_device_train_batch_size", "1")
    assert set(packed) <= {"--pack_tokens 256", "--gradient_checkpointing True"} and packed


@pytest.mark.parametrize(
    "flag, remedy",
    [
        ("--auto_find_batch_size", "--auto_find_batch_size: lowers .* double --gradient_accumulation_steps"),
        ("--enable_jit_checkpoint", "--enable_jit_checkpoint: .* --save_on_signal saves on every signal and rank"),
    ],
)
def test_flags_of_transformers_that_would_do_worse_are_refused(tiny_model, tmp_path, flag, remedy):
    rows = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(UserError, match=remedy):
        parse(argv(tiny_model, rows, tmp_path / "out", flag, "True"))
