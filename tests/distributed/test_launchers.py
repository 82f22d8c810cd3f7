"""The launchers: what they start, what they refuse in a sentence, and how several machines meet and part."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from helpers import ROOT

sys.path.insert(0, str(ROOT))
from recipe.console import UserError
from recipe.distributed import nodes

LAUNCHERS = sorted(path.name for path in ROOT.glob("finetune_*.sh"))
SINGLE = [name for name in LAUNCHERS if "single_gpu" in name]
SEVERAL = [name for name in LAUNCHERS if "single_gpu" not in name]
MODEL_DATA = ("-m", "model", "-d", "rows.jsonl")
PYTHON = f"""#!/usr/bin/env bash
# Stands for Python: tells how many GPUs there are, and prints what it is asked to run in place of running it.
case $1 in
  -c) if [[ $GPUS == none ]]; then exit 1; else echo "$GPUS"; fi ;;
  -) exec {sys.executable} "$@" ;;
  */nodes.py) if [[ $# == 1 ]]; then echo "meet $NNODES $NODE_RANK $MASTER_ADDR $MASTER_PORT"; exit "$MEET"; fi ;;&
  *)
    for word in "$@"; do echo "word $word"; done
    echo "gpus ${{CUDA_VISIBLE_DEVICES-all}}"
    echo "cwd $PWD"
    exit "$CODE"
    ;;
esac
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Function that runs a launcher with the words and the environment of a test, and the Python above."""
    folder = tmp_path_factory.mktemp("a python")
    python = folder / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)

    def run(name, *words, shell="bash", root=ROOT, cwd=folder, **environment):
        plain = {"PATH": os.environ["PATH"], "PYTHON": str(python), "GPUS": "2", "CODE": "0", "MEET": "0"}
        command = [shell, str(root / name), *map(str, words)]
        return subprocess.run(command, cwd=cwd, env={**plain, **environment}, capture_output=True, text=True)

    return run


def words(done):
    return [line[5:] for line in done.stdout.splitlines() if line.startswith("word ")]


def flags(done):
    """What finetune.py gets."""
    assert done.returncode == 0, done.stderr
    given = words(done)
    return given[given.index(str(ROOT / "finetune.py")) + 1 :]


def refused(done):
    """The one sentence of a launcher that ends with exit code 2 and starts nothing."""
    assert done.returncode == 2 and not words(done), done
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    return done.stderr


def test_six_launchers():
    assert LAUNCHERS == [
        "finetune_ds.sh", "finetune_fsdp.sh", "finetune_lora_ds.sh", "finetune_lora_single_gpu.sh",
        "finetune_qlora_ds.sh", "finetune_qlora_single_gpu.sh",
    ]  # fmt: skip


def test_shellcheck_finds_nothing():
    from shutil import which

    shellcheck = which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    scripts = sorted(ROOT.glob("*.sh")) + sorted((ROOT / "tests").glob("*.sh"))
    done = subprocess.run([shellcheck, "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(not shutil.which("dash"), reason="needs dash, the sh of Debian")
@pytest.mark.parametrize("name", LAUNCHERS)
def test_sh_is_refused(name, start):
    assert "this script needs bash; start it as: bash" in refused(start(name, *MODEL_DATA, shell="dash"))


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help(name, word, start):
    done = start(name, word, GPUS="none")
    assert done.returncode == 0 and not done.stderr
    assert f"usage: bash {name} -m MODEL -d DATA" in done.stdout and "--learning_rate" in done.stdout
    assert ("NNODES" in done.stdout) == (name in SEVERAL)


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def test_short_words_become_flags(start):
    got = flags(start("finetune_lora_ds.sh", "-m", "model", "-d", "a.json", "b.json", "-e", "held.json", "-o", "out"))
    assert got[-9:] == [
        "--model_name_or_path", "model", "--data_path", "a.json", "b.json", "--eval_data_path", "held.json",
        "--output_dir", "out",
    ]  # fmt: skip
    long = flags(start("finetune_lora_ds.sh", "--model", "model", "--data", "a.json", "b.json", "--eval", "held.json"))
    assert long[-7:] == got[-9:-2]


@pytest.mark.parametrize("missing, rest", [("-m MODEL", ["-d", "x"]), ("-d DATA", ["-m", "x"])])
def test_the_model_and_the_data_are_required(missing, rest, start):
    assert f"error: {missing} is missing" in refused(start("finetune_ds.sh", *rest))
    assert words(start("finetune_ds.sh", "--model_name_or_path=x", "--data-path", "x"))


@pytest.mark.parametrize("rest", [["-m"], ["-m", "-d", "x"], ["-m", "x", "-d"], ["-d", "x", "-m", ""]])
def test_a_value_that_is_missing_is_an_error(rest, start):
    assert "needs a value" in refused(start("finetune_ds.sh", *rest))


def test_other_flags_come_last_and_as_they_are(start):
    given = ["--learning_rate", "1e-4", "--unknown", "", "two words", "*", "--lora_r=8", "-1e-4"]
    got = flags(start("finetune_lora_ds.sh", *MODEL_DATA, *given))
    assert got[-len(given) :] == given
    assert got.index("3e-4") < got.index("1e-4")


def test_entries_of_a_config_file_win_over_defaults(start, tmp_path):
    file = tmp_path / "run file.yaml"
    file.write_text("model_name_or_path: m\ndata_path: d\nwarmup_ratio: 0.1  # as it was called\nlearning-rate: 1e-3\n")
    got = flags(start("finetune_lora_ds.sh", file, "--lora_r", "8"))
    assert got[0] == str(file)  # where finetune.py looks for it
    assert "--use_lora" in got and not {"--warmup_steps", "0.01", "--learning_rate", "3e-4"} & set(got)
    assert got[-2:] == ["--lora_r", "8"]


def test_a_config_file_that_cannot_be_read_is_an_error(start, tmp_path):
    assert "no.yaml: cannot be read" in refused(start("finetune_ds.sh", "no.yaml"))
    (tmp_path / "bad.json").write_text("{")
    assert "not valid JSON" in refused(start("finetune_ds.sh", tmp_path / "bad.json"))


def test_spaces_in_paths(start, tmp_path):
    root, cwd = tmp_path / "check out", tmp_path / "my data"
    cwd.mkdir()
    root.mkdir()
    for name in [*LAUNCHERS, "launch.sh"]:
        shutil.copy(ROOT / name, root)
    done = start("finetune_lora_ds.sh", "-m", "my model", "-d", "my rows.jsonl", root=root, cwd=cwd)
    got = words(done)
    assert str(root / "finetune.py") in got and str(root / "ds_config_zero2.json") in got
    assert {"my model", "my rows.jsonl"} <= set(got) and f"cwd {cwd}" in done.stdout


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_exit_code_is_kept(name, start):
    assert start(name, *MODEL_DATA, CODE="7").returncode == 7


@pytest.mark.parametrize("name", LAUNCHERS)
def test_finetune_understands_every_word(name, start, tiny_model, tmp_path, capsys):
    import finetune

    rows = tmp_path / "rows.jsonl"
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    rows.write_text(json.dumps(row) + "\n")
    got = flags(start(name, "-m", tiny_model, "-d", rows, "-o", tmp_path / "out", "--use_cpu", "True"))
    for word in got:
        assert not word.endswith("config.json") and "ds_config" not in word or os.path.isfile(word)
    model_args, data_args, training_args, lora_args = finetune.parse(got)
    assert model_args.model_name_or_path == str(tiny_model)
    assert training_args.use_lora == ("lora" in name) and lora_args.q_lora == ("qlora" in name)
    assert training_args.learning_rate == (3e-4 if "lora" in name else 1e-5)
    assert training_args.gradient_checkpointing is None  # by memory, once the model is loaded
    assert finetune.parse([*got, "--learning_rate", "1e-4"])[2].learning_rate == 1e-4


# ----------------------------------------------------------------------------------------------------------------------
# The machine


def test_a_python_that_is_not_there_or_without_torch_is_an_error(start):
    assert "no-python: no such program" in refused(start("finetune_ds.sh", *MODEL_DATA, PYTHON="no-python"))
    assert "cannot import torch" in refused(start("finetune_ds.sh", *MODEL_DATA, GPUS="none"))


@pytest.mark.parametrize("name", LAUNCHERS)
def test_no_gpu_is_an_error(name, start):
    for answer in ([], ["--use_cpu", "False"], ["--use_cpu", "True", "--use_cpu=false"]):
        sentence = refused(start(name, *MODEL_DATA, *answer, GPUS="0"))
        assert "no GPU found" in sentence and "nvidia-smi" in sentence and "--use_cpu True" in sentence
    assert "CUDA_VISIBLE_DEVICES is '5'" in refused(start(name, *MODEL_DATA, GPUS="0", CUDA_VISIBLE_DEVICES="5"))


@pytest.mark.parametrize("answer", [["--use_cpu"], ["--use_cpu", "True"], ["--use-cpu=true"], ["--no_cuda", "--bf16"]])
def test_the_cpu_is_used_when_asked_for(answer, start):
    done = start("finetune_lora_ds.sh", *MODEL_DATA, *answer, GPUS="0")
    assert "no GPU: training on the CPU" in done.stdout and flags(done)[-len(answer) :] == answer
    assert words(done)[:4] == [
        str(ROOT / "recipe" / "distributed" / "nodes.py"),
        "--standalone",
        "--nproc_per_node",
        "1",
    ]
    several = start("finetune_lora_ds.sh", *MODEL_DATA, *answer, GPUS="0", NPROC_PER_NODE="3")
    assert words(several)[3] == "3"


def test_a_config_file_can_ask_for_the_cpu(start, tmp_path):
    file = tmp_path / "run.json"
    for value, code in ((True, 0), (False, 2)):
        file.write_text(json.dumps({"model_name_or_path": "m", "data_path": ["d"], "use_cpu": value}))
        assert start("finetune_lora_ds.sh", file, GPUS="0").returncode == code


@pytest.mark.parametrize("name", SINGLE)
def test_a_single_gpu_launcher_uses_the_first_gpu_and_plain_python(name, start):
    done = start(name, *MODEL_DATA, GPUS="4")
    assert words(done)[0] == str(ROOT / "finetune.py") and "gpus 0\n" in done.stdout
    assert "4 GPUs are visible: using the first one" in done.stdout
    assert "gpus 5\n" in start(name, *MODEL_DATA, GPUS="2", CUDA_VISIBLE_DEVICES="5,6").stdout
    assert "gpus all\n" in start(name, *MODEL_DATA, GPUS="1").stdout


@pytest.mark.parametrize("name", SEVERAL)
def test_other_launchers_start_a_process_for_each_gpu(name, start):
    run = [str(ROOT / "recipe" / "distributed" / "nodes.py"), "--standalone", "--nproc_per_node"]
    assert words(start(name, *MODEL_DATA, GPUS="4"))[:5] == [*run, "4", str(ROOT / "finetune.py")]
    assert words(start(name, *MODEL_DATA, GPUS="4", NPROC_PER_NODE="2"))[:4] == [*run, "2"]
    for wrong in ("5", "0", "two"):
        sentence = refused(start(name, *MODEL_DATA, GPUS="4", NPROC_PER_NODE=wrong))
        assert f"NPROC_PER_NODE={wrong}: expected a whole number from 1 to 4." in sentence


TWO = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_nodes_meet_before_they_start(name, start):
    done = start(name, *MODEL_DATA, **TWO)
    assert done.stdout.startswith("meet 2 1 10.0.0.1 29500\n")
    assert words(done)[:12] == [
        str(ROOT / "recipe" / "distributed" / "nodes.py"), "--nnodes", "2", "--node_rank", "1", "--master_addr", "10.0.0.1",
        "--master_port", "29500", "--nproc_per_node", "2", str(ROOT / "finetune.py"),
    ]  # fmt: skip
    missed = start(name, *MODEL_DATA, **TWO, MEET="2")
    assert missed.returncode == 2 and not words(missed)


@pytest.mark.parametrize("missing", ["NODE_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_variable_that_is_missing_is_named(missing, start):
    assert f"error: {missing} is not set" in refused(start("finetune_ds.sh", *MODEL_DATA, **{**TWO, missing: ""}))


@pytest.mark.parametrize(
    "name, value",
    [("NNODES", "two"), ("NNODES", "0"), ("NODE_RANK", "2"), ("NODE_RANK", "-1"), ("NODE_RANK", "08"),
     ("MASTER_PORT", "0"), ("MASTER_PORT", "65536"), ("MASTER_ADDR", "10.0.0.1 ")],
)  # fmt: skip
def test_a_variable_that_is_wrong_is_named(name, value, start):
    assert f"error: {name}={value}: expected" in refused(start("finetune_ds.sh", *MODEL_DATA, **{**TWO, name: value}))


def test_a_node_rank_without_a_number_of_nodes_is_an_error(start):
    assert "but NNODES" in refused(start("finetune_ds.sh", *MODEL_DATA, **{**TWO, "NNODES": ""}))


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
        environment = {**os.environ, **TWO, "NODE_RANK": "0", "MASTER_PORT": str(port)}
        done = subprocess.run(
            [sys.executable, ROOT / "recipe" / "distributed" / "nodes.py"],
            env={**environment, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: port {port} is in use on this machine, node 0; set another MASTER_PORT")


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
import sys, time, nodes, torch.distributed
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
def test_a_mistake_keeps_its_sentence_and_its_exit_code_through_torchrun(tiny_model, tmp_path):
    command = ["bash", ROOT / "finetune_lora_ds.sh", "-m", tiny_model, "-d", "no such.jsonl", "--use_cpu", "True"]
    environment = {**os.environ, "PYTHON": sys.executable, "NPROC_PER_NODE": "2"}
    done = subprocess.run(
        command, cwd=tmp_path, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 2 and list(tmp_path.iterdir()) == []
    assert done.stderr.count("error: no such.jsonl") == 1


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
