"""What lets longer rows fit computes the same, for every kind of layer, and is on where it must be."""

import os

import families
import pytest
import torch

import finetune
from helpers import UNEVEN_ROWS, argv, history, parse, write
from recipe.console import UserError
from recipe.model import long_rows
from recipe.training import memory, plan
from recipe.training.plan import MEASURES, Plan

BOTH = ["--activation_offloading", "True", "--tiled_mlp", "True"]
MODES = {"full": [], "LoRA": ["--use_lora"], "QLoRA": ["--q_lora"]}


@pytest.fixture
def rows(tmp_path):
    return write(tmp_path / "rows.jsonl", UNEVEN_ROWS)


@pytest.fixture
def small_pieces(monkeypatch):
    """Rows of tens of tokens count as long."""
    monkeypatch.setattr(long_rows, "PIECE", 16)
    monkeypatch.setattr(long_rows, "SMALL", 256)


def train(model, rows, output, *more):
    fixed = ["--use_cpu", "True", "--max_steps", 2, "--adam_epsilon", "1e-3", "--gradient_checkpointing", "True"]
    finetune.train(argv(model, rows, output, *fixed, *more))
    return history(output, "loss"), history(output, "grad_norm")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, mode",
    [
        *((name, mode) for name in ("qwen3", "qwen3_moe", "qwen3_5_moe") for mode in MODES),
        *((name, "LoRA") for name in ("gpt_oss", "gemma4 A4B", "kimi_linear", "qwen3_vl", "llama")),
    ],
)
def test_pieces_and_offloading_change_no_loss_and_no_gradient(
    small_tokenizer, rows, tmp_path, monkeypatch, small_pieces, name, mode
):
    model = families.family(name, tmp_path / "model", small_tokenizer)
    more = [*MODES[mode], *["--lora_dropout", 0] * (mode != "full")]
    put_away, pieces = [], set()
    put, compute = long_rows.Inputs.put, long_rows._in_pieces

    def counted(self, tensor):
        held = put(self, tensor)
        put_away.append(not torch.is_tensor(held))
        return held

    def watched(forward, number, hidden, *rest, **options):
        pieces.add(-(-hidden.shape[1] // long_rows.PIECE))
        return compute(forward, number, hidden, *rest, **options)

    monkeypatch.setattr(long_rows.Inputs, "put", counted)
    monkeypatch.setattr(long_rows, "_in_pieces", watched)
    found = train(model, rows, tmp_path / "long", *more, *BOTH)
    assert any(put_away) and max(pieces) > 3
    assert not [path for path in os.listdir(tmp_path / "long") if path.startswith("tmp")]
    for kind in ('{"use_reentrant": false}', '{"use_reentrant": true}'):
        expected = train(model, rows, tmp_path / "plain", *more, "--gradient_checkpointing_kwargs", kind)
        for one, other in zip(found, expected, strict=True):
            assert one == pytest.approx(other, rel=1e-5)
    again = train(model, rows, tmp_path / "again", *more, *BOTH, "--gradient_checkpointing_kwargs", kind)
    assert again[0] == pytest.approx(found[0], rel=1e-5)


def test_pieces_draw_the_same_numbers_when_they_are_computed_again(small_pieces):
    """Dropout of an adapter: the gradient by pieces is that of the numbers drawn in the forward pass."""
    part = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 8))
    layer = torch.nn.Module()
    layer.mlp = part
    long_rows.in_pieces([layer])
    hidden = torch.randn(1, 50, 8, requires_grad=True)
    torch.manual_seed(1)
    part.forward(hidden).sum().backward()
    torch.manual_seed(1)
    other = hidden.detach().clone().requires_grad_()
    torch.cat(
        [torch.nn.Sequential.forward(part, piece) for piece in other.tensor_split(4, dim=1)], dim=1
    ).sum().backward()
    assert torch.equal(hidden.grad, other.grad)


# ----------------------------------------------------------------------------------------------------------------------
# When they are on


