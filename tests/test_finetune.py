"""The whole recipe on a tiny random model."""

import json
import math
import pathlib

import pytest

import finetune

ROWS = [
    {"messages": [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word * 2}]}
    for word in ("one", "two", "three", "four", "five", "six", "seven", "eight")
]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def argv(model, data, output, *more):
    return [
        "--model_name_or_path", str(model), "--data_path", str(data), "--output_dir", str(output),
        "--per_device_train_batch_size", "4", "--num_train_epochs", "3", "--logging_steps", "1",
        "--learning_rate", "1e-2", "--save_strategy", "no", "--disable_tqdm", "True", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("mode", [[], ["--use_lora"], ["--q_lora"]])
def test_training_lowers_the_loss_and_saves_what_loads(tiny_model, rows, tmp_path, mode):
    out = tmp_path / "out"
    finetune.train(argv(tiny_model, rows, out, "--eval_data_path", str(rows), "--eval_strategy", "epoch", *mode))
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert losses[-1] < losses[0] and all(map(math.isfinite, losses))
    weights = "adapter_model.safetensors" if mode else "model.safetensors"
    for folder in (out, out / "best"):
        for name in (weights, "tokenizer.json", "chat_template.jinja", "generation_config.json"):
            assert (pathlib.Path(folder) / name).exists()


def test_eager_and_lazy_datasets_hold_the_same_rows(qwen, rows):
    conversations, encoder = finetune.Conversations([str(rows)]), finetune.ChatEncoder(qwen)
    eager = finetune.SupervisedDataset(conversations, encoder, 512)
    lazy = finetune.LazySupervisedDataset(conversations, encoder, 512)
    assert [eager[i] for i in range(len(eager))] == [lazy[i] for i in range(len(lazy))]
