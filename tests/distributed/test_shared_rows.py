"""--sequence_parallel: ranks that share rows learn what one process learns, and go on from their checkpoints."""

import families
import pytest
import torch
from safetensors.torch import load_file

import finetune
from benchmarks.families import FLAGS, MODES
from helpers import UNEVEN_ROWS, argv, run_ranks, write
from recipe.console import UserError
from recipe.dataset.collator import Collator
from recipe.dataset.packing import SharedRows
from recipe.distributed.engines import Mode
from recipe.model import sequence

pytestmark = pytest.mark.slow

LONG = ["--activation_offloading", "True", "--tiled_mlp", "True"]  # with the packed rows that are shared
ENGINES = {"DDP": 2, "ZeRO-2": 2, "ZeRO-3": 2, "FSDP2": 2, "DDP, 2 of 4": 4, "DDP, 4 of 4": 4}


@pytest.fixture(scope="module")
def qwen3(small_tokenizer, tmp_path_factory):
    """Folder of a model with four heads, and two of keys and values."""
    return families.family("qwen3", tmp_path_factory.mktemp("qwen3"), small_tokenizer)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write(tmp_path_factory.mktemp("rows") / "rows.jsonl", UNEVEN_ROWS * 3)


def jobs(qwen3, rows, folder, engine, sharing):
    """Trainings of each kind, of which those that share rows come a second time from a checkpoint."""
    for mode in (Mode.FULL, Mode.LORA, Mode.QLORA):
        for packed in ([], ["--pack_tokens", "256"])[mode != Mode.LORA :]:
            name = f"{mode} packed" if packed else str(mode)
            ranks = 1 if engine == "one process" else ENGINES[engine]
            words = argv(
                qwen3, rows, folder / name, "--max_steps", 5, *FLAGS[engine.partition(",")[0]], *MODES[mode], *packed,
                "--per_device_train_batch_size", (2 if packed else 4) * sharing // ranks, "--sequence_parallel", sharing,
                "--adam_epsilon", "1e-3", "--save_strategy", "steps", "--save_steps", 3, "--eval_data_path", rows,
                "--eval_strategy", "steps", "--eval_steps", 5, "--per_device_eval_batch_size", 2, "--eval_generate", 1,
                "--gradient_checkpointing", "True" if packed else "False", *LONG[: len(LONG) * bool(packed and sharing > 1)],
            )  # fmt: skip
            yield name, {"argv": words, "gather": folder / f"{name}.pt", "long": [64, 256]}
        if sharing > 1 and mode != Mode.QLORA:
            again = argv(qwen3, rows, folder / "again" / mode, *words[words.index("--max_steps") :])
            copy = [folder / name / "checkpoint-3", folder / "again" / mode / "checkpoint-3"]
            words = [*again, "--resume_from_checkpoint", "auto"]
            yield f"{mode} again", {"argv": words, "copy": copy, "long": [64, 256]}


@pytest.fixture(scope="module")
def ran(qwen3, rows, tmp_path_factory):
    """Function from an engine of ENGINES to {training: what it left}."""
    results = {}

    def of(engine):
        if engine not in results:
            sharing = {"one process": 1, "DDP, 4 of 4": 4}.get(engine, 2)
            folder = tmp_path_factory.mktemp("shared")
            todo = dict(jobs(qwen3, rows, folder, engine, sharing))
            results[engine] = run_ranks(folder, todo, 1 if sharing == 1 else ENGINES[engine])
        assert not results[engine]["problem"], results[engine]["problem"]
        return results[engine]

    return of


def log(result, key):
    return [entry[key] for entry in result["log"] if key in entry]


@pytest.mark.parametrize("kind", ["full packed", "LoRA", "LoRA packed", "QLoRA packed"])
@pytest.mark.parametrize("engine", ENGINES)
def test_ranks_that_share_rows_train_as_one_process(ran, engine, kind):
    found, expected = ran(engine)[kind], ran("one process")[kind]
    sharing = 4 if engine == "DDP, 4 of 4" else 2
    assert f"{ENGINES[engine]} processes, {sharing} of which share each row" in found["said"]
    assert ("pieces of 64 tokens" in found["said"] and "until then in files in" in found["said"]) == ("packed" in kind)
    for key in ("loss", "grad_norm", "eval_loss"):
        assert log(found, key) == pytest.approx(log(expected, key), rel=1e-4), key
    assert len(log(found, "loss")) == 5 and log(found, "eval_exact_match") == log(expected, "eval_exact_match")
    assert sum(log(found, "tokens_per_second")) > 0
    prefixes = log(found, "shared")  # of documents; two groups of ranks have two shorter rows
    assert len(prefixes) == 5 and (prefixes == log(expected, "shared") or engine == "DDP, 2 of 4")
    one, shared = (torch.load(ran(name)["folder"] / f"{kind}.pt") for name in ("one process", engine))
    for name, weight in one.items():
        assert (shared[name] - weight).norm() < 1e-3 * weight.norm(), name


