"""Attention over a packed row that never looks at another document, at the cost of the documents alone.

transformers would build a mask of T x T positions for a row of T tokens and compute all of it, which grows with the
square of the row. Here a GPU takes the row in one call of torch's variable-length kernel (FlashAttention 2, or 3 where
`flash_attn_interface` is installed), and a CPU makes one causal call for each document; the result is the same.
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

PACKED = "packed"
# Kinds of layers, as transformers' configurations name them, in which a token of a packed row sees its document alone:
# all earlier tokens of it (see linear_attention.py for the last two), or those within a window, by a mask.
WHOLE = {"full_attention", "linear_attention", "conv"}
WINDOWED = {"sliding_attention"}
# torch 2.11 takes fewer key heads than query heads without being told.
GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None, max_length_q: int | None = None, scaling: float | None = None,
    dropout: float = 0.0, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Compute the attention of one layer, as transformers' attention interface requires.

    Args:
        query: [B, H, T, D]; key, value: [B, Hkv, S, D] with H a multiple of Hkv.
        attention_mask: None, or bool [B, 1, T, S], True where a position may be seen.
        cu_seq_lens_q: int32 [documents + 1], 0 and where each document of the row ends, with B = 1; None for ordinary
            batches and for generation, which transformers' own sdpa implementation computes.
        max_length_q: int, length of the longest document or more.
    Returns:
        ([B, T, H, D], None).
    """
    if cu_seq_lens_q is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        options.update(scaling=scaling, dropout=dropout)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    if kind == "cuda" and dtype.itemsize == 2 and not dropout:
        row = [states[0].transpose(0, 1).to(dtype) for states in (query, key, value)]  # [T, H, D]
        ends = [cu_seq_lens_q] * 2 + [max_length_q] * 2
        return varlen_attn(*row, *ends, scale=scaling, window_size=(-1, 0), **GROUPED)[None], None  # causal
    return _per_document(query, key, value, cu_seq_lens_q, scaling, dropout), None


@torch.compiler.disable  # rows differ in their documents, and each would be compiled anew
def _per_document(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scaling: float | None, dropout: float
) -> Tensor:
    """One call for each document; [1, H, T, D] to [1, T, H, D]."""
    lengths = ends.diff().tolist()
    parts = [states.split(lengths, dim=2) for states in (query, key, value)]
    settings = dict(dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=True)
    outputs = [scaled_dot_product_attention(q, k, v, **settings) for q, k, v in zip(*parts, strict=True)]
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1)


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


def choose(config: PreTrainedConfig) -> str:
    """Choose the attention kernel for packed rows: PACKED, or one that observes the window of some layers.

    Returns:
        A name for `attn_implementation`; "auto" leaves the choice to transformers, as for models with layers of other
        kinds, whose rows are padded (see `checks.packing_fault`).
    """
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
