"""Print how large a model fits, by arithmetic, and the arithmetic beside what others have measured.

python benchmarks/memory_table.py               # the table of docs/performance.md
python benchmarks/memory_table.py published     # beside published figures
"""

import copy
import functools
import pathlib
import sys

import peft
import torch
import transformers
from transformers import Qwen2Config, Qwen3_5Config, Qwen3_5MoeConfig, Qwen3Config, Qwen3MoeConfig

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from recipe.training.memory import ModelSize, model_size  # noqa: E402


def qwen2(hidden, layers, inner, heads, groups, vocabulary, tied=False):
    return Qwen2Config(
        hidden_size=hidden, num_hidden_layers=layers, intermediate_size=inner, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=vocabulary, tie_word_embeddings=tied,
    )  # fmt: skip


def qwen3_5(hidden, layers, inner, heads, groups, value_heads, tower, tied=False):
    """A vision checkpoint; `tower` is the hidden size and the number of layers of its vision tower."""
    width, depth = tower
    text = dict(
        hidden_size=hidden, num_hidden_layers=layers, intermediate_size=inner, num_attention_heads=heads,
        num_key_value_heads=groups, linear_num_value_heads=value_heads, tie_word_embeddings=tied,
    )  # fmt: skip
    vision = dict(hidden_size=width, depth=depth, intermediate_size=4 * width, num_heads=width // 64)
    vision = {**vision, "intermediate_size": 4304, "num_heads": 16} if width == 1152 else vision
    return Qwen3_5Config(
        text_config=text, vision_config={**vision, "out_hidden_size": hidden}, tie_word_embeddings=tied
    )


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
    """Return the size of a model with an adapter on its linear layers; no weight takes any memory."""
    config = copy.deepcopy(CONFIGS[name])
    vision = hasattr(config, "vision_config")
    auto = transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
        linear = {n for n, m in model.get_decoder().named_modules() if isinstance(m, torch.nn.Linear)}
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules=linear))
    return model_size(model, fused_delta_rule=True)


if __name__ == "__main__":
    import time

    for n in CONFIGS:
        t = time.time()
        s = size_of(n)
        print(
            n,
            f"{s.base / 1e9:.3f} tower {s.tower / 1e9:.3f} adapter {s.adapter / 1e6:.1f}M linear {s.linear / 1e9:.3f} largest {s.largest / 1e6:.0f}M {time.time() - t:.1f}s",
            s.layers[0],
            flush=True,
        )
