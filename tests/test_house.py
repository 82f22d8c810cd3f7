"""The rules of the house: what lies where, what importing costs, what every public function says."""

import ast
import re
import subprocess
import sys
import tomllib

import pytest

from helpers import ROOT

MODULES = sorted(
    [*ROOT.glob("*.py"), *(ROOT / "recipe").rglob("*.py"), *(ROOT / "demo").glob("*.py")],
    key=lambda path: path.relative_to(ROOT).as_posix(),
)


def tracked() -> list[str]:
    """Paths that git tracks, or those of the folder where this is no checkout."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return done.stdout.splitlines()
    return [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if path.is_file()]


def test_at_most_20_files_lie_at_the_root():
    assert len([path for path in tracked() if "/" not in path]) <= 20


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_module_has_at_most_500_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


def functions(tree: ast.Module, public: bool = True):
    """Public functions and methods of public classes, with their names."""
    for node in tree.body:
        holder = [node] if isinstance(node, ast.FunctionDef) else node.body if isinstance(node, ast.ClassDef) else []
        for part in holder:
            if isinstance(part, ast.FunctionDef) and not part.name.startswith("_") and not node.name.startswith("_"):
                yield part


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_public_function_has_types_and_a_docstring(path):
    for function in functions(ast.parse(path.read_text(encoding="utf-8"))):
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        untyped = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls", "ctx")]
        assert not untyped and function.returns is not None, f"{function.name}: {untyped or 'no return type'}"
        assert ast.get_docstring(function) or len(function.body) == 1 or is_override(function), function.name


def is_override(function: ast.FunctionDef) -> bool:
    """Whether the function replaces one of the Trainer or of a callback, which documents it."""
    import transformers

    return hasattr(transformers.Trainer, function.name) or hasattr(transformers.TrainerCallback, function.name)


STATE = """
import json, logging, os, sys, warnings
import torch
def state():
    return [dict(os.environ), [str(entry) for entry in warnings.filters],
            {name: logging.getLogger(name).level for name in ("bitsandbytes", "transformers", "peft", "torch")},
            torch.get_float32_matmul_precision(), torch.get_num_threads(), sys.modules.get("peft", "") is None]
import transformers, datasets, accelerate, bitsandbytes  # which may change it themselves
before = state()
import finetune, eval, merge, chat
import recipe.flag_rules, recipe.training.trainer
after = state()
print(json.dumps([before == after, [[b, a] for b, a in zip(before, after) if a != b]], default=str))
"""


@pytest.mark.slow
def test_importing_changes_no_warnings_no_environment_and_no_modules():
    done = subprocess.run([sys.executable, "-c", STATE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1] == "[true, []]", done.stdout


COMPILER = """
import sys
import torch
compile = torch.compile
import finetune
import bitsandbytes
assert torch.compile is compile and "torch._inductor.compile_fx" not in sys.modules
weight = torch.randn(64, 64)
again = bitsandbytes.functional.dequantize_4bit(*bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4"))
assert (again - weight).norm() < 0.2 * weight.norm()
"""


@pytest.mark.slow
def test_bitsandbytes_is_imported_without_torchs_compiler_and_works():
    done = subprocess.run([sys.executable, "-c", COMPILER], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_an_upward_import_fails_the_lint(tmp_path):
    import shutil

    shutil.copytree(ROOT / "recipe", tmp_path / "recipe", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)

    def lint():
        command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()"]
        return subprocess.run([*command, "--no-cache"], cwd=tmp_path, capture_output=True, text=True)

    assert lint().returncode == 0, lint().stdout
    with open(tmp_path / "recipe" / "dataset" / "collator.py", "a") as file:
        file.write("\nimport recipe.training.trainer\n")
    assert lint().returncode != 0 and "recipe.dataset is not allowed to import recipe.training" in lint().stdout


def test_the_script_header_names_the_pinned_packages():
    header = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", (ROOT / "finetune.py").read_text(), flags=re.M)
    script = tomllib.loads(re.sub(r"^# ?", "", header.group(1), flags=re.M))
    pinned = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert script["dependencies"] == pinned
    assert (
        script["requires-python"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    )
