"""Attention over a packed row that never looks at another document: one causal call for each document.

transformers would build a mask of T x T positions for a row of T tokens and compute all of it, which grows with the
square of the row; here the cost is that of the documents alone, and the result is the same. `register()` adds the
implementation under the name PACKED to transformers' attention interface; the row's `document_lengths` travel from
`batches.Collator` through the model to every layer, also when a checkpointed layer is computed again.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

PACKED = "packed"


def packed_attention(module, query, key, value, attention_mask, document_lengths=None, **options):
    """Attention of one layer, as transformers' attention interface asks for it.

    Args:
        query: [B, H, T, D]; key, value: [B, Hkv, S, D] with H a multiple of Hkv.
        attention_mask: None, or bool [B, 1, T, S], True where a position may be seen.
        document_lengths: how many tokens each document of the row has, with sum T and B = 1; None for ordinary
            batches and for generation, which transformers' own sdpa implementation computes.
    Returns:
        ([B, T, H, D], None).
    """
    if document_lengths is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    settings = dict(
        dropout_p=options.get("dropout", 0.0), scale=options.get("scaling"), is_causal=True, enable_gqa=True
    )
    parts = [states.split(document_lengths, dim=2) for states in (query, key, value)]
    outputs = [scaled_dot_product_attention(q, k, v, **settings) for q, k, v in zip(*parts, strict=True)]
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1), None


def packed_mask(*args, attention_mask=None, q_length, kv_length, **options):
    """The mask for `packed_attention`: none where a whole causal row is computed, else that of sdpa."""
    if attention_mask is None and q_length == kv_length:
        return None
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(*args, attention_mask=attention_mask, q_length=q_length, kv_length=kv_length, **options)


def can_pack(config):
    """Whether every layer of the model looks at all earlier tokens, as `packed_attention` does."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return set(kinds) == {"full_attention"}
    return getattr(config, "sliding_window", None) is None or getattr(config, "use_sliding_window", True) is False


def register():
    """Make PACKED known to transformers; further calls change nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, packed_mask)
