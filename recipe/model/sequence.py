"""Share a row between ranks, for --sequence_parallel N: rows that are too long for the memory of one.

Each of N neighbouring ranks takes the same row and computes a piece of its tokens. All layers compute each token by
itself but attention, before which the ranks exchange tokens for heads: each then has every token of the row for its share
of the heads, computes one document after the other as always, and exchanges back (DeepSpeed-Ulysses, arXiv 2309.14509).
The gradients of the pieces add up as those of rows of their own would, so engines need to know nothing of it.
"""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from recipe import console
from recipe.console import UserError
from recipe.model import rope

_group: Any = None  # the ranks that share this one's rows


def set_up(count: int) -> None:
    """Form the groups of so many ranks that share rows; 1: none. Every rank must call it, after the engine is chosen."""
    global _group
    _group = dist.new_subgroups(group_size=count)[0] if count > 1 else None


def is_shared() -> bool:
    """Return whether ranks share rows."""
    return _group is not None


def piece(count: int) -> tuple[int, int]:
    """Return which piece of a row this rank takes, from 0, and the number of pieces."""
    return console.rank() % count, count


def check(config: Any, count: int) -> None:
    """Refuse a model that ranks cannot share a row of.

    Args:
        config: Configuration of its decoder.
        count: How many ranks share a row.
    Raises:
        UserError: It has layers other than full attention, or heads that cannot be shared out.
    """
    if count == 1:
        return
    others = sorted(set(getattr(config, "layer_types", None) or []) - {"full_attention"})
    if not getattr(config, "layer_types", None) and getattr(config, "sliding_window", None):
        others = ["sliding_attention"] * getattr(config, "use_sliding_window", True)
    remedy = "leave it out; --activation_offloading and --tiled_mlp make room on one device."
    if others:
        raise UserError(f"--sequence_parallel {count}: {config.model_type} has layers of {', '.join(others)}; {remedy}")
    if kinds := rope.follow_length(config):
        how = f"{config.model_type} has rotary positions of the kind {kinds.pop()}, which follow the whole row"
        raise UserError(f"--sequence_parallel {count}: {how}; {remedy}")
    heads, groups = (
        config.num_attention_heads,
        getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
    )
    if heads % count or (groups % count and count % groups):
        raise UserError(
            f"--sequence_parallel {count}: {config.model_type} has {heads} heads and {groups} of keys and values, which "
            f"{count} ranks cannot share; choose a number that divides them, or {remedy}"
        )


class _Exchange(torch.autograd.Function):
    """Give part i of a tensor [N, ...] to the i-th rank, and return what came from each; its gradient goes back so."""

    @staticmethod
    def forward(ctx, parts):
        received = torch.empty_like(parts, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, parts.contiguous(), group=_group)
        return received

    @staticmethod
    def backward(ctx, gradient):
        return _Exchange.apply(gradient)


def to_heads(states: Tensor) -> Tensor:
    """Exchange a piece of all heads [1, H, T / N, D] for all tokens of a share of them [1, H / N, T, D].

    With fewer heads of keys than ranks, each goes to the ranks whose queries need it.
    """
    count = dist.get_world_size(_group)
    if states.shape[1] % count:
        states = states.repeat_interleave(count // states.shape[1], dim=1)
    parts = _Exchange.apply(states[0].unflatten(0, (count, -1)))  # [N, H / N, T / N, D], from each rank its tokens
    return parts.transpose(0, 1).flatten(1, 2)[None]


def to_tokens(attended: Tensor) -> Tensor:
    """Exchange all tokens of a share of the heads [1, T, H / N, D] for a piece of all heads [1, T / N, H, D]."""
    count = dist.get_world_size(_group)
    parts = _Exchange.apply(attended[0].unflatten(0, (count, -1)))  # [N, T / N, H / N, D], from each rank its heads
    return parts.transpose(0, 1).flatten(1, 2)[None]
