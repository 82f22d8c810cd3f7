"""SmolLM2-135M-Instruct, a real pretrained model: it learns, stops by itself, merges without loss and answers."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import finetune
from demo.demo_model import demo_model
from helpers import ROOT, history, write
from recipe.console import UserError
from recipe.dataset.conversations import Conversations
from recipe.dataset.encoding import IGNORE_INDEX, ChatEncoder
from recipe.model import loading
from recipe.training import answers, merge_proof
from recipe.training.merging import merge

CAPITALS = (
    "Austria Vienna Belgium Brussels Chile Santiago Denmark Copenhagen Egypt Cairo Finland Helsinki Greece Athens "
    "Hungary Budapest Ireland Dublin Japan Tokyo Kenya Nairobi Latvia Riga Malta Valletta Norway Oslo Oman Muscat Peru Lima "
    "Qatar Doha Romania Bucharest Spain Madrid Tunisia Tunis"
).split()

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm():
    return demo_model()


ADAPTER = ["--use_lora", "--lora_dropout", 0]


def argv(model, data, out, *more):
    words = f"--model_name_or_path {model} --data_path {data} --output_dir {out} --save_strategy no --disable_tqdm True"
    return [*f"{words} --logging_steps 1 --per_device_train_batch_size 4".split(), *map(str, more)]


@pytest.fixture(scope="module")
def memorised(smollm, tmp_path_factory):
    """An adapter that has learnt twenty answers of its own style by heart, and the file with them."""
    folder = tmp_path_factory.mktemp("memorised")
    rows = [
        {"prompt": f"Capital of {country}?", "completion": f"{city.upper()}!"}
        for country, city in zip(CAPITALS[::2], CAPITALS[1::2], strict=True)
    ]
    data = write(folder / "rows.jsonl", rows)
    options = [*ADAPTER, "--lora_r", 16, "--learning_rate", "1e-3", "--num_train_epochs", 12]
    finetune.train(argv(smollm, data, folder / "out", *options))
    return folder / "out", data


@pytest.mark.parametrize("mode", [[], [*ADAPTER, "--q_lora"]], ids=["full", "qlora"])
def test_training_lowers_the_loss_of_held_out_rows(smollm, tmp_path, mode):
    rows = [json.loads(line) for line in open(ROOT / "data" / "validation.jsonl")][:6]
    held_out = write(tmp_path / "held_out.jsonl", rows)
    options = ["--eval_data_path", held_out, "--eval_on_start", "True", "--max_steps", 6, *mode]
    options += ["--learning_rate", "1e-3" if mode else "2e-4"]
    finetune.train(argv(smollm, ROOT / "data" / "train.jsonl", tmp_path / "out", *options))
    losses = history(tmp_path / "out", "eval_loss")
    assert losses[-1] < 0.9 * losses[0]


def test_padding_free_and_padded_training_have_the_same_curve(smollm, tmp_path):
    curves = []
    lines = sorted((ROOT / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines(), key=len)[:40]
    data = write(tmp_path / "short.jsonl", map(json.loads, lines))
    for padding_free in ("True", "False"):
        out = tmp_path / padding_free
        options = [*ADAPTER, "--lora_r", 8, "--learning_rate", "1e-3", "--max_steps", 10, "--bf16", "False"]
        options += ["--per_device_train_batch_size", 2]
        finetune.train(argv(smollm, data, out, *options, "--padding_free", padding_free))
        curves.append(history(out, "loss"))
    assert len(curves[0]) == 10 and curves[0][-1] < 0.5 * curves[0][0]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_generation_stops_by_itself_on_all_twenty_memorised_examples(memorised):
    out, data = memorised
    model, tokenizer = loading.load(str(out), torch.float32)
    records = Conversations([str(data)])
    encoder = ChatEncoder(tokenizer)
    asked = answers.questions([records[i] for i in range(20)], encoder)
    for question in asked:
        # no stop token is given here: the saved generation config has to know it
        new = model.generate(torch.tensor([question.prompt_ids]), max_new_tokens=32, do_sample=False)[0]
        answer = new[len(question.prompt_ids) :].tolist()
        assert answer[-1] == encoder.stop_ids[0] and answer == question.reference_ids


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_merged_model_has_the_adapters_logits_in_a_plain_load(memorised, tmp_path, dtype):
    out, _ = memorised
    difference = merge(str(out), str(tmp_path / "merged"), getattr(torch, dtype))
    adapter, tokenizer = loading.load(str(out), torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == getattr(torch, dtype)
    ids = [tokenizer(text, return_tensors="pt").input_ids for text in merge_proof.PROMPTS]
    with torch.no_grad():
        expected = [adapter(i).logits for i in ids]
        rounded = adapter.merge_and_unload().to(getattr(torch, dtype))
        found = [merged.float()(i).logits for i in ids]
        distance = max((a - b).norm() / a.norm() for a, b in zip(found, expected, strict=True))
    assert difference == pytest.approx(distance.item(), rel=1e-2, abs=1e-5)  # what is told is what was written
    if dtype == "float32":
        assert distance < 1e-4
    # Nothing but rounding is between them, however much that moves the logits of what was learnt by heart.
    weights = merged.state_dict()
    assert all(torch.equal(weights[name], tensor.float()) for name, tensor in rounded.state_dict().items())
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config and config["use_cache"]
    again = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert again.chat_template == tokenizer.chat_template and again.eos_token == "<|im_end|>"


def test_merging_refuses_what_it_cannot_prove(memorised, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="holds no adapter_config.json"):
        merge(str(tmp_path), str(tmp_path / "merged"))
    monkeypatch.setattr(merge_proof, "TOLERANCE", 1e-12)
    with pytest.raises(UserError, match="nothing was written"):
        merge(str(memorised[0]), str(tmp_path / "merged"), torch.float32)
    assert not (tmp_path / "merged").exists()


def test_an_adapter_weight_without_a_place_in_the_base_is_an_error(memorised, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(memorised[0], tmp_path / "broken")
    weights = load_file(broken / "adapter_model.safetensors")
    weights["base_model.model.model.layers.99.mlp.up_proj.lora_A.weight"] = torch.ones(16, 576)
    save_file(weights, broken / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"1 adapter weights do not match .*layers\.99"):
        merge(str(broken), str(tmp_path / "merged"), torch.float32)


def test_evaluation_by_generation_reports_exact_answers_and_a_users_own_metric(memorised, tmp_path):
    out, data = memorised
    metric = tmp_path / "metric.py"
    metric.write_text(
        "def shouted(answer, reference, messages):\n    return answer.isupper() and 'Cap' in messages[-1]['content']\n"
    )
    command = [sys.executable, "eval.py", "--model_name_or_path", out, "--data_path", data, "--limit", "6",
               "--metric", f"{metric}:shouted", "--output", tmp_path / "answers.jsonl"]  # fmt: skip
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    numbers = json.loads(done.stdout.splitlines()[-1])
    assert numbers["exact_match"] == numbers["shouted"] == 1 and numbers["valid_json"] == 0
    assert numbers["eval_loss"] < 0.05
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert answers[0] == {"answer": "VIENNA!", "reference": "VIENNA!"} and len(answers) == 6


def test_answers_do_not_depend_on_the_batch_they_are_given_in(smollm):
    model, tokenizer = loading.load(smollm, torch.float32)
    encoder = ChatEncoder(tokenizer)
    held_out = Conversations([str(ROOT / "data" / "validation.jsonl")])
    asked = answers.questions([held_out[i] for i in range(5)], encoder)
    alone = [answers.answer(model, tokenizer, [question], encoder.stop_ids, 12)[0] for question in asked]
    assert answers.answer(model, tokenizer, asked, encoder.stop_ids, 12, batch_size=5) == alone


def test_the_trainer_answers_held_out_prompts_at_each_evaluation(memorised, tmp_path):
    out, data = memorised
    base = json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]
    options = ["--lora_weight_path", out, "--eval_data_path", data, "--eval_on_start", "True", "--eval_generate", 8]
    finetune.train(argv(base, data, tmp_path / "out", *options, "--max_steps", 1, "--learning_rate", "1e-6"))
    assert history(tmp_path / "out", "eval_exact_match")[0] == 1.0
    assert history(tmp_path / "out", "eval_valid_json")[0] == 0.0


def test_chat_answers_in_the_terminal(memorised):
    command = [sys.executable, "chat.py", "--model_name_or_path", str(memorised[0])]
    done = subprocess.run(
        command, cwd=ROOT, input="Capital of Japan?\n\nCapital of Peru?\n", capture_output=True, text=True
    )
    assert "TOKYO!" in done.stdout and "LIMA!" in done.stdout and done.returncode == 0


def test_chat_and_evaluate_name_a_model_that_is_not_there():
    for command in (["chat.py"], ["eval.py", "--data_path", "data/validation.jsonl"]):
        words = [sys.executable, *command, "--model_name_or_path", "no/such/model/here"]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and "cannot be loaded" in done.stderr and "Traceback" not in done.stderr


def test_turns_of_the_real_tokenizer_decode_to_the_answers_and_their_stop_tokens(smollm):
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    two = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello 😀 there"}]
    three = [*two, {"role": "user", "content": "More"}, {"role": "assistant", "content": " spaced\n"}]
    for messages, expected in (
        (two, "Hello 😀 there<|im_end|>"),
        (three, "Hello 😀 there<|im_end|> spaced\n<|im_end|>"),
    ):
        (document,) = ChatEncoder(tokenizer).encode({"messages": messages}).documents
        learnt = [label for label in document["labels"] if label != IGNORE_INDEX]
        assert tokenizer.decode(learnt, clean_up_tokenization_spaces=False) == expected


def test_a_metric_that_is_not_there_is_one_sentence(tmp_path):
    for name in ("no_file.py:f", "no_function", f"{__file__}:no_such_function"):
        with pytest.raises(UserError, match="--metric"):
            answers.load_metric(name)
