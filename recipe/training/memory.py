"""Estimate the memory of a training on each device: model, engine, mode, devices and tokens -> bytes by their parts.

Every part is counted from the model and from what the code keeps; nothing is fitted. tests/training/test_memory.py holds
the parts against the bytes that torch keeps, and benchmarks/memory_table.py prints a table of common models.
"""

from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch

from recipe.distributed.engines import Engine, Mode
from recipe.distributed.weights import numel
from recipe.model import experts, long_rows
from recipe.model.attention import PACKED
from recipe.model.loading import never_trained
from recipe.model.loss import BLOCK, ROWS

GB = 1e9
# Bytes of a weight in NF4 with double quantisation (QLoRA, arXiv 2305.14314): an 8-bit scale for each 64 weights, and a
# float32 scale for each 256 of those.
NF4, NF4_SCALES = 0.5, 1 / 64 + 4 / (64 * 256)
ZERO3_LIVE = 1_000_000_000  # elements: DeepSpeed's stage3_max_live_parameters, and its sub_group_size in a step
KERNELS = 150_000_000  # bytes of the products that oneDNN compiles on a CPU, see console.configure_libraries
CHUNK = 64  # tokens that the gated delta rule computes together
# Linear layers that read the result of their block; others read that of a norm.
ATTENTION_OUTPUTS = ("o_proj", "out_proj", "dense")
MLP_OUTPUTS = ("down_proj", "w2", "fc2", "dense_4h_to_h")


