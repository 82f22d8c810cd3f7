"""Documents that begin alike share these tokens in a row: computed once, and no loss or gradient differs by it."""

import itertools
import json
import random

import families
import pytest
import torch
from transformers import AutoModelForCausalLM

import finetune
from helpers import argv, history, reference, relative, step, write
from recipe.dataset import prefixes
from recipe.dataset.collator import Collator
from recipe.dataset.encoding import IGNORE_INDEX, ChatEncoder
from recipe.dataset.rendering import padding_document
from recipe.model import attention, loading
from recipe.model.loss import supervised_loss
from recipe.training import checks

SYSTEM = {"role": "system", "content": "You know the tools of this workshop and name one of them in every answer."}
ROWS = [
    {"messages": [SYSTEM, {"role": "user", "content": question}, {"role": "assistant", "content": "word " * length}]}
    for question, length in [("Which cuts?", 1), ("Which cuts?", 9), ("Which is it?", 30), ("A saw?", 2), ("", 5)]
]
ROWS.append(
    {"messages": [{"role": "user", "content": "no system prompt"}, {"role": "assistant", "content": "answer " * 3}]}
)


def document(ids, prompt):
    return {"input_ids": ids, "labels": [IGNORE_INDEX] * prompt + ids[prompt:], "turns": [1]}


def random_documents(seed):
    """Branches of a tree over few tokens, with answers of any length anywhere behind the first token."""
    chance, documents = random.Random(seed), []
    for _ in range(chance.randint(1, 12)):
        start = chance.choice(documents)["input_ids"] if documents and chance.random() < 0.8 else []
        ids = start[: chance.randint(0, len(start))] + [chance.randrange(3) for _ in range(chance.randint(1, 9))]
        labels = [id if n and chance.random() < 0.3 else IGNORE_INDEX for n, id in enumerate(ids)]
        documents.append({"input_ids": ids, "labels": labels, "turns": []})
    return documents


# ----------------------------------------------------------------------------------------------------------------------
# The row


def test_a_row_has_what_documents_begin_with_once():
    system = [1, 2, 3, 4]
    documents = [document([*system, 5, 6, 7], 5), document([9, 9, 8], 2), document([*system, 5, 6, 8, 8], 6)]
    batch = Collator(share_prefixes=True)([documents])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 5, 6, 8, 8, 9, 9, 8]]
    assert batch["position_ids"].tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 0, 1, 2]
    ]  # 5 predicts an answer: its own
    assert batch["cu_seq_lens_q"].tolist() == [0, 7, 11, 14] and batch["cu_seq_lens_k"].tolist() == [0, 7, 15, 18]
    assert batch["key_places"].tolist() == [*range(7), 0, 1, 2, 3, *range(7, 14)]
    assert (batch["shared_tokens"], batch["max_length_q"], batch["max_length_k"]) == (4, 7, 8)


@pytest.mark.parametrize("seed", range(100))
def test_every_document_is_whole_in_its_row_and_its_own_tokens_have_all_its_labels(seed):
    documents = random_documents(seed)
    batch = Collator(share_prefixes=True)([documents])
    plain = Collator()([documents])
    places = batch.get("key_places", torch.arange(batch["input_ids"].shape[1]))
    lengths, own = batch["cu_seq_lens_k"].diff().tolist(), batch["cu_seq_lens_q"].diff().tolist()
    found, ends = [], batch["cu_seq_lens_q"].tolist()
    for part, count, (start, end) in zip(places.split(lengths), own, itertools.pairwise(ends), strict=True):
        assert count > 0 and part[-count:].tolist() == list(range(start, end))
        assert batch["position_ids"][0, part].tolist() == list(range(len(part)))
        shared = part[:-count]
        assert (batch["shift_labels"][0, shared] == IGNORE_INDEX).all()
        found.append([batch[name][0, part].tolist() for name in ("input_ids", "shift_labels")])
    ids, labels = (
        plain[name][0].split(plain["cu_seq_lens_q"].diff().tolist()) for name in ("input_ids", "shift_labels")
    )
    assert sorted(found) == sorted([i.tolist(), n.tolist()] for i, n in zip(ids, labels, strict=True))
    assert len(places) - batch["input_ids"].shape[1] == batch.get("shared_tokens", 0)
    assert (batch["shift_labels"] != IGNORE_INDEX).sum() == (plain["shift_labels"] != IGNORE_INDEX).sum()


def test_what_is_not_alike_or_hardly_keeps_its_order():
    documents = [document([3, *range(70)], 9), document([2, *range(70)], 9), document([2, 9, *range(70)], 9)]
    plain, shared = (Collator(share_prefixes=on)([documents]) for on in (False, True))
    assert plain.keys() == shared.keys() and torch.equal(plain["input_ids"], shared["input_ids"])


