"""The launchers: what they start, what they refuse in a sentence, and how several machines meet and part."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch

import finetune
from helpers import ROOT, ROWS, argv, history, parse, write
from recipe import command_line, launch
from recipe.console import UserError
from recipe.distributed import nodes

LAUNCHERS = sorted(path.name for path in ROOT.glob("finetune_*.sh"))
SINGLE = [name for name in LAUNCHERS if "single_gpu" in name]
SEVERAL = [name for name in LAUNCHERS if "single_gpu" not in name]
MODEL_DATA = ("-m", "model", "-d", "rows.jsonl")
PYTHON = """#!/bin/sh
# Stands for Python: prints the words that it is to run.
for word in "$@"; do echo "word $word"; done
echo "path $PYTHONPATH"
echo "cwd $PWD"
exit "$CODE"
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Function that runs a launcher with the words and the environment of a test, and the Python above."""
    folder = tmp_path_factory.mktemp("a python")
    python = folder / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)

    def run(name, *words, shell="bash", root=ROOT, cwd=folder, **environment):
        plain = {"PATH": os.environ["PATH"], "PYTHON": str(python), "CODE": "0"}
        command = [shell, str(root / name), *map(str, words)]
        return subprocess.run(command, cwd=cwd, env={**plain, **environment}, capture_output=True, text=True)

    return run


def words(done):
    return [line[5:] for line in done.stdout.splitlines() if line.startswith("word ")]


@pytest.fixture(scope="module")
def case(start):
    """Function from a launcher to its own flags."""

    def of(name):
        got = words(start(name))
        assert got[:3] == ["-P", "-m", "recipe.launch"]
        assert got[3:5] == [str(ROOT / name), "one" if name in SINGLE else "all"]
        return got[6 : got.index("--")]

    return of


@pytest.fixture
def flags(case):
    """Function from a launcher and the user's words to what finetune.py gets."""

    def of(name, *words):
        return launch.finetune_words(case(name), [launch.long_form(str(word)) for word in words], name)[0]

    return of


def trained_by(got):
    """The arguments that finetune.py makes of these words."""
    named = command_line.read(got, finetune.ARGUMENTS, notice=lambda text: None)
    return command_line.defaults(finetune.ARGUMENTS) | named


