"""Each family of docs/families.md trains on packed rows, or on padded ones where packed ones would be wrong."""

import json

import families
import pytest

import finetune
from benchmarks import families as cells
from helpers import ROOT, UNEVEN_ROWS, history, write
from recipe.distributed.engines import Mode


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write(tmp_path_factory.mktemp("rows") / "rows.jsonl", UNEVEN_ROWS)


@pytest.mark.slow
@pytest.mark.parametrize("name", cells.FAMILIES)
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
