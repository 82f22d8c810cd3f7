"""--pack_tokens fills rows with whole conversations; attention, compiled layers and checkpointing fit to them."""

import itertools
import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

import finetune
from helpers import UNEVEN_ROWS, argv, history, parse, reference, relative, run_forked, step, write
from recipe.console import UserError
from recipe.dataset import prefixes
from recipe.dataset.collator import Collator
from recipe.dataset.packing import PackedDataset
from recipe.model import attention


class Rows(torch.utils.data.Dataset):
    """What PackedDataset reads of a SupervisedDataset; a conversation is a list of documents of given lengths."""

    def __init__(self, conversations):
        self.conversations = conversations
        self.kept = list(range(len(conversations)))
        self.sizes = [sum(lengths) for lengths in conversations]

    def __len__(self):
        return len(self.conversations)

    def __getitem__(self, index):
        lengths = self.conversations[index]
        return [{"input_ids": [index] * n, "labels": [part] * n} for part, n in enumerate(lengths)]


def random_rows(count, seed=0):
    chance = random.Random(seed)
    return Rows([[min(1024, 1 + int(chance.lognormvariate(5.2, 0.8)))] for _ in range(count)])


@pytest.mark.parametrize("tokens, share", [(1024, 0.94), (8192, 0.99)])
def test_every_conversation_is_in_one_row_and_rows_are_nearly_full(tokens, share):
    rows = random_rows(5000)
    packed = PackedDataset(rows, tokens, seed=0)
    found = [document["input_ids"] for pack in packed for document in pack]
    assert sorted(ids[0] for ids in found) == rows.kept
    assert all(len(ids) == rows.sizes[ids[0]] for ids in found)
    lengths = [sum(len(document["input_ids"]) for document in pack) for pack in packed]
    assert max(lengths) <= tokens and sum(lengths) / (len(packed) * tokens) > share


def test_a_conversation_of_documents_that_are_too_long_together_is_shared_out_by_document():
    packed = PackedDataset(Rows([[6, 6, 3], [5], [2]]), 8)
    found = [[(d["input_ids"][0], d["labels"][0], len(d["labels"])) for d in pack] for pack in packed]
    assert sorted(sum(found, [])) == [(0, 0, 6), (0, 1, 6), (0, 2, 3), (1, 0, 5), (2, 0, 2)]
    assert max(sum(n for _, _, n in pack) for pack in found) <= 8


def test_rows_differ_with_the_seed_and_keep_the_order_of_the_file_without_one():
    rows = random_rows(200)
    contents = [PackedDataset(rows, 2048, seed).packs for seed in (0, 0, 1)]
    assert contents[0] == contents[1] != contents[2]
    first = [min(index for index, _ in pack) for pack in PackedDataset(rows, 2048).packs]
    assert first == sorted(first)


