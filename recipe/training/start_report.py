"""What a run will do, said before it starts: each number with what it comes from."""

import dataclasses
import math

import numpy as np

from recipe import console
from recipe.console import UserError, say
from recipe.dataset import packing, report
from recipe.distributed import engines, weights
from recipe.model import adapter, experts, linear_attention
from recipe.model.loading import outside_decoder
from recipe.model.loss import BLOCK, obstacle_to_fusing
from recipe.model.precision import dtype_name
from recipe.training import memory
from recipe.training.memory import GB, free_disk, free_memory


def describe(trainer, compute_dtype, lora_args):
    """The block of lines printed before training.

    Raises:
        UserError: a checkpoint would not fit on the disk.
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
    if trainer.args.world_size > 1:
        facts["engine"] = f"{engines.engine_of(trainer.args).label}, {trainer.args.world_size} processes"
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
    kind = "all weights, float32 masters"
    if args.use_lora:
        config = model.peft_config["default"]
        names = getattr(config, "target_modules", None) or []
        names = [names] if isinstance(names, str) else names
        adapted = {name.rsplit(".", 1)[-1] for name in names}
        kind = f"LoRA, r {config.r}, alpha {config.lora_alpha}" if config.peft_type == "LORA" else config.peft_type
        kind += f", on {', '.join(sorted(adapted))}" * bool(adapted)
        gates = {part for name in adapter.gates(model) for part in name.split(".") if part in adapter.GATES - adapted}
        if gates:
            kind += f" (not on the gates {', '.join(sorted(gates))}, which --lora_target_modules can name)"
        taken = ", ".join(sorted({name.rpartition(".")[2] for name in adapter.taken_for_experts(model)}))
        kind += f" (not on {taken}, which peft takes for routed experts)" * bool(taken)
        kind += ", base in 4 bits (NF4)" * lora_args.q_lora
    base = model.get_base_model() if args.use_lora else model
    if outside_decoder(base):
        kind += "; text only: images are left as they are"
    return f"{trainable:,} of {total:,} parameters ({trainable / total:.2%}): {kind}"


def _experts(trainer, q_lora):
    """What becomes of the routed experts of a mixture, None for another model."""
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


def parameters(model):
    """(trainable, all) parameters of a model, wherever their parts are; 4-bit weights count as what they hold."""
    counts = [(p.requires_grad, weights.numel(p)) for p in model.parameters()]
    return sum(n for grad, n in counts if grad), sum(n for _, n in counts)


def steps(trainer):
    """(optimizer steps, steps an epoch, warm-up steps) as the Trainer will take them."""
    args = trainer.args
    micro_batches = math.ceil(len(trainer.train_dataset) / (args.train_batch_size * args.world_size))
    epoch = max(1, math.ceil(micro_batches / args.gradient_accumulation_steps))
    total = args.max_steps if args.max_steps > 0 else math.ceil(epoch * args.num_train_epochs)
    return total, epoch, args.get_warmup_steps(total)


def _conversations(trainer):
    """The SupervisedDataset, also where its conversations are packed."""
    return getattr(trainer.train_dataset, "dataset", trainer.train_dataset)


def _steps(trainer):
    args, dataset = trainer.args, trainer.train_dataset
    total, epoch, warmup = steps(trainer)
    text, kind = "", "rows"
    if isinstance(dataset, packing.PackedDataset):
        kind, share = "packed rows", dataset.held / (len(dataset) * dataset.tokens)
        text = f"rows of up to {dataset.tokens:,} tokens, {share:.1%} full; about {len(dataset.dataset) / epoch:.1f} "
        text += "conversations an optimizer step; "
    text += (
        f"{len(dataset):,} {kind} / ({args.train_batch_size} a device x {args.gradient_accumulation_steps} "
        f"accumulated x {args.world_size} ranks) = {epoch:,} an epoch"
    )
    text += "; " if args.max_steps > 0 else f" x {args.num_train_epochs:g} epochs = "
    text += f"{total:,} optimizer steps{' (--max_steps)' * (args.max_steps > 0)}"
    kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    text += f", {warmup:,} of them warm-up to a learning rate of {args.learning_rate:g}, then {kind}"
    return text + ("; few steps: the model may learn little, raise --num_train_epochs" if total < 50 else "")


def _longest(trainer):
    """Tokens of the largest micro-batch that may come."""
    args, dataset = trainer.args, trainer.train_dataset
    if isinstance(dataset, packing.PackedDataset):
        return dataset.tokens * args.train_batch_size
    lengths = np.minimum(np.sort(dataset.lengths)[-args.train_batch_size :], args.model_max_length)
    return int(lengths.sum())


def _engine(args):
    """Return the engine for the estimate: on a CPU everything is in main memory, and offloading changes nothing."""
    engine = engines.engine_of(args)
    return dataclasses.replace(engine, offloads=False) if args.device.type == "cpu" else engine


def _needed(trainer, compute_dtype, lora_args, checkpointing):
    """Bytes that training takes at its peak on one device, by their parts (see memory.py)."""
    args, dataset, longest = trainer.args, _conversations(trainer), _longest(trainer)
    block = BLOCK.get(args.device.type, longest)
    supervised = int(longest * dataset.supervised / max(dataset.tokens, 1))
    supervised = min(supervised, block) if trainer.head is not None else 2 * supervised  # whole logits, in two copies
    needed = memory.gpu_bytes(
        memory.shape_of(trainer.model), _engine(args), engines.training_mode(args, lora_args), args.world_size, longest,
        checkpointing, compute_dtype, supervised, lora_args.lora_dropout,
    )  # fmt: skip
    if args.device.type == "cpu":
        needed["step"] = 0  # torch takes one parameter after the other there
    return needed


def _room(trainer):
    """Bytes of one device for this process: what is free, and what the loaded weights have taken already."""
    device = trainer.args.device
    here = console.local_world_size() if device.type == "cpu" else 1  # processes that share it
    return free_memory(device) // here + _loaded(trainer.model, device)


def choose_checkpointing(trainer, compute_dtype, lora_args):
    """Switch gradient checkpointing on where training would not fit without it. Every rank must call this."""
    from accelerate.utils import gather_object

    args = trainer.args
    fsdp_does_it = bool(args.fsdp) and bool(args.fsdp_config.get("activation_checkpointing"))
    needed = memory.peak(_needed(trainer, compute_dtype, lora_args, checkpointing=False))
    chosen = any(gather_object([needed > 0.9 * _room(trainer)])) and not fsdp_does_it
    engines.set_checkpointing(args, chosen)
    if chosen:
        say(
            f"gradient checkpointing is on: without it training takes about {needed / GB:.1f} GB; "
            "--gradient_checkpointing False switches it off."
        )


def _memory(trainer, compute_dtype, lora_args):
    """Estimated peak of training on one device, by its parts, against what is free now (the weights being loaded)."""
    args, engine = trainer.args, _engine(trainer.args)
    needed = _needed(trainer, compute_dtype, lora_args, args.gradient_checkpointing)
    parts = {name: f"{value / GB:.2f}" for name, value in needed.items()}
    rows = min(args.train_batch_size, len(trainer.train_dataset))
    total, loaded, free = memory.peak(needed), _loaded(trainer.model, args.device), free_memory(args.device)
    text = (
        f"about {total / GB:.2f} GB = weights {parts['weights']} + gradients and optimizer "
        f"{(needed['gradients'] + needed['optimizer']) / GB:.2f}{_shared(engine, args.world_size)} + "
    )
    passes = needed["gathered"] + needed["activations"] + needed["logits"]
    if needed["step"] > passes:
        text += f"{parts['step']} in the optimizer's step, more than "
    if needed["gathered"] >= 0.005 * GB:
        text += f"copies and buckets {parts['gathered']} + "
    text += (
        f"activations {parts['activations']} and logits {parts['logits']} of the {rows} longest rows "
        f"({_longest(trainer):,} tokens{', each layer computed twice' * bool(args.gradient_checkpointing)}); "
        f"{free / GB:.1f} GB free{' besides the weights' * bool(loaded)}"
    )
    if total > _room(trainer):
        text += "; this may not fit: lower --per_device_train_batch_size or --model_max_length, "
        text += "or train with --q_lora" if args.gradient_checkpointing else "or set --gradient_checkpointing True"
    return text


def _loaded(model, device):
    """Bytes of the weights that are on the device already; ZeRO-3 may hold a part of each."""
    parts = (getattr(p, "ds_tensor", p) for p in model.parameters())
    return sum(p.numel() * p.element_size() for p in parts if p.device.type == device.type)


def _shared(engine, gpus):
    """Return which numbers of the estimate are a 1/world_size share, or are in main memory."""
    if not engine.shards_optimizer:
        return ""
    parts = "weights, gradients and optimizer" if engine.shards_weights else "gradients and optimizer"
    return f" ({parts} are in main memory)" if engine.offloads else f" (a share of 1/{gpus} of {parts})"


def _disk(trainer, compute_dtype):
    args = trainer.args
    trainable, _ = parameters(trainer.model)
    # float32 weights, the two averages of AdamW, and what the engine adds
    size = trainable * (4 + 8 + engines.engine_of(args).extra_checkpoint_bytes(compute_dtype))
    free = free_disk(args.output_dir)
    if args.save_strategy == "no":
        size = trainable * 4  # the trained weights at the end
    if size > free:
        raise UserError(
            f"--output_dir {args.output_dir}: a checkpoint takes about {size / GB:.1f} GB and {free / GB:.1f} GB are "
            "free; choose another disk."
        )
    kept = f"at most {args.save_total_limit} are kept" if args.save_total_limit else "all are kept"
    if args.save_strategy == "no":
        kept = "none is written (--save_strategy no)"
    return f"a checkpoint takes about {size / GB:.2f} GB, {kept}; {free / GB:.0f} GB free at {args.output_dir}"
