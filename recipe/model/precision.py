"""What this machine computes fastest in, and how much room it has."""

import functools
import os
import time

import torch


@functools.lru_cache
def best_dtype(cpu):
    """Fastest precision that trains well here: bfloat16, float16 (GPUs before Ampere) or float32.

    On a CPU that knows bfloat16 the two are timed for some hundredths of a second: between processors with the same
    instructions, bfloat16 runs at four times or at half the speed of float32.
    """
    if not cpu:
        return torch.bfloat16 if has_bf16(cpu) else torch.float16
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return torch.float32  # ranks that time it each for itself might disagree
    if has_bf16(cpu) and 1.3 * _matmul_seconds(torch.bfloat16) < _matmul_seconds(torch.float32):
        return torch.bfloat16
    return torch.float32


@functools.lru_cache
def choose_float32():
    """Let oneDNN multiply float32 on this CPU where it is faster than torch's own choice, MKL, and as exact.

    Precision "medium" leads there. It would allow bfloat16 as well, which AMX then uses: hence the second look.
    """
    seconds = _matmul_seconds(torch.float32)
    torch.set_float32_matmul_precision("medium")
    numbers = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    exact = numbers.double() @ numbers.double()
    rounded = ((numbers @ numbers).double() - exact).norm() > 1e-6 * exact.norm()
    if rounded or 1.2 * _matmul_seconds(torch.float32) > seconds:  # twice as fast on some, a draw on others
        torch.set_float32_matmul_precision("highest")


def has_bf16(cpu):
    """Whether the CPU, or the GPU, has instructions for bfloat16; without them it is emulated, and very slow."""
    if cpu:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.cuda.is_bf16_supported(including_emulation=False)


def _matmul_seconds(dtype, repeats=8):
    states, weight = torch.ones(512, 1024, dtype=dtype), torch.ones(2048, 1024, dtype=dtype)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(torch.nn.functional.linear(states, weight), weight)  # on the way forth and back
        seconds.append(time.perf_counter() - start)
    return min(seconds)  # the first ones choose a kernel and wake the threads


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")
