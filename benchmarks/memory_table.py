"""How large a model fits, by arithmetic, and the formula beside what was measured.

python benchmarks/memory_table.py               # the table of the README
python benchmarks/memory_table.py measured
"""

import pathlib
import sys
from types import SimpleNamespace

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from recipe.distributed import engines  # noqa: E402
from recipe.training.memory import GB, Shape, gpu_bytes, kept, peak  # noqa: E402


def qwen2(hidden, layers, wide, heads, groups, head, vocabulary, tied, rank=64):
    """The Shape of a Qwen2 with an adapter on every linear layer but the output head."""
    query, key = heads * head, groups * head
    matrices = [(hidden, query), (hidden, key), (hidden, key), (query, hidden), *[(hidden, wide)] * 3]
    config = SimpleNamespace(
        hidden_size=hidden, num_hidden_layers=layers, intermediate_size=wide, num_attention_heads=heads,
        num_key_value_heads=groups, head_dim=head, vocab_size=vocabulary,
    )  # fmt: skip
    return Shape(
        linear=layers * sum(rows * columns for rows, columns in matrices),
        other=layers * (query + 2 * key + 2 * hidden) + hidden,
        embedding=vocabulary * hidden,
        head=0 if tied else vocabulary * hidden,
        adapter=layers * rank * sum(rows + columns for rows, columns in matrices),
        config=config,
    )


QWEN2_5 = {
    "0.5B": qwen2(896, 24, 4864, 14, 2, 64, 151936, True),
    "1.5B": qwen2(1536, 28, 8960, 12, 2, 128, 151936, True),
    "3B": qwen2(2048, 36, 11008, 16, 2, 128, 151936, True),
    "7B": qwen2(3584, 28, 18944, 28, 4, 128, 152064, False),
    "14B": qwen2(5120, 48, 13824, 40, 8, 128, 152064, False),
    "32B": qwen2(5120, 64, 27648, 40, 8, 128, 152064, False),
    "72B": qwen2(8192, 80, 29568, 64, 8, 128, 152064, False),
}


# ----------------------------------------------------------------------------------------------------------------------
# The table

COLUMNS = {  # title: engine, mode, GPUs
    "1 GPU QLoRA": ("one process", "QLoRA", 1),
    "1 GPU LoRA": ("one process", "LoRA", 1),
    "1 GPU full": ("one process", "full", 1),
    "8 ZeRO-2 LoRA": ("ZeRO-2", "LoRA", 8),
    "8 ZeRO-3 QLoRA": ("ZeRO-3", "QLoRA", 8),
    "8 FSDP2 QLoRA": ("FSDP2", "QLoRA", 8),
    "8 ZeRO-2 full": ("ZeRO-2", "full", 8),
    "8 ZeRO-3 full": ("ZeRO-3", "full", 8),
    "8 FSDP2 full": ("FSDP2", "full", 8),
    "8 ZeRO-3 offload full": ("ZeRO-3 offload", "full", 8),
}
TOKENS = 2048
ADVICE = (
    "GB on each GPU by `python scaling.py`, in bf16, with --gradient_checkpointing and 2,048 supervised tokens a "
    "micro-batch, of whose logits at most 2.5 are there at once and whose activations, 0.1 to 5, grow with the tokens. "
    "Take the column furthest to the left, of the training that you want, that leaves a tenth of your GPU free; with "
    "more GPUs ZeRO-3's and FSDP2's weights, gradients and optimizer shrink in proportion. Offload moves about "
    "20 bytes a trained parameter to main memory."
)

TINY = qwen2(256, 4, 1024, 8, 2, 32, 1024, True)
ON_CPU = "two CPU ranks (one process: one), float32, DeepSpeed 0.19.8, torch 2.13, November 2026"
MEASURED = [  # Shape, engine, mode, GPUs, tokens of a micro-batch, dtype, `kept` or `peak`, GB, where and when
    # by tests/test_scaling.py, between the passes and the step; ZeRO-3's QLoRA after the step
    (TINY, engine, mode, gpus, 114, torch.float32, kept, gb, ON_CPU)
    for engine, gpus, measured in (
        ("one process", 1, (0.06508, 0.03882, 0.02561)),
        ("ZeRO-2", 2, (0.04933, 0.03318, 0.01997)),
        ("ZeRO-3", 2, (0.04096, 0.02251, 0.01602)),
        ("FSDP2", 2, (0.03254, 0.01941, 0.01285)),
    )
    for mode, gb in zip(engines.Mode, measured, strict=True)
]


def table():
    """GB on each GPU for every Qwen2.5 and the columns, in Markdown, and how to read them."""
    lines = [f"| Qwen2.5 | {' | '.join(COLUMNS)} |", f"|{'---|' * (len(COLUMNS) + 1)}"]
    for name, shape in QWEN2_5.items():
        needed = (
            peak(gpu_bytes(shape, engines.ENGINES[engine], mode, gpus, TOKENS)) / GB
            for engine, mode, gpus in COLUMNS.values()
        )
        lines.append(f"| {name} | {' | '.join(f'{gb:.0f}' for gb in needed)} |")
    return "\n".join(lines) + f"\n\n{ADVICE}"


def measured():
    """MEASURED beside the formula, in Markdown."""
    lines = ["| model | engine | mode | GPUs | tokens | what | formula, GB | measured, GB |  |", f"|{'---|' * 9}"]
    for shape, engine, mode, gpus, tokens, dtype, what, gb, where in MEASURED:
        formula = what(gpu_bytes(shape, engines.ENGINES[engine], mode, gpus, tokens, dtype=dtype)) / GB
        cells = f"{shape.base:,} parameters", engine, mode, gpus, tokens, what.__name__, f"{formula:.3g}", f"{gb:.3g}"
        lines.append(f"| {' | '.join(map(str, cells))} | {where} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(measured() if sys.argv[1:] == ["measured"] else table())
