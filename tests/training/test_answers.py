"""Answers to held-out prompts: what is left behind when something fails, and what a user's metric may import."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import ROWS
from recipe.console import UserError
from recipe.dataset.encoding import ChatEncoder
from recipe.training import answers


@pytest.mark.parametrize("training", [True, False])
def test_a_failure_while_answering_leaves_the_model_as_it_was(tiny_model, monkeypatch, training):
    model = AutoModelForCausalLM.from_pretrained(tiny_model).train(training)
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(tiny_model))
    asked = answers.questions(ROWS[:2], encoder)
    config = model.config.to_dict()

    def out_of_memory(*args, **options):
        assert not model.training
        raise torch.OutOfMemoryError("no memory is left")

    monkeypatch.setattr(model, "generate", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        answers.answer(model, encoder.tokenizer, asked, encoder.stop_ids)
    assert model.training is training and model.config.to_dict() == config
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_a_metric_imports_the_package_evaluate_and_no_module_of_this_project(tmp_path, monkeypatch):
    package = tmp_path / "site" / "evaluate"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("def load(name):\n    return lambda answer: float(len(answer) + len(name))\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    metric = tmp_path / "my.py"
    metric.write_text(
        "import evaluate\nmeasure = evaluate.load('rouge')\ndef rouge(answer, *_):\n    return measure(answer)\n"
    )
    assert answers.load_metric(f"{metric}:rouge")("abc", "", []) == 8.0


def test_conversations_that_are_too_long_are_left_out_of_all_figures(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(tiny_model))
    turns = [{"role": "user", "content": "long " * 300}, {"role": "assistant", "content": "x"}]
    short, all_rows = ROWS[:2], [*ROWS[:2], {"messages": turns}]
    expected = answers.measure(model, encoder, short, max_new_tokens=4)
    found = answers.measure(model, encoder, all_rows, max_new_tokens=4, max_length=100)
    assert found.figures == pytest.approx(expected.figures) and len(found.questions) == 2
    with pytest.raises(UserError, match="no conversation of at most 2 tokens has an assistant turn"):
        answers.measure(model, encoder, short, max_length=2)
