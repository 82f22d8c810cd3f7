"""Describe before the start what a training will do, each number with its formula; decide on gradient checkpointing."""

import dataclasses
import functools
from typing import Any

import numpy as np
import torch
import transformers
from transformers.utils.import_utils import is_flash_linear_attention_available

from recipe import console
from recipe.console import UserError, say
from recipe.dataset import packing, report
from recipe.distributed import engines, weights
from recipe.model import adapter, experts, linear_attention
from recipe.model.loading import in_indexer, outside_decoder
from recipe.model.loss import obstacle_to_fusing
from recipe.model.precision import dtype_name
from recipe.training import memory
from recipe.training.memory import GB, MemoryParts, free_disk, free_memory


def describe(trainer: transformers.Trainer, compute_dtype: torch.dtype, lora_args: Any) -> str:
    """Return the block of lines that is printed before training.

    Args:
        trainer: The RecipeTrainer that will train.
        compute_dtype: Precision of the forward and backward pass.
        lora_args: LoraArguments of finetune.py.
    """
    args, model = trainer.args, trainer.model
    facts = {
        "model": _model(model, compute_dtype),
        "trained": _trained(model, args, lora_args),
        "chat template": report.template(_conversations(trainer).tokeniser.encoder),
        "training rows": report.rows(_conversations(trainer)),
    }
    linear = linear_attention.describe(model, args.device)
    if linear:
        facts["linear attention"] = linear
    routed = _experts(trainer, lora_args.q_lora)
    if routed:
        facts["routed experts"] = routed
    if args.world_size > 1:
        facts["engine"] = f"{engines.engine_of(args).label}, {args.world_size} processes"
    if trainer.head is None:
        facts["loss"] = f"from whole logits, which takes more memory: {obstacle_to_fusing(model)}"
    for name, dataset in (trainer.eval_dataset or {}).items():
        facts[f"evaluation rows ({name})"] = report.rows(dataset)
    facts["steps"] = _steps(trainer)
    facts["memory"] = _memory(trainer, compute_dtype, lora_args)
    facts["disk"] = _disk(trainer, compute_dtype)
    return "\n".join(f"{name}: {text}" for name, text in facts.items())


def _model(model, compute_dtype):
    config = model.config.get_text_config()
    computed, window = dtype_name(compute_dtype), getattr(config, "max_position_embeddings", "unknown")
    return (
        f"{model.config._name_or_path}, {config.model_type}, {config.num_hidden_layers} layers, "
        f"window {window}, attention {config._attn_implementation}, computed in {computed}"
    )


def _trained(model, args, lora_args):
    trainable, total = parameters(model)
    what = "all weights, float32 masters"
    if args.use_lora:
        config = model.peft_config["default"]
        adapted = adapter.layers_by_name(model)
        what = f"LoRA, r {config.r}, alpha {config.lora_alpha}" if config.peft_type == "LORA" else config.peft_type
        what += f", on {', '.join(f'{name} ({count})' for name, count in adapted.items())}" * bool(adapted)
        untouched = adapter.GATES - adapted.keys()
        gates = {part for name in adapter.gates(model) for part in name.split(".") if part in untouched}
        if gates:
            what += f" (not on the gates {', '.join(sorted(gates))}, which --lora_target_modules can name)"
        taken = ", ".join(sorted({name.rpartition(".")[2] for name in adapter.taken_for_experts(model)}))
        what += f" (not on {taken}, which peft takes for routed experts)" * bool(taken)
        what += ", base in 4 bits (NF4)" * lora_args.q_lora
    base = model.get_base_model() if args.use_lora else model
    if outside_decoder(base):
        what += "; text only: images are left as they are"
    if any(in_indexer(name) for name, _ in base.named_parameters()):
        what += "; the indexers of sparse attention are frozen, as no gradient reaches them"
    return f"{trainable:,} of {total:,} parameters ({trainable / total:.2%}): {what}"