@dataclass(frozen=True)
class LayerSize:
    """Elements that one decoder layer keeps of each token for the backward pass.

    Attributes:
        norms: Inputs of RMS norms, which compute in float32.
        entering: Inputs of the linear layers that read the output of a norm, counted for each of them.
        shared: The same, where those of one block (such as q_proj, k_proj, v_proj) read one tensor.
        leaving: Inputs of the linear layers that read the result of their block.
        attended: Those of them that are `between`, too, as packed attention leaves them.
        ranks: Outputs of the adapter's first matrices.
        between: Results between the linear layers, in the computing precision.
        exact: Results between them that are float32 in every precision.
        casts: Copies of such results in the computing precision, if that is another one.
        gradients: Gradients that exist at once in the backward pass, those of the widest results.
    """

    norms: float = 0
    entering: float = 0
    shared: float = 0
    leaving: float = 0
    attended: float = 0
    ranks: float = 0
    between: float = 0
    exact: float = 0
    casts: float = 0
    gradients: float = 0

    def __add__(self, other: "LayerSize") -> "LayerSize":
        """Add up what two parts of a layer keep."""
        return LayerSize(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class ModelSize:
    """Parameters of a model by how they are stored, and what its layers keep.

    Attributes:
        linear: Elements of the matrices that QLoRA holds in 4 bits.
        largest: Elements of the largest of these matrices.
        other: Elements of all other weights but embedding and output head.
        embedding: Elements of the input embedding.
        head: Elements of the output head; 0 if it is the embedding.
        tower: Elements of all these that are never trained: outside of the decoder, in a vision tower, or in indexers.
        adapter: Elements that LoRA trains.
        layers: What each decoder layer keeps: with an adapter for its backward pass, else for that of all weights.
        feed_forward: The part of each of them that `long_rows.in_pieces` lets take a row in pieces.
        widest: Trained elements of the largest of these parts.
        config: The configuration of the decoder.
    """

    linear: int
    largest: int
    other: int
    embedding: int
    head: int
    tower: int
    adapter: int
    layers: tuple[LayerSize, ...]
    feed_forward: tuple[LayerSize, ...]
    widest: int
    config: Any

    @property
    def base(self) -> int:
        """Count the parameters without the adapter."""
        return self.linear + self.other + self.embedding + self.head


@dataclass(frozen=True)
class MemoryParts:
    """Bytes on one device at the worst moment of a micro-batch: the end of its forward pass, or its backward pass.

    Attributes:
        weights: Model and adapter, or this process's share of them.
        gradients: Gradients, which stay from micro-batch to micro-batch.
        optimizer: AdamW's averages, and float32 masters where the engine keeps those apart.
        gathered: Copies of weights in the computing precision, gathered weights, communication buckets.
        activations: What the layers keep for the backward pass, and in it the gradients of one layer's results.
        logits: Logits and the gradients that the output head forms at once; in the backward pass these alone.
        step: Temporary tensors of the optimizer's step, which comes after the passes.
    """

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    logits: float
    step: float

    @property
    def kept(self) -> float:
        """Return the bytes that stay from step to step (gradients: between the micro-batches of one step)."""
        return self.weights + self.gradients + self.optimizer

    @property
    def passes(self) -> float:
        """Return the bytes that the forward and backward pass add."""
        return self.gathered + self.activations + self.logits

    @property
    def peak(self) -> float:
        """Return the bytes at the worst moment of all."""
        return self.kept + max(self.passes, self.step)


# ----------------------------------------------------------------------------------------------------------------------
# Sizes of a model


def model_size(model: Any, fused_delta_rule: bool = False) -> ModelSize:
    """Count a model of any kind: on a device, on meta, in 4 bits, with an adapter, or held in parts by ZeRO-3.

    Args:
        model: A causal language model of transformers, or peft's wrapper of one.
        fused_delta_rule: Whether linear-attention layers run the kernels of flash-linear-attention.
    """
    adapted = hasattr(model, "peft_config")
    base = model.get_base_model() if adapted else model
    decoder, head = base.get_decoder(), base.get_output_embeddings()
    outside = {id(parameter) for parameter in never_trained(base).values()}
    matrices = {id(m.weight) for m in base.modules() if isinstance(m, torch.nn.Linear) and m is not head}
    matrices |= {id(p) for name, p in base.named_parameters() if experts.is_routed_weight(name)}
    counts = dict.fromkeys(("adapter", "4 bits", "matrices", "other", "tower"), 0)
    largest = {"4 bits": 0, "matrices": 0}
    for parameter in model.parameters():
        if adapted and parameter.requires_grad:
            counts["adapter"] += numel(parameter)
            continue
        packed = getattr(parameter, "quant_state", None)
        elements = numel(parameter) if packed is None else packed.shape.numel()
        kind = "4 bits" if packed is not None else "matrices" if id(parameter) in matrices else "other"
        counts[kind] += elements
        counts["tower"] += elements * (id(parameter) in outside)
        if kind in largest:
            largest[kind] = max(largest[kind], elements)
    config = model.config.get_text_config()
    embedding = config.vocab_size * config.hidden_size
    tied = not {id(p) for p in head.parameters()} - {id(p) for p in base.get_input_embeddings().parameters()}
    linear = "4 bits" if counts["4 bits"] else "matrices"
    unpacked = counts["matrices"] if counts["4 bits"] else 0
    layers = decoder_layers(decoder, config)
    parts = [long_rows.feed_forward(layer) for layer in layers]
    return ModelSize(
        linear=counts[linear],
        largest=largest[linear],
        other=counts["other"] + unpacked - embedding * (1 if tied else 2),
        embedding=embedding,
        head=0 if tied else embedding,
        tower=counts["tower"],
        adapter=counts["adapter"],
        layers=tuple(_layer_size(layer, config, adapted, fused_delta_rule) for layer in layers),
        feed_forward=tuple(_layer_size(part, config, adapted, False) if part else LayerSize() for part in parts),
        widest=max((sum(numel(p) for p in part.parameters() if p.requires_grad) for part in parts if part), default=0),
        config=config,
    )


def decoder_layers(decoder: Any, config: Any) -> torch.nn.ModuleList | list[torch.nn.Module]:
    """Find the decoder's layers, however they are named."""
    lists = (m for m in decoder.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == config.num_hidden_layers)
    return next(lists, [])


def _layer_size(layer: torch.nn.Module, config: Any, adapted: bool, fused: bool) -> LayerSize:
    """Count what a layer keeps, by the modules in it."""
    size = _linear_inputs(layer, adapted) + _routed_experts(layer, config, adapted)
    for name, module in layer.named_modules():
        path = name.rpartition(".")[2]
        if path == "linear_attn" and hasattr(module, "num_v_heads"):
            size += _delta_net(module, fused)
        elif path in ("self_attn", "self_attention", "attention", "attn"):
            size += _attention(module, config, adapted)
        elif path in MLP_OUTPUTS and hasattr(module, "in_features"):
            # gate_proj, its activation and up_proj; the gradients of two of them
            size += LayerSize(between=3 * module.in_features, gradients=2 * module.in_features)
        elif path == "shared_expert":
            size += LayerSize(between=config.hidden_size)  # before it is weighed
        elif "Norm" in type(module).__name__ and path not in (
            "q_norm",
            "k_norm",
            "norm",
        ):  # those are counted elsewhere
            size += LayerSize(norms=numel(module.weight) if hasattr(module, "weight") else config.hidden_size)
    return size


def _linear_inputs(layer: torch.nn.Module, adapted: bool) -> LayerSize:
    """Sum up the input widths of the linear layers with an adapter, or of all (without `adapted`)."""
    size, shared = LayerSize(), {}
    for name, module in layer.named_modules():
        block, _, path = name.rpartition(".")
        if not hasattr(module, "in_features") or hasattr(module, "parameter_name"):  # experts: see _routed_experts
            continue
        if adapted:
            if not getattr(module, "lora_A", None):
                continue
            size += LayerSize(ranks=sum(module.r.values()))
        if path in ATTENTION_OUTPUTS + MLP_OUTPUTS:
            size += LayerSize(leaving=module.in_features)
        else:
            size += LayerSize(entering=module.in_features)
            shared[block] = module.in_features
    return size + LayerSize(shared=sum(shared.values()))


def _attention(attention: torch.nn.Module, config: Any, adapted: bool) -> LayerSize:
    """Count query, key, value, output and, in float32, a number a head; norms of query and key; an output gate.

    A gate keeps itself, its sigmoid and what it multiplies.
    """
    parts = {name: part for name, part in attention.named_children() if hasattr(part, "in_features")}
    output = next((parts[name] for name in ATTENTION_OUTPUTS if name in parts), None)
    query = config.hidden_size if output is None else output.in_features
    key = parts["k_proj"].out_features if "k_proj" in parts else query
    gated = "q_proj" in parts and parts["q_proj"].out_features == 2 * query
    norms = query * hasattr(attention, "q_norm") + key * hasattr(attention, "k_norm")
    kept = output is not None and (not adapted or bool(getattr(output, "lora_A", None)))
    same = query * (kept and not gated and config._attn_implementation == PACKED)
    return LayerSize(norms=norms, between=2 * query + 2 * key + 3 * query * gated, exact=query / 64, attended=same)


def _routed_experts(layer: torch.nn.Module, config: Any, adapted: bool) -> LayerSize:
    """Count what the routed experts of a layer keep, if it has any.

    k rows of a token pass the experts: two results of the first stack, the activation, the output; if the stacks or
    adapters of them are trained also the input of both stacks. The router keeps its probabilities and 64-bit indices.
    """
    routed = next(iter(experts.routed_experts(layer).values()), None)
    if routed is None:
        return LayerSize()
    wrapped = [m for n, m in layer.named_modules() if getattr(m, "parameter_name", None) and hasattr(m, "lora_A")]
    inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    k, hidden = experts.experts_per_token(config), config.hidden_size
    rows = hidden + 3 * inner
    if wrapped or not adapted:
        rows += hidden + inner + sum(sum(module.r.values()) for module in wrapped)
    return LayerSize(between=k * rows, exact=routed.num_experts + 8 * k, gradients=k * (2 * hidden + inner))


def _delta_net(net: Any, fused: bool) -> LayerSize:
    """Count what a gated delta net keeps.

    With flash-linear-attention: input and output of the convolution, normalised query and key, a row of the inverted
    chunk matrix, the output; and its norm's three tensors in float32. With torch's functions: all intermediate results,
    by heads and chunks (`torch_chunk_gated_delta_rule` in transformers 5.23), and the states between chunks. These
    functions pad each document to whole chunks, which is not counted.
    """
    heads, values = net.num_v_heads, net.value_dim
    chunk, states = heads * CHUNK, heads * net.head_k_dim * net.head_v_dim / CHUNK
    convolution = 2 * (2 * net.key_dim + values)
    if fused:
        return LayerSize(between=convolution + 2 * net.key_dim + chunk + 2 * values, exact=3 * values + 4 * heads)
    return LayerSize(
        between=convolution + 8 * values + 3 * chunk,
        exact=11 * values + 2 * chunk + states + 10 * heads,
        casts=1.5 * values + 2 * states,
    )


# ----------------------------------------------------------------------------------------------------------------------
# The estimate


def kept_bytes(
    layer: LayerSize, mode: Mode, dtype: torch.dtype, dropout: float = 0.0, device: str = "cuda", stream: int = 0
) -> float:
    """Return the bytes that a layer keeps of one token between forward and backward pass.

    Args:
        layer: Its size.
        mode: What is trained.
        dtype: Computing precision.
        dropout: Of the adapter. Each adapted layer then keeps an input and a mask of its own; a GPU's mask has 1 byte.
        device: Kind of device.
        stream: Bytes of an element between the layers (0: those of `dtype`). Autocast leaves float32 weights with
            float32 there, and copies the input of each linear layer.
    """
    size = dtype.itemsize
    stream = stream or size
    if mode == Mode.FULL:  # a norm's weight needs its normalised input
        norms = (4 + stream) * layer.norms
        inputs = size * ((layer.entering if stream > size else layer.shared) + layer.leaving - layer.attended)
    else:
        norms = 4 * layer.norms
        mask = 1 if device == "cuda" else size
        inputs = size * (layer.shared + layer.leaving - layer.attended)
        if dropout:
            inputs = (size + mask) * (layer.entering + layer.leaving)
    casts = size * layer.casts * (size < 4)
    return norms + inputs + size * (layer.ranks + layer.between) + 4 * layer.exact + casts


def stream_bytes(engine: Engine, mode: Mode, dtype: torch.dtype) -> int:
    """Return the bytes of a number between the layers: autocast leaves float32 weights with float32 there."""
    autocast = mode == Mode.FULL and not (engine.masters_apart or engine.shards_weights)
    return 4 if autocast else dtype.itemsize


def estimate(
    size: ModelSize,
    engine: Engine,
    mode: Mode,
    devices: int,
    tokens: int,
    *,
    supervised: int | None = None,
    checkpointing: bool = True,
    inputs_off: bool = False,
    in_pieces: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    dropout: float = 0.05,
    device: str = "cuda",
    fused_head: bool = True,
) -> MemoryParts:
    """Estimate the bytes on one device for AdamW and the engines' configurations of this recipe.

    * One process, DDP: what is trained, its gradients and two averages in float32; autocast's copies of it in `dtype`;
      DDP's buckets, which hold all gradients once more.
    * LoRA: the base in `dtype`. QLoRA: its linear layers in NF4, 0.516 bytes a weight, of which the scales (0.016) are
      never sharded; one matrix at a time is dequantised.
    * ZeRO: weights in `dtype`; a share of their float32 masters and averages, and of gradients in `dtype`. ZeRO-2: whole
      weights, two buckets of hidden size squared. ZeRO-3: a share of all weights, at most 1e9 gathered elements, one
      bucket. With QLoRA the 4-bit weights that a forward pass gathered stay until its backward pass ends, as
      bitsandbytes refers to them (but not with reentrant checkpointing, which `engines` chooses there, or FSDP2).
    * FSDP2: a share of everything, in float32 what is trained; two layers and the head gathered in `dtype`, with as much
      for the gradients of what is trained.
    * Offloading: gradients and optimizer, and shared weights, are in main memory.
    * Checkpointing: the input of every layer, and what one layer keeps. With the inputs elsewhere, that of the layer at
      work, and on a GPU that of the one before it. With feed-forward layers in pieces, what they keep of one piece, and
      their inputs, outputs and the gradients of both.
    * Step: 4 bytes for each trained weight, and 4 for ZeRO's gradients in float32 (1e9 weights at a time). On a CPU,
      torch takes one parameter after the other.

    Args:
        size: The model.
        engine: The engine.
        mode: What is trained.
        devices: Processes, one on each device.
        tokens: Tokens of a micro-batch on one device.
        supervised: How many of them have a label (None: all).
        checkpointing: Whether layers are computed again in the backward pass.
        inputs_off: Whether the inputs of layers are kept off the device until then, see `long_rows.Inputs`.
        in_pieces: Whether feed-forward layers take a row in pieces, see `long_rows.in_pieces`.
        dtype: Computing precision.
        dropout: Of the adapter.
        device: "cuda" or "cpu".
        fused_head: Whether `recipe.model.loss.HeadLoss` computes the loss; otherwise all logits exist.
    """
    full, bits = mode == Mode.FULL, dtype.itemsize
    trained = size.base - size.tower if full else size.adapter
    master = bits if engine.masters_apart else 4
    linear = NF4 if mode == Mode.QLORA else bits
    frozen = master * size.tower if full else linear * size.linear + bits * (size.base - size.linear)
    scales = NF4_SCALES * size.linear * (mode == Mode.QLORA)
    weights = frozen + master * trained
    share = 1 / devices if engine.shards_optimizer else 1
    here = 0 if engine.offloads else share
    if device == "cpu":
        step = 0.0
    elif engine.masters_apart:
        step = 0 if engine.offloads else 8 * min(trained * share, ZERO3_LIVE)
    else:
        step = 0 if engine.offloads else 4 * trained * share
    positions = tokens if supervised is None else supervised
    gathered, one_layer = _gathered(size, engine, mode, dtype, weights, trained, checkpointing)
    stream = stream_bytes(engine, mode, dtype)
    stored, computed = _activations(
        size,
        lambda layer: kept_bytes(layer, mode, dtype, dropout, device, stream),
        bits,
        stream,
        checkpointing,
        inputs=(1 if device == "cpu" else 2) if inputs_off else None,
        piece=min(1, long_rows.PIECE / max(tokens, 1)) if in_pieces else 1,
        sums=1.5 * master * size.widest / max(tokens, 1),
    )
    head = _head_gradients(size, full, dtype, positions)
    forward = MemoryParts(
        weights=weights * (here if engine.shards_weights else 1) + scales,
        gradients=master * trained * here,
        optimizer=(12 if engine.masters_apart else 8) * trained * here,
        gathered=gathered,
        activations=tokens * stored,
        logits=head + _logits(size, full, dtype, positions, device, fused_head),
        step=step,
    )
    backward = replace(forward, gathered=one_layer, activations=tokens * (stored + computed), logits=head)
    return max(forward, backward, key=lambda parts: parts.passes)


def _activations(
    size: ModelSize, kept: Callable[[LayerSize], float], bits: int, stream: int, checkpointing: bool, inputs: int | None,
    piece: float, sums: float,
) -> tuple[float, float]:  # fmt: skip
    """Return the bytes of a token that are there between forward and backward pass, and those of one layer's backward pass.

    Args:
        kept: Function from a part of a layer to the bytes that it keeps of a token.
        bits: Bytes of a number; stream: of one between the layers.
        inputs: How many layers' inputs are on the device with checkpointing; None: those of all layers.
        piece: Share of a row that feed-forward layers take at once.
        sums: Bytes, a token, of the gradients of such a layer's weights: their sum, and those of a matrix for one piece.
    """
    hidden, layers = size.config.hidden_size, list(zip(size.layers, size.feed_forward, strict=True))
    whole, peaks = [kept(layer) for layer in size.layers], [bits * layer.gradients for layer in size.layers]
    if piece < 1:  # a feed-forward layer keeps its input
        whole = [kept(layer) - kept(part) + bits * hidden for layer, part in layers]
        # With a piece of it at work: the gradients of its output and input. After that, what the norm before it computes.
        ends, norm = 2 * bits * hidden + sums, (4 * (5 + (bits < 4)) - bits) * hidden
        peaks = [max(ends + piece * (bits * layer.gradients + kept(part)), norm) for layer, part in layers]
    if not checkpointing:
        return sum(whole), max(peaks, default=0)
    stored = stream * hidden * (len(whole) if inputs is None else min(inputs, len(whole)))
    stored -= 4 * hidden * (stream == 4)  # the norm at the beginning of the layer at work keeps the same
    return stored, max(map(sum, zip(whole, peaks, strict=True)), default=0)


def _gathered(
    size: ModelSize, engine: Engine, mode: Mode, dtype: torch.dtype, weights: float, trained: int, checkpointing: bool
) -> tuple[float, float]:
    """Return the bytes of copies, gathered weights and buckets: in the forward pass, in the backward pass."""
    full, bits, hidden = mode == Mode.FULL, dtype.itemsize, size.config.hidden_size
    matrix = bits * size.largest * (mode == Mode.QLORA)
    if engine.deepspeed_stage == 2:
        return (2 * hidden**2 * bits + matrix,) * 2
    if engine.deepspeed_stage == 3:
        held = NF4 * size.linear * (mode == Mode.QLORA and not checkpointing)
        return (held + min(weights - held, ZERO3_LIVE * bits) + hidden**2 * bits + matrix,) * 2
    if engine.shards_weights:
        linear = NF4 if mode == Mode.QLORA else bits
        layers = linear * size.linear + bits * (size.other + size.adapter * (not full))
        return ((2 * layers / size.config.num_hidden_layers + bits * size.embedding) * (2 if full else 1) + matrix,) * 2
    # Autocast's copies live until the forward pass ends, or until the backward pass of a layer that kept them. Rows are
    # looked up in an embedding, which needs no copy of it.
    copies = bits * (trained - (size.embedding if full and size.head else 0)) * (bits < 4)
    buckets = 4 * trained * engine.copies_gradients
    return copies + buckets + matrix, (
        copies / size.config.num_hidden_layers if checkpointing else copies
    ) + buckets + matrix


def _logits(size: ModelSize, full: bool, dtype: torch.dtype, positions: int, device: str, fused_head: bool) -> float:
    """Return the bytes of logits and their gradient."""
    bits, vocabulary = dtype.itemsize, size.config.vocab_size
    if not fused_head:  # the logits, and in float32 the logarithms of softmax and their gradient
        return positions * vocabulary * (bits + 8)
    block = min(positions, BLOCK.get(device, BLOCK["cuda"]))
    exact = min(block, ROWS.get(device, block))
    # A block adds to the gradient of a trained head what it has computed in `dtype`.
    return vocabulary * (bits * block + 4 * exact * (bits < 4)) + bits * size.embedding * full


def _head_gradients(size: ModelSize, full: bool, dtype: torch.dtype, positions: int) -> float:
    """Return the bytes of the gradients that the output head forms in the forward pass: of its input, of its weight."""
    return positions * size.config.hidden_size * dtype.itemsize + 4 * size.embedding * full