def run(*command, cwd=ROOT, **environment):
    """Run a command with this Python; the launchers find it in PYTHON."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = {**kept, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)


def refused(done):
    """The one sentence of a launcher that ends with exit code 2 and starts nothing."""
    assert done.returncode == 2, done
    assert re.fullmatch("error: .+\n", done.stderr), done.stderr
    assert done.stdout == ""
    return done.stderr


@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_shellcheck_finds_nothing(shell):
    shellcheck = shutil.which(
        "shellcheck", path=f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    scripts = LAUNCHERS if shell == "sh" else ["setup.sh", *(ROOT / "tests").rglob("*.sh")]
    done = subprocess.run([shellcheck, "-s", shell, *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# ----------------------------------------------------------------------------------------------------------------------
# The shell part


@pytest.mark.parametrize("shell", [name for name in ("bash", "dash", "sh") if shutil.which(name)])
@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_hands_on_every_word_as_it_is(name, shell, start):
    given = ["-m", "my model", "--learning_rate", "1e-4", "", "two words", "*", "--lora_r=8", "$HOME", "-1e-4", "--"]
    done = start(name, *given, shell=shell)
    got = words(done)
    assert done.returncode == 0
    assert got[got.index("--") + 1 :] == given


def test_spaces_in_paths(start, tmp_path):
    root, cwd = tmp_path / "check out", tmp_path / "my data"
    cwd.mkdir()
    root.mkdir()
    for name in LAUNCHERS:
        shutil.copy(ROOT / name, root)
    done = start("finetune_lora_ds.sh", "-m", "my model", root=root, cwd=cwd, PYTHONPATH="/mine")
    assert str(root / "ds_config_zero2.json") in words(done)
    assert f"cwd {cwd}\n" in done.stdout
    assert f"path {root}:/mine\n" in done.stdout  # the user's own modules are still found


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_exit_code_is_kept(name, start):
    assert start(name, *MODEL_DATA, CODE="7").returncode == 7


def test_a_python_that_is_not_there_is_an_error(start):
    assert "no-python: no such program" in refused(start("finetune_ds.sh", *MODEL_DATA, PYTHON="no-python"))


def test_a_python_without_torch_is_an_error(tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # without site-packages
    bare.chmod(0o755)
    sentence = refused(run("bash", ROOT / "finetune_ds.sh", *MODEL_DATA, PYTHON=bare))
    assert re.search(r"cannot import (numpy|torch); run", sentence)  # the first that finetune.py imports
    shown = run("bash", ROOT / "finetune_ds.sh", "--help", PYTHON=bare)
    assert shown.returncode == 0
    assert not shown.stderr


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help(name, word, case):
    done = run("bash", ROOT / name, "-m", "x", word)
    assert done.returncode == 0
    assert not done.stderr
    assert f"usage: bash {name} -m MODEL -d DATA" in done.stdout
    assert f"  {' '.join(case(name))}\n" in done.stdout
    assert "learning_rate: 3e-4" in done.stdout
    assert ("NNODES" in done.stdout) == (name in SEVERAL)


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def test_short_words_become_flags(flags):
    got = flags("finetune_lora_ds.sh", "-m", "model", "-d", "a.json", "b.json", "-e", "held.json", "-o", "out")
    assert got[-9:] == [
        "--model_name_or_path", "model", "--data_path", "a.json", "b.json", "--eval_data_path", "held.json",
        "--output_dir", "out",
    ]  # fmt: skip
    long = flags("finetune_lora_ds.sh", "--model=model", "--data", "a.json", "b.json", "--eval", "held.json")
    assert trained_by(long)["model_name_or_path"] == "model"
    assert long[-5:] == got[-7:-2]


@pytest.mark.parametrize(
    "missing, rest",
    [("-m MODEL", ["-d", "x"]), ("-d DATA", ["-m", "x"]), ("-m MODEL", ["-d", "x", "-m", ""])],
)
def test_the_model_and_the_data_are_required(missing, rest, flags):
    with pytest.raises(UserError, match=f"^{missing} is missing .*see finetune_ds.sh --help.$"):
        flags("finetune_ds.sh", *rest)
    assert flags("finetune_ds.sh", "--model_name_or_path=x", "--data-path", "x")


@pytest.mark.parametrize("rest", [["-m"], ["-m", "-d", "x"], ["-m", "x", "-d"]])
def test_a_value_that_is_missing_is_an_error(rest, flags):
    with pytest.raises(UserError, match="^argument --(model_name_or|data)_path: expected (at least )?one argument.$"):
        flags("finetune_ds.sh", *rest)


def test_a_wrong_flag_is_found_before_any_process_starts(flags):
    with pytest.raises(UserError, match="^Unknown flag '--learning_rat'. Did you mean --learning_rate"):
        flags("finetune_ds.sh", *MODEL_DATA, "--learning_rat", "1e-4")


def test_a_launcher_passes_what_its_hardware_needs_and_the_users_flags_win(flags):
    got = flags("finetune_lora_ds.sh", *MODEL_DATA, "--learning_rate", "1e-4", "--deepspeed", "mine.json")
    args = trained_by(got)
    assert args["use_lora"]
    assert args["deepspeed"] == "mine.json"
    assert args["learning_rate"] == 1e-4
    assert args["logging_steps"] == finetune.TrainingArguments.logging_steps  # which Qwen's launchers set to 1


def test_entries_of_a_config_file_win_over_the_launcher(flags, tmp_path):
    file = tmp_path / "run file.yaml"
    file.write_text("model_name_or_path: m\ndata_path: d\nwarmup_ratio: 0.1  # as it was called\nlearning-rate: 1e-3\n")
    got = flags("finetune_lora_ds.sh", file, "--lora_r", "8")
    assert got[0] == str(file)  # where finetune.py looks for it
    assert got[-2:] == ["--lora_r", "8"]
    assert not [word for word in got if "warmup" in word or "learning" in word]
    assert trained_by(got)["warmup_steps"] == 0.1
    file.write_text("model_name_or_path: m\ndata_path: d\nuse_lora: false\ndeepspeed: mine.json\n")
    args = trained_by(flags("finetune_lora_ds.sh", file))
    assert (args["use_lora"], args["deepspeed"], args["learning_rate"]) == (False, "mine.json", 1e-5)


def test_a_config_file_that_cannot_be_read_is_an_error(flags, tmp_path):
    with pytest.raises(UserError, match="no.yaml: cannot be read"):
        flags("finetune_ds.sh", "no.yaml")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        flags("finetune_ds.sh", tmp_path / "bad.json")


@pytest.mark.parametrize("name", LAUNCHERS)
def test_finetune_understands_every_word(name, flags, tiny_model, tmp_path):
    rows = tmp_path / "rows.jsonl"
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    rows.write_text(json.dumps(row) + "\n")
    got = flags(name, "-m", tiny_model, "-d", rows, "-o", tmp_path / "out", "--use_cpu", "True")
    for word in got:
        assert not word.endswith("config.json") and "ds_config" not in word or os.path.isfile(word.split("=")[-1])
    model_args, data_args, training_args, lora_args = parse(got)
    assert model_args.model_name_or_path == str(tiny_model)
    assert training_args.use_lora == ("lora" in name)
    assert lora_args.q_lora == ("qlora" in name)
    assert training_args.learning_rate == (3e-4 if "lora" in name else 1e-5)
    assert training_args.gradient_checkpointing is None  # by memory, once the model is loaded
    assert parse([*got, "--learning_rate", "1e-4"])[2].learning_rate == 1e-4


def test_an_edited_default_holds_through_a_launcher(tmp_path, case):
    for name in ("recipe", "finetune.py"):
        source = ROOT / name
        shutil.copytree(source, tmp_path / name) if source.is_dir() else shutil.copy(source, tmp_path)
    script = tmp_path / "finetune.py"
    field = '    use_lora: bool = flag(False, "Train'
    assert script.read_text().count(field) == 1
    edited = "    learning_rate: float = flag(2e-6, 'Step size.')\n    logging_steps: float = flag(7, 'Steps.')\n"
    script.write_text(script.read_text().replace(field, edited + field))
    command = f"from recipe import launch; print(launch.finetune_words({case('finetune_lora_ds.sh')}, ['--model_name_or_path=m', '--data_path=d'], ''))"
    done = subprocess.run([sys.executable, "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "learning_rate" not in done.stdout
    assert "logging_steps" not in done.stdout
    assert "--warmup_steps=0.01" in done.stdout  # not edited


# ----------------------------------------------------------------------------------------------------------------------
# The machine


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
@pytest.mark.parametrize("name", LAUNCHERS)
def test_no_gpu_is_an_error(name, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UserError, match="no GPU found .CUDA_VISIBLE_DEVICES is unset.*nvidia-smi.*--use_cpu True"):
        launch.usable_gpus(use_cpu=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES is '5'"):
        launch.usable_gpus(use_cpu=False)


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("--use_cpu", True), ("--use_cpu True", True), ("--use-cpu=true", True), ("--no_cuda --bf16", True), ("", False),
        ("--use_cpu False", False), ("--use_cpu True --use_cpu=false", False), ("--use_cpu no", False),
    ],
)  # fmt: skip
def test_the_cpu_is_used_when_asked_for(answer, expected, case, tmp_path):
    asked = ["--model_name_or_path=m", "--data_path=d", *answer.split()]
    assert launch.finetune_words(case("finetune_lora_ds.sh"), asked, "")[1] == expected
    file = tmp_path / "run.json"
    for value in (True, False):
        file.write_text(json.dumps({"model_name_or_path": "m", "data_path": ["d"], "use_cpu": value}))
        assert launch.finetune_words(case("finetune_lora_ds.sh"), [str(file)], "")[1] == value


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
def test_training_on_the_cpu_is_said(capsys):
    assert launch.usable_gpus(use_cpu=True) == 0
    assert capsys.readouterr().out == "no GPU: training on the CPU\n"


@pytest.mark.parametrize("visible, devices, first", [(4, None, "0"), (2, "5,6", "5"), (1, None, None), (0, None, None)])
def test_a_single_gpu_launcher_uses_the_first_gpu_and_one_process(visible, devices, first):
    code = f"from recipe import launch; launch.start_one({visible}, ['--help'])"
    shown = "import atexit, os; atexit.register(lambda: print(os.environ.get('CUDA_VISIBLE_DEVICES'), 'RANK' in os.environ))"
    environment = {"RANK": "0", "WORLD_SIZE": "2"} | ({"CUDA_VISIBLE_DEVICES": devices} if devices else {})
    done = run(sys.executable, "-c", f"{shown}; {code}", **environment)
    assert done.returncode == 0, done.stderr
    assert "usage: finetune.py" in done.stdout
    assert done.stdout.endswith(f"{first or devices} False\n")
    expected = f"{visible} GPUs are visible: using the first one (CUDA_VISIBLE_DEVICES={first})\n"
    assert done.stdout.startswith(expected if first else "usage")


@pytest.fixture
def clean(monkeypatch):
    """No variable of a cluster is set, and those that are set in a test are removed after it."""
    for name in ("NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "")


def test_other_launchers_start_a_process_for_each_gpu(clean, monkeypatch):
    options = ["--standalone", "--nproc_per_node"]
    assert launch.torchrun_options(4, "") == [*options, "4"]
    assert launch.torchrun_options(0, "") == [*options, "1"]  # the CPU
    assert os.environ["OMP_NUM_THREADS"] != ""
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    assert launch.torchrun_options(4, "") == [*options, "2"]
    monkeypatch.setenv("NPROC_PER_NODE", "3")
    assert launch.torchrun_options(0, "") == [*options, "3"]
    for wrong in ("5", "0", "two", "-1", "2.0"):
        monkeypatch.setenv("NPROC_PER_NODE", wrong)
        with pytest.raises(UserError, match=f"^NPROC_PER_NODE={wrong}: expected a whole number from 1 to 4.$"):
            launch.torchrun_options(4, "")


TWO = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def two(clean, monkeypatch):
    for name, value in TWO.items():
        monkeypatch.setenv(name, value)


def test_several_nodes_meet_before_they_start(two, monkeypatch, port):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    first = threading.Thread(target=nodes.meet, args=(2, 0, "127.0.0.1", port, 20))
    first.start()
    options = launch.torchrun_options(2, "")
    first.join(20)
    assert not first.is_alive()
    assert options == [
        "--nnodes", "2", "--node_rank", "1", "--master_addr", "127.0.0.1", "--master_port", str(port),
        "--nproc_per_node", "2",
    ]  # fmt: skip


@pytest.mark.parametrize("missing", ["NODE_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_variable_that_is_missing_is_named(missing, two, monkeypatch):
    monkeypatch.setenv(missing, "")
    with pytest.raises(UserError, match=f"^{missing} is not set; NNODES=2 machines need it .*finetune_ds.sh --help"):
        launch.torchrun_options(2, "finetune_ds.sh")


@pytest.mark.parametrize(
    "name, value",
    [("NNODES", "two"), ("NNODES", "0"), ("NODE_RANK", "2"), ("NODE_RANK", "-1"), ("NODE_RANK", "08"),
     ("MASTER_PORT", "0"), ("MASTER_PORT", "65536"), ("MASTER_ADDR", "10.0.0.1 ")],
)  # fmt: skip
def test_a_variable_that_is_wrong_is_named(name, value, two, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^{name}={value}: expected"):
        launch.torchrun_options(2, "")


def test_a_node_rank_without_a_number_of_nodes_is_an_error(two, monkeypatch):
    monkeypatch.setenv("NNODES", "")
    with pytest.raises(UserError, match="^NODE_RANK=1, but NNODES"):
        launch.torchrun_options(2, "")


# ----------------------------------------------------------------------------------------------------------------------
# Nodes meet


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def together(port, *came, timeout=2):
    """What each of the nodes (nnodes, node_rank) learns when they start at the same time: None, or its error."""
    results = [None] * len(came)

    def run(number, nnodes, node_rank):
        try:
            nodes.meet(nnodes, node_rank, "127.0.0.1", port, timeout)
        except UserError as error:
            results[number] = str(error)

    threads = [threading.Thread(target=run, args=(number, *node)) for number, node in enumerate(came)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return results


def test_three_nodes_meet(port):
    assert together(port, (3, 2), (3, 0), (3, 1)) == [None] * 3
    with socket.create_server(("", port)):  # free again at once, for torch.distributed.run
        pass


def test_a_missing_node_is_named_by_all_that_came(port):
    first, second = together(port, (3, 0), (3, 1))
    assert first == second
    assert f"node 2 of 3 has not come to 127.0.0.1:{port} within 2 s; start the same launcher there" in first
    assert "NODE_RANK=2" in first
    assert "nodes 1, 2 and 3 of 4 have not come" in together(port, (4, 0), timeout=1)[0]


def test_two_nodes_of_one_rank_are_an_error(port):
    for problem in together(port, (3, 0), (3, 1), (3, 1)):
        assert f"two machines came as node 1 of 3 ({socket.gethostname()} and " in problem


def test_two_numbers_of_nodes_are_an_error(port):
    for problem in together(port, (3, 0), (2, 1)):
        assert "with NNODES=2" in problem and "with NNODES=3; set the same NNODES on all nodes" in problem


def test_a_node_that_cannot_reach_node_0_says_why(port):
    [problem] = together(port, (2, 1), timeout=1)
    assert f"node 0 cannot be reached at 127.0.0.1:{port} within 1 s (connection refused); start" in problem


def test_a_port_in_use_is_an_error_at_once(port):
    with socket.create_server(("", port)):
        [problem] = together(port, (2, 0), timeout=20)
    assert problem.startswith(f"port {port} is in use on this machine, node 0; set another MASTER_PORT")


def test_a_node_may_be_stopped_and_started_again_and_strangers_do_not_count(port):
    waiting = threading.Thread(target=together, args=(port, (2, 0)), kwargs={"timeout": 10})
    waiting.start()
    time.sleep(0.3)
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    with socket.create_connection(("127.0.0.1", port)) as stopped:
        stopped.sendall(b'{"node": 1, "nodes": 3, "host": "x"')  # and no end of the line
    assert together(port, (2, 1), timeout=5) == [None]
    waiting.join(5)
    assert not waiting.is_alive()


# ----------------------------------------------------------------------------------------------------------------------
# Nodes watch each other

TRAINING = """
import sys, time, torch.distributed
from recipe.distributed import nodes
with nodes.watch(patience=2, arrival=int(sys.argv[2])):
    print("training", flush=True)
    time.sleep(float(sys.argv[1]))
    if sys.argv[3:]:
        raise ValueError(sys.argv[3])
