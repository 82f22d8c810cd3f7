"""Measure a training while it runs: tokens a second, padding, memory, time left, and the share of a GPU's peak."""

import time
from typing import Any

import torch
import transformers

from recipe.distributed import weights
from recipe.model import experts
from recipe.training import resources

# Dense bfloat16 peak (without sparsity) in FLOP/s of one GPU, by the name that torch.cuda.get_device_name() returns.
# From NVIDIA's data sheets, November 2026; a card of the same chip with another name may be slower and is left out.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,  # SXM5
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,  # SXM5
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}


class Throughput(transformers.TrainerCallback):
    """Count what micro-batches hold and the time of optimizer steps, without evaluation and saving.

    `entry()` gives, since the last call and over all processes: tokens_per_second, supervised_tokens_per_second,
    padding (share of computed positions that hold no token), shared (share of the tokens that several documents begin
    with and that were computed once, see `dataset.prefixes`; only where there are any), memory_gb (peak of this process
    since training began, see `resources.peak_memory`), minutes_left, and on known GPUs mfu, the share of the peak that the
    model's own operations take (as Megatron counts them, arXiv 2205.05198: what gradient checkpointing computes again is
    left out).
    """

    def __init__(self, trainer: transformers.Trainer):
        self.trainer = trainer
        # positions, those of a token, tokens (more if documents share positions), supervised ones
        self.counts, self.flops = (0, 0, 0, 0), flops_per_token(trainer.model)
        self.seconds, self.steps, self.mark = 0.0, 0, None
        self.all_tokens = self.all_supervised = 0  # of all entries

    def add(self, batch: dict[str, Any], supervised: torch.Tensor) -> None:
        """Count a micro-batch of `Collator` with this number of supervised tokens; nothing waits for the device."""
        positions = batch["input_ids"].numel()
        mask = batch.get("attention_mask")
        filled = positions - batch.get("padding_tokens", 0) if mask is None else mask.sum()
        counts = positions, filled, filled + batch.get("shared_tokens", 0), supervised
        self.counts = tuple(a + b for a, b in zip(self.counts, counts, strict=True))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        resources.start_peak(args.device)
        self.mark = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.seconds += now - self.mark
        self.steps += 1
        self.mark = now

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.mark = time.perf_counter()

    on_save = on_evaluate

    def entry(self) -> dict[str, float]:
        """Return the figures since the last call, {} before the first step. Every rank must call this."""
        if not self.steps:
            return {}
        args, state = self.trainer.args, self.trainer.state
        sums = torch.tensor([int(count) for count in self.counts], dtype=torch.float64, device=args.device)
        positions, filled, tokens, supervised = self.trainer.accelerator.reduce(sums).tolist()
        self.all_tokens += int(tokens)
        self.all_supervised += int(supervised)
        figures = {
            "tokens_per_second": round(tokens / self.seconds, 1),
            "supervised_tokens_per_second": round(supervised / self.seconds, 1),
            "padding": round(1 - filled / positions, 3),
            **({"shared": round(1 - filled / tokens, 3)} if filled < tokens else {}),
            "memory_gb": round(resources.peak_memory(args.device) / 1e9, 2),
            "minutes_left": round((state.max_steps - state.global_step) * self.seconds / self.steps / 60, 1),
        }
        peak = PEAK_FLOPS.get(torch.cuda.get_device_name()) if args.device.type == "cuda" else None
        if peak:
            figures["mfu"] = round(filled * self.flops / self.seconds / args.world_size / peak, 3)
        self.counts, self.seconds, self.steps = (0, 0, 0, 0), 0.0, 0
        return figures

    def totals(self) -> dict[str, int]:
        """Return the tokens that were trained on since the start, over all processes. Every rank must call this."""
        self.entry()
        return {"tokens": self.all_tokens, "supervised_tokens": self.all_supervised}


def flops_per_token(model: torch.nn.Module) -> float:
    """Count the floating-point operations of one token, forward and backward: 6 a trained weight, 4 a frozen one.

    A token passes k of E routed experts, so theirs count k / E. Embeddings are looked up and do not count. The output
    head counts only for supervised positions, and attention little for documents of a few thousand tokens; both are
    left out, as is all that is outside of the decoder.
    """
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    routed = next(iter(experts.routed_experts(base).values()), None)
    share = experts.experts_per_token(base.config) / routed.num_experts if routed is not None else 1
    total = 0.0
    for name, parameter in base.get_decoder().named_parameters():
        if "embed" not in name:
            operations = (6 if parameter.requires_grad else 4) * weights.numel(parameter)
            total += operations * (share if ".experts." in name else 1)
    return total