def test_documents_that_fill_a_row_up_are_left_as_they_are():
    documents = [document([0, 0, 0, 0, 5, 6], 5), padding_document(4), document([0, 0, 0, 0, 7, 8], 5)]
    batch = Collator(share_prefixes=True)([documents])
    assert batch["input_ids"].tolist() == [[0, 0, 0, 0, 5, 6, 7, 8, 0, 0, 0, 0]]
    assert batch["shared_tokens"] == batch["padding_tokens"] == 4
    pieces = [Collator(piece=(i, 8), share_prefixes=True)([documents]) for i in range(8)]
    assert torch.cat([piece["input_ids"][0] for piece in pieces]).tolist() == [
        *batch["input_ids"][0].tolist(),
        *[0] * 4,
    ]
    assert sum(piece.get("shared_tokens", 0) for piece in pieces) == 4
    assert sum(piece.get("padding_tokens", 0) for piece in pieces) == 8


def test_the_turns_that_a_template_renders_anew_for_every_answer_cost_as_much_as_the_conversation(tokenizer_of):
    """Qwen3 leaves the thoughts of earlier turns out, so that every answer is a document with all turns before it."""
    rows = {}
    for turns in (2, 8):
        messages = []
        for turn in range(turns):
            messages.append({"role": "user", "content": f"What is {turn} and {turn}? " + "Think well. " * 20})
            thought = {"reasoning_content": f"Twice {turn}, which I know."}
            messages.append({"role": "assistant", "content": f"It is {2 * turn}." + " Surely." * 20, **thought})
        documents = ChatEncoder(tokenizer_of("qwen3")).encode({"messages": messages}).documents
        assert len(documents) == turns
        rows[turns] = [Collator(share_prefixes=on)([documents])["input_ids"].shape[1] for on in (False, True)]
    assert rows[8][0] > 10 * rows[2][0] and rows[8][1] < 5 * rows[2][1]


# ----------------------------------------------------------------------------------------------------------------------
# What layers do with it


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", ["document", "torch"])
def test_a_document_attends_to_shared_tokens_as_to_its_own(dtype, kernel):
    documents = [document([*range(20), *rest], 22) for rest in ([1, 2, 3, 4], [1, 2, 5, 6, 7], [8] * 300)]
    documents += [document([*range(7), 1, 2, 3], 8), document([4, 5, 6], 1)]
    documents += [document([*range(30, 30 + n), *rest], n) for n in (9, 300) for rest in ([1, 2], [3, 4, 5], [6] * 310)]
    batch = Collator(share_prefixes=True)([documents])
    tokens, places = batch["input_ids"].shape[1], batch["key_places"]
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    for part, own in zip(
        places.split(batch["cu_seq_lens_k"].diff().tolist()), batch["cu_seq_lens_q"].diff().tolist(), strict=True
    ):
        for n in range(len(part) - own, len(part)):
            mask[part[n], part[: n + 1]] = True
    torch.manual_seed(0)
    wide = {"document": 8, "torch": 4}[kernel]  # values of another width than keys have no kernel of their own
    states = [
        torch.randn(1, heads, tokens, width, dtype=dtype, requires_grad=True)
        for heads, width in ((4, 8), (2, 8), (2, wide))
    ]
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "key_places")
    found, _ = attention.packed_attention(None, *states, None, **{name: batch[name] for name in names})
    exact = [state.detach().double().requires_grad_() for state in states]
    query, key, value = exact[0], *(state.repeat_interleave(2, 1) for state in exact[1:])
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)
    weight = torch.randn_like(plain)
    got = [found, *torch.autograd.grad((found * weight.to(dtype)).sum(), states)]
    expected = [plain, *torch.autograd.grad((plain * weight).sum(), exact)]
    bound = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    for ours, right in zip(got, expected, strict=True):
        assert ours.dtype == dtype and (ours.double() - right).norm() < bound * right.norm()


@pytest.mark.parametrize("kernel", ["document", "torch"])
def test_gradients_of_tokens_that_many_share_add_up_without_rounding_each_time(kernel):
    documents = [document([*range(64), 100 + n, 1, 2], 65) for n in range(512)]
    batch = Collator(share_prefixes=True)([documents])
    torch.manual_seed(0)
    states = [
        torch.randn(1, 2, batch["input_ids"].shape[1], width) for width in (8, 8, {"document": 8, "torch": 4}[kernel])
    ]
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "key_places")

    def gradients(dtype):
        inputs = [state.bfloat16().to(dtype).requires_grad_() for state in states]
        found, _ = attention.packed_attention(None, *inputs, None, **{name: batch[name] for name in names})
        return torch.autograd.grad(found.sum(), inputs[1:])

    for found, exact in zip(gradients(torch.bfloat16), gradients(torch.float64), strict=True):
        assert (found.double() - exact)[:, :, :64].norm() < 5e-3 * exact[:, :, :64].norm()


@pytest.fixture(params=["qwen2", "qwen3_moe", "qwen3_5_text", "qwen3_next", "kimi_linear"])
def model(request, small_tokenizer, tmp_path):
    folder = str(families.family(request.param, tmp_path / "model", small_tokenizer))
    source = loading.Pretrained(folder)
    return source.model(source.config(), torch.float32, "packed")


