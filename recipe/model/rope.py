"""Rotary positions beyond the window that a model was trained with."""

import math

from recipe.console import UserError, say


def scale(config, kind, length):
    """Change a model's configuration so that positions up to `length` lie in its window.

    Args:
        config: text configuration; changed in place.
        kind: yarn (arXiv 2309.00071), linear, dynamic, or None: refuse a `length` beyond the window.
    Raises:
        UserError: `kind` is unknown, or None and needed.
    """
    window = getattr(config, "max_position_embeddings", length)
    if kind not in (None, "yarn", "linear", "dynamic"):
        raise UserError(f"--rope_scaling {kind!r}: expected yarn, linear or dynamic.")
    if length <= window:
        return
    if kind is None:
        raise UserError(
            f"--model_max_length {length} exceeds the model's window of {window} positions; lower it or set "
            "--rope_scaling yarn."
        )
    factor = math.ceil(length / window * 100) / 100
    config.rope_parameters = {
        **config.rope_parameters,
        "rope_type": kind,
        "factor": factor,
        "original_max_position_embeddings": window,
    }
    if kind != "dynamic":  # dynamic scaling starts beyond the window, which has to stay what it was
        config.max_position_embeddings = length
    say(f"rope scaling: {kind}, factor {factor}, window {window} -> {length}")