@pytest.mark.parametrize("static", [False, True])
def test_one_step_over_packed_rows_is_that_of_plain_torch(
    tiny_model,
    documents,  # noqa: F811
    tmp_path,
    static,
    capsys,
    monkeypatch,
):
    # Rows are as long as for compiled layers, which are tested further down.
    monkeypatch.setattr(
        finetune.loading, "compile_layers", lambda model, args: setattr(args, "torch_compile_backend", None)
    )
    data = write(tmp_path / "rows.jsonl", UNEVEN_ROWS)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    expected_loss, expected_gradients = reference(plain, documents)
    more = ["--pack_tokens", 256, "--gradient_accumulation_steps", 8]
    more += ["--torch_compile_backend", "aot_eager"] * static
    loss, gradients = step(tmp_path, tiny_model, data, "out", *more)
    assert loss == pytest.approx(expected_loss, rel=1e-5) and relative(gradients, expected_gradients) < 1e-4
    told = capsys.readouterr().out
    tokens = sum(len(document["input_ids"]) for (document,) in documents)
    packs = -(-tokens // 256)
    assert f"rows of up to 256 tokens, {tokens / (packs * 256):.1%} full; about 8.0 conversations an" in told
    # As many tokens are computed as the rows have, or as they are filled up to.
    assert history(tmp_path / "out", "padding")[0] == (round(1 - tokens / (packs * 256), 3) if static else 0)


def test_a_run_over_packed_rows_is_resumed_where_it_ended(tiny_model, tmp_path):
    data = write(tmp_path / "rows.jsonl", UNEVEN_ROWS * 2)
    whole = argv(tiny_model, data, tmp_path / "whole", "--use_lora", "--pack_tokens", 300, "--max_steps", 5)
    finetune.train(whole)
    part = argv(tiny_model, data, tmp_path / "part", "--use_lora", "--pack_tokens", 300, "--max_steps", 5,
                "--save_strategy", "steps", "--save_steps", 3)  # fmt: skip
    finetune.train(part)
    for name in ("model.safetensors", "adapter_model.safetensors"):
        (tmp_path / "part" / name).unlink(missing_ok=True)
    finetune.train([*part, "--resume_from_checkpoint", str(tmp_path / "part" / "checkpoint-3")])
    assert history(tmp_path / "part", "loss") == pytest.approx(history(tmp_path / "whole", "loss"), rel=1e-6)
    with pytest.raises(UserError, match=r"--pack_tokens .300 then, 400 now."):
        finetune.train([*part, "--pack_tokens", "400", "--resume_from_checkpoint", "auto"])


@pytest.mark.parametrize(
    "more, told",
    [
        (["--lazy_preprocess"], "needs all lengths; leave out --lazy_preprocess"),
        (["--train_sampling_strategy", "group_by_length"], "leave out --train_sampling_strategy group_by_length"),
        (["--padding_free", "False"], "exclude each other"),
        (["--model_max_length", "512"], "expected at least --model_max_length, 512"),
        (["--pack_tokens", "0"], "--pack_tokens 0: expected a number of at least 1"),
    ],
)
def test_what_cannot_be_packed_is_told_before_anything_is_loaded(tiny_model, tmp_path, more, told):
    with pytest.raises(UserError, match=told):
        parse(argv(tiny_model, tmp_path / "none.jsonl", tmp_path / "out", "--pack_tokens", "256", *more))


def test_a_packed_row_alone_is_a_micro_batch_and_bounds_conversations_unless_told_otherwise(tiny_model, tmp_path):
    base = ["--model_name_or_path", str(tiny_model), "--data_path", "rows.jsonl", "--pack_tokens", "256"]
    model_args, data_args, training_args, _ = parse(base)
    finetune.load_config(model_args, training_args, data_args.pack_tokens)
    assert training_args.per_device_train_batch_size == 1 and training_args.model_max_length == 256
    _, _, training_args, _ = parse([*base, "--per_device_train_batch_size", "2", "--model_max_length", "64"])
    assert training_args.per_device_train_batch_size == 2 and training_args.model_max_length == 64


def test_a_model_that_falls_back_to_padded_rows_needs_no_padding_document():
    (pack,) = PackedDataset(Rows([[5], [9]]), 20, pad_to_full=True)
    assert Collator()([pack])["input_ids"].shape == (1, 20) and Collator()([pack])["padding_tokens"] == 6
    padded = Collator(padding_free=False)([pack])
    assert padded["attention_mask"].sum(1).tolist() == [5, 9]


# ----------------------------------------------------------------------------------------------------------------------
# What layers do with them


@pytest.mark.slow
def test_compiled_layers_change_no_loss_and_no_name(tiny_model, tmp_path):
    """In a process of its own: what torch has compiled and given up is kept for a whole process."""
    data, program = write(tmp_path / "rows.jsonl", UNEVEN_ROWS), tmp_path / "program.py"
    program.write_text(
        "import json, sys, torch, finetune\nfinetune.train(sys.argv[1:])\n"
        "print(json.dumps(torch._dynamo.utils.counters['stats']))"
    )
    graphs, losses = {}, {}
    for compiled in ("False", "True"):
        words = argv(tiny_model, data, tmp_path / compiled, "--use_lora", "--lora_dropout", 0, "--max_steps", 4,
                     "--pack_tokens", 256, "--torch_compile", compiled, "--eval_data_path", data)  # fmt: skip
        codes, said = run_forked(tmp_path, program, words, 1)
        assert codes == [0] and "recompile_limit" not in said, said[-3000:]
        graphs[compiled] = json.loads(said.splitlines()[-1]).get("unique_graphs", 0)
        losses[compiled] = [history(tmp_path / compiled, key) for key in ("loss", "eval_loss")]
        assert bool(history(tmp_path / compiled, "shared")) == (compiled == "False")  # compiled rows have one length
    assert graphs["False"] == 0 < graphs["True"] <= 16  # parts of one layer: more would be each layer by itself
    for plain, compiled in zip(losses["False"], losses["True"], strict=True):
        assert compiled == pytest.approx(plain, rel=1e-4)
    finetune.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "True")


