"""The loss that the output head computes, a block of positions at a time, is that of plain torch."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import finetune
from helpers import ROWS, argv, write
from recipe.dataset.collator import Collator
from recipe.dataset.encoding import IGNORE_INDEX
from recipe.model import loss
from recipe.model.loss import supervised_loss


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setitem(loss.BLOCK, "cpu", 7)  # several blocks, the last one not full


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("trained", ["hidden", "weight", "both"])
def test_loss_and_gradients_are_those_of_torch(small_blocks, smoothing, with_bias, trained):
    torch.manual_seed(0)
    hidden = torch.randn(31, 16, requires_grad=trained != "weight")
    weight = torch.randn(50, 16, requires_grad=trained != "hidden")
    bias = torch.randn(50) if with_bias else None
    targets = torch.randint(50, (31,))
    targets[[0, 8, 30]] = IGNORE_INDEX
    found = loss.HeadLoss.apply(hidden, weight, bias, targets, smoothing)
    (found / 3).backward()
    grads = [tensor.grad for tensor in (hidden, weight)]
    hidden.grad = weight.grad = None
    logits = torch.nn.functional.linear(hidden, weight, bias)
    expected = torch.nn.functional.cross_entropy(
        logits, targets, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=smoothing
    )
    (expected / 3).backward()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    for grad, tensor in zip(grads, (hidden, weight), strict=True):
        assert (grad is None) == (tensor.grad is None)
        if grad is not None:
            torch.testing.assert_close(grad, tensor.grad, rtol=1e-4, atol=1e-5)


def test_nothing_to_learn_is_a_loss_of_zero_with_a_graph():
    hidden = torch.randn(3, 4, requires_grad=True)
    total = loss.HeadLoss.apply(hidden, torch.randn(5, 4), None, torch.full((3,), IGNORE_INDEX), 0.0)
    total.backward()
    assert total == 0 and not hidden.grad.any()


def test_under_bfloat16_the_reported_loss_keeps_float32(small_blocks):
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(40, 64), torch.randn(100, 64) / 8, torch.randint(100, (40,))
    with torch.autocast("cpu", torch.bfloat16):
        found = loss.HeadLoss.apply(hidden, weight, None, targets, 0.0)
    logits = (hidden.bfloat16() @ weight.bfloat16().T).float()
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(
        torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item(), rel=1e-5
    )


@pytest.mark.parametrize("padding_free", [True, False])
def test_the_models_head_takes_over_the_loss_and_still_gives_logits(tiny_model, small_blocks, padding_free):
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    taught = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    head = loss.fuse_loss_into_head(taught)
    rows = [
        [{"input_ids": list(range(5, 5 + n)), "labels": [IGNORE_INDEX] * 3 + list(range(8, 5 + n))}] for n in (9, 20)
    ]
    batch = Collator(padding_free)(rows)
    results = []
    for model, its_head in ((plain, None), (taught, head)):
        total, count = supervised_loss(model, batch, 0.1, its_head)
        total.backward()
        results.append((total.item(), count.item(), {name: p.grad for name, p in model.named_parameters()}))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6) and results[0][1] == results[1][1] == 23
    for name, gradient in results[0][2].items():
        torch.testing.assert_close(results[1][2][name], gradient, rtol=1e-3, atol=1e-5)
    ids = torch.arange(4)[None]
    assert torch.equal(plain(input_ids=ids).logits, taught(input_ids=ids).logits)


def test_a_head_that_is_more_than_a_linear_layer_keeps_its_logits(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config.final_logit_softcapping = 30.0
    assert loss.fuse_loss_into_head(model) is None
    assert loss.obstacle_to_fusing(model) == "it changes its logits (final_logit_softcapping)"
    model.config.final_logit_softcapping = None
    assert loss.fuse_loss_into_head(model).head is model.get_output_embeddings()


def rows_of(*lengths):
    return [[{"input_ids": list(range(5, 5 + n)), "labels": list(range(5, 5 + n))}] for n in lengths]


@pytest.mark.parametrize("change", [lambda logits: 3 * logits, lambda logits: torch.tanh(logits / 30) * 30])
def test_a_model_that_changes_its_logits_in_a_way_nobody_named_gets_its_loss_from_whole_logits(
    tiny_model, change, capsys
):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    forward = model.forward

    def changed(*args, **options):
        output = forward(*args, **options)
        output.logits = change(output.logits)
        return output

    model.forward = changed
    batch = Collator()(rows_of(9, 20))
    expected, _ = supervised_loss(model, batch)
    head = loss.fuse_loss_into_head(model)
    for _ in range(2):
        found, count = supervised_loss(model, batch, 0.0, head)
        assert found.item() == expected.item() and count == 27
    assert capsys.readouterr().out.count("changes its logits after the output head") == 1


def test_the_start_block_says_why_the_head_does_not_compute_the_loss(tiny_model, tmp_path, capsys):
    data = write(tmp_path / "rows.jsonl", ROWS)
    more = ["--use_lora", "--modules_to_save", "lm_head"]
    finetune.train(argv(tiny_model, data, tmp_path / "out", *more))
    assert "loss: from whole logits, which takes more memory" in capsys.readouterr().out
    finetune.train(argv(tiny_model, data, tmp_path / "out", "--use_lora"))
    assert "loss: from whole logits" not in capsys.readouterr().out