@pytest.mark.parametrize("measures", plan.ORDER, ids=lambda names: " ".join(sorted(names)) or "none")
def test_what_training_would_not_fit_without_is_switched_on_the_cheapest_first(
    tiny_model, rows, tmp_path, monkeypatch, capsys, small_pieces, measures
):
    """A room that the measures fit in, and none before them in the order."""
    monkeypatch.setattr(long_rows, "PIECE", 8)
    seen = []

    def estimate(self, on, mode=None, tokens=None):
        seen.append(set(on))
        needed = 1 if set(on) == measures else 100
        return memory.MemoryParts(needed, 0, 0, 0, 0, 0, 0)

    monkeypatch.setattr(Plan, "estimate", estimate)
    monkeypatch.setattr(Plan, "room", lambda self: 50)
    monkeypatch.setattr(Plan, "longest_rows", lambda self: [(1, [])])
    watched = []
    train_as_usual = finetune.RecipeTrainer.train
    monkeypatch.setattr(
        finetune.RecipeTrainer, "train", lambda self, **options: watched.append(self) or train_as_usual(self, **options)
    )
    finetune.train(argv(tiny_model, rows, tmp_path / "out", "--use_lora", "--use_cpu", "True", "--max_steps", 1))
    args = watched[0].args
    assert {name for name in MEASURES if getattr(args, name)} == measures
    said = capsys.readouterr().out
    for name in MEASURES:
        assert (f"--{name} False" in said) == (name in measures)
    assert seen[: plan.ORDER.index(measures) + 1] == plan.ORDER[: plan.ORDER.index(measures) + 1]


@pytest.mark.parametrize(
    "flags, message",
    [
        ([*BOTH[:2], "--gradient_checkpointing", "False"], "--activation_offloading keeps what gradient checkpointing"),
        ([*BOTH[:2], "--torch_compile", "True"], "--activation_offloading and --torch_compile exclude each other"),
        ([*BOTH[2:], "--torch_compile", "True"], "--tiled_mlp and --torch_compile exclude each other"),
    ],
)
def test_flags_that_contradict_them_are_refused(rows, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        finetune.train(argv("no_such_model", rows, tmp_path / "out", *flags))


def test_offloading_without_a_word_on_checkpointing_switches_that_on(tiny_model, rows, tmp_path, capsys, small_pieces):
    finetune.train(
        argv(tiny_model, rows, tmp_path / "out", "--use_lora", "--use_cpu", "True", "--max_steps", 1, *BOTH[:2])
    )
    said = capsys.readouterr().out
    assert "each layer computed twice, the inputs of layers until then in files in" in said


def test_inputs_too_small_to_be_worth_it_stay_where_they_are(tiny_model, rows, tmp_path):
    one = ["--per_device_train_batch_size", 1]
    plain, offloaded = (train(tiny_model, rows, tmp_path / f"{len(more)}", *one, *more) for more in ([], BOTH[:2]))
    assert offloaded == plain


def test_a_disk_without_room_for_the_inputs_is_said_before_the_first_step(tiny_model, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "free_disk", lambda folder: 10)
    with pytest.raises(UserError, match="--activation_offloading: it takes 0.0 GB of the disk of .*, and 0.0 are free"):
        finetune.train(argv(tiny_model, rows, tmp_path / "out", "--use_cpu", "True", *BOTH[:2]))


def test_what_a_model_cannot_have_is_said_before_its_weights_load(small_tokenizer, rows, tmp_path, monkeypatch):
    changes = {"output_router_logits": True, "router_aux_loss_coef": 0.01}
    model = families.family("qwen3_moe", tmp_path / "model", small_tokenizer, **changes)
    words = argv(model, rows, tmp_path / "out", "--use_cpu", "True")
    finetune.train([*words, *BOTH[2:], "--use_lora", "--max_steps", "1"])  # an adapter leaves that loss out
    monkeypatch.setattr(finetune, "load_model", lambda *args: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match="--tiled_mlp: the load-balancing loss needs .*; leave it out"):
        finetune.train([*words, *BOTH[2:]])
    args = parse(words)[2]
    args.sequence_parallel = 2
    with pytest.raises(UserError, match="--sequence_parallel: the load-balancing loss needs .*; leave it out"):
        plan.refuse_flags(args, finetune.transformers.AutoModelForCausalLM.from_pretrained(model))


@pytest.mark.parametrize("room", [0.6e9, 2e9])
def test_the_longest_row_that_is_announced_is_the_longest_that_fits(
    tiny_model, rows, tmp_path, prepared, monkeypatch, room
):
    trainer = prepared(argv(tiny_model, rows, tmp_path / "out", "--use_lora", "--use_cpu", "True"))
    planned = Plan(trainer, torch.float32, finetune.LoraArguments())
    monkeypatch.setattr(Plan, "room", lambda self: room)
    found = planned.longest_rows()
    assert [more for _, more in found] == [list(MEASURES)[:count] for count in range(4)]
    for tokens, more in found:
        fits = [planned.estimate(set(more), tokens=n).peak <= 0.9 * room for n in (tokens, tokens + 1)]
        assert fits == [True, False]
    assert sorted(tokens for tokens, _ in found) == [tokens for tokens, _ in found]