@pytest.mark.parametrize("shared", [False, True], ids=["apart", "shared prefixes"])
def test_a_gpu_takes_a_row_in_one_call_that_equals_one_call_for_each_document(shared):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: torch's variable-length attention has no kernel for CPUs")
    torch.manual_seed(0)
    row = {"cu_seq_lens_q": [0, 5, 135, 136, 200]}
    taken = [0, 3, 2, 0] if shared else [0] * 4
    lengths = [
        end - start + count for start, end, count in zip([0, 5, 135, 136], [5, 135, 136, 200], taken, strict=True)
    ]
    if shared:
        row |= {"cu_seq_lens_k": [0, *itertools.accumulate(lengths)], "key_places": prefixes.places(lengths, taken)}
    row = {name: torch.as_tensor(value, device="cuda") for name, value in row.items()}
    row |= {name: value.int() for name, value in row.items() if name != "key_places"}
    states = []
    for heads in (8, 2, 2):
        states.append(torch.randn(1, heads, 200, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True))
    most = {"max_length_q": 130, "max_length_k": max(lengths)}
    results = []
    for function in (
        lambda *qkv: attention.packed_attention(None, *qkv, None, **row, **most)[0],
        lambda *qkv: attention._by_document(*qkv, attention._documents(*row.values()), None, 0.0),
    ):
        output = function(*states)
        (output.float() ** 2).sum().backward()
        results.append([output, *(state.grad for state in states)])
        for state in states:
            state.grad = None
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() < 1e-2 * expected.norm()


def test_documents_in_a_row_get_the_attention_of_plain_torch_and_its_gradients():
    torch.manual_seed(0)
    lengths = [5, 30, 1, 14]
    states = [torch.randn(1, heads, 50, 8, requires_grad=True) for heads in (4, 2, 2)]
    ends = torch.tensor([0, 5, 35, 36, 50], dtype=torch.int32)
    mask = torch.block_diag(*(torch.ones(n, n) for n in lengths)).tril().bool()
    query, key, value = states
    plain = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), attn_mask=mask, scale=0.3
    ).transpose(1, 2)
    found, _ = attention.packed_attention(None, *states, None, cu_seq_lens_q=ends, max_length_q=30, scaling=0.3)
    weight = torch.randn_like(found)
    for output, grads in ((plain, expected := []), (found, got := [])):
        grads += [output, *torch.autograd.grad((output * weight).sum(), states)]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chosen", ["highest", "medium"])
def test_short_and_long_documents_on_a_cpu_have_the_attention_and_gradients_of_float64(dtype, chosen):
    """As exact as torch's own call for each document, or more, under any precision, which is left as it was."""
    lengths = [attention.SHORT - 1, 1, attention.SHORT, attention.SHORT + 1, 2 * attention.SHORT]
    torch.manual_seed(0)
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    states = [torch.randn(1, sum(lengths), heads, 16).to(dtype) for heads in (6, 2, 2)]
    weight = torch.randn(1, sum(lengths), 6, 16)

    def plain(query, key, value):
        parts = zip(*(row.split(lengths, dim=2) for row in (query, key, value)), strict=True)
        settings = dict(is_causal=True, enable_gqa=True)
        found = [torch.nn.functional.scaled_dot_product_attention(*part, **settings) for part in parts]
        return torch.cat(found, dim=2).transpose(1, 2)

    def packed(query, key, value):
        return attention.packed_attention(None, query, key, value, None, cu_seq_lens_q=ends)[0]

    def computed(function, kind):
        inputs = [row.to(kind).requires_grad_() for row in states]
        output = function(*(row.transpose(1, 2) for row in inputs))
        gradients = torch.autograd.grad((output * weight.to(output.dtype)).sum(), inputs)
        return [tensor.double() for tensor in (output, *gradients)]

    torch.set_float32_matmul_precision(chosen)
    exact, found, torchs = computed(plain, torch.float64), computed(packed, dtype), computed(plain, dtype)
    assert torch.get_float32_matmul_precision() == chosen
    for right, ours, theirs in zip(exact, found, torchs, strict=True):
        error, bound = ((tensor - right).norm() / right.norm() for tensor in (ours, theirs))
        assert error <= 1.1 * bound and error < (1e-6 if dtype == torch.float32 else 1e-2)
    in_float64 = computed(packed, torch.float64)
    for right, ours in zip(exact, in_float64, strict=True):
        assert (ours - right).norm() < 1e-12 * right.norm()