@pytest.mark.parametrize("mode", ["full", "LoRA"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_that_shares_rows_goes_on_from_its_checkpoint(ran, engine, mode):
    whole, again = ran(engine)[f"{mode} packed"], ran(engine)[f"{mode} again"]
    assert log(again, "loss") == pytest.approx(log(whole, "loss"), rel=1e-5)
    assert log(again, "eval_loss") == pytest.approx(log(whole, "eval_loss"), rel=1e-5)


def test_what_is_saved_is_what_was_trained(ran):
    for mode, file in (("full", "model.safetensors"), ("LoRA", "adapter_model.safetensors")):
        left = ran("DDP")
        saved = load_file(left["folder"] / f"{mode} packed" / file)
        for name, weight in torch.load(left["folder"] / f"{mode} packed.pt").items():
            assert torch.equal(saved[name.replace(".default", "")], weight)


# ----------------------------------------------------------------------------------------------------------------------
# The parts


def test_pieces_of_a_row_hold_each_token_and_label_once():
    def document(n):
        return {"input_ids": list(range(n)), "labels": [-100, *range(1, n)], "turns": []}

    conversations = [[document(7)], [document(3), document(9)]]
    whole, pieces = Collator()(conversations), [Collator(piece=(i, 4))(conversations) for i in range(4)]
    assert {piece["input_ids"].shape for piece in pieces} == {(1, 5)}  # 19 tokens and one of padding
    for name in ("input_ids", "position_ids", "shift_labels"):
        assert torch.equal(torch.cat([piece[name] for piece in pieces], dim=1)[:, :19], whole[name])
    assert all(piece["cu_seq_lens_q"].tolist() == [0, 7, 10, 19, 20] for piece in pieces)
    assert all(piece["max_length_q"] == 9 and piece["max_length_k"] == 20 for piece in pieces)
    assert [piece.get("padding_tokens", 0) for piece in pieces] == [0, 0, 0, 1]
    kept = [piece["shift_labels"][:, piece["logits_to_keep"]].ne(-100).sum() for piece in pieces]
    assert sum(kept) == whole["shift_labels"].ne(-100).sum()


def test_neighbouring_ranks_take_the_same_batches():
    rows = SharedRows(range(7), batch=2, count=3)
    assert list(rows) == [0, 1] * 3 + [2, 3] * 3 + [4, 5] * 3 and len(rows) == 18


@pytest.mark.parametrize(
    "name, count, message",
    [
        ("qwen3_5_text", 2, "qwen3_5_text has layers of linear_attention; leave it out; --activation_offloading"),
        ("gemma3_text", 2, "gemma3_text has layers of sliding_attention; leave it out"),
        ("mistral", 2, "mistral has layers of sliding_attention; leave it out"),
        ("qwen3", 3, "qwen3 has 4 heads and 2 of keys and values, which 3 ranks cannot share"),
    ],
)
def test_models_whose_rows_cannot_be_shared_are_refused(name, count, message):
    import transformers

    config = transformers.CONFIG_MAPPING[name](**families.TEXT[name])
    sequence.check(config, 1)
    with pytest.raises(UserError, match=message):
        sequence.check(config, count)


def test_a_number_of_processes_that_forms_no_groups_is_refused(rows, tmp_path):
    with pytest.raises(UserError, match="--sequence_parallel 2: 1 processes cannot form groups of 2; start a multiple"):
        finetune.train(argv("no_such_model", rows, tmp_path / "out", "--sequence_parallel", 2))


@pytest.mark.parametrize(
    "flags, other",
    [
        (["--padding_free", "False"], "padding_free False"),
        (["--attn_implementation", "sdpa"], "attn_implementation sdpa"),
        (["--neftune_noise_alpha", "5"], "neftune_noise_alpha"),
        (["--torch_compile", "True"], "torch_compile"),
        (["--average_tokens_across_devices", "False"], "average_tokens_across_devices False"),
    ],
)
def test_flags_that_contradict_shared_rows_are_refused(qwen3, rows, tmp_path, flags, other):
    words = argv(qwen3, rows, tmp_path / "out", "--use_cpu", "True", "--sequence_parallel", 2, *flags)
    left = run_ranks(tmp_path, {"refused": {"argv": words}}, 2)
    assert f"--sequence_parallel 2 and --{other} exclude each other" in left["refused"]["error"]