def _experts(trainer, q_lora):
    """Return how the routed experts of a mixture are trained; None for another model."""
    model, config = trainer.model, trainer.model.config
    held = {name: part for name, part in model.named_parameters() if experts.is_routed_weight(name)}
    if not held:
        return None
    count, (_, total) = sum(map(weights.numel, held.values())), parameters(model)
    text = f"{experts.experts_per_token(config)} for a token, {count:,} parameters ({count / total:.0%} of all)"
    balancing = experts.balancing_weight(config)
    if not trainer.args.use_lora:
        return f"{text}, trained" + f"; load-balancing loss, weight {balancing:g}" * bool(balancing)
    if q_lora and not any(type(part).__name__ == "Params4bit" for part in held.values()):
        text += ", not in 4 bits, as transformers computes them in a way of its own"
    options = model.peft_config["default"]
    adapted = sum(weights.numel(p) for name, p in model.named_parameters() if ".experts." in name and p.requires_grad)
    rank = experts.expert_rank(config, options.r)
    more = experts.adapter_size(model, rank)
    text += ", frozen"
    if adapted:
        ranks = ", ".join(map(str, sorted(set(options.rank_pattern.values())))) or options.r
        text += f", with adapters of rank {ranks} ({adapted:,} parameters)"
    elif more:
        text += f"; --lora_experts adapts them at rank {rank}, {more:,} parameters more to train"
    return text + "; the load-balancing loss is left out, as the router is frozen" * bool(balancing)


def parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Count the trainable parameters of a model and all of them; packed 4-bit weights count their original elements."""
    counts = [(p.requires_grad, weights.numel(p)) for p in model.parameters()]
    return sum(n for grad, n in counts if grad), sum(n for _, n in counts)


# ----------------------------------------------------------------------------------------------------------------------
# Steps


def refuse_no_batch(dataset: torch.utils.data.Dataset, args: Any) -> None:
    """Refuse rows that make no batch at all.

    Args:
        dataset: Training rows.
        args: TrainingArguments of finetune.py.
    Raises:
        UserError: With --dataloader_drop_last, the rows do not fill one batch of all ranks.
    """
    if args.dataloader_drop_last and len(dataset) < args.train_batch_size * args.world_size:
        raise UserError(
            f"--dataloader_drop_last True: {len(dataset)} rows do not fill one batch of {args.train_batch_size} rows "
            f"on each of {args.world_size} ranks, so nothing would be trained; leave the flag out or lower "
            "--per_device_train_batch_size."
        )


def steps(trainer: transformers.Trainer) -> tuple[int, int, int]:
    """Return the optimizer steps of a training, of an epoch, and of the warm-up, as the Trainer counts them."""
    args = trainer.args
    _, epoch, *_, total = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    return total, epoch, args.get_warmup_steps(total)


def _conversations(trainer):
    """Return the SupervisedDataset, also if its conversations are packed."""
    return getattr(trainer.train_dataset, "dataset", trainer.train_dataset)


def _steps(trainer):
    args, dataset = trainer.args, trainer.train_dataset
    total, epoch, warmup = steps(trainer)
    text, rows = "", "rows"
    if isinstance(dataset, packing.PackedDataset):
        rows, share = "packed rows", dataset.held / (len(dataset) * dataset.tokens)
        text = f"rows of up to {dataset.tokens:,} tokens, {share:.1%} full; about {len(dataset.dataset) / epoch:.1f} "
        text += "conversations an optimizer step; "
    text += (
        f"{len(dataset):,} {rows} / ({args.train_batch_size} a device x {args.gradient_accumulation_steps} "
        f"accumulated x {args.world_size} ranks) = {epoch:,} an epoch"
    )
    if args.dataloader_drop_last:
        text += ", without the incomplete last batch"
    text += "; " if args.max_steps > 0 else f" x {args.num_train_epochs:g} epochs = "
    text += f"{total:,} optimizer steps{' (--max_steps)' * (args.max_steps > 0)}"
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    text += f", {warmup:,} of them warm-up to a learning rate of {args.learning_rate:g}, then {schedule}"
    return text + ("; few steps: the model may learn little, raise --num_train_epochs" if total < 50 else "")


# ----------------------------------------------------------------------------------------------------------------------
# Memory


def choose_checkpointing(trainer: transformers.Trainer, compute_dtype: torch.dtype, lora_args: Any) -> None:
    """Switch gradient checkpointing on if training would not fit without it. Every rank must call this."""
    from accelerate.utils import gather_object

    needed = estimate(trainer, compute_dtype, lora_args, checkpointing=False).peak
    # A tenth stays free: allocators cannot use every gap, and libraries take memory of their own.
    chosen = any(gather_object([needed > 0.9 * _room(trainer)])) and not _fsdp_checkpoints(trainer.args)
    engines.set_checkpointing(trainer.args, chosen)
    if chosen:
        say(
            f"gradient checkpointing is on: without it training takes about {needed / GB:.1f} GB; "
            "--gradient_checkpointing False switches it off."
        )


def estimate(
    trainer: transformers.Trainer,
    compute_dtype: torch.dtype,
    lora_args: Any,
    checkpointing: bool,
    mode: engines.Mode | None = None,
    share: float = 1.0,
) -> MemoryParts:
    """Estimate what training takes on this process's device, for the largest micro-batch that may come.

    Args:
        mode: another one than that of the arguments.
        share: of the tokens of that micro-batch.
    """
    args, dataset, longest = trainer.args, _conversations(trainer), int(_longest(trainer) * share)
    cpu = args.device.type == "cpu"
    engine = engines.engine_of(args)
    if cpu:  # everything is in main memory, and offloading changes nothing
        engine = dataclasses.replace(engine, offloads=False)
    return memory.estimate(
        memory.model_size(trainer.model, fused_delta_rule=not cpu and is_flash_linear_attention_available()),
        engine,
        mode or engines.training_mode(args, lora_args),
        args.world_size,
        longest,
        supervised=int(longest * dataset.supervised / max(dataset.tokens, 1)),
        checkpointing=checkpointing,
        dtype=compute_dtype,
        dropout=lora_args.lora_dropout,
        device=args.device.type,
        fused_head=trainer.head is not None,
    )


def remedies(trainer: transformers.Trainer, compute_dtype: torch.dtype, lora_args: Any) -> list[tuple[str, float]]:
    """Return the flags that lower the peak, with the bytes that each saves by the estimate, the largest first."""
    args, mode = trainer.args, engines.training_mode(trainer.args, lora_args)
    on = bool(args.gradient_checkpointing) or _fsdp_checkpoints(args)
    plan = functools.partial(estimate, trainer, compute_dtype, lora_args)
    rows, dataset = args.per_device_train_batch_size, trainer.train_dataset
    choices = {} if on else {"--gradient_checkpointing True": plan(True)}
    if rows > 1:
        accumulated = rows * args.gradient_accumulation_steps
        flags = f"--per_device_train_batch_size 1 with --gradient_accumulation_steps {accumulated}"
        choices[flags] = plan(on, share=1 / rows)
    elif isinstance(dataset, packing.PackedDataset):
        choices[f"--pack_tokens {dataset.tokens // 2}"] = plan(on, share=1 / 2)
    else:
        choices[f"--model_max_length {_longest(trainer) // 2}"] = plan(on, share=1 / 2)
    if mode == engines.Mode.FULL:
        choices["--use_lora"] = plan(on, mode=engines.Mode.LORA)
    if mode != engines.Mode.QLORA:
        choices["--q_lora"] = plan(on, mode=engines.Mode.QLORA)
    saved = [(flags, plan(on).peak - parts.peak) for flags, parts in choices.items()]
    return sorted((choice for choice in saved if choice[1] > 0), key=lambda choice: -choice[1])


def _longest(trainer):
    """Return the tokens of the largest micro-batch that may come, with padding."""
    args, dataset, rows = trainer.args, trainer.train_dataset, trainer.args.train_batch_size
    if isinstance(dataset, packing.PackedDataset):
        return dataset.tokens * rows
    kept = np.asarray(dataset.kept)
    if args.padding_free:
        return int(np.sort(np.asarray(dataset.sizes)[kept])[-rows:].sum())
    longest = np.asarray(dataset.lengths)[kept].max()
    return min(rows, len(dataset)) * int(min(longest, args.model_max_length))  # a longer one was cut


def _fsdp_checkpoints(args):
    """Return True if FSDP's configuration switches activation checkpointing on, which is the same by another name."""
    return bool(args.fsdp) and bool(args.fsdp_config.get("activation_checkpointing"))


def _room(trainer):
    """Return the bytes of the device for this process: what is free, and what the loaded weights take already."""
    device = trainer.args.device
    here = console.local_world_size() if device.type == "cpu" else 1  # processes that share it
    return free_memory(device) // here + _loaded(trainer.model, device)


