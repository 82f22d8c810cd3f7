"""Attention over a packed row that never looks at another document, at the cost of the documents alone.

transformers would build a mask of T x T positions for a row of T tokens and compute all of it, which grows with the
square of the row. Here a GPU takes the row in one call of torch's variable-length kernel (FlashAttention 2, or 3 where
`flash_attn_interface` is installed), and a CPU computes one document after the other; the result is the same.
`register()` adds the implementation under the name PACKED to transformers' attention interface; where documents begin
travels from `collator.Collator` through the model to every layer, under the names that transformers' own flash
implementations know, also when a checkpointed layer is computed again.
"""

import importlib.util
import inspect
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedConfig

from recipe.console import say
from recipe.model import rope, sequence
from recipe.model.precision import computing_dtype, exact_float32

PACKED = "packed"
# Kinds of layers, as transformers' configurations name them, in which a token of a packed row sees its document alone:
# all earlier tokens of it (see linear_attention.py for the last two), or those within a window, by a mask.
WHOLE = {"full_attention", "linear_attention", "conv"}
WINDOWED = {"sliding_attention"}
SHORT = 256  # tokens of a document, see _DocumentAttention
MASKED = 1 << 20  # numbers of a mask at most: 4 MB, see _operands
# torch 2.11 takes fewer key heads than query heads without being told.
GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None, max_length_q: int | None = None, max_length_k: int | None = None,
    cu_seq_lens_k: Tensor | None = None, key_places: Tensor | None = None,
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
            `sequence.py`), to whom all that is said of documents applies as well.
        key_places: int64 [S], where in the row each token of each document stands, if documents share the tokens that
            they begin with (see `dataset.prefixes`); `cu_seq_lens_q` and `max_length_q` are then of the tokens that each
            has for itself, its last ones, and `cu_seq_lens_k` (int32 [documents + 1]) and `max_length_k` of all of it.
    Returns:
        ([B, T, H, D], None).
    """
    if cu_seq_lens_q is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        options.update(scaling=scaling, dropout=dropout)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if sequence.is_shared() and (max_length_k or 0) > query.shape[2]:
        query, key, value = map(sequence.to_heads, (query, key, value))
        options.update(scaling=scaling, dropout=dropout, cu_seq_lens_k=cu_seq_lens_k, key_places=key_places)
        attended, _ = packed_attention(module, query, key, value, None, cu_seq_lens_q, max_length_q, **options)
        return sequence.to_tokens(attended), None
    dtype = computing_dtype(query)
    if query.device.type == "cuda" and dtype.itemsize == 2 and not dropout:
        row = [states[0].transpose(0, 1).to(dtype) for states in (query, key, value)]  # [T, H, D]
        ends = [cu_seq_lens_q] * 2 + [max_length_q] * 2
        if key_places is not None:  # the queries of a document are its last tokens, as the kernel takes them to be
            row[1:] = [Fetch.apply(states, key_places) for states in row[1:]]
            ends = [cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k or len(key_places)]
        return varlen_attn(*row, *ends, scale=scaling, window_size=(-1, 0), **GROUPED)[None], None  # causal
    documents = _documents(cu_seq_lens_q, cu_seq_lens_k, key_places)
    return _by_document(query, key, value, documents, scaling, dropout), None


class Fetch(torch.autograd.Function):
    """Take the rows [S, ...] at places int64 [S] of states [T, ...]; what comes back to one of them adds up in float32."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, places: Tensor) -> Tensor:
        """Take the rows."""
        ctx.save_for_backward(places)
        ctx.shape = states.shape
        return states.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Add up what comes back to each row."""
        (places,) = ctx.saved_tensors
        total = gradient.new_zeros(ctx.shape, dtype=torch.float32)
        return total.index_add_(0, places, gradient.float()).to(gradient.dtype), None


class Run(NamedTuple):
    """Neighbouring tokens of a document: where they stand in the row, and in the document."""

    row: slice
    document: slice


@torch.compiler.disable  # rows differ in their documents, and each would be compiled anew
def _documents(ends: Tensor, all_ends: Tensor | None = None, places: Tensor | None = None) -> list[list[Run]]:
    """Return where the tokens of each document are: those that it shares, and as the last run all of its own.

    Args:
        ends, all_ends, places: `cu_seq_lens_q`, `cu_seq_lens_k` and `key_places` of `packed_attention`.
    """
    own = list(itertools.pairwise(ends.tolist()))
    if places is None or all_ends is None:
        return [[Run(slice(start, end), slice(0, end - start))] for start, end in own]
    found = []
    for (start, end), document in zip(own, places.cpu().split(all_ends.diff().tolist()), strict=True):
        count = len(document) - (end - start)
        jumps = (document[:count].diff() != 1).nonzero()[:, 0] + 1
        runs = [
            Run(slice(first := int(document[a]), first + b - a), slice(a, b))
            for a, b in itertools.pairwise([0, *jumps.tolist(), count])
            if b
        ]
        found.append([*runs, Run(slice(start, end), slice(count, len(document)))])
    return found


@torch.compiler.disable
def _by_document(
    query: Tensor, key: Tensor, value: Tensor, documents: list[list[Run]], scaling: float | None, dropout: float
) -> Tensor:
    """Compute one document after the other; [1, H, T, D] to [1, T, H, D]."""
    if query.device.type == "cpu" and not dropout and query.shape[-1] == value.shape[-1]:
        row = [states.to(computing_dtype(query)) for states in (query, key, value)]
        return _DocumentAttention.apply(*row, documents, scaling)
    settings = dict(dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=True)
    outputs, dtype = [], query.dtype
    if any(len(runs) > 1 for runs in documents):  # for what comes back to a shared token, see _DocumentAttention
        key, value = (states.to(torch.promote_types(dtype, torch.float32)) for states in (key, value))
    for runs in documents:
        row = (_tokens(states, runs).to(dtype) for states in (query, key, value))
        output = scaled_dot_product_attention(*row, **settings)
        outputs.append(output[:, :, runs[-1].document].transpose(1, 2))
    return torch.cat(outputs, dim=1)


class _DocumentAttention(torch.autograd.Function):
    """`_by_document` on a CPU, by the kernel that torch takes: short documents in float32, and float32 always by MKL.

    oneDNN, which computes the products of bfloat16 and, on AMD, of float32 (see `precision.choose_float32`), takes longer
    to prepare the small products of a head than to compute them. Forward and backward pass of one layer for a document of
    90 tokens, 9 heads of 64, one core of Zen 4: 4.1 ms (float32) and 2.8 ms (bfloat16) with it, 1.2 ms without; of 400
    tokens 22.5, 18.3 and 16.4 ms.
    """

    @staticmethod
    def forward(ctx, query, key, value, documents, scaling):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output = query.new_empty(query.transpose(1, 2).shape)
        sums = []  # of each query: log of the sum of its weights
        with exact_float32():
            for runs in documents:
                own, (first, row, seen) = runs[-1], _operands(runs, query, key, value)
                attended, total = flash(*row, **seen, scale=scaling)
                output[:, own.row] = attended[:, :, own.document.start - first :].transpose(1, 2)
                sums.append(total)
        ctx.save_for_backward(query, key, value, output, *sums)
        ctx.documents, ctx.scaling = documents, scaling
        return output

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, output, *sums = ctx.saved_tensors
        flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        shared = any(len(runs) > 1 for runs in ctx.documents)
        # What comes back to a shared token from many documents adds up in float32.
        adding = torch.promote_types(key.dtype, torch.float32) if shared else key.dtype
        wanted = [torch.empty_like(query), *(torch.empty_like(states, dtype=adding) for states in (key, value))]
        with exact_float32():
            for runs, total in zip(ctx.documents, sums, strict=True):
                *before, own = runs
                first, row, seen = _operands(runs, query, key, value)
                # Queries for shared tokens have no gradient here, whatever they attend to.
                gap = (0, 0, own.document.start - first, 0)
                arrived, attended = (part[:, own.row].transpose(1, 2).to(row[0].dtype) for part in (gradient, output))
                arrived, attended = (nn.functional.pad(part, gap) if gap[2] else part for part in (arrived, attended))
                found = flash_backward(arrived, *row, attended, total, 0.0, **seen, scale=ctx.scaling)
                wanted[0][:, :, own.row] = found[0][:, :, own.document.start - first :]
                for part, tensor in zip(wanted[1:], found[1:], strict=True):
                    part[:, :, own.row] = tensor[:, :, own.document]
                    for run in before:
                        part[:, :, run.row] += tensor[:, :, run.document]
        return *(part.to(key.dtype) for part in wanted), None, None


def _operands(runs: list[Run], query: Tensor, key: Tensor, value: Tensor) -> tuple[int, list[Tensor], dict[str, Any]]:
    """Return what the kernel takes for a document: its first query, queries, keys and values, and what each query sees.

    The kernel leaves out what lies behind a query only if it has the queries of all tokens; where the document's own are
    few, they come alone, with a mask.
    """
    length, first = runs[-1].document.stop, runs[-1].document.start
    if 2 * first <= length or (length - first) * length > MASKED:
        first = 0
    row = [_tokens(query, runs[-1:] if first else runs), _tokens(key, runs), _tokens(value, runs)]
    if query.dtype.itemsize == 2 and length <= SHORT:
        row = [states.float() for states in row]
    if not first:
        return first, row, {"is_causal": True}
    later = row[0].new_full((length - first, length), -torch.inf).triu(first + 1)
    return first, row, {"is_causal": False, "attn_mask": later}


def _tokens(states: Tensor, runs: list[Run]) -> Tensor:
    """Return the tokens [1, H, t, D] of a row [1, H, T, D] that a document has, see `_documents`."""
    parts = [states[:, :, run.row] for run in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


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


def can_share_prefixes(config: PreTrainedConfig) -> bool:
    """Return True if documents may share the tokens that they begin with: all layers know of it.

    Rotary positions that follow the length of a document differ from one to the other.
    """
    return can_pack(config) and config._attn_implementation == PACKED and not rope.follow_length(config)


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
