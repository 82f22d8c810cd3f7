"""Each family of docs/families.md trains on packed rows, or on padded ones where packed ones would be wrong."""

import json
import types

import families
import pytest
import torch
from safetensors.torch import load_file, save_file

import finetune
from benchmarks import families as cells
from helpers import ROOT, UNEVEN_ROWS, write
from recipe.console import UserError
from recipe.distributed import engines
from recipe.distributed.engines import Mode
from recipe.model import loading
from recipe.training import merging


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write(tmp_path_factory.mktemp("rows") / "rows.jsonl", UNEVEN_ROWS)


CELLS = [(name, Mode.LORA) for name in cells.FAMILIES if not name.endswith("_text")]
# Their files have other names than the model.
CELLS += [("qwen3_moe", Mode.FULL), ("gemma3", Mode.FULL), ("qwen3_moe", "QLoRA of experts")]


@pytest.mark.slow
@pytest.mark.parametrize("name, mode", CELLS)
def test_a_family_trains_and_goes_on_as_plain_torch_would_and_plain_libraries_load_it(
    small_tokenizer, rows, tmp_path, name, mode
):
    """One cell of the table, as benchmarks/families.py runs all of them."""
    cell = cells.Cell(name, mode, cells.ALONE)
    model = families.family(name, tmp_path / name, small_tokenizer)
    ((_, left),) = cells.run(cells.ALONE, [cell], tmp_path)
    result = cells.judge(cell, left, model, rows)
    assert result["verdict"] == cells.read()[cell]["verdict"]
    assert result["loss_difference"] < 1e-5 and result["step_difference"] < 1e-4
    assert ("the indexers of sparse attention are frozen" in left["said"]) == name.startswith("qwen4_exp")
    factors = [weight for name, weight in torch.load(left["weights"]).items() if "lora_B" in name]
    assert all(factor.any() for factor in factors) and (len(factors) >= 4 or mode == Mode.FULL)


def test_the_document_has_the_table_of_all_committed_results():
    assert cells.table() in (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert cells.summary() in (ROOT / "README.md").read_text(encoding="utf-8")
    found = [json.loads(line) for line in cells.RESULTS.read_text(encoding="utf-8").splitlines()]
    assert len(found) == sum(len(cells.modes(family)) for family in cells.FAMILIES) * len(cells.FLAGS)
    assert all(cell["verdict"].partition(":")[0] in ("trained", "padded", "refused") for cell in found)
    kept = [cell for cell in found if not cell["verdict"].startswith("refused")]
    assert all(cell["loss_difference"] < 1e-4 and cell["step_difference"] < 1e-3 for cell in kept)


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
