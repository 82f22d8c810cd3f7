"""How fast a training is while it runs: tokens a second, padding, memory, time left, and the share of a GPU's peak."""

import time

import torch
import transformers

from recipe.distributed import weights

# Dense bfloat16 peak of one GPU in FLOP/s, from the makers' data sheets.
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12, "RTX 4090": 165e12}


class Throughput(transformers.TrainerCallback):
    """Counts what micro-batches hold and the time of optimizer steps; evaluation and saving are not counted.

    `entry()` gives, since the last call and over all processes: tokens_per_second, supervised_tokens_per_second,
    padding (share of computed positions), memory_gb (peak of this process), minutes_left, and on known GPUs mfu, the
    share of the peak that the model's own operations take (Megatron's count: what gradient checkpointing repeats is
    left out).
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.counts, self.flops = (0, 0, 0), _flops(trainer.model)  # positions, tokens, supervised
        self.seconds, self.steps, self.mark = 0.0, 0, None

    def add(self, batch, supervised):
        """Count a micro-batch of `batches.Collator`; nothing waits for the device."""
        positions = batch["input_ids"].numel()
        mask = batch.get("attention_mask")
        counts = positions, positions - batch.get("padding_tokens", 0) if mask is None else mask.sum(), supervised
        self.counts = tuple(a + b for a, b in zip(self.counts, counts, strict=True))

    def on_train_begin(self, args, state, control, **kwargs):
        self.mark = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self.seconds += now - self.mark
        self.steps += 1
        self.mark = now

    def on_evaluate(self, args, state, control, **kwargs):
        self.mark = time.perf_counter()

    on_save = on_evaluate

    def entry(self):
        """The figures since the last call. Every rank must call it; {} before the first step."""
        if not self.steps:
            return {}
        args, state = self.trainer.args, self.trainer.state
        sums = torch.tensor([int(count) for count in self.counts], dtype=torch.float64, device=args.device)
        positions, tokens, supervised = self.trainer.accelerator.reduce(sums).tolist()
        peak = torch.cuda.max_memory_allocated() if args.device.type == "cuda" else _resident()
        figures = {
            "tokens_per_second": round(tokens / self.seconds, 1),
            "supervised_tokens_per_second": round(supervised / self.seconds, 1),
            "padding": round(1 - tokens / positions, 3),
            "memory_gb": round(peak / 1e9, 2),
            "minutes_left": round((state.max_steps - state.global_step) * self.seconds / self.steps / 60, 1),
        }
        name = torch.cuda.get_device_name() if args.device.type == "cuda" else ""
        for gpu, flops in PEAK.items():
            if gpu in name:
                figures["mfu"] = round(tokens * self.flops / self.seconds / args.world_size / flops, 3)
        self.counts, self.seconds, self.steps = (0, 0, 0), 0.0, 0
        return figures


def _flops(model):
    """Floating-point operations of one token, forward and backward: 6 a trained parameter, 4 a frozen one.

    Embeddings are looked up and do not count; a head that is tied to them does, for the positions that reach it, and is
    left out here as most do not. Attention is left out, too: it is small for documents of a few thousand tokens.
    """
    body = [(name, p) for name, p in model.named_parameters() if "embed" not in name and "lm_head" not in name]
    return sum((6 if p.requires_grad else 4) * weights.numel(p) for _, p in body)


def _resident():
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
