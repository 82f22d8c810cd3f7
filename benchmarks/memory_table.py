"""Print how large a model fits, by arithmetic, and the arithmetic beside what others have published.

python benchmarks/memory_table.py               # the table of docs/performance.md
python benchmarks/memory_table.py published     # beside published figures
python benchmarks/memory_table.py rows          # the longest row that fits
"""

import bisect
import copy
import functools
import pathlib
import sys

import peft
import torch
import transformers
from transformers import Qwen2Config, Qwen3_5Config, Qwen3_5MoeConfig, Qwen3Config, Qwen3MoeConfig

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from recipe.distributed.engines import ENGINES, Mode  # noqa: E402
from recipe.model import adapter, attention  # noqa: E402
from recipe.training.memory import GB, ModelSize, estimate, model_size  # noqa: E402


def qwen2(
    hidden: int, layers: int, inner: int, heads: int, groups: int, vocabulary: int, tied: bool = False
) -> Qwen2Config:
    """Return the configuration of a dense model."""
    return Qwen2Config(
        hidden_size=hidden, num_hidden_layers=layers, intermediate_size=inner, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=vocabulary, tie_word_embeddings=tied,
    )  # fmt: skip


def qwen3_5(
    hidden: int,
    layers: int,
    inner: int,
    heads: int,
    groups: int,
    value_heads: int,
    tower: tuple[int, int],
    tied: bool = False,
) -> Qwen3_5Config:
    """Return the configuration of a vision checkpoint; `tower`: hidden size and layers of its vision tower."""
    width, depth = tower
    inner_width, tower_heads = (4304, 16) if width == 1152 else (4 * width, width // 64)
    text = dict(
        hidden_size=hidden, num_hidden_layers=layers, intermediate_size=inner, num_attention_heads=heads,
        num_key_value_heads=groups, linear_num_value_heads=value_heads, tie_word_embeddings=tied,
    )  # fmt: skip
    vision = dict(
        hidden_size=width, depth=depth, intermediate_size=inner_width, num_heads=tower_heads, out_hidden_size=hidden
    )  # fmt: skip
    return Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=tied)


# From the config.json of each model; what is left out is the default of transformers' class.
CONFIGS = {
    "Qwen2.5-0.5B": qwen2(896, 24, 4864, 14, 2, 151936, tied=True),
    "Qwen2.5-1.5B": qwen2(1536, 28, 8960, 12, 2, 151936, tied=True),
    "Qwen2.5-3B": qwen2(2048, 36, 11008, 16, 2, 151936, tied=True),
    "Qwen2.5-7B": qwen2(3584, 28, 18944, 28, 4, 152064),
    "Qwen2.5-14B": qwen2(5120, 48, 13824, 40, 8, 152064),
    "Qwen2.5-32B": qwen2(5120, 64, 27648, 40, 8, 152064),
    "Qwen2.5-72B": qwen2(8192, 80, 29568, 64, 8, 152064),
    "Qwen3-8B": Qwen3Config(
        hidden_size=4096, num_hidden_layers=36, intermediate_size=12288, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=151936,
    ),
    "Qwen3-30B-A3B": Qwen3MoeConfig(num_hidden_layers=48, head_dim=128),
    "Qwen3.5-0.8B": qwen3_5(1024, 24, 3584, 8, 2, 16, (768, 12), tied=True),
    "Qwen3.5-2B": qwen3_5(2048, 24, 6144, 8, 2, 16, (1024, 24), tied=True),
    "Qwen3.5-4B": qwen3_5(2560, 32, 9216, 16, 4, 32, (1024, 24), tied=True),
    "Qwen3.5-9B": qwen3_5(4096, 32, 12288, 16, 4, 32, (1152, 27)),
    "Qwen3.6-27B": qwen3_5(5120, 64, 17408, 24, 4, 48, (1152, 27)),
    "Qwen3.6-35B-A3B": Qwen3_5MoeConfig(vision_config={"out_hidden_size": 2048}),
}  # fmt: skip


@functools.cache
def size_of(name: str, rank: int = 64) -> ModelSize:
    """Return the size of a model with the adapter that finetune.py puts on it; no weight takes any memory."""
    config = copy.deepcopy(CONFIGS[name])
    vision = hasattr(config, "vision_config")
    auto = transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM
    attention.register()
    with torch.device("meta"):
        model = auto.from_config(config, attn_implementation=attention.PACKED)
        lora = peft.LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules=adapter.targets(model, None))
        return model_size(peft.get_peft_model(model, lora), fused_delta_rule=True)


