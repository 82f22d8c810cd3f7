"""What memory and disk there are, and what this process has taken of them."""

import os
import shutil
import sys

import torch


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a GPU, or of main memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil  # comes with accelerate

    return psutil.virtual_memory().available


def used_memory() -> int:
    """Return the bytes of main memory that this process has: weights, tokens, Python and its libraries."""
    import psutil

    return psutil.Process().memory_info().rss


def unread_weights() -> int:
    """Return the bytes of mapped model files that are not in main memory yet; safetensors reads them when needed."""
    import psutil

    files = getattr(psutil.Process(), "memory_maps", list)()  # not on macOS
    return sum(file.size - file.rss for file in files if file.path.endswith(".safetensors"))


def start_peak(device: torch.device) -> None:
    """Let `peak_memory` begin anew, without what loading the model has needed."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # as `man proc` has it: reset the peak of the resident set
    except OSError:  # not Linux, or not permitted
        pass


def peak_memory(device: torch.device) -> int:
    """Return the most bytes since `start_peak`: of tensors on a GPU, or of main memory that this process has had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        # Not ru_maxrss, which begins with the peak of the program that started this one.
        with open("/proc/self/status") as file:
            return 1024 * int(next(line.split()[1] for line in file if line.startswith("VmHWM:")))
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return used_memory()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_disk(folder: str) -> int:
    """Return the free bytes of the disk that holds `folder`, or will hold it."""
    folder = os.path.abspath(folder)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    return shutil.disk_usage(folder).free
