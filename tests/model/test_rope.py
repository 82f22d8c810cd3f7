"""Rotary positions that follow the length of a text follow that of each document, whatever else is in its row."""

import json

import families
import pytest
import torch
from transformers import AutoModelForCausalLM

import finetune
from helpers import argv, history, reference, relative, step, write
from recipe.console import UserError
from recipe.dataset.encoding import ChatEncoder
from recipe.model import sequence

ROWS = [{"messages": [{"role": "user", "content": "say " * n}, {"role": "assistant", "content": "word " * n}]}
        for n in (2, 90, 30, 2, 60)]  # fmt: skip
HALF = [1.0] * 8  # factors of a head of 16
ROPES = {
    "dynamic": {"factor": 8.0, "original_max_position_embeddings": 64},
    "longrope": {
        "short_factor": HALF,
        "long_factor": [3.0 + n for n in range(8)],
        "original_max_position_embeddings": 64,
    },
}


def model_with(kind, folder, tokenizer, name="llama"):
    """Folder of a tiny model whose positions are stretched beyond 64, and its configuration."""
    path = families.family(name, folder, tokenizer)
    config = json.loads((path / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 1e4, "rope_type": kind, **ROPES[kind]}
    config["max_position_embeddings"] = 64 if kind == "dynamic" else 1024
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("kind", ROPES)
def test_documents_of_a_row_have_the_positions_of_each_alone(small_tokenizer, tmp_path, kind):
    folder = model_with(kind, tmp_path / "model", small_tokenizer)
    encoder = ChatEncoder(finetune.transformers.AutoTokenizer.from_pretrained(folder))
    documents = [encoder.encode(row).documents for row in ROWS]
    lengths = [len(part["input_ids"]) for (part,) in documents]
    assert min(lengths) < 64 < sorted(lengths)[-2] and max(lengths) < 512
    counts = [sum(label != -100 for label in part["labels"]) for (part,) in documents]
    alone = [reference(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), [part]) for part in documents]
    parts = list(zip(alone, counts, strict=True))
    expected = sum(loss * count for (loss, _), count in parts) / sum(counts)
    gradients = {name: sum(g[name] * count for (_, g), count in parts) / sum(counts) for name in alone[0][1]}
    data = write(tmp_path / "rows.jsonl", ROWS)
    more = ["--per_device_train_batch_size", 5, "--eval_data_path", data, "--eval_on_start", "True"]
    if kind == "dynamic":  # the flag makes what the reference has in its configuration
        config = json.loads((folder / "config.json").read_text())
        config["rope_parameters"] = {"rope_theta": 1e4, "rope_type": "default"}
        (folder / "config.json").write_text(json.dumps(config))
        more += ["--model_max_length", 512, "--rope_scaling", "dynamic"]
    loss, found = step(tmp_path, folder, data, "out", *more)
    assert loss == pytest.approx(expected, rel=1e-5) and relative(found, gradients) < 1e-4
    assert history(tmp_path / "out", "eval_loss")[0] == pytest.approx(expected, rel=1e-5)
    assert not history(tmp_path / "out", "shared")  # what begins alike is not computed alike


@pytest.mark.parametrize("kind", ROPES)
def test_ranks_cannot_share_a_row_whose_length_they_do_not_see(small_tokenizer, tmp_path, kind):
    config = finetune.transformers.AutoConfig.from_pretrained(model_with(kind, tmp_path, small_tokenizer))
    with pytest.raises(UserError, match=f"llama has rotary positions of the kind {kind}, which follow the whole row"):
        sequence.check(config, 2)


def test_a_tuned_model_with_such_positions_answers(small_tokenizer, tmp_path):
    folder, data = model_with("longrope", tmp_path / "model", small_tokenizer), write(tmp_path / "rows.jsonl", ROWS)
    more = ["--eval_data_path", data, "--eval_generate", 2, "--max_steps", 1, "--gradient_checkpointing", "True"]
    finetune.train(argv(folder, data, tmp_path / "out", *more))
    assert history(tmp_path / "out", "eval_exact_match")
