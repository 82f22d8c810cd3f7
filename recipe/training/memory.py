"""What a training needs on each GPU, by arithmetic: model, engine, mode, GPUs and tokens -> bytes by their parts.

`python scaling.py` prints the table of the README, `python scaling.py measured` the formula beside what was measured.
"""

import os
import shutil
from dataclasses import dataclass

import torch

from recipe.distributed.engines import Mode
from recipe.distributed.weights import numel
from recipe.model.loss import BLOCK

GB = 1e9
NF4, NF4_SCALES = 0.5, 1 / 64 + 4 / (64 * 256)  # bytes a weight; 8 bits scale 64 weights, float32 scales 256 of these
ZERO3_LIVE = 1_000_000_000  # elements; DeepSpeed's default for weights that are gathered, and for a part of its step


@dataclass
class Shape:
    """Parameters of a model by where they are kept, and its config (with the names of transformers).

    linear: weights of the linear layers, which QLoRA holds in 4 bits; other: norms, biases and the like; embedding;
    head: 0 where it is the embedding; adapter: what LoRA trains.
    """

    linear: int
    other: int
    embedding: int
    head: int
    adapter: int
    config: object

    @property
    def base(self):
        return self.linear + self.other + self.embedding + self.head


def shape_of(model):
    """The Shape of a loaded model of any kind, wherever its parts are."""
    config = model.config.get_text_config()
    counts = dict.fromkeys(("4 bits", "matrices", "other", "adapter"), 0)
    for parameter in model.parameters():
        elements = numel(parameter)
        if hasattr(model, "peft_config") and parameter.requires_grad:
            counts["adapter"] += elements
        elif getattr(parameter, "quant_state", None) is not None:
            counts["4 bits"] += parameter.quant_state.shape.numel()
        else:
            matrix = len(getattr(parameter, "ds_shape", parameter.shape)) > 1
            counts["matrices" if matrix else "other"] += elements
    embedding = config.vocab_size * config.hidden_size
    head = 0 if model.config.get_text_config().tie_word_embeddings else embedding
    matrices = counts["matrices"] - embedding - head
    linear, other = (counts["4 bits"], counts["other"] + matrices) if counts["4 bits"] else (matrices, counts["other"])
    return Shape(linear, other, embedding, head, counts["adapter"], config)


