"""Plan the memory of a training: what it takes, what is switched on so that it fits, how long a row may be."""

import bisect
import dataclasses
import functools
import math
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
import transformers
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.import_utils import is_flash_linear_attention_available

from recipe import console
from recipe.console import UserError, say
from recipe.dataset import packing
from recipe.distributed import engines
from recipe.model import experts, long_rows
from recipe.training import memory
from recipe.training.memory import GB, MemoryParts, ModelSize
from recipe.training.resources import free_disk, free_memory

# What lets longer rows fit, by its flag. The first is needed for the second.
MEASURES = {
    "gradient_checkpointing": "gradient checkpointing",
    "activation_offloading": "activation offloading",
    "tiled_mlp": "feed-forward layers in pieces",
}
# Those that are tried together, the cheapest in time first: copies beside the computation cost less than to compute
# feed-forward layers a third time.
ORDER = [
    set(),
    {"gradient_checkpointing"},
    {"gradient_checkpointing", "activation_offloading"},
    {"gradient_checkpointing", "tiled_mlp"},
    set(MEASURES),
]
UNBALANCED = "the load-balancing loss needs the routers' scores of a whole row"
LONGEST = 1 << 24  # tokens of a row that nobody will ask for


def refuse_flags(args: Any, model: torch.nn.Module) -> None:
    """Refuse flags for long rows that a model cannot have.

    Args:
        args: TrainingArguments of finetune.py.
        model: The model with its adapter, or its skeleton.
    Raises:
        UserError: There is such a flag.
    """
    for name in MEASURES:
        if getattr(args, name) and (obstacle := _obstacle(name, args, model)):
            raise UserError(f"--{name}: {obstacle}; leave it out.")
    if args.sequence_parallel > 1 and experts.balancing_of(model):
        raise UserError(f"--sequence_parallel: {UNBALANCED}; leave it out.")


def _obstacle(measure: str, args: Any, model: torch.nn.Module) -> str | None:
    """Return why a model cannot have one of MEASURES; None if it can."""
    if _fsdp_checkpoints(args):
        return "activation_checkpointing of --fsdp_config is in its way; there, --gradient_checkpointing does the same"
    if measure == "gradient_checkpointing":
        return None
    if args.torch_compile:
        return "--torch_compile is in its way"
    if measure == "activation_offloading":
        here = any(isinstance(layer, GradientCheckpointingLayer) for layer in model.modules())
        return None if here else "this model does not checkpoint its layers in the way of transformers"
    if experts.balancing_of(model):
        return UNBALANCED
    return None if any(map(long_rows.feed_forward, _layers(model))) else "no feed-forward layer was found in this model"


def _fsdp_checkpoints(args: Any) -> bool:
    """Return True if FSDP's configuration switches activation checkpointing on, which is the same by another name."""
    return bool(args.fsdp) and bool(args.fsdp_config.get("activation_checkpointing"))


def _layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    return memory.decoder_layers(base.get_decoder(), base.config.get_text_config())


