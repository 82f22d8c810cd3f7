"""Attention over a packed row that never looks at another document, at the cost of the documents alone.

transformers would build a mask of T x T positions for a row of T tokens and compute all of it, which grows with the
square of the row. Here a GPU takes the row in one call of torch's variable-length kernel (FlashAttention 2, or 3 where
`flash_attn_interface` is installed), and a CPU computes one document after the other; the result is the same.
`register()` adds the implementation under the name PACKED to transformers' attention interface; where documents begin
travels from `batches.Collator` through the model to every layer, under the names that transformers' own flash
implementations know, also when a checkpointed layer is computed again.
"""

import importlib.util
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedConfig

from recipe.console import say
from recipe.model import sequence
from recipe.model.precision import exact_float32

PACKED = "packed"
# Kinds of layers, as transformers' configurations name them, in which a token of a packed row sees its document alone:
# all earlier tokens of it (see linear_attention.py for the last two), or those within a window, by a mask.
WHOLE = {"full_attention", "linear_attention", "conv"}
WINDOWED = {"sliding_attention"}
SHORT = 256  # tokens of a document, see _DocumentAttention
# torch 2.11 takes fewer key heads than query heads without being told.
GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None, max_length_q: int | None = None, max_length_k: int | None = None,
    scaling: float | None = None, dropout: float = 0.0, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Compute the attention of one layer, as transformers' attention interface requires.

    Args:
        query: [B, H, T, D]; key, value: [B, Hkv, S, D] with H a multiple of Hkv.
        attention_mask: None, or bool [B, 1, T, S], True where a position may be seen.
        cu_seq_lens_q: int32 [documents + 1], 0 and where each document of the row ends, with B = 1; None for ordinary
            batches and for generation, which transformers' own sdpa implementation computes.
        max_length_q: int, length of the longest document or more.
        max_length_k: int, the same; or the tokens of the whole row if other ranks have the rest of it (see
            `sequence.py`), to whom `cu_seq_lens_q` and `max_length_q` apply as well.
    Returns:
        ([B, T, H, D], None).
    """
    if cu_seq_lens_q is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        options.update(scaling=scaling, dropout=dropout)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if sequence.is_shared() and (max_length_k or 0) > query.shape[2]:
        query, key, value = map(sequence.to_heads, (query, key, value))
        options.update(scaling=scaling, dropout=dropout)
        attended, _ = packed_attention(module, query, key, value, None, cu_seq_lens_q, max_length_q, **options)
        return sequence.to_tokens(attended), None
    dtype = _computing_dtype(query)
    if query.device.type == "cuda" and dtype.itemsize == 2 and not dropout:
        row = [states[0].transpose(0, 1).to(dtype) for states in (query, key, value)]  # [T, H, D]
        ends = [cu_seq_lens_q] * 2 + [max_length_q] * 2
        return varlen_attn(*row, *ends, scale=scaling, window_size=(-1, 0), **GROUPED)[None], None  # causal
    return _by_document(query, key, value, cu_seq_lens_q, scaling, dropout), None


def _computing_dtype(states: Tensor) -> torch.dtype:
    """Return the dtype that autocast gives an attention over these states."""
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype


@torch.compiler.disable  # rows differ in their documents, and each would be compiled anew
def _by_document(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scaling: float | None, dropout: float
) -> Tensor:
    """Compute one document after the other; [1, H, T, D] to [1, T, H, D]."""
    lengths = ends.diff().tolist()
    if query.device.type == "cpu" and not dropout and query.shape[-1] == value.shape[-1]:
        row = [states.to(_computing_dtype(query)) for states in (query, key, value)]
        return _DocumentAttention.apply(*row, lengths, scaling)
    settings = dict(dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=True)
    outputs = [scaled_dot_product_attention(*parts, **settings) for parts in _documents(lengths, query, key, value)]
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1)


class _DocumentAttention(torch.autograd.Function):
    """`_by_document` on a CPU, by the kernel that torch takes: short documents in float32, and float32 always by MKL.

    oneDNN, which computes the products of bfloat16 and, on AMD, of float32 (see `precision.choose_float32`), takes longer
    to prepare the small products of a head than to compute them. Forward and backward pass of one layer for a document of
    90 tokens, 9 heads of 64, one core of Zen 4: 4.1 ms (float32) and 2.8 ms (bfloat16) with it, 1.2 ms without; of 400
    tokens 22.5, 18.3 and 16.4 ms.
    """

    @staticmethod
    def forward(ctx, query, key, value, lengths, scaling):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output = query.new_empty(query.transpose(1, 2).shape)
        sums = []  # of each document: log of the sum of each token's weights
        with exact_float32():
            for part, *row in _documents(lengths, output.transpose(1, 2), query, key, value):
                attended, total = flash(*map(_for_kernel, row), is_causal=True, scale=scaling)
                part.copy_(attended)
                sums.append(total)
        ctx.save_for_backward(query, key, value, output, *sums)
        ctx.lengths, ctx.scaling = lengths, scaling
        return output

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, output, *sums = ctx.saved_tensors
        flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        wanted = [torch.empty_like(states) for states in (query, key, value)]
        given = [gradient.transpose(1, 2), query, key, value, output.transpose(1, 2)]
        with exact_float32():
            for parts, total in zip(_documents(ctx.lengths, *wanted, *given), sums, strict=True):
                row = map(_for_kernel, parts[3:])
                found = flash_backward(*row, total, 0.0, True, scale=ctx.scaling)
                for part, tensor in zip(parts[:3], found, strict=True):
                    part.copy_(tensor)
        return *wanted, None, None


def _for_kernel(states: Tensor) -> Tensor:
    """Cast a short document [1, H, t, D] of half precision to float32."""
    return states.float() if states.dtype.itemsize == 2 and states.shape[2] <= SHORT else states


def _documents(lengths, *rows):
    """Yield the views [1, H, t, D] of rows [1, H, T, D] that belong to each document."""
    yield from zip(*(row.split(lengths, dim=2) for row in rows), strict=True)


def packed_mask(
    *args: Any, attention_mask: Tensor | None = None, q_length: int, kv_length: int, **options: Any
) -> Tensor | None:
    """Return the mask for `packed_attention`: None where a whole causal row is computed, else that of sdpa."""
    if attention_mask is None and q_length == kv_length:
        return None
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(*args, attention_mask=attention_mask, q_length=q_length, kv_length=kv_length, **options)


def layer_kinds(config: PreTrainedConfig) -> set[str]:
    """Return the kinds of layers of a text model, such as `full_attention`."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return set(kinds)
    window = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    return WINDOWED if window else {"full_attention"}


