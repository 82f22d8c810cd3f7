"""The loss is the mean over the supervised tokens of an optimizer step, however it is cut into batches and ranks."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import finetune
from helpers import ROOT, UNEVEN_ROWS, argv, history, reference, relative, step, write
from recipe.console import UserError
from recipe.dataset import tokenised
from recipe.dataset.collator import Collator
from recipe.dataset.encoding import IGNORE_INDEX
from recipe.model.loss import supervised_loss
from recipe.training import checks


@pytest.fixture(params=["packed", "sdpa", "eager"])
def model(request, tiny_model):
    finetune.attention.register()
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation=request.param)


@pytest.mark.parametrize("padding_free", [True, False], ids=["padding-free", "padded"])
@pytest.mark.parametrize("size", [8, 4, 2, 1])
def test_loss_and_gradients_equal_plain_torch_for_every_way_to_cut_a_step(model, documents, padding_free, size):
    expected_loss, expected_gradients = reference(model, documents)
    collator, total, count = Collator(padding_free), 0.0, 0
    model.train()
    for start in range(0, len(documents), size):
        loss, supervised = supervised_loss(model, collator(documents[start : start + size]))
        loss.backward()
        total, count = total + loss.item(), count + supervised.item()
    assert total / count == pytest.approx(expected_loss, rel=1e-5)
    gradients = {name: parameter.grad / count for name, parameter in model.named_parameters()}
    assert relative(gradients, expected_gradients) < 1e-5


GEOMETRIES = {
    "8x1": ["--per_device_train_batch_size", 8],
    "2x4": ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 4],
    "1x8": ["--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 8],
    "2x4 padded": ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 4, "--padding_free", "False"],
    "2 ranks": ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2],
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * ("ranks" in n)) for n in GEOMETRIES])
def test_one_step_of_the_trainer_is_the_same_for_every_geometry(tiny_model, documents, tmp_path, name):
    data = write(tmp_path / "rows.jsonl", UNEVEN_ROWS)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    expected_loss, expected_gradients = reference(plain, documents)
    loss, gradients = step(tmp_path, tiny_model, data, "out", *GEOMETRIES[name], ranks=2 if "ranks" in name else 1)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    # weights minus a small gradient are rounded to float32: 1e-4 is what the subtraction leaves
    assert relative(gradients, expected_gradients) < 1e-4


two_ranks = [pytest.param(2, size, marks=pytest.mark.slow) for size in (1, 3)]


@pytest.mark.parametrize("ranks, size", [(1, 1), (1, 3), (1, 8), *two_ranks])
def test_evaluation_loss_is_the_token_mean_for_every_batch_and_rank(tiny_model, documents, tmp_path, ranks, size):
    data, train = write(tmp_path / "rows.jsonl", UNEVEN_ROWS[:7]), write(tmp_path / "train.jsonl", UNEVEN_ROWS[:4])
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    expected, _ = reference(plain, documents[:7])
    more = ["--eval_data_path", data, "--eval_on_start", "True", "--per_device_eval_batch_size", size,
            "--per_device_train_batch_size", 2]  # fmt: skip
    step(tmp_path, tiny_model, train, "out", *more, ranks=ranks)
    assert history(tmp_path / "out", "eval_loss")[0] == pytest.approx(expected, rel=1e-6)


def test_several_evaluation_files_have_a_loss_each_and_one_over_all_tokens(tiny_model, documents, tmp_path):
    first, second = write(tmp_path / "first.jsonl", UNEVEN_ROWS[:3]), write(tmp_path / "second.jsonl", UNEVEN_ROWS[3:])
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    more = ["--eval_data_path", first, second, "--eval_on_start", "True"]
    step(tmp_path, tiny_model, first, "out", *more)
    for key, part in (
        ("eval_first_loss", documents[:3]),
        ("eval_second_loss", documents[3:]),
        ("eval_loss", documents),
    ):
        assert history(tmp_path / "out", key)[0] == pytest.approx(reference(plain, part)[0], rel=1e-6)


def test_label_smoothing_is_in_the_training_loss_and_not_in_the_evaluation_loss(tiny_model, documents, tmp_path):
    data = write(tmp_path / "rows.jsonl", UNEVEN_ROWS)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    more = ["--eval_data_path", data, "--eval_on_start", "True", "--label_smoothing_factor", 0.2]
    loss, _ = step(tmp_path, tiny_model, data, "out", *more, "--per_device_train_batch_size", 8)
    total = count = 0
    for (document,) in documents:
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor([document["input_ids"]]), use_cache=False).logits[0, :-1]
        labels = torch.tensor(document["labels"][1:])
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.2).item()
        count += (labels != IGNORE_INDEX).sum().item()
    assert loss == pytest.approx(total / count, rel=1e-5)
    assert history(tmp_path / "out", "eval_loss")[0] == pytest.approx(reference(plain, documents)[0], rel=1e-6)


def test_rows_can_be_grouped_by_length(tiny_model, tmp_path):
    data = write(
        tmp_path / "rows.jsonl", UNEVEN_ROWS * 8
    )  # transformers sorts a sixteenth of the rows at a time, at least
    padding = {}
    for strategy in ("random", "group_by_length"):
        options = ["--train_sampling_strategy", strategy, "--padding_free", "False", "--num_train_epochs", 1]
        finetune.train(argv(tiny_model, data, tmp_path / strategy, *options))
        padding[strategy] = sum(history(tmp_path / strategy, "padding"))
    assert padding["group_by_length"] < 0.7 * padding["random"], padding
    for more in (["group_by_length", "--lazy_preprocess"], ["batch_rebalance"]):
        with pytest.raises(UserError, match="--train_sampling_strategy"):
            finetune.train(argv(tiny_model, data, tmp_path / "out", "--train_sampling_strategy", *more))


@pytest.mark.parametrize("mode", [[], ["--use_lora"]], ids=["full", "lora"])
def test_twenty_steps_in_bfloat16_stay_within_the_spread_of_two_seeds(tiny_model, tmp_path, monkeypatch, mode):
    monkeypatch.setattr(finetune.precision, "has_bf16", lambda cpu: True)  # slow on some processors, and right on all
    data = ROOT / "data" / "train.jsonl"
    more = ["--max_steps", 20, "--learning_rate", 2e-3, "--lora_dropout", 0, *mode]

    def curve(name, *flags):
        finetune.train(argv(tiny_model, data, tmp_path / name, *more, *flags))
        return torch.tensor(history(tmp_path / name, "loss"))

    exact = curve("exact")
    rounded, other_seed = curve("rounded", "--bf16", "True"), curve("other seed", "--seed", 1)
    assert exact[-5:].mean() < exact[:5].mean()
    assert 0 < (rounded - exact).abs().max() < (other_seed - exact).abs().max()
    assert (rounded - exact).norm() < (other_seed - exact).norm()


# ----------------------------------------------------------------------------------------------------------------------
# Documents of a row


def test_a_poisoned_neighbour_changes_nothing(model):
    assert checks.packing_fault(model, Collator()) is None


def test_the_self_test_sees_a_model_that_mixes_documents_and_training_falls_back_to_padding(
    tiny_model, documents, tmp_path, monkeypatch, capsys
):
    mixing = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="sdpa")
    forward = mixing.forward
    ends = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    mixing.forward = lambda position_ids=None, **rest: forward(  # one long document
        **{name: value for name, value in rest.items() if name not in ends}
    )
    assert checks.packing_fault(mixing, Collator())
    monkeypatch.setattr(checks, "packing_fault", lambda model, collator: "this model mixes the documents of a row")
    data = write(tmp_path / "rows.jsonl", UNEVEN_ROWS)
    loss, _ = step(tmp_path, tiny_model, data, "out", "--per_device_train_batch_size", 8)
    assert "training with padded batches" in capsys.readouterr().out
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    assert loss == pytest.approx(reference(plain, documents)[0], rel=1e-5)


def test_a_sliding_window_is_left_to_the_exact_mask(tiny_copy, tmp_path, capsys):
    config = json.loads((tiny_copy / "config.json").read_text())
    config.update(
        use_sliding_window=True, sliding_window=16, max_window_layers=0, layer_types=["sliding_attention"] * 2
    )
    (tiny_copy / "config.json").write_text(json.dumps(config))
    finetune.train(argv(tiny_copy, write(tmp_path / "rows.jsonl", UNEVEN_ROWS), tmp_path / "out"))
    told = capsys.readouterr().out
    assert "has layers with a sliding window: attention by an exact mask" in told and "attention sdpa" in told


def test_a_micro_batch_has_no_padding_and_keeps_its_conversations(documents):
    batch = Collator()(documents[:4])
    assert batch["input_ids"].shape == (1, sum(len(document["input_ids"]) for (document,) in documents[:4]))
    assert "attention_mask" not in batch and (batch["position_ids"] == 0).sum() == 4
    lengths = [len(document["input_ids"]) for (document,) in documents[:4]]
    assert batch["cu_seq_lens_q"].dtype == torch.int32 and batch["cu_seq_lens_q"].diff().tolist() == lengths
    assert batch["max_length_q"] == max(lengths)


def test_padding_is_masked_by_length_and_a_pad_token_in_the_text_stays(documents):
    ((short,),) = documents[:1]
    with_pad = {**short, "input_ids": [0, *short["input_ids"]], "labels": [IGNORE_INDEX, *short["labels"]]}
    batch = Collator(padding_free=False)([[with_pad], *documents[1:2]])
    assert batch["attention_mask"].sum(1).tolist() == [len(with_pad["input_ids"]), len(documents[1][0]["input_ids"])]


def test_truncated_documents_end_with_a_label(documents):
    labels = [IGNORE_INDEX, 5, 6, IGNORE_INDEX, 7, 8]
    document = {"input_ids": [1, 5, 6, 2, 7, 8], "labels": labels, "turns": [2, 4]}
    assert tokenised.truncated([document], 5) == [{"input_ids": [1, 5, 6], "labels": labels[:3], "turns": [2]}]
    assert tokenised.truncated([document], 2) == []