COLUMNS = {  # title: engine, mode, GPUs
    "1 GPU QLoRA": ("one process", Mode.QLORA, 1),
    "1 GPU LoRA": ("one process", Mode.LORA, 1),
    "1 GPU full": ("one process", Mode.FULL, 1),
    "8 ZeRO-2 LoRA": ("ZeRO-2", Mode.LORA, 8),
    "8 ZeRO-3 QLoRA": ("ZeRO-3", Mode.QLORA, 8),
    "8 FSDP2 QLoRA": ("FSDP2", Mode.QLORA, 8),
    "8 ZeRO-2 full": ("ZeRO-2", Mode.FULL, 8),
    "8 ZeRO-3 full": ("ZeRO-3", Mode.FULL, 8),
    "8 FSDP2 full": ("FSDP2", Mode.FULL, 8),
    "8 ZeRO-3 offload full": ("ZeRO-3 offload", Mode.FULL, 8),
}
TOKENS = 2048
ADVICE = (
    "GB on each GPU, in bf16, with --gradient_checkpointing, --lora_r 64 and a micro-batch of 2,048 tokens, all of them "
    "supervised. Their logits take up to 1.9 GB (3.1 with the vocabulary of Qwen3.5), their activations 0.1 to 5, which "
    "grow with the tokens. Vision towers are there and frozen, routed experts are frozen under LoRA and in 4 bits under "
    "QLoRA. Take the column furthest to the left, of the training that you want, that leaves a tenth of your GPU free; "
    "with more GPUs ZeRO-3's and FSDP2's weights, gradients and optimizer shrink in proportion. Offloading moves about "
    "20 bytes a trained parameter to main memory."
)
# GB for LoRA in bf16, as unsloth.ai/docs/models/qwen3.5/fine-tune said in November 2026. It does not say for which rank
# and length; its notebooks have rank 16 and rows of at most 2,048 tokens. Qwen3.6 has the shapes of Qwen3.5.
PUBLISHED = {
    "Qwen3.5-0.8B": 3,
    "Qwen3.5-2B": 5,
    "Qwen3.5-4B": 10,
    "Qwen3.5-9B": 22,
    "Qwen3.6-27B": 56,
    "Qwen3.6-35B-A3B": 74,
}


def needed(name: str, engine: str, mode: Mode, gpus: int) -> float:
    """Return the estimated GB on each GPU."""
    return estimate(size_of(name), ENGINES[engine], mode, gpus, TOKENS).peak / GB


def table() -> str:
    """Return the GB on each GPU for every model and column, in Markdown, and how to read them."""
    lines = [f"| model | {' | '.join(COLUMNS)} |", f"|{'---|' * (len(COLUMNS) + 1)}"]
    for name in CONFIGS:
        lines.append(f"| {name} | {' | '.join(f'{needed(name, *column):.0f}' for column in COLUMNS.values())} |")
    return "\n".join(lines) + f"\n\n{ADVICE}"


def beside_published(name: str) -> float:
    """Return the estimated GB of LoRA with rank 16, for a row of 2,048 tokens with 512 supervised ones."""
    return (
        estimate(size_of(name, 16), ENGINES["one process"], Mode.LORA, 1, TOKENS, supervised=512, dropout=0).peak / GB
    )


def published() -> str:
    """Return PUBLISHED beside the estimate, in Markdown."""
    lines = ["| LoRA in bf16, GB | published | estimated |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {gb} | {beside_published(name):.1f} |" for name, gb in PUBLISHED.items())])


ROWS = [
    ("Qwen2.5-7B", Mode.QLORA),
    ("Qwen2.5-7B", Mode.LORA),
    ("Qwen2.5-32B", Mode.QLORA),
    ("Qwen3.5-9B", Mode.QLORA),
    ("Qwen3.5-9B", Mode.LORA),
    ("Qwen3.6-27B", Mode.QLORA),
    ("Qwen3.6-27B", Mode.LORA),
]
GPUS = (24, 48, 80, 141)
MEASURES = [{}, {"inputs_off": True}, {"inputs_off": True, "in_pieces": True}]
HOW = (
    "Thousands of tokens of the longest row, all of them supervised, with --gradient_checkpointing alone, with "
    "--activation_offloading, and with --tiled_mlp besides; in bf16, --lora_r 64, a tenth of the GPU left free."
)


def longest(name: str, mode: Mode, gb: int, **measures: bool) -> int:
    """Return the tokens of the longest row that fits into nine tenths of a GPU."""
    engine = ENGINES["one process"]
    return bisect.bisect_right(
        range(1, 1 << 24),
        0.9 * gb * GB,
        key=lambda tokens: estimate(size_of(name), engine, mode, 1, tokens, **measures).peak,
    )


def rows() -> str:
    """Return the longest row that fits, for each of MEASURES, in Markdown, and how to read it."""
    lines = [f"| longest row | {' | '.join(f'{gb} GB' for gb in GPUS)} |", "|---" * (len(GPUS) + 1) + "|"]
    for name, mode in ROWS:
        cells = []
        for gb in GPUS:
            found = [longest(name, mode, gb, **measures) for measures in MEASURES]
            cells.append(", ".join(f"{tokens / 1000:.0f}k" for tokens in found) if found[-1] else "no room")
        lines.append(f"| {name} {mode} | {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\n{HOW}"


if __name__ == "__main__":
    print({"published": published, "rows": rows}.get("".join(sys.argv[1:]), table)())