def can_pack(config: PreTrainedConfig) -> bool:
    """Return True if `packed_attention` is right for every attention layer: it sees all earlier tokens."""
    return layer_kinds(config) <= WHOLE


def choose(config: PreTrainedConfig, sharing: int = 1) -> str:
    """Choose the attention kernel for packed rows: PACKED, or one that observes the window of some layers.

    Args:
        config: Configuration of the decoder.
        sharing: How many ranks share a row; a UserError if they cannot.
    Returns:
        A name for `attn_implementation`; "auto" leaves the choice to transformers, as for models with layers of other
        kinds, whose rows are padded (see `checks.packing_fault`).
    """
    sequence.check(config, sharing)
    kinds = layer_kinds(config)
    if kinds <= WHOLE:
        return PACKED
    if not kinds <= WHOLE | WINDOWED:
        return "auto"
    from transformers.utils import is_flash_attn_2_available

    flash = is_flash_attn_2_available()
    how = "FlashAttention 2" if flash else "an exact mask over each row, which is slower"
    say(f"this model has layers with a sliding window: attention by {how}.")
    return "flash_attention_2" if flash else "auto"


def register() -> None:
    """Make PACKED known to transformers; further calls change nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    installed = importlib.util.find_spec("flash_attn_interface")  # FlashAttention 3's module
    if installed and torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        torch.nn.attention.activate_flash_attention_impl("FA3")

    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, packed_mask)
