"""The precision that a run computes in, chosen from the hardware alone, so that a run and its resume agree."""

import contextlib
import os
import platform
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from recipe import console
from recipe.console import say


def best_dtype(cpu: bool) -> torch.dtype:
    """Return the fastest precision that trains well on this machine.

    A GPU gets bfloat16, or float16 if it has no instructions for bfloat16 (before Ampere). A CPU gets bfloat16 if its
    bfloat16 products are faster than its float32 products, else float32. This follows from the kind of CPU and is not
    timed: a timing depends on the load of the machine, and the same command would train in another precision.

    Args:
        cpu: whether the run computes on a CPU.
    """
    if not cpu:
        return torch.bfloat16 if has_bf16(cpu) else torch.float16
    several = console.world_size() > 1  # ranks on different machines must agree
    return torch.bfloat16 if _cpu_is_fast_in_bf16() and not several else torch.float32


def choose_precision(args: Any, recorded: str | None) -> None:
    """Set `bf16` and `fp16` where they are not given, or where this hardware does not compute in what was given.

    Args:
        args: TrainingArguments, with `use_cpu` as it will be.
        recorded: the precision of the run that is resumed, as a dtype's name; what is fast here may be another one.
    """
    if args.tf32 and args.use_cpu:
        say("--tf32 is for GPUs and is left out on this CPU.")
        args.tf32 = None
    best = recorded or dtype_name(best_dtype(args.use_cpu))
    if args.fp16 and args.use_cpu or args.bf16 and not has_bf16(args.use_cpu):
        best = dtype_name(best_dtype(args.use_cpu))
        say(f"--{'fp16' if args.fp16 else 'bf16'}: this hardware does not compute in it; {best} is used instead.")
        args.bf16 = args.fp16 = None
    if args.bf16 is None and args.fp16 is None:
        args.bf16, args.fp16 = best == "bfloat16", best == "float16"
    args.bf16, args.fp16 = bool(args.bf16), bool(args.fp16)


def compute_dtype(args: Any) -> torch.dtype:
    """Return the precision that TrainingArguments compute in."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def computing_dtype(states: torch.Tensor) -> torch.dtype:
    """Return the dtype that autocast gives to products of these states; theirs without autocast."""
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype


def has_bf16(cpu: bool) -> bool:
    """Return True if the CPU, or the GPU, has instructions for bfloat16; without them it is emulated and very slow."""
    if cpu:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.cuda.is_bf16_supported(including_emulation=False)


def _cpu_is_fast_in_bf16() -> bool:
    """Return True if bfloat16 products are faster than float32 products on this CPU.

    Rates measured on products of 512 x 1024 x 2048, bfloat16 (oneDNN) over float32 (MKL): AMD Zen 5 with AVX512-BF16
    4.0, AMD Zen 4 with AVX512-BF16 2.2, a Xeon with AVX512-BF16 but without AMX 0.55.
    """
    return torch.cpu._is_amx_tile_supported() or (has_bf16(cpu=True) and _is_amd())


def choose_float32() -> None:
    """Let oneDNN multiply float32 matrices on an AMD CPU, where it is faster than MKL, and as exact.

    MKL is torch's own choice. oneDNN reaches 2.1 times its rate on Zen 5, 1.15 times on Zen 4, and the same on Intel.
    Precision "medium" selects oneDNN; it also allows to round to bfloat16, which AMX does, so the result is compared.
    This changes a global setting of torch.
    """
    if not _is_amd():
        return
    torch.set_float32_matmul_precision("medium")
    numbers = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    exact = numbers.double() @ numbers.double()
    # Rounding to float32 leaves 3e-7 of the norm, rounding to bfloat16 1e-3.
    if ((numbers @ numbers).double() - exact).norm() > 1e-6 * exact.norm():
        torch.set_float32_matmul_precision("highest")


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Multiply float32 matrices by torch's own choice, which `choose_float32` may have changed."""
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)


def _is_amd() -> bool:
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return "AuthenticAMD" in file.read()
    return "AuthenticAMD" in platform.processor()


def dtype_name(dtype: torch.dtype) -> str:
    """Return "bfloat16" for torch.bfloat16, and so on."""
    return str(dtype).removeprefix("torch.")


def trainable_to_float32(model: nn.Module) -> None:
    """Cast every trained parameter to float32: in half precision, small updates of a weight are rounded away."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def keep_input_dtype(model: nn.Module) -> None:
    """Let the adapters of peft take their inputs as they are. Only under autocast, which casts each product itself.

    Otherwise peft first copies every input to the adapter's float32.
    """
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False