def activation_bytes(config, dtype, lora, dropout):
    """Bytes that one token keeps per layer between forward and backward, for Qwen2-like layers.

    From counting what autograd saves: about 4 tensors of the MLP's width and 10 of the hidden size in the computing
    precision; in half precision also the float32 copies made by the norms and by the adapters; with dropout a mask and
    a copy of every adapter's input.
    """
    hidden, size = config.hidden_size, dtype.itemsize
    wide = getattr(config, "intermediate_size", None) or 4 * hidden
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    heads = groups * (getattr(config, "head_dim", None) or hidden // config.num_attention_heads)
    kept = size * (4 * wide + 10 * hidden + 2 * heads)
    if size == 2:
        kept += 2 * wide + 18 * hidden if lora else 4 * hidden
    return kept + (5 * (wide + 6 * hidden) if lora and dropout else 0)


def gpu_bytes(shape, engine, mode, gpus, tokens, checkpointing=True, dtype=torch.bfloat16, supervised=None,
              dropout=0.05):  # fmt: skip
    """Bytes on one GPU by their parts; `peak` adds them up.

    Assumed, with AdamW of torch and the configurations beside this file:
        one process, DDP: what is trained, its gradients and two averages in float32; autocast's copies of it in the
            computing dtype; DDP's buckets, which are the gradients once more.
        LoRA: the base in the computing dtype. QLoRA: its linear layers in NF4 with double quantisation, 0.516 bytes a
            weight, of which the scales (0.016) are never shared out; one matrix at a time is computed from them.
        ZeRO: what is trained in the computing dtype; a share of its float32 masters and averages, and of gradients in
            the computing dtype. ZeRO-2: the weights whole, two buckets of hidden size squared gradients. ZeRO-3: a
            share of all weights; 1e9 gathered elements at most and a bucket of hidden size squared. In QLoRA all 4-bit
            weights that a forward pass has gathered stay until its backward pass ends: bitsandbytes refers to them
            (FSDP2 empties them all the same, and so does checkpointing, of the reentrant kind that engines.py chooses
            here).
        FSDP2: a share of everything, the trained part in float32; two layers and the head gathered in the computing
            dtype, and as much again for gradients of what is trained.
        offload: optimizer and gradients, and all but ZeRO-2's weights, are in main memory.
        the step, after the passes: 4 bytes more a trained weight, and 4 for ZeRO's gradients in float32 (of 1e9
            weights at a time).
        checkpointing: the input of each layer, and one layer's activations.
        logits: in the computing dtype, in float32, and their gradient, of at most BLOCK supervised tokens; the float32
            gradient of a head that is trained.
    Args:
        shape: a Shape; engine: an Engine; mode: an engines.Mode; gpus: processes, one on each.
        tokens: of a micro-batch on one GPU; supervised: how many of them are (None: all).
        dropout: of the adapter.
    Returns:
        {part: bytes}: weights, gradients, optimizer, gathered (with copies and buckets), activations, logits, step.
    """
    size, config = dtype.itemsize, shape.config
    zero, offload = engine.masters_apart, engine.offloads
    full, q_lora = mode == Mode.FULL, mode == Mode.QLORA
    trained = shape.base if full else shape.adapter
    linear = NF4 if q_lora else size  # bytes of a weight of the layers
    frozen = 0 if full else linear * shape.linear + size * (shape.base - shape.linear)
    scales = NF4_SCALES * shape.linear * q_lora
    weights = frozen + (size if zero else 4) * trained
    share = 1 / gpus if engine.shards_optimizer else 1
    here = 0 if offload else share

    if engine.deepspeed_stage == 2:
        gathered = 2 * config.hidden_size**2 * size
    elif engine.deepspeed_stage == 3:
        held = NF4 * shape.linear * q_lora * (not checkpointing)
        gathered = held + min(weights - held, ZERO3_LIVE * size) + config.hidden_size**2 * size
    elif engine.shards_weights:  # FSDP2
        layers = linear * shape.linear + size * (shape.other + shape.adapter * (not full))
        gathered = (2 * layers / config.num_hidden_layers + size * shape.embedding) * (2 if full else 1)
    else:  # rows are looked up in an embedding, which needs no copy of it
        copied = trained - (shape.embedding if full and shape.head else 0)
        gathered = size * copied * (size < 4) + 4 * trained * engine.copies_gradients

    block = min(tokens if supervised is None else supervised, BLOCK["cuda"])
    layer = activation_bytes(config, dtype, not full, dropout)
    inputs = config.num_hidden_layers * config.hidden_size * size
    return {
        "weights": weights * (here if engine.shards_weights else 1) + scales,
        "gradients": (size if zero else 4) * trained * here,
        "optimizer": (12 if zero else 8) * trained * here,
        "gathered": gathered + config.hidden_size * (getattr(config, "intermediate_size", None) or 0) * size * q_lora,
        "activations": tokens * (inputs + layer if checkpointing else config.num_hidden_layers * layer),
        "logits": block * config.vocab_size * (8 if size < 4 else 4) + 4 * shape.embedding * full,
        "step": 0 if offload else 8 * min(trained * share, ZERO3_LIVE) if zero else 4 * trained * share,
    }


def kept(parts):
    """Bytes that stay from step to step (gradients between the micro-batches of one)."""
    return parts["weights"] + parts["gradients"] + parts["optimizer"]


def peak(parts):
    """Bytes at the worst moment: at the end of a forward pass or, when the passes are done, in the optimizer's step."""
    return kept(parts) + max(parts["gathered"] + parts["activations"] + parts["logits"], parts["step"])


def free_memory(device):
    """Free bytes on a GPU, or of main memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil  # comes with accelerate

    return psutil.virtual_memory().available


def free_disk(folder):
    """Free bytes where `folder` lies or will lie."""
    folder = os.path.abspath(folder)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    return shutil.disk_usage(folder).free