"""


@pytest.fixture
def train():
    """Function that starts node 0 or 1 of two, which train for some seconds; the store is in this process."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    running = []

    def start(node, seconds, arrival=20, *failure):
        environment = {
            "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "RANK": str(node), "GROUP_RANK": str(node),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, "-c", TRAINING, str(seconds), str(arrival), *failure]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, **pipes)
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


def begun(*processes):
    for process in processes:
        assert process.stdout.readline() == "training\n"
    time.sleep(1.5)  # the first signs of life come and go


@pytest.mark.slow
def test_a_node_that_is_not_heard_of_ends_the_others(train):
    other, first = train(0, 60), train(1, 60)
    begun(first, other)
    first.send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    _, errors = other.communicate(timeout=20)
    assert other.returncode == 3 and time.monotonic() - stopped < 2 + 5
    assert f"error: node 1 ({socket.gethostname()}) has not been heard of for" in errors
    assert errors.strip().count("\n") == 0 and "--resume_from_checkpoint auto" in errors


@pytest.mark.slow
def test_a_node_that_fails_ends_the_others(train):
    first, other = train(0, 2, 20, "out of memory"), train(1, 60)
    _, errors = other.communicate(timeout=20)
    assert other.returncode == 3 and "error: node 0" in errors
    assert first.wait(5) == 1


@pytest.mark.slow
def test_nodes_that_finish_say_goodbye(train):
    first, last = train(0, 1), train(1, 5)  # alone for longer than the patience
    for process in (first, last):
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 0 and not errors


@pytest.mark.slow
def test_a_node_that_never_comes_has_more_time(train):
    begun(alone := train(0, 60, arrival=5))
    time.sleep(1)  # and 1.5 above are more than the patience
    assert alone.poll() is None
    _, errors = alone.communicate(timeout=20)
    assert alone.returncode == 3 and "error: node 1 has not been heard of for" in errors


def test_one_node_watches_nothing(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "RANK", "GROUP_RANK"):
        monkeypatch.delenv(name, raising=False)
    before = threading.active_count()
    with nodes.watch():  # plain python
        assert threading.active_count() == before
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with nodes.watch():  # one node with four GPUs
        assert threading.active_count() == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["finetune_lora_ds.sh", "finetune_lora_single_gpu.sh"])
