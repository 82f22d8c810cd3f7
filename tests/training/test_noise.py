"""--neftune_noise_alpha: noise by the length of each document, whatever row it lies in, and none when nothing is learnt."""

import pytest
import torch

import finetune
from helpers import UNEVEN_ROWS, argv, history, write

ALPHA = 5


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "rows.jsonl", UNEVEN_ROWS)


@pytest.mark.parametrize("kind", [[], ["--use_lora"]], ids=["full", "LoRA"])
@pytest.mark.parametrize("padding_free", [True, False])
def test_each_document_gets_the_noise_of_its_own_length(tiny_model, data, tmp_path, prepared, padding_free, kind):
    flags = ["--neftune_noise_alpha", ALPHA, "--padding_free", padding_free, *kind]
    trainer = prepared(argv(tiny_model, data, tmp_path / "out", *flags))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    embeddings, seen = trainer.model.get_input_embeddings(), []
    embeddings.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    lengths = [len(document["input_ids"]) for i in range(4) for document in trainer.train_dataset[i]]
    assert len(set(lengths)) > 1
    for training in (True, False):
        trainer.model.train(training)
        trainer.compute_loss(trainer.model, batch)
    noise = seen[0] - seen[1]  # [B, T, D]
    if padding_free:
        documents = noise[0].split(lengths)
    else:
        documents = [row[:length] for row, length in zip(noise, lengths, strict=True)]
        assert not any(row[length:].any() for row, length in zip(noise, lengths, strict=True))
    for length, document in zip(lengths, documents, strict=True):
        bound = ALPHA / (length * document.shape[1]) ** 0.5
        assert 0.95 * bound < document.abs().max() <= 1.01 * bound
        assert abs(document.mean()) < 0.2 * bound


def test_a_training_with_noise_is_another_and_its_evaluation_has_none(tiny_model, data, tmp_path):
    losses = {}
    for alpha in (0, 5):
        out, noise = tmp_path / str(alpha), ["--neftune_noise_alpha", alpha] if alpha else []
        flags = ["--eval_data_path", data, "--eval_on_start", "True", "--max_steps", 2, *noise]
        finetune.train(argv(tiny_model, data, out, *flags))
        losses[alpha] = history(out, "loss"), history(out, "eval_loss")
    assert losses[0][1][0] == losses[5][1][0]  # before the first step
    assert losses[0][0][0] != losses[5][0][0] and torch.tensor(losses[5][0]).isfinite().all()