class Plan:
    """What a training takes on this process's device, and what can be done about it.

    Args:
        trainer: The RecipeTrainer that will train.
        compute_dtype: Precision of the forward and backward pass.
        lora_args: LoraArguments of finetune.py.
    """

    def __init__(self, trainer: transformers.Trainer, compute_dtype: torch.dtype, lora_args: Any):
        self.trainer, self.args = trainer, trainer.args
        self.compute_dtype, self.lora_args = compute_dtype, lora_args
        self.mode = engines.training_mode(trainer.args, lora_args)

    # What there is

    @functools.cached_property
    def size(self) -> ModelSize:
        """The size of the model, with its adapter."""
        fused = self.args.device.type != "cpu" and is_flash_linear_attention_available()
        return memory.model_size(self.trainer.model, fused_delta_rule=fused)

    @property
    def measures(self) -> set[str]:
        """Those of MEASURES that are on."""
        on = {name for name in MEASURES if getattr(self.args, name)}
        return on | {"gradient_checkpointing"} if _fsdp_checkpoints(self.args) else on

    def longest_batch(self) -> int:
        """Return the tokens of the largest micro-batch that may come, with padding."""
        args, dataset, rows = self.args, self.trainer.train_dataset, self.args.train_batch_size
        if isinstance(dataset, packing.PackedDataset):
            return dataset.tokens * rows
        kept = np.asarray(dataset.kept)
        if args.padding_free:
            return int(np.sort(np.asarray(dataset.sizes)[kept])[-rows:].sum())
        longest = np.asarray(dataset.lengths)[kept].max()
        return min(rows, len(dataset)) * int(min(longest, args.model_max_length))  # a longer one was cut

    def loaded(self) -> int:
        """Return the bytes of the weights that are on the device already; ZeRO-3 may hold a part of each."""
        parts = (getattr(p, "ds_tensor", p) for p in self.trainer.model.parameters())
        return sum(p.numel() * p.element_size() for p in parts if p.device.type == self.args.device.type)

    def room(self) -> int:
        """Return the bytes of the device for this process: what is free, and what the loaded weights take already."""
        device = self.args.device
        here = console.local_world_size() if device.type == "cpu" else 1  # processes that share it
        return free_memory(device) // here + self.loaded()

    # What it takes

    def estimate(self, on: Collection[str], mode: engines.Mode | None = None, tokens: int | None = None) -> MemoryParts:
        """Estimate the memory for the largest micro-batch that may come.

        Args:
            on: Which of MEASURES are on.
            mode: Another one than that of the arguments.
            tokens: Another number of tokens of that micro-batch, of which ranks that share rows take their pieces.
        """
        args, dataset = self.args, packing.conversations(self.trainer.train_dataset)
        tokens = -(-(self.longest_batch() if tokens is None else tokens) // args.sequence_parallel)
        engine = engines.engine_of(args)
        if args.device.type == "cpu":  # everything is in main memory, and offloading weights changes nothing
            engine = dataclasses.replace(engine, offloads=False)
        return memory.estimate(
            self.size,
            engine,
            mode or self.mode,
            args.world_size,
            tokens,
            supervised=int(tokens * dataset.supervised / max(dataset.tokens, 1)),
            checkpointing="gradient_checkpointing" in on,
            inputs_off="activation_offloading" in on,
            in_pieces="tiled_mlp" in on,
            dtype=self.compute_dtype,
            dropout=self.lora_args.lora_dropout,
            device=args.device.type,
            fused_head=self.trainer.head is not None,
        )

    def fits(self, parts: MemoryParts) -> bool:
        """Return whether this process has room for it; a tenth stays free.

        Allocators cannot use every gap, and libraries take memory of their own.
        """
        return parts.peak <= 0.9 * self.room()

    def offloaded(self) -> int:
        """Return the bytes of all inputs of layers, which --activation_offloading keeps off the device."""
        wide = memory.stream_bytes(engines.engine_of(self.args), self.mode, self.compute_dtype)
        each = wide * self.size.config.hidden_size * self.longest_batch() // self.args.sequence_parallel
        return each * len(self.size.layers)

    def longest_rows(self) -> list[tuple[int, list[str]]]:
        """Return how many tokens a row may have with the measures that are on, and with more and more of the others."""
        on, room, found = self.measures, 0.9 * self.room(), []
        others = [name for name in MEASURES if name not in on and not self._obstacle(name)]
        for count in range(len(others) + 1):
            more = others[:count]
            if "activation_offloading" in more and "gradient_checkpointing" not in on | {*more}:
                continue
            peak = functools.partial(self.estimate, on | {*more})
            tokens = bisect.bisect_right(range(1, LONGEST), room, key=lambda n, peak=peak: peak(tokens=n).peak)
            found.append((tokens, more))
        return found

    # What can be done

    def choose(self) -> None:
        """Switch on those of MEASURES that training would not fit without, the cheapest in time first.

        What the user has decided stays. The model is prepared for what is on. Every rank must call this.

        Raises:
            UserError: The user wants one that this model cannot have.
        """
        from accelerate.utils import gather_object

        args = self.args
        refuse_flags(args, self.trainer.model)
        found = gather_object([{name: self._obstacle(name) for name in MEASURES}])  # disks may differ
        obstacles = {name: next((of[name] for of in found if of[name]), None) for name in MEASURES}
        for name, obstacle in obstacles.items():
            if getattr(args, name) and obstacle:
                raise UserError(f"--{name}: {obstacle}; leave it out.")
        wanted = {name for name in MEASURES if getattr(args, name)}
        free = {name for name in MEASURES if getattr(args, name) is None and not obstacles[name]}
        for more in ORDER:
            chosen = wanted | more & free
            if "gradient_checkpointing" not in chosen:
                chosen -= {"activation_offloading"}
            if all(gather_object([self.fits(self.estimate(chosen))])):
                break
        for name in MEASURES:
            setattr(args, name, name in chosen)
        engines.set_checkpointing(args, args.gradient_checkpointing)  # under its other name, too
        new = [name for name in MEASURES if name in chosen - wanted]
        if new:
            be, them = ("is", "it") if len(new) == 1 else ("are", "them")
            say(
                f"{' and '.join(MEASURES[name] for name in new)} {be} on: without {them} training takes about "
                f"{self.estimate(wanted).peak / GB:.1f} GB; {', '.join(f'--{name} False' for name in new)} switches "
                f"{them} off."
            )
        if args.activation_offloading:
            self.trainer.add_callback(long_rows.Inputs(args.device, args.output_dir))
        if args.tiled_mlp:
            # Ranks of ZeRO-3 gather weights whenever one of them computes, and so must compute equally often.
            together = engines.engine_of(args).deepspeed_stage == 3
            pieces = math.ceil(self.longest_batch() / args.sequence_parallel / long_rows.PIECE) if together else None
            long_rows.in_pieces(_layers(self.trainer.model), pieces)

    def _obstacle(self, measure: str) -> str | None:
        """Return why one of MEASURES cannot be switched on here; None if it can."""
        args = self.args
        if (obstacle := _obstacle(measure, args, self.trainer.model)) or measure != "activation_offloading":
            return obstacle
        cpu, needed = args.device.type == "cpu", console.local_world_size() * self.offloaded()
        there = free_disk(args.output_dir) if cpu else free_memory(torch.device("cpu"))
        place = f"the disk of {args.output_dir}" if cpu else "main memory"
        return f"it takes {needed / GB:.1f} GB of {place}, and {there / GB:.1f} are free" if needed > there else None

    def remedies(self) -> list[tuple[str, float]]:
        """Return the flags that lower the peak, with the bytes that each saves by the estimate, the largest first."""
        args, on, longest = self.args, self.measures, self.longest_batch()
        rows, dataset, choices = args.per_device_train_batch_size, self.trainer.train_dataset, {}
        for name in MEASURES:
            needs = {"gradient_checkpointing"} if name == "activation_offloading" else set()
            if name not in on and needs <= on and not self._obstacle(name):
                choices[f"--{name} True"] = self.estimate(on | {name})
        if rows > 1:
            accumulated = rows * args.gradient_accumulation_steps
            flags = f"--per_device_train_batch_size 1 with --gradient_accumulation_steps {accumulated}"
            choices[flags] = self.estimate(on, tokens=longest // rows)
        elif isinstance(dataset, packing.PackedDataset):
            choices[f"--pack_tokens {dataset.tokens // 2}"] = self.estimate(on, tokens=longest // 2)
        else:
            choices[f"--model_max_length {longest // 2}"] = self.estimate(on, tokens=longest // 2)
        if self.mode == engines.Mode.FULL:
            choices["--use_lora"] = self.estimate(on, mode=engines.Mode.LORA)
        if self.mode != engines.Mode.QLORA:
            choices["--q_lora"] = self.estimate(on, mode=engines.Mode.QLORA)
        now = self.estimate(on).peak
        saved = [(flags, now - parts.peak) for flags, parts in choices.items()]
        return sorted((choice for choice in saved if choice[1] > 0), key=lambda choice: -choice[1])