def _loaded(model, device):
    """Return the bytes of the weights that are on the device already; ZeRO-3 may hold a part of each."""
    parts = (getattr(p, "ds_tensor", p) for p in model.parameters())
    return sum(p.numel() * p.element_size() for p in parts if p.device.type == device.type)


def _memory(trainer, compute_dtype, lora_args):
    """Return the estimated peak on one device by its parts, and what is free: the same quantity as the log's memory_gb.

    On a CPU that is the memory of the whole process, with Python and its libraries.
    """
    args = trainer.args
    checkpointing = bool(args.gradient_checkpointing) or _fsdp_checkpoints(args)
    needed = estimate(trainer, compute_dtype, lora_args, checkpointing)
    loaded, libraries = _loaded(trainer.model, args.device), 0
    if args.device.type == "cpu":
        libraries = max(0, memory.used_memory() + memory.unread_weights() - loaded) + memory.KERNELS
    text = f"about {(libraries + needed.peak) / GB:.2f} GB = "
    if libraries:
        text += f"Python and its libraries {libraries / GB:.2f} + "
    text += f"weights {needed.weights / GB:.2f} + gradients and optimizer "
    text += f"{(needed.gradients + needed.optimizer) / GB:.2f}{_shared(engines.engine_of(args), args)} + "
    if needed.step > needed.passes:
        text += f"{needed.step / GB:.2f} in the optimizer's step, more than "
    if needed.gathered >= 0.005 * GB:
        text += f"copies and buckets {needed.gathered / GB:.2f} + "
    rows = min(args.train_batch_size, len(trainer.train_dataset))
    text += (
        f"activations {needed.activations / GB:.2f} and logits {needed.logits / GB:.2f} of the {rows} longest rows "
        f"({_longest(trainer):,} tokens{', each layer computed twice' * checkpointing}); "
        f"{free_memory(args.device) / GB:.1f} GB free{' besides the weights' * bool(loaded)}"
    )
    if needed.peak > _room(trainer):
        text += "; this may not fit: lower --per_device_train_batch_size or --model_max_length, "
        text += "or train with --q_lora" if checkpointing else "or set --gradient_checkpointing True"
    return text


def _shared(engine, args):
    """Return which numbers of the estimate are a share, or are in main memory."""
    if not engine.shards_optimizer:
        return ""
    parts = "weights, gradients and optimizer" if engine.shards_weights else "gradients and optimizer"
    if engine.offloads and args.device.type != "cpu":
        return f" ({parts} are in main memory)"
    return f" (a share of 1/{args.world_size} of {parts})"


# ----------------------------------------------------------------------------------------------------------------------
# Disk


def refuse_full_disk(trainer: transformers.Trainer, compute_dtype: torch.dtype) -> None:
    """Refuse to train if a checkpoint would not fit on the disk of --output_dir.

    Raises:
        UserError: What a checkpoint takes, and what is free.
    """
    args = trainer.args
    size, free = _checkpoint_bytes(trainer, compute_dtype), free_disk(args.output_dir)
    if size > free:
        raise UserError(
            f"--output_dir {args.output_dir}: a checkpoint takes about {size / GB:.1f} GB and {free / GB:.1f} GB are "
            "free; choose another disk."
        )


def _checkpoint_bytes(trainer, compute_dtype):
    """Return the bytes of a checkpoint; without checkpoints, those of the trained weights at the end."""
    trainable, _ = parameters(trainer.model)
    if trainer.args.save_strategy == "no":
        return trainable * 4
    # float32 weights, the two averages of AdamW, and what the engine adds
    return trainable * (4 + 8 + engines.engine_of(trainer.args).extra_checkpoint_bytes(compute_dtype))


def _disk(trainer, compute_dtype):
    args = trainer.args
    size, free = _checkpoint_bytes(trainer, compute_dtype), free_disk(args.output_dir)
    kept = f"at most {args.save_total_limit} are kept" if args.save_total_limit else "all are kept"
    if args.save_strategy == "no":
        kept = "none is written (--save_strategy no)"
    return f"a checkpoint takes about {size / GB:.2f} GB, {kept}; {free / GB:.0f} GB free at {args.output_dir}"
