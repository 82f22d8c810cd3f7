"""Rotary positions beyond the window that a model was trained with."""

import functools
import json
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME

from recipe.console import UserError, say

KINDS = ("yarn", "linear", "dynamic")
FOLLOW_LENGTH = {"dynamic", "longrope"}  # kinds whose frequencies depend on how long a text is
ORIGINAL = "original_max_position_embeddings"  # transformers' name for the window before it was extended


def extend_window(config: PreTrainedConfig, kind: str | None, length: int) -> None:
    """Change a text configuration in place so that positions up to `length` lie in its window.

    Args:
        config: the text configuration of a model.
        kind: "yarn" (arXiv 2309.00071), "linear" (arXiv 2306.15595), "dynamic", or None to refuse a `length` beyond
            the window.
        length: number of positions, in tokens.

    Raises:
        UserError: `kind` is unknown, or None although `length` exceeds the window; or the model has no rotary
            positions, or they are scaled in another way already.
    """
    window = getattr(config, "max_position_embeddings", length)
    if kind not in (None, *KINDS):
        raise UserError(f"--rope_scaling {kind!r}: expected yarn, linear or dynamic.")
    if length <= window:
        return
    if kind is None:
        raise UserError(
            f"--model_max_length {length} exceeds the model's window of {window} positions; lower it or set "
            "--rope_scaling yarn."
        )
    ropes = _unlimited(config)
    used = {rope["rope_type"] for rope in ropes} - {"default", kind}
    if not ropes or used:
        how = f"are scaled by {used.pop()!r} already" if used else "are not rotary"
        raise UserError(f"--rope_scaling {kind}: the model's positions {how}; lower --model_max_length to {window}.")
    for rope in ropes:
        factor = math.ceil(rope.get("factor", 1.0) * length / window * 100) / 100
        rope.update({"rope_type": kind, "factor": factor, ORIGINAL: rope.get(ORIGINAL, window)})
    if kind != "dynamic":  # dynamic scaling begins beyond the window, which must stay as it was
        config.max_position_embeddings = length
    say(f"rope scaling: {kind}, factor {factor}, window {window} -> {length}")


def is_extended(config: PreTrainedConfig) -> bool:
    """Return True if a text configuration has a window that `extend_window`, or its publisher, has extended."""
    return any(ORIGINAL in rope for rope in _unlimited(config))


def follow_length(config: PreTrainedConfig) -> set[str]:
    """Return the kinds of rotary positions of a text configuration that depend on how long a text is."""
    return FOLLOW_LENGTH & {rope.get("rope_type") for rope in _unlimited(config)}


def keep_documents_apart(model: nn.Module) -> None:
    """Let rotary positions follow the length of each document of a packed row, as if the document came alone.

    transformers takes the longest document of the row for all, and for "dynamic" also remembers that of earlier rows.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if FOLLOW_LENGTH & set(kinds.values() if isinstance(kinds, dict) else [kinds]):
            module.forward = functools.partial(_by_document, module, module.forward)


def _by_document(
    module: Any, forward: Callable, states: Tensor, position_ids: Tensor, *more: Any, **options: Any
) -> Any:
    """Compute the rotary embeddings (tensors [1, T, ...]) of the documents of a row, whose positions start at 0 each."""
    starts = (position_ids[0] == 0).nonzero()[:, 0].tolist() if position_ids.shape[:-1] == (1,) else []
    if not starts:  # padded rows, or generation
        return forward(states, position_ids, *more, **options)
    ends = [*starts[1:], position_ids.shape[1]]
    found = []
    for start, end in zip(starts, ends, strict=True):
        _forget(module, *more, *options.values())
        found.append(forward(states[:, start:end], position_ids[:, start:end], *more, **options))
    _forget(module, *more, *options.values())
    return (
        torch.cat(found, 1) if torch.is_tensor(found[0]) else tuple(torch.cat(p, 1) for p in zip(*found, strict=True))
    )


def _forget(module: Any, kind: str | None = None) -> None:
    """Let a module of "dynamic" positions take up its original frequencies, for one kind of layers if they differ."""
    prefix = f"{kind}_" if kind else ""
    if "dynamic" in (module.rope_type[kind] if kind else module.rope_type):
        original = getattr(module, f"{prefix}original_inv_freq").to(getattr(module, f"{prefix}inv_freq").device)
        module.register_buffer(f"{prefix}inv_freq", original, persistent=False)
        setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def write_old_names(config: PreTrainedConfig, folder: str) -> None:
    """Name the rotary parameters in config.json as transformers 4 does, too, which takes its own default in silence.

    Left out where the configuration would no longer be read as what it is, and for kinds that version 4 names otherwise.

    Args:
        config: the configuration that was saved.
        folder: folder with its config.json, or without one.
    """
    path = os.path.join(folder, CONFIG_NAME)
    if not os.path.exists(path):
        return
    with open(path, encoding="utf-8") as file:
        text = file.read()
    content = json.loads(text)
    for part in filter(None, (content, content.get("text_config"))):
        found = part.get("rope_parameters") or {}
        rope = found.get("full_attention") or found
        if not isinstance(rope.get("rope_theta"), (int, float)) or rope.get("rope_type") == "longrope":
            continue
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        part["rope_theta"] = rope["rope_theta"]
        part["rope_scaling"] = scaling if scaling.get("rope_type") != "default" or "mrope_section" in scaling else None
        if "sliding_attention" in found:  # as in Gemma 3
            part["rope_local_base_freq"] = found["sliding_attention"].get("rope_theta")
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, sort_keys=True) + "\n")
    try:
        again = type(config).from_pretrained(folder).get_text_config()
        same = again.rope_parameters == config.get_text_config().rope_parameters
    except Exception:  # of any configuration class
        same = False
    if not same:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)


def _unlimited(config):
    """The rotary parameters of the layers that see all earlier tokens; layers with a window need no longer one."""
    rope = getattr(config, "rope_parameters", None) or {}
    by_kind = [part for part in rope.values() if isinstance(part, dict)]  # as in Gemma 3
    return [rope["full_attention"]] if by_kind else [rope] if rope else []
