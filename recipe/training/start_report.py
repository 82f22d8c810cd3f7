"""Describe before the start what a training will do, each number with its formula."""

from typing import Any

import torch
import transformers

from recipe.console import UserError
from recipe.dataset import packing, report
from recipe.distributed import engines, weights
from recipe.model import adapter, experts, linear_attention, long_rows
from recipe.model.loading import in_indexer, outside_decoder
from recipe.model.loss import obstacle_to_fusing
from recipe.model.precision import dtype_name
from recipe.training import memory, resources
from recipe.training.memory import GB
from recipe.training.plan import Plan
from recipe.training.resources import free_disk, free_memory


def describe(plan: Plan) -> str:
    """Return the block of lines that is printed before training."""
    trainer, compute_dtype, lora_args = plan.trainer, plan.compute_dtype, plan.lora_args
    args, model = trainer.args, trainer.model
    facts = {
        "model": _model(model, compute_dtype),
        "trained": _trained(model, args, lora_args),
        "chat template": report.template(packing.conversations(trainer.train_dataset).tokeniser.encoder),
        "training rows": report.rows(packing.conversations(trainer.train_dataset)),
    }
    linear = linear_attention.describe(model, args.device)
    if linear:
        facts["linear attention"] = linear
    routed = _experts(trainer, lora_args.q_lora)
    if routed:
        facts["routed experts"] = routed
    if args.world_size > 1:
        facts["engine"] = f"{engines.engine_of(args).label}, {args.world_size} processes"
        facts["engine"] += f", {args.sequence_parallel} of which share each row" * (args.sequence_parallel > 1)
    if trainer.head is None:
        facts["loss"] = f"from whole logits, which takes more memory: {obstacle_to_fusing(model)}"
    for name, dataset in (trainer.eval_dataset or {}).items():
        facts[f"evaluation rows ({name})"] = report.rows(dataset)
    facts["steps"] = _steps(trainer)
    facts["memory"] = _memory(plan)
    facts["longest row that fits"] = _longest_rows(plan)
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
    ranks = args.world_size // args.sequence_parallel
    if args.dataloader_drop_last and len(dataset) < args.train_batch_size * ranks:
        raise UserError(
            f"--dataloader_drop_last True: {len(dataset)} rows do not fill one batch of {args.train_batch_size} rows "
            f"on each of {ranks} ranks, so nothing would be trained; leave the flag out or lower "
            "--per_device_train_batch_size."
        )


def steps(trainer: transformers.Trainer) -> tuple[int, int, int]:
    """Return the optimizer steps of a training, of an epoch, and of the warm-up, as the Trainer counts them."""
    args = trainer.args
    _, epoch, *_, total = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    return total, epoch, args.get_warmup_steps(total)


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
        f"accumulated x {args.world_size // args.sequence_parallel} ranks) = {epoch:,} an epoch"
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


def _memory(plan):
    """Return the estimated peak on one device by its parts, and what is free: the same quantity as the log's memory_gb.

    On a CPU that is the memory of the whole process, with Python and its libraries.
    """
    args, trainer, on = plan.args, plan.trainer, plan.measures
    needed, loaded, libraries = plan.estimate(on), plan.loaded(), 0
    if args.device.type == "cpu":
        libraries = max(0, resources.used_memory() + resources.unread_weights() - loaded) + memory.KERNELS
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
        f"({plan.longest_batch():,} tokens{_how(plan)}); "
        f"{free_memory(args.device) / GB:.1f} GB free{' besides the weights' * bool(loaded)}"
    )
    if needed.peak > plan.room():
        text += "; this may not fit: lower --per_device_train_batch_size or --model_max_length, "
        text += "or train with --q_lora" if "gradient_checkpointing" in on else "or set --gradient_checkpointing True"
    return text


def _how(plan):
    """Say what lets the rows take less."""
    text = ", each layer computed twice" * ("gradient_checkpointing" in plan.measures)
    if "activation_offloading" in plan.measures:
        place = f"files in {plan.args.output_dir}" if plan.args.device.type == "cpu" else "main memory"
        text += f", the inputs of layers until then in {place}, {plan.offloaded() / GB:.2f} GB"
    return text + f", feed-forward layers in pieces of {long_rows.PIECE:,} tokens" * ("tiled_mlp" in plan.measures)


def _longest_rows(plan):
    """Return the tokens of a row that fit as things are, and with more and more measures."""
    (tokens, _), *others = plan.longest_rows()
    more = [f"{_rounded(n)} with --{names[-1]} True{' besides' * bool(names[1:])}" for n, names in others]
    return "; ".join([f"{_rounded(tokens)} tokens", *more])


def _rounded(tokens):
    """Write a number of tokens with two digits that count."""
    return f"{float(f'{tokens:.1e}'):,.0f}"


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


def refuse_full_disk(plan: Plan) -> None:
    """Refuse to train if a checkpoint would not fit on the disk of --output_dir.

    Raises:
        UserError: What a checkpoint takes, and what is free.
    """
    args = plan.args
    size, free = _checkpoint_bytes(plan.trainer, plan.compute_dtype), free_disk(args.output_dir)
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
