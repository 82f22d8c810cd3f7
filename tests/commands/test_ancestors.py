"""The command lines of Qwen's five launchers and of FastChat's train_lora.py run unchanged and train."""

import json
import pathlib

import pytest
from safetensors import safe_open

import finetune
from commands.ancestors import COMMANDS, original

ROWS = [
    {
        "id": f"identity_{n}",
        "conversations": [{"from": "user", "value": f"hi {n}"}, {"from": "assistant", "value": "hello " * n}],
    }
    for n in range(1, 33)
]


@pytest.mark.parametrize("name", COMMANDS)
def test_an_ancestors_command_trains_and_saves(tiny_model, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(ROWS[:4] if name == "FastChat train_lora.sh" else ROWS))  # that one asks for 150 epochs
    words = original(name)
    words[words.index("--model_name_or_path") + 1] = str(tiny_model)
    words[words.index("--data_path") + 1] = str(data)
    finetune.train(words)
    out = pathlib.Path(words[words.index("--output_dir") + 1])
    log = [
        entry["loss"]
        for entry in json.loads((out / "trainer_state.json").read_text())["log_history"]
        if "loss" in entry
    ]
    assert len(log) >= 5 and log[-1] < log[0]
    full = "--use_lora" not in words and not any(word.startswith("--lora") for word in words)
    with safe_open(out / ("model.safetensors" if full else "adapter_model.safetensors"), "pt") as saved:
        assert all(("lora_" in key) is not full for key in saved.keys())
