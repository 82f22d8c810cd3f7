"""What goes to TensorBoard is the log of the run."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import finetune
from helpers import ROWS, argv, history, write


def test_tensorboard_gets_the_losses_of_the_log(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    data, out = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "out"
    finetune.train(argv(tiny_model, data, out, "--use_lora", "--eval_data_path", data, "--report_to", "tensorboard"))
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    for tag, key in (
        ("train/loss", "loss"),
        ("eval/loss", "eval_loss"),
        ("train/tokens_per_second", "tokens_per_second"),
    ):
        assert [event.value for event in events.Scalars(tag)] == pytest.approx(history(out, key), rel=1e-6)
    assert len(events.Scalars("eval/loss")) == 3
    assert json.loads((out / "run.json").read_text())["arguments"]["report_to"] == ["tensorboard"]
