"""Each family of docs/families.md trains on packed rows, or on padded ones where packed ones would be wrong."""

import json
import shutil
import types

import families
import pytest
import torch
from safetensors.torch import load_file, save_file

import finetune
from benchmarks import families as cells
from helpers import ROOT, UNEVEN_ROWS, history, write
from recipe.console import UserError
from recipe.distributed import engines
from recipe.distributed.engines import Mode
from recipe.model import loading
from recipe.training import merging


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write(tmp_path_factory.mktemp("rows") / "rows.jsonl", UNEVEN_ROWS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in cells.FAMILIES if not name.endswith("_text")])
def test_an_adapter_of_each_family_trains_as_plain_torch_would_and_plain_peft_loads_it(
    small_tokenizer, rows, tmp_path, capsys, name
):
    cell = cells.Cell(name, Mode.LORA, cells.ALONE)
    model = families.family(name, tmp_path / "model", small_tokenizer)
    finetune.train(cells.words(cell, model, rows, tmp_path / "out"))
    losses = history(tmp_path / "out", "loss")
    assert len(losses) == 2 and losses[0] == pytest.approx(cells.loss_alone(cell.mode, model, rows), rel=1e-5)
    said = capsys.readouterr().out
    padded = cells.PADDED in said
    assert ("the indexers of sparse attention are frozen" in said) == name.startswith("qwen4_exp")
    verdict = cells.read()[cell]["verdict"]
    assert verdict.startswith("padded: ") if padded else verdict == "trained"
    loaded = cells.load_plainly(cell.mode, model, tmp_path / "out")  # raises an error for a weight without a place
    factors = [parameter for weight, parameter in loaded.named_parameters() if "lora_B" in weight]
    assert len(factors) >= 4 and all(factor.any() for factor in factors)


def test_the_document_has_the_table_of_all_committed_results():
    assert cells.table() in (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    found = [json.loads(line) for line in cells.RESULTS.read_text(encoding="utf-8").splitlines()]
    assert len(found) == len(cells.FAMILIES) * len(cells.MODES) * len(cells.FLAGS)
    assert all(cell["verdict"].partition(":")[0] in ("trained", "padded", "refused") for cell in found)
    assert all(cell["loss_difference"] < 1e-4 for cell in found if not cell["verdict"].startswith("refused"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "gemma3"])
def test_a_full_training_goes_on_from_its_checkpoint_where_files_have_other_names_than_the_model(
    small_tokenizer, rows, tmp_path, name
):
    model = families.family(name, tmp_path / "model", small_tokenizer)
    cell = cells.Cell(name, Mode.FULL, cells.ALONE)
    more = ["--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2"]
    finetune.train([*cells.words(cell, model, rows, tmp_path / "whole"), *more])
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    words = cells.words(cell, model, rows, tmp_path / "resumed")
    finetune.train([*words, *more, "--resume_from_checkpoint", "auto"])
    whole, resumed = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "resumed"))
    assert history(tmp_path / "resumed", "loss") == history(tmp_path / "whole", "loss")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[weight], resumed[weight]) for weight in whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, mode, more",
    [
        ("qwen3_moe", Mode.FULL, []),
        ("gemma3", Mode.FULL, []),
        ("qwen3", Mode.LORA, []),
        ("qwen3", Mode.LORA, ["--init_lora_weights", "pissa"]),
    ],
    ids=["experts", "vision checkpoint", "adapter", "converted adapter"],
)
def test_the_best_weights_are_loaded_at_the_end_as_they_lie_in_the_checkpoint(
    small_tokenizer, rows, tmp_path, name, mode, more
):
    model, out = families.family(name, tmp_path / "model", small_tokenizer), tmp_path / "out"
    words = cells.words(cells.Cell(name, mode, cells.ALONE), model, rows, out)
    finetune.train([
        *words, "--max_steps", "3", "--greater_is_better", "True", "--eval_data_path", str(rows), "--eval_strategy", "steps",
        "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1", "--load_best_model_at_end", "True",
        "--save_total_limit", "0", *more,
    ])  # fmt: skip
    best = json.loads((out / "trainer_state.json").read_text())["best_global_step"]
    assert best < 3  # the highest loss counts as the best here, and it falls
    file = "model.safetensors" if mode == Mode.FULL else "adapter_model.safetensors"
    saved, expected = load_file(out / file), load_file(out / f"checkpoint-{best}" / file)
    assert saved.keys() == expected.keys() and all(torch.equal(saved[weight], expected[weight]) for weight in saved)


@pytest.mark.slow
def test_experts_are_saved_and_merged_in_the_layout_of_the_files(small_tokenizer, rows, tmp_path):
    """The files of Qwen3-VL-MoE on the hub hold experts transposed, those that transformers writes do not."""
    model = families.family("qwen3_vl_moe", tmp_path / "model", small_tokenizer)
    base = load_file(model / "model.safetensors")
    base = {name: w.transpose(1, 2).contiguous() if ".experts." in name else w for name, w in base.items()}
    save_file(base, model / "model.safetensors", metadata={"format": "pt"})
    for mode, more in ((Mode.FULL, []), (Mode.LORA, ["--lora_experts", "True"])):
        cell = cells.Cell("qwen3_vl_moe", mode, cells.ALONE)
        finetune.train([*cells.words(cell, model, rows, tmp_path / mode), *more])
    merging.merge(str(tmp_path / Mode.LORA), str(tmp_path / "merged"))  # compares the logits
    for folder in (tmp_path / Mode.FULL, tmp_path / "merged"):
        saved = load_file(folder / "model.safetensors")
        assert {name: w.shape for name, w in saved.items()} == {name: w.shape for name, w in base.items()}
        moved = [name for name, w in saved.items() if ".experts." in name and not torch.equal(w, base[name])]
        assert len(moved) == 4


def test_fsdp2_refuses_a_model_that_reads_a_weight_in_parts(small_tokenizer, tmp_path):
    source = loading.Pretrained(str(families.family("gemma4 E4B", tmp_path, small_tokenizer)))
    model = source.skeleton(source.config())
    args = types.SimpleNamespace(deepspeed=None, fsdp=True, fsdp_config={})
    with pytest.raises(UserError, match="gemma4 with FSDP2: .* use DDP or ZeRO-3"):
        engines.settle_loading(args, model, loading.buffers_in_files(model))


def test_buffers_in_the_files_are_known_without_the_weights(small_tokenizer, tmp_path):
    found = {}
    for name in ("kimi_linear", "qwen4_exp_text", "qwen3_5"):
        source = loading.Pretrained(str(families.family(name, tmp_path / name, small_tokenizer)))
        buffers = loading.buffers_in_files(source.skeleton(source.config()))
        found[name] = {buffer.rpartition(".")[2] for buffer in buffers}
    assert found["kimi_linear"] == {"e_score_correction_bias"} and found["qwen4_exp_text"] and not found["qwen3_5"]
