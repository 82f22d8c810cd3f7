"""The whole recipe on a tiny random model: it trains, says what it will do, saves what loads, and can be repeated."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import finetune
from helpers import ROOT, ROWS, argv, history, parse, run_forked, write
from recipe.console import UserError
from recipe.dataset.conversations import Conversations
from recipe.dataset.encoding import ChatEncoder
from recipe.model import loading


@pytest.fixture
def rows(tmp_path):
    return write(tmp_path / "rows.jsonl", ROWS)


# ----------------------------------------------------------------------------------------------------------------------
# Training and what it leaves behind


@pytest.mark.pictures
@pytest.mark.parametrize("mode", [[], ["--use_lora"], ["--q_lora"]], ids=["full", "lora", "qlora"])
@pytest.mark.parametrize("checkpointing", ["False", "True"])
def test_training_lowers_the_loss_and_saves_a_complete_folder(tiny_model, rows, tmp_path, mode, checkpointing):
    out = tmp_path / "out"
    finetune.train(
        argv(tiny_model, rows, out, "--eval_data_path", rows, "--gradient_checkpointing", checkpointing, *mode)
    )
    losses = history(out, "eval_loss")
    assert len(losses) == 3 and losses[-1] < losses[0]
    weights = "adapter_model.safetensors" if mode else "model.safetensors"
    for folder in (out, out / "best"):
        for name in (weights, "tokenizer.json", "chat_template.jinja", "generation_config.json"):
            assert (folder / name).exists()
    assert (out / "loss.png").stat().st_size > 5000


@pytest.mark.parametrize("mode", [[], ["--use_lora", "--lora_dropout", "0.1"]], ids=["full", "lora with dropout"])
def test_the_same_seed_gives_the_same_run_and_another_seed_another(tiny_model, rows, tmp_path, mode):
    runs = [tmp_path / name for name in "abc"]
    for out, seed in zip(runs, (1, 1, 2), strict=True):
        finetune.train(argv(tiny_model, rows, out, "--seed", seed, *mode))
    first, again, other = (history(out, "loss") for out in runs)
    assert first == again and first != other


def test_gradient_checkpointing_changes_no_loss(tiny_model, rows, tmp_path):
    runs = [tmp_path / "plain", tmp_path / "checkpointed"]
    for out, on in zip(runs, ("False", "True"), strict=True):
        finetune.train(argv(tiny_model, rows, out, "--use_lora", "--lora_dropout", 0, "--gradient_checkpointing", on))
    plain, checkpointed = (history(out, "loss") for out in runs)
    assert plain == pytest.approx(checkpointed, rel=1e-5)


def test_best_holds_the_weights_of_the_lowest_evaluation_loss(tiny_model, rows, tmp_path):
    held_out = write(tmp_path / "other.jsonl", [{"prompt": "say one", "completion": "nothing of the kind"}])
    out = tmp_path / "out"
    options = ["--use_lora", "--eval_data_path", held_out, "--save_strategy", "epoch", "--save_total_limit", 9]
    finetune.train(argv(tiny_model, rows, out, *options))
    losses = history(out, "eval_loss")
    best = min(range(3), key=lambda i: losses[i])
    assert best < 2, "the evaluation loss must rise for this test to tell anything"
    assert json.loads((out / "best" / "metrics.json").read_text()) == {"eval_loss": losses[best], "step": 2 * best + 2}
    saved, checkpoint = (
        load_file(folder / "adapter_model.safetensors") for folder in (out / "best", out / f"checkpoint-{2 * best + 2}")
    )
    assert saved.keys() == checkpoint.keys() and all(torch.equal(saved[key], checkpoint[key]) for key in saved)


@pytest.mark.slow
def test_adapters_load_with_plain_peft_in_a_fresh_process_and_have_the_loss_that_was_logged(tiny_model, rows, tmp_path):
    out = tmp_path / "out"
    finetune.train(argv(tiny_model, rows, out, "--use_lora", "--eval_data_path", rows))
    finetune.train(argv(tiny_model, rows, out, "--dump_tokens", tmp_path / "tokens.jsonl"))
    program = (
        "import json, sys, torch, peft\n"
        "for folder in sys.argv[2:]:\n"
        "    model = peft.AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)\n"
        "    total = count = 0\n"
        "    for row in map(json.loads, open(sys.argv[1])):\n"
        "        labels = torch.tensor([row['labels']])\n"
        "        with torch.no_grad():\n"
        "            loss = model(input_ids=torch.tensor([row['input_ids']]), labels=labels).loss.item()\n"
        "        supervised = int((labels != -100).sum())\n"
        "        total, count = total + loss * supervised, count + supervised\n"
        "    print(total / count)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "tokens.jsonl"), str(out), str(out / "best")]
    done = subprocess.run(command, capture_output=True, text=True)
    logged = history(out, "eval_loss")
    assert list(map(float, done.stdout.split())) == pytest.approx([logged[-1], min(logged)], rel=1e-5), done.stderr[
        -2000:
    ]


def test_an_adapter_holds_lora_weights_alone_in_float32(tiny_model, rows, tmp_path):
    finetune.train(argv(tiny_model, rows, tmp_path / "out", "--use_lora", "--lora_r", 4))
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(".lora_A." in key or ".lora_B." in key for key in saved)
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert len(saved) == 2 * 2 * 7  # A and B of seven linear layers in two blocks; the output head is left alone
    assert all(value.any() for key, value in saved.items() if "lora_B" in key)


def test_the_saved_config_is_the_base_models_but_for_the_stop_token(tiny_model, rows, tmp_path):
    finetune.train(argv(tiny_model, rows, tmp_path / "out"))
    before, after = (json.loads((pathlib.Path(f) / "config.json").read_text()) for f in (tiny_model, tmp_path / "out"))
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert changed <= {"eos_token_id", "pad_token_id", "transformers_version", "dtype", "rope_theta", "rope_scaling"}
    assert after["rope_theta"] == before["rope_parameters"]["rope_theta"] and after["rope_scaling"] is None
    assert after["use_cache"] is True


def test_generation_stops_at_the_learnt_stop_token_also_for_a_base_model(tiny_model, rows, tmp_path, capsys):
    finetune.train(argv(tiny_model, rows, tmp_path / "out", "--use_lora"))
    stops = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    vocabulary = json.loads((tiny_model / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in vocabulary}
    assert stops == [ids["<|im_end|>"], ids["<|endoftext|>"]]  # that of the base model is kept
    assert "generation will stop at <|im_end|>" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"


def test_a_generation_config_that_cannot_be_saved_is_mended(tiny_copy, rows, tmp_path):
    path = tiny_copy / "generation_config.json"
    path.write_text(json.dumps({"do_sample": False, "temperature": 0.7, "eos_token_id": 151643}))
    finetune.train(argv(tiny_copy, rows, tmp_path / "out"))
    assert "temperature" not in json.loads((tmp_path / "out" / "generation_config.json").read_text())


# ----------------------------------------------------------------------------------------------------------------------
# Adapters


def test_what_is_asked_of_peft_reaches_peft(tiny_model, rows, tmp_path):
    options = "--lora_r 8 --lora_alpha 32 --lora_dropout 0.1 --use_rslora --use_dora --modules_to_save lm_head"
    options += " --init_lora_weights gaussian --lora_target_modules q_proj v_proj --lora_bias none"
    finetune.train(argv(tiny_model, rows, tmp_path / "out", *options.split()))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    expected = dict(r=8, lora_alpha=32, lora_dropout=0.1, use_rslora=True, use_dora=True, ensure_weight_tying=True,
                    init_lora_weights="gaussian", bias="none", base_model_name_or_path=str(tiny_model))  # fmt: skip
    assert {key: config[key] for key in expected} == expected
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "out" / "adapter_model.safetensors")


def test_stop_token_embeddings_can_be_trained_beside_the_adapter(tiny_model, rows, tmp_path):
    finetune.train(argv(tiny_model, rows, tmp_path / "out", "--use_lora", "--trainable_token_indices", 999))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == [999]
    assert any("trainable_tokens" in key for key in load_file(tmp_path / "out" / "adapter_model.safetensors"))


def test_an_adapter_is_continued_where_it_ended(tiny_model, rows, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    finetune.train(argv(tiny_model, rows, first, "--use_lora", "--lora_r", 4, "--eval_data_path", rows))
    options = [
        "--lora_weight_path",
        first,
        "--eval_data_path",
        rows,
        "--eval_on_start",
        "True",
        "--learning_rate",
        "1e-4",
    ]
    finetune.train(argv(tiny_model, rows, second, *options))
    assert history(second, "eval_loss")[0] == pytest.approx(history(first, "eval_loss")[-1], rel=1e-5)
    assert json.loads((second / "adapter_config.json").read_text())["r"] == 4


def test_target_modules_that_the_model_lacks_are_refused_with_those_it_has(tiny_model, rows, tmp_path):
    with pytest.raises(UserError, match="c_attn.*'q_proj'"):
        finetune.train(argv(tiny_model, rows, tmp_path / "out", "--lora_target_modules", "c_attn"))


def test_a_tensor_that_the_loss_does_not_reach_stops_the_run(tiny_model, rows, tmp_path, monkeypatch):
    add_adapter = finetune.add_adapter

    def cut_off(model, *args):
        model = add_adapter(model, *args)
        model.base_model.model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: output.detach())
        return model

    monkeypatch.setattr(finetune, "add_adapter", cut_off)
    with pytest.raises(UserError, match=r"6 trained tensors .*layers\.0\.mlp.* \(no gradient\)"):
        finetune.train(argv(tiny_model, rows, tmp_path / "out", "--use_lora"))


# ----------------------------------------------------------------------------------------------------------------------
# What the run says before it starts


def test_the_steps_that_are_announced_are_the_steps_that_are_taken(tiny_model, rows, tmp_path, capsys):
    options = ["--per_device_train_batch_size", 3, "--gradient_accumulation_steps", 2, "--warmup_steps", 0.3]
    finetune.train(argv(tiny_model, rows, tmp_path / "out", *options))
    said = capsys.readouterr().out
    assert "8 rows / (3 a device x 2 accumulated x 1 ranks) = 2 an epoch x 3 epochs = 6 optimizer steps" in said
    assert "2 of them warm-up to a learning rate of 0.01, then cosine" in said
    rates = history(tmp_path / "out", "learning_rate")
    assert len(rates) == 6 and max(rates) == rates[2] == 0.01


def test_the_block_counts_rows_tokens_and_parameters(tiny_model, tmp_path, capsys):
    rows = [*ROWS, {"prompt": "long " * 300, "completion": "x"}, {"messages": [{"role": "user", "content": "alone"}]}]
    data = write(tmp_path / "rows.jsonl", rows)
    finetune.train(argv(tiny_model, data, tmp_path / "out", "--use_lora", "--lora_r", 2, "--model_max_length", 100))
    said = capsys.readouterr().out
    assert f"10 read from {data} (messages)" in said and "8 kept" in said
    assert f"1 dropped, longer than 100 tokens: {data}: record 9 (line 9)" in said
    assert f"1 dropped, without a turn to learn: {data}: record 10 (line 10)" in said
    tokens = int(re.search(r"([\d,]+) tokens, ", said).group(1).replace(",", ""))
    supervised = int(re.search(r"tokens, ([\d,]+) of them supervised", said).group(1).replace(",", ""))
    encoder = ChatEncoder(finetune.transformers.AutoTokenizer.from_pretrained(tiny_model))
    ids = [encoder.encode(row).documents[0] for row in ROWS]
    assert tokens == sum(len(document["input_ids"]) for document in ids)
    assert supervised == sum(label != -100 for document in ids for label in document["labels"])
    # q, k, v, o, gate, up, down of width 64, 32 (two key heads of 16) and 128, twice
    lora = 2 * 2 * ((64 + 64) + (64 + 32) + (64 + 32) + (64 + 64) + (64 + 128) + (64 + 128) + (128 + 64))
    assert f"trained: {lora:,} of" in said
    assert "attention packed, computed in float32" in said and "GB free" in said


def test_rope_scaling_stretches_the_window_and_is_saved(tiny_model, rows, tmp_path):
    with pytest.raises(UserError, match="4096 exceeds the model's window of 2048 positions.*--rope_scaling yarn"):
        finetune.train(argv(tiny_model, rows, tmp_path / "out", "--model_max_length", 4096))
    beyond = write(tmp_path / "beyond.jsonl", [{"prompt": "long " * 600, "completion": "word " * 400}])
    options = ["--model_max_length", 4096, "--overlong", "error", "--learning_rate", 0, "--max_steps", 1]
    ids = torch.arange(3000)[None] % 900
    for kind in ("yarn", "linear", "dynamic"):
        out = tmp_path / kind
        finetune.train(argv(tiny_model, beyond, out, *options, "--rope_scaling", kind))
        rope = json.loads((out / "config.json").read_text())["rope_parameters"]
        assert (rope["rope_type"], rope["factor"]) == (kind, 2.0)
        config = finetune.transformers.AutoConfig.from_pretrained(tiny_model)
        config.rope_parameters |= {"rope_type": kind, "factor": 2.0, "original_max_position_embeddings": 2048}
        load = finetune.transformers.AutoModelForCausalLM.from_pretrained
        with torch.no_grad():
            found = load(out, dtype=torch.float32)(ids).logits
            expected = load(tiny_model, config=config, dtype=torch.float32)(ids).logits
            plain = load(tiny_model, dtype=torch.float32)(ids).logits
        assert torch.allclose(found, expected, atol=1e-5) and not torch.allclose(found, plain, atol=1e-3)


@pytest.mark.parametrize("name", ["no/such/folder/at/all", "nobody/nothing"])
def test_a_model_that_is_not_there_is_one_sentence(rows, tmp_path, name):
    with pytest.raises(UserError, match=f"--model_name_or_path {name}: cannot be loaded"):
        finetune.train(argv(name, rows, tmp_path / "out"))


def test_a_chat_template_of_ones_own_is_used_and_saved(tiny_model, rows, tmp_path):
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
    )
    finetune.train(argv(tiny_model, rows, tmp_path / "out", "--use_lora", "--chat_template", template))
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == template.read_text()


def test_a_loss_that_is_not_finite_stops_the_run(tiny_model, rows, tmp_path):
    with pytest.raises(UserError, match="training is stopped"):
        finetune.train(argv(tiny_model, rows, tmp_path / "out", "--learning_rate", "1e30", "--max_grad_norm", 0))


def test_a_base_model_that_never_saw_the_stop_token_is_pointed_out(tiny_copy, rows, tmp_path, capsys):
    from safetensors.torch import save_file

    weights = load_file(tiny_copy / "model.safetensors")
    tokenizer = finetune.transformers.AutoTokenizer.from_pretrained(tiny_copy)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    finetune.train(argv(tiny_copy, rows, tmp_path / "out", "--use_lora"))
    assert "never seen" not in capsys.readouterr().out
    weights["model.embed_tokens.weight"][stop] = weights["model.embed_tokens.weight"][len(tokenizer) :].mean(0)
    save_file(weights, tiny_copy / "model.safetensors", metadata={"format": "pt"})
    finetune.train(argv(tiny_copy, rows, tmp_path / "out", "--use_lora"))
    said = capsys.readouterr().out
    assert f"never seen <|im_end|>: it may not learn to stop. Add --trainable_token_indices {stop}" in said


def test_many_overlong_rows_come_with_the_length_that_would_keep_nearly_all(tiny_model, tmp_path, capsys):
    data = write(tmp_path / "rows.jsonl", [*ROWS, *[{"prompt": "long " * 50, "completion": "x"}] * 3])
    finetune.train(argv(tiny_model, data, tmp_path / "out", "--model_max_length", 60))
    assert re.search(r"--model_max_length \d{2,3} would keep 99 %", capsys.readouterr().out)


# ----------------------------------------------------------------------------------------------------------------------
# What is in the output folder already


def test_another_kind_of_training_in_the_same_folder_leaves_no_weights_of_the_first(tiny_model, rows, tmp_path):
    out = tmp_path / "out"
    finetune.train(argv(tiny_model, rows, out, "--use_lora"))
    finetune.train(argv(tiny_model, rows, out))
    assert (out / "model.safetensors").exists() and not list(out.glob("adapter_*"))
    finetune.train(argv(tiny_model, rows, out, "--use_lora"))
    assert (out / "adapter_model.safetensors").exists() and not list(out.glob("model*")) + list(out.glob("config.json"))


def test_the_folder_of_the_model_is_refused_as_output(tiny_copy, rows, tmp_path):
    with pytest.raises(UserError, match="is the model to start from"):
        finetune.train(argv(tiny_copy, rows, tiny_copy))
    with pytest.raises(UserError, match="is a file; expected a folder"):
        finetune.train(argv(tiny_copy, rows, rows))


def test_a_resumed_run_ends_where_an_unbroken_one_does_and_keeps_the_best(tiny_model, rows, tmp_path):
    options = ["--use_lora", "--eval_data_path", rows, "--save_strategy", "epoch", "--lora_dropout", 0.1]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for out in (whole, broken):
        finetune.train(argv(tiny_model, rows, out, *options))
    shutil.rmtree(broken / "checkpoint-6")
    (broken / "best" / "metrics.json").write_text(json.dumps({"eval_loss": 0.0, "step": 1}))
    finetune.train(argv(tiny_model, rows, broken, *options, "--resume_from_checkpoint", "True"))
    assert history(broken, "loss") == pytest.approx(history(whole, "loss"), rel=1e-5)
    assert json.loads((broken / "best" / "metrics.json").read_text())["eval_loss"] == 0.0
    for nothing in ("True", tmp_path / "nowhere"):
        with pytest.raises(UserError, match="--resume_from_checkpoint"):
            finetune.train(argv(tiny_model, rows, tmp_path / "new", "--resume_from_checkpoint", nothing))


def test_checkpoints_are_complete_folders_too(tiny_model, rows, tmp_path):
    finetune.train(argv(tiny_model, rows, tmp_path / "out", "--use_lora", "--save_strategy", "epoch"))
    for name in ("adapter_model.safetensors", "tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / "checkpoint-6" / name).exists()


def test_layers_that_are_trained_beside_the_adapter_are_float32(tiny_model, rows, tmp_path):
    options = ["--modules_to_save", "lm_head", "--lora_bias", "all", "--bf16", "True"]
    finetune.train([*argv(tiny_model, rows, tmp_path / "out"), *options])
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}


def test_an_adapter_trained_with_rope_scaling_is_loaded_with_it(tiny_model, rows, tmp_path):

    more = ["--use_lora", "--model_max_length", 4096, "--rope_scaling", "yarn"]
    finetune.train(argv(tiny_model, rows, tmp_path / "out", *more))
    model, _ = loading.load(str(tmp_path / "out"))
    assert model.config.rope_parameters["rope_type"] == "yarn" and model.config.max_position_embeddings == 4096


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


def test_a_share_of_the_rows_is_held_out_for_evaluation(tiny_model, rows, tmp_path, capsys):
    finetune.train(argv(tiny_model, rows, tmp_path / "out", "--use_lora", "--eval_ratio", 0.25))
    said = capsys.readouterr().out
    assert "6 rows / (4 a device" in said and "evaluation rows (held_out): 2 read" in said
    assert len(history(tmp_path / "out", "eval_loss")) == 3


def test_evaluation_files_of_the_same_name_are_told_apart(tiny_model, rows, tmp_path):
    files = []
    for language in ("en", "de"):
        (tmp_path / language).mkdir()
        files.append(write(tmp_path / language / "val.jsonl", ROWS[: 3 + len(files)]))
    finetune.train(argv(tiny_model, rows, tmp_path / "out", "--use_lora", "--eval_data_path", *files))
    logged = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    names = {key for entry in logged for key in entry if re.fullmatch(r"eval_.+_loss", key)}
    assert len(names) == 2 and any("_en_" in name for name in names) and any("_de_" in name for name in names)


def test_a_metric_that_fails_on_an_answer_does_not_end_the_run(tiny_model, rows, tmp_path, capsys):
    from recipe.training import answers

    metric = tmp_path / "metric.py"
    metric.write_text("def odd(answer, reference, messages):\n    return 1 / 0\ndef loss(*_):\n    return 0\n")
    more = ["--use_lora", "--eval_data_path", rows, "--eval_generate", 2, "--metric", f"{metric}:odd"]
    finetune.train(argv(tiny_model, rows, tmp_path / "out", *more))
    assert "--metric odd: ZeroDivisionError" in capsys.readouterr().out
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    with pytest.raises(UserError, match="'loss' is the name of a figure that is there"):
        answers.load_metric(f"{metric}:loss")


def test_an_overflow_of_fp16_is_no_reason_to_stop_and_a_loss_that_is_not_finite_is(tiny_model, rows, tmp_path):
    trainer = finetune.RecipeTrainer(
        model=finetune.transformers.AutoModelForCausalLM.from_pretrained(tiny_model),
        args=parse(argv(tiny_model, rows, tmp_path / "out"))[2],
        save=finetune.safe_save_model_for_hf_trainer,
    )
    with pytest.raises(UserError, match="gradient norm inf"):
        trainer.log({"loss": 1.0, "grad_norm": float("inf")})
    trainer.args.fp16 = True
    trainer.log({"loss": 1.0, "grad_norm": float("inf")})
    with pytest.raises(UserError, match="the loss is nan"):
        trainer.log({"train_loss": float("nan")})


def test_evaluating_outside_training_leaves_best_as_it_is(tiny_model, rows, tmp_path):
    arguments = parse(argv(tiny_model, rows, tmp_path / "out", "--eval_data_path", rows))
    tokenizer = finetune.pretrained(arguments[0], arguments[2]).tokenizer()
    arguments[2].model_max_length = 512
    _, evaluated = finetune.make_datasets(arguments[1], arguments[2], ChatEncoder(tokenizer))
    trainer = finetune.RecipeTrainer(
        model=finetune.transformers.AutoModelForCausalLM.from_pretrained(tiny_model),
        args=arguments[2],
        eval_dataset=evaluated,
        processing_class=tokenizer,
        data_collator=finetune.Collator(True),
        save=finetune.safe_save_model_for_hf_trainer,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] > 1 and not (tmp_path / "out" / "best").exists()
    assert trainer.evaluate(metric_key_prefix="test")["test_loss"] == pytest.approx(metrics["eval_loss"])
    trainer.keep_best(metrics)
    assert json.loads((tmp_path / "out" / "best" / "metrics.json").read_text())["step"] == 0


@pytest.mark.slow
def test_workers_that_stay_evaluate_each_file_on_its_own_rows(tiny_model, rows, tmp_path):
    """In processes of their own: torch waits 5 seconds for each worker that stayed, when its loader is collected."""
    other = write(tmp_path / "other.jsonl", ROWS[:3])
    losses = []
    for workers in (0, 1):
        out = tmp_path / f"{workers} workers"
        stay = ["--dataloader_num_workers", workers, "--dataloader_persistent_workers", bool(workers)]
        words = argv(tiny_model, rows, out, "--eval_data_path", rows, other, "--max_steps", 4, *stay)
        codes, said = run_forked(tmp_path, ROOT / "finetune.py", words, 1)
        assert codes == [0], said
        losses.append([history(out, key) for key in ("eval_rows_loss", "eval_other_loss", "eval_loss")])
    assert losses[0] == losses[1] and losses[0][0] != losses[0][1] and len(losses[0][0]) == 2


def test_packed_rows_that_fill_no_last_batch_are_left_out(tiny_model, rows, tmp_path, capsys):
    more = ["--pack_tokens", 120, "--per_device_train_batch_size", 3, "--dataloader_drop_last", "True"]
    finetune.train(argv(tiny_model, rows, tmp_path / "out", *more))
    packed = int(re.search(r"(\d+) packed rows /", capsys.readouterr().out).group(1))
    assert packed % 3 and len(history(tmp_path / "out", "loss")) == 3 * (packed // 3)


@pytest.mark.parametrize("name, expected", [("Mistral", False), ("Llama", True), ("Qwen2", True), ("Qwen3", True)])
def test_packed_attention_is_for_models_without_a_sliding_window(name, expected):
    config = getattr(finetune.transformers, f"{name}Config")()
    assert finetune.attention.can_pack(config) is expected


def test_records_can_be_sent_to_a_process_that_was_not_forked(rows):
    import pickle

    again = pickle.loads(pickle.dumps(Conversations([str(rows)])))
    assert [again[i] for i in range(8)] == [Conversations([str(rows)])[i] for i in range(8)]
