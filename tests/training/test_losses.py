"""A loss that is not finite, or far off, names the rows of its micro-batch."""

import pytest
import torch
import transformers
from families import SIZE

import finetune
from helpers import ROWS, argv, write
from recipe.console import UserError
from recipe.dataset.packing import places


@pytest.fixture(scope="module")
def broken_model(small_tokenizer, tmp_path_factory):
    """Folder of a model that computes NaN for every text with one word, as its embedding is broken."""
    import shutil

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("broken")
    shutil.copytree(small_tokenizer, folder, dirs_exist_ok=True)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZE))
    (token,) = transformers.AutoTokenizer.from_pretrained(folder)("Z")["input_ids"]
    model.get_input_embeddings().weight.data[token] = float("nan")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A file of nine records of which the sixth has that word."""
    odd = {"messages": [{"role": "user", "content": "Z"}, {"role": "assistant", "content": "no"}]}
    return write(tmp_path_factory.mktemp("rows") / "rows.jsonl", [*ROWS[:5], odd, *ROWS[5:]])


@pytest.mark.parametrize("more", [[], ["--gradient_accumulation_steps", 3], ["--lazy_preprocess"]], ids=str)
def test_a_loss_that_is_not_finite_names_its_row_and_no_checkpoint_follows(broken_model, rows, tmp_path, more):
    words = argv(broken_model, rows, tmp_path / "out", "--use_lora", "--logging_steps", 100, *more)
    words[words.index("--per_device_train_batch_size") + 1] = "1"
    more = ["--train_sampling_strategy", "sequential", "--save_strategy", "steps", "--save_steps", "1"]
    with pytest.raises(UserError) as stopped:
        finetune.train([*words, *more, "--save_total_limit", "0"])
    step = 2 if "3" in words[words.index("--logging_steps") :] else 6
    assert str(stopped.value).startswith(f"step {step}: the loss is nan with {rows}: record 6 (line 6); training")
    saved = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert saved == [f"checkpoint-{number}" for number in range(1, step)]


def test_of_a_packed_row_all_conversations_are_named(broken_model, rows, tmp_path):
    words = argv(broken_model, rows, tmp_path / "out", "--use_lora", "--pack_tokens", "150", "--max_steps", "9")
    words[words.index("--per_device_train_batch_size") + 1] = "1"
    with pytest.raises(UserError, match="the loss is nan") as stopped:
        finetune.train(words)
    assert f"{rows}: record 6 (line 6)" in str(stopped.value)
    assert str(stopped.value).count(": record") == 2


@pytest.fixture
def watch(tiny_model, rows, tmp_path, prepared):
    """The watch of a trainer with the rows in their order."""
    return prepared(argv(tiny_model, rows, tmp_path / "out", "--use_lora")).losses


def look_at(watch, losses, rows):
    watch.rows = rows
    for loss in losses:
        watch.add(torch.tensor(loss))
    watch.look()


def test_a_gradient_that_is_not_finite_names_the_rows_of_its_step(watch, rows):
    watch.rows = [0]
    watch.add(torch.tensor(1.0))
    watch.rows = [5, 2]
    watch.add(torch.tensor(1.0))
    watch.add_norm(torch.tensor(float("inf")))
    watch.trainer.state.global_step = 1  # its weights are lost, and the next losses with them
    watch.rows = [3]
    watch.add(torch.tensor(float("nan")))
    with pytest.raises(UserError) as stopped:
        watch.look()
    named = ", ".join(f"{rows}: record {number} (line {number})" for number in (1, 6, 3))
    assert str(stopped.value).startswith(f"step 1: the gradient norm is inf with {named}; training is stopped")


def test_a_spike_is_printed_once_with_its_rows(watch, rows, capsys):
    usual = [2.0 + (number % 7) / 10 for number in range(40)]
    look_at(watch, usual, [0, 1])
    assert "the loss is" not in capsys.readouterr().out
    look_at(watch, [9.0], [5, 2])
    said = capsys.readouterr().out
    assert said == (
        f"step 1: the loss is 9 with {rows}: record 6 (line 6), {rows}: record 3 (line 3); half are below 2.3.\n"
    )
    look_at(watch, [9.0], [5, 2])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
def test_losses_that_scatter_as_usual_are_no_spikes(watch, scale, capsys):
    torch.manual_seed(0)
    look_at(watch, (scale * (1 + 0.3 * torch.randn(400)).abs()).tolist(), [0])
    assert "the loss is" not in capsys.readouterr().out


def test_a_late_row_is_the_one_that_was_taken_in_place_of_a_dropped_one(tiny_model, tmp_path, prepared, monkeypatch):
    from recipe.dataset import tokenised

    monkeypatch.setattr(tokenised, "SCAN", 1)
    empty = {"messages": [{"role": "user", "content": "?"}]}
    path = write(tmp_path / "rows.jsonl", [ROWS[0], empty, ROWS[1]])
    dataset = prepared(argv(tiny_model, path, tmp_path / "out", "--lazy_preprocess")).train_dataset
    (place,) = places(dataset, 1)
    assert place.where == f"{path}: record 3 (line 3)"
    assert place.tokens == len(dataset[1][0]["input_ids"])
