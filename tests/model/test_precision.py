"""The precision of a run follows from the hardware, so that a run and its resume compute in the same one."""

import time

import pytest
import torch

from recipe.model import precision

AMX, AVX512_BF16, AMD = "_is_amx_tile_supported", "_is_avx512_bf16_supported", "AMD"


@pytest.mark.parametrize(
    "features, chosen",
    [
        ({AMX, AVX512_BF16}, torch.bfloat16),
        ({AVX512_BF16, AMD}, torch.bfloat16),
        ({AVX512_BF16}, torch.float32),  # half as fast in bfloat16 as in float32
        ({AMD}, torch.float32),
        (set(), torch.float32),
    ],
    ids=["Xeon with AMX", "Zen 4", "Xeon without AMX", "Zen 3", "other"],
)
def test_the_precision_of_a_cpu_follows_from_its_instructions_and_never_from_a_clock(monkeypatch, features, chosen):
    for name in (AMX, AVX512_BF16):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in features)
    monkeypatch.setattr(precision, "_is_amd", lambda: AMD in features)
    monkeypatch.setattr(time, "perf_counter", lambda: pytest.fail("the choice was timed"))
    assert precision.best_dtype(cpu=True) == chosen
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert precision.best_dtype(cpu=True) == torch.float32


def test_float32_products_stay_exact_whichever_library_computes_them():
    before, numbers = torch.get_float32_matmul_precision(), torch.randn(300, 300)
    try:
        precision.choose_float32()
        error = (numbers @ numbers).double() - numbers.double() @ numbers.double()
    finally:
        torch.set_float32_matmul_precision(before)
    assert error.abs().max() < 1e-4


def test_building_the_arguments_changes_no_setting_of_torch(tmp_path):
    import finetune

    before = torch.get_float32_matmul_precision()
    finetune.TrainingArguments(output_dir=str(tmp_path))
    assert torch.get_float32_matmul_precision() == before