def test_a_mistake_keeps_its_sentence_and_its_exit_code(name, tiny_model, tmp_path):
    command = ["bash", ROOT / name, "-m", tiny_model, "-d", "no such.jsonl", "--use_cpu", "True"]
    done = run(*command, cwd=tmp_path, NPROC_PER_NODE="2")
    assert done.returncode == 2
    assert list(tmp_path.iterdir()) == []
    assert done.stderr.count("error: no such.jsonl") == 1


@pytest.mark.slow
def test_a_single_gpu_launcher_trains_on_the_cpu(tiny_model, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    words = ["-m", tiny_model, "-d", "rows.jsonl", "-o", "out", "--use_cpu", "--max_steps", "1"]
    done = run("sh", ROOT / "finetune_qlora_single_gpu.sh", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "base in 4 bits" in done.stdout
    assert "warm-up to a learning rate of 0.0003" in done.stdout
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_a_process_that_is_killed_gives_the_launcher_its_code(tmp_path):
    script = tmp_path / "finetune.py"
    script.write_text("import os, signal, sys; os.kill(os.getpid(), signal.SIGKILL) if sys.argv[1:] else sys.exit(7)")
    code = f"from recipe import launch; launch.ROOT = {str(tmp_path)!r}; launch.start_all(0, WORDS, '')"
    for words, expected in ((["x"], 128 + 9), ([], 7)):
        done = run(sys.executable, "-c", code.replace("WORDS", str(words)), NPROC_PER_NODE="2")
        assert done.returncode == expected, done.stderr


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_launcher_of_deepspeed_works_too(tiny_model, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    command = [
        pathlib.Path(sys.executable).parent / "deepspeed", "--num_gpus", "2", ROOT / "finetune.py",
        "--model_name_or_path", tiny_model, "--data_path", "rows.jsonl", "--use_lora", "--max_steps", "2",
        "--per_device_train_batch_size", "2", "--deepspeed", ROOT / "ds_config_zero2.json", "--save_strategy", "no",
    ]  # fmt: skip
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)),
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "x 2 ranks" in done.stdout and "engine: ZeRO-2" in done.stdout
    assert (tmp_path / "output" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_a_launchers_only_process_trains(tiny_model, tmp_path):
    data = write(tmp_path / "rows.jsonl", ROWS)
    words = argv(tiny_model, data, tmp_path / "out", "--use_lora", "--use_cpu", "True", "--max_steps", 2)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1", ROOT / "finetune.py", *words]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(history(tmp_path / "out", "loss")) == 2