@pytest.fixture(scope="module")
def alike(tiny_model):
    encoder = ChatEncoder(finetune.transformers.AutoTokenizer.from_pretrained(tiny_model))
    return [encoder.encode(row).documents for row in ROWS]


@pytest.mark.parametrize("size", [6, 2])
def test_loss_and_gradients_equal_plain_torch_one_conversation_at_a_time(model, alike, size):
    expected_loss, expected_gradients = reference(model, alike)
    collator, total, count, shared = Collator(share_prefixes=True), 0.0, 0, 0
    assert checks.can_share_prefixes(model)
    model.train()
    for start in range(0, len(alike), size):
        batch = collator(alike[start : start + size])
        shared += batch.get("shared_tokens", 0)
        loss, supervised = supervised_loss(model, batch)
        loss.backward()
        total, count = total + loss.item(), count + supervised.item()
    assert shared > 40 and total / count == pytest.approx(expected_loss, rel=1e-5)
    largest = max(gradient.norm() for gradient in expected_gradients.values())
    for name, parameter in model.named_parameters():
        expected = expected_gradients[name]  # those of a decay are a millionth of the others, and rounded like these
        error = (parameter.grad / count - expected).norm()
        assert error < 1e-5 * max(expected.norm(), 1e-3 * largest), name


# ----------------------------------------------------------------------------------------------------------------------
# Training


def test_a_training_shares_what_rows_begin_with_and_counts_all_tokens(tiny_model, alike, tmp_path):
    data = write(tmp_path / "rows.jsonl", ROWS)
    expected_loss, expected_gradients = reference(
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), alike
    )
    more = ["--per_device_train_batch_size", 6, "--eval_data_path", data, "--eval_on_start", "True"]
    loss, gradients = step(tmp_path, tiny_model, data, "out", *more)
    assert loss == pytest.approx(expected_loss, rel=1e-5) and relative(gradients, expected_gradients) < 1e-4
    assert history(tmp_path / "out", "eval_loss")[0] == pytest.approx(expected_loss, rel=1e-6)
    tokens = sum(len(part["input_ids"]) for documents in alike for part in documents)
    (shared,) = history(tmp_path / "out", "shared")
    assert shared == pytest.approx(Collator(share_prefixes=True)(alike)["shared_tokens"] / tokens, abs=1e-3)
    assert history(tmp_path / "out", "padding") == [0]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["tokens"] == tokens


@pytest.mark.parametrize(
    "more",
    [["--neftune_noise_alpha", 5], ["--padding_free", "False"], ["--attn_implementation", "sdpa"]],
    ids=lambda more: more[0],
)
def test_what_is_of_each_document_or_has_another_kernel_shares_nothing(tiny_model, tmp_path, more):
    data = write(tmp_path / "rows.jsonl", ROWS)
    finetune.train(argv(tiny_model, data, tmp_path / "out", "--max_steps", 2, *more))
    assert history(tmp_path / "out", "padding") and not history(tmp_path / "out", "shared")


def test_a_load_balancing_loss_keeps_the_tokens_of_every_document(small_tokenizer, tmp_path):
    folder = families.family("qwen3_moe", tmp_path / "moe", small_tokenizer)
    data = write(tmp_path / "rows.jsonl", ROWS)
    for balanced in (False, True):
        config = json.loads((folder / "config.json").read_text()) | {"output_router_logits": balanced}
        (folder / "config.json").write_text(json.dumps(config))
        finetune.train(argv(folder, data, tmp_path / str(balanced), "--max_steps", 2))
        assert bool(history(tmp_path / str(balanced), "shared")) != balanced


def test_a_model_that_loses_the_places_shares_nothing(tiny_model, capsys):
    finetune.attention.register()
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="packed")
    assert checks.can_share_prefixes(model)
    forward = model.forward
    model.forward = lambda key_places=None, **rest: forward(**rest)
    assert not checks.can_share_prefixes(model)
    assert "this model computes what they share differently" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["no gradient for keys", "raises"])
def test_a_kernel_that_cannot_share_is_found_before_the_first_step(tiny_model, tmp_path, monkeypatch, capsys, fault):
    right = attention._DocumentAttention.backward

    def wrong(ctx, gradient):
        if fault == "raises":
            raise RuntimeError("no such kernel")
        query, key, *rest = right(ctx, gradient)
        return query, torch.zeros_like(key) if any(len(runs) > 1 for runs in ctx.documents) else key, *rest

    monkeypatch.setattr(attention._DocumentAttention, "backward", staticmethod(wrong))
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="packed")
    assert not checks.can_share_prefixes(model)
    assert "documents that begin alike are computed whole" in capsys.readouterr().out


def test_places_continue_what_is_taken_from_the_document_before():
    assert prefixes.places([4, 5, 3], [0, 2, 1]).tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6, 0, 7, 8]
