"""Real signals to real processes: what is saved, what is said, the exit code, and how the run goes on."""

import json
import signal
import subprocess
import sys

import pytest

from helpers import ROOT, ROWS, argv, run_forked, write

pytestmark = pytest.mark.slow
STEPS = ["--eval_strategy", "steps", "--eval_steps", 2]
EPOCHS = ["--eval_strategy", "epoch"]
MOMENTS = {  # when: what is signalled, and with which further flags
    "in a step": {"when": ["on_step_begin", 3], "signals": ["SIGINT"], "more": STEPS},
    "in an evaluation": {"when": ["on_prediction_step", 5], "signals": ["SIGTERM"], "more": STEPS},
    "before an evaluation": {"when": ["on_step_begin", 4], "signals": ["SIGTERM"], "more": STEPS},
    "in a save": {"when": ["checkpoint-2/adapter_config.json", 1], "signals": ["SIGUSR1"], "more": [*STEPS, "--save_strategy", "steps", "--save_steps", 2]},
    "in all processes": {"when": ["on_step_begin", 3], "signals": ["SIGTERM"], "group": True, "more": [*STEPS, "--dataloader_num_workers", 2]},
    "at the end of an epoch": {"when": ["on_step_begin", 4], "signals": ["SIGTERM"], "more": EPOCHS},
}  # fmt: skip
CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 138, "SIGHUP": 129}


@pytest.fixture(scope="module")
def ran(tiny_model, tmp_path_factory):
    """{name of a case: what signalled.py found, and the folder of the output}."""
    folder = tmp_path_factory.mktemp("signalled")
    rows = write(folder / "rows.jsonl", ROWS)
    held_out = write(folder / "held_out.jsonl", ROWS[:5])

    def words(name, *more):
        (folder / name).mkdir()
        words = argv(tiny_model, rows, folder / name / "out", "--eval_data_path", held_out, "--use_lora", *more)
        words[words.index("--per_device_train_batch_size") + 1] = "2"
        return [*words, "--num_train_epochs", "2", "--per_device_eval_batch_size", "2"]

    cases = {"undisturbed": {"words": words("undisturbed", *STEPS)}}
    cases["undisturbed epochs"] = {"words": words("undisturbed epochs", *EPOCHS)}
    for name, moment in MOMENTS.items():
        cases[name] = {**moment, "words": words(name, *moment["more"]), "resumes": True}
    step = {"when": ["on_step_begin", 3], "signals": ["SIGTERM"]}
    cases["unsaved"] = {**step, "words": words("unsaved", "--save_on_signal", "False")}
    cases["data"] = {"when": ["rows.jsonl", 1], "signals": ["SIGTERM"], "words": words("data")}
    cases["twice"] = {**step, "signals": ["SIGINT", "SIGINT"], "words": words("twice")}
    cases["last step"] = {"when": ["on_step_begin", 8], "signals": ["SIGHUP"], "words": words("last step")}
    (folder / "cases.json").write_text(json.dumps(cases))
    program, words = ROOT / "tests" / "training" / "signalled.py", [folder / "cases.json", folder / "out.json"]
    codes, said = run_forked(folder, program, words, 1)
    assert codes == [0], said[-3000:]
    found = json.loads((folder / "out.json").read_text())
    return {name: result | {"folder": folder / name / "out"} for name, result in found.items()}


def course(output):
    """All that is logged but the time that it took."""
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    timed = ("second", "minute", "runtime", "memory", "train_loss", "padding")
    entries = [{key: value for key, value in entry.items() if not any(part in key for part in timed)} for entry in log]
    return [entry for entry in entries if entry.keys() - {"epoch", "step", "total_flos"}]


@pytest.mark.parametrize("name", MOMENTS)
def test_a_signal_saves_a_checkpoint_says_how_to_go_on_and_gives_its_exit_code(ran, name):
    found = ran[name]
    (number,) = MOMENTS[name]["signals"]
    assert found["code"] == CODES[number], found["said"]
    assert len(found["checkpoints"]) == 1
    assert f"{number}: {found['checkpoints'][0]} is saved in " in found["said"]
    assert found["said"].count("--resume_from_checkpoint auto") == 1
    assert "Traceback" not in found["said"]


@pytest.mark.parametrize("name", MOMENTS)
def test_the_run_goes_on_to_the_weights_and_evaluations_of_an_undisturbed_one_bit_for_bit(ran, name):
    found, whole = ran[name], ran["undisturbed epochs" if MOMENTS[name]["more"] is EPOCHS else "undisturbed"]
    assert (whole["code"], found["resumed"]) == (0, 0), found["then"]
    assert course(found["folder"]) == course(whole["folder"])
    for path in ("adapter_model.safetensors", "best/adapter_model.safetensors", "best/metrics.json"):
        assert (found["folder"] / path).read_bytes() == (whole["folder"] / path).read_bytes(), path


def test_the_checkpoint_is_that_of_the_step_in_which_the_signal_came(ran):
    steps = {name: ran[name]["checkpoints"] for name in MOMENTS}
    assert steps == {
        "in a step": ["checkpoint-3"],
        "in an evaluation": ["checkpoint-4"],  # its second one; each has three batches
        "before an evaluation": ["checkpoint-4"],
        "in a save": ["checkpoint-2"],
        "in all processes": ["checkpoint-3"],
        "at the end of an epoch": ["checkpoint-4"],
    }


def test_those_who_want_no_checkpoint_get_none(ran):
    assert ran["unsaved"]["code"] == 143 and not ran["unsaved"]["checkpoints"]
    assert "SIGTERM: ended at once (--save_on_signal False)" in ran["unsaved"]["said"]


def test_while_the_data_is_prepared_there_is_nothing_to_save(ran):
    assert ran["data"]["code"] == 143 and not ran["data"]["folder"].exists()
    assert ran["data"]["said"].strip() == "SIGTERM: nothing was to be saved yet."


def test_a_second_ctrl_c_ends_the_run_at_once_whatever_the_main_thread_does(ran):
    assert ran["twice"]["code"] == 130 and not ran["twice"]["checkpoints"]
    assert ran["twice"]["seconds"] < 30
    assert "SIGINT: ended at once" in ran["twice"]["said"]


def test_in_the_last_step_the_trained_model_is_what_is_saved(ran):
    found, whole = ran["last step"], ran["undisturbed epochs"]
    assert found["code"] == 129 and not found["checkpoints"]
    for path in ("adapter_model.safetensors", "run.yaml"):
        assert (found["folder"] / path).exists()
    record = json.loads((found["folder"] / "run.json").read_text())
    assert (record["exit_reason"], record["saved"]) == ("ended by SIGHUP", True)
    assert f"SIGHUP: the trained model is in {found['folder']}" in found["said"]
    weights = [(run["folder"] / "adapter_model.safetensors").read_bytes() for run in (found, whole)]
    assert weights[0] == weights[1]


def test_sighup_stays_ignored_under_nohup():
    code = (
        "import os, signal; from recipe import signals; signals.watch(); os.kill(os.getpid(), signal.SIGHUP); print(7)"
    )
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, preexec_fn=ignore)
    assert (done.returncode, done.stdout) == (0, "7\n")
