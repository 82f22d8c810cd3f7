"""Adapters on routed experts: this recipe's forward pass beside peft's own, on the same layer and the same factors.

    python benchmarks/experts.py               # one layer of a small mixture, interleaved, in Markdown

One forward and backward pass of the routed experts of a Qwen3-MoE layer. Seconds are the fastest of --repeat rounds,
in which the variants take turns; memory is the most that tensors made during the pass hold at one time.
"""

import argparse
import pathlib
import sys
import time
import weakref

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from recipe.model import experts  # noqa: E402

clock = time.perf_counter if torch.cuda.is_available() else time.process_time  # as other programs run beside it
VARIANTS = ("frozen, grouped_mm", "adapted by peft", "adapted here")


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations create, until they are freed; `peak` is the largest sum."""

    def __init__(self):
        super().__init__()
        self.known, self.live, self.peak = weakref.WeakSet(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        given = {t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(t)}
        for tensor in filter(torch.is_tensor, torch.utils._pytree.tree_leaves(result)):
            storage = tensor.untyped_storage()
            if storage.device.type != "meta" and storage.data_ptr() not in given and storage not in self.known:
                self.known.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return result

    def _freed(self, count):
        self.live -= count


def layers(args, dtype):
    """The experts of one layer for each variant: {variant: module}, with the same weights and factors."""
    import peft
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    found = {}
    for variant in VARIANTS:
        torch.manual_seed(0)
        config = Qwen3MoeConfig(
            vocab_size=8, hidden_size=args.hidden, moe_intermediate_size=args.intermediate, num_experts=args.experts,
            num_experts_per_tok=args.per_token, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)
        if variant != VARIANTS[0]:
            options = experts.lora_options(model, args.rank * args.per_token, 16, False)
            model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], **options))
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.data.normal_(std=0.02)
        if variant == VARIANTS[2]:
            experts.use_low_rank_forward(model.get_base_model())
            experts.hand_over_factors(model)
        found[variant] = (model if variant == VARIANTS[0] else model.get_base_model()).model.layers[0].mlp.experts
    return found


def step(module, hidden, chosen, weights):
    output = module(hidden.detach().requires_grad_(), chosen, weights)
    output.backward(torch.ones_like(output))


def measure(args, dtype, tokens):
    """{variant: (seconds, bytes)} of a forward and backward pass."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, args.hidden, device=args.device, dtype=dtype)
    scores = torch.randn(tokens, args.experts, device=args.device).softmax(-1)
    weights, chosen = scores.topk(args.per_token)
    seconds, found = dict.fromkeys(VARIANTS, float("inf")), {}
    modules = {variant: module.to(args.device) for variant, module in layers(args, dtype).items()}
    for round in range(args.repeat + 1):  # the first warms up
        for variant, module in modules.items():
            module.zero_grad()
            started = clock()
            step(module, hidden, chosen, weights.to(dtype))
            if args.device == "cuda":
                torch.cuda.synchronize()
            if round:
                seconds[variant] = min(seconds[variant], clock() - started)
    for variant, module in modules.items():
        module.zero_grad()
        with LiveBytes() as live:
            step(module, hidden, chosen, weights.to(dtype))
        found[variant] = seconds[variant], live.peak
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for flag, default in (("hidden", 512), ("intermediate", 192), ("experts", 128), ("per_token", 8), ("rank", 8),
                          ("repeat", 5)):  # fmt: skip
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    print(f"| tokens, precision | {' | '.join(f'{variant}: ms, MB' for variant in VARIANTS)} | faster | memory |")
    print("|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in args.tokens:
            found = measure(args, dtype, tokens)
            cells = [f"{1e3 * seconds:.0f}, {count / 1e6:.0f}" for seconds, count in found.values()]
            (theirs, their_bytes), (ours, our_bytes) = found[VARIANTS[1]], found[VARIANTS[2]]
            ratios = f"{theirs / ours:.2f} x | {our_bytes / their_bytes:.2f} |"
            print(f"| {tokens:,}, {str(dtype).removeprefix('torch.')} | {' | '.join(cells)} | {ratios}", flush=True)


if __name__ == "__main__":
    main()
