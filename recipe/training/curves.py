"""Draw a run from the Trainer's own log: loss.png beside the model, and the picture of report.html."""

import contextlib
import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

PICTURE = "loss.png"
LOSSES = {"loss": ("-", "training"), "eval_loss": ("o--", "held out")}  # key of the log: style, label
INK = "#123456"  # of text and lines of the axes; replaced by the page's own colour, which is dark or light
# Fixed, as are plain numbers on the axis of the loss: to look for the best would take most of the time.
MARGINS = {"left": 0.08, "right": 0.98, "bottom": 0.06, "top": 0.98, "wspace": 0.22, "hspace": 0.25}
PANELS = {  # key of the log: label of its axis
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens / s",
    "memory_gb": "memory (GB)",
}


def plot_loss(log_history: list[dict[str, Any]], output_dir: str) -> str | None:
    """Write `loss.png` with the training and evaluation loss over optimizer steps.

    Args:
        log_history: Entries of the Trainer's log.
        output_dir: Folder for the picture.

    Returns:
        The picture's path, or None if no loss was logged.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(
        figsize=(7, 4), gridspec_kw={"left": 0.12, "right": 0.98, "bottom": 0.13, "top": 0.97}
    )
    _losses(axes, log_history)
    path = None
    if axes.lines:
        path = os.path.join(output_dir, PICTURE)
        figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def panels(log_history: list[dict[str, Any]], lengths: Sequence[int], max_length: int) -> str:
    """Return a picture of losses, other curves and the lengths of conversations, as SVG for a page of any colour.

    Args:
        log_history: Entries of the Trainer's log.
        lengths: Tokens of each conversation.
        max_length: --model_max_length, beyond which conversations are not used whole.
    """
    with _picture(3, 2) as (grid, text):
        first, *others, last = grid.flat
        _losses(first, log_history)
        for axes, (key, label) in zip(others, PANELS.items(), strict=True):
            _curve(axes, log_history, key, "-", None)
            axes.set(xlabel="optimizer step", ylabel=label)
        lengths = np.asarray(lengths)
        last.hist(lengths, bins=min(40, max(1, len(np.unique(lengths)))))
        if max_length <= 1.5 * lengths.max():
            last.axvline(max_length, linestyle="--")
        last.set(xlabel="tokens of a conversation", ylabel="conversations")
    return _of_any_colour(text)


def overlaid(logs: dict[str, list[dict[str, Any]]]) -> str:
    """Return a picture with the losses of several runs on the same axes, as SVG for a page of any colour.

    Args:
        logs: {name of a run: entries of the Trainer's log}.
    """
    with _picture(2, 1) as (grid, text):
        for axes, (key, (style, label)) in zip(grid.flat, LOSSES.items(), strict=True):
            for name, log_history in logs.items():
                _curve(axes, log_history, key, style, name)
            _loss_axis(axes, f"{label}: loss per supervised token (nats)")
    return _of_any_colour(text)


@contextlib.contextmanager
def _picture(rows, columns):
    """Give the axes of a picture, and a buffer that holds it as SVG afterwards."""
    pyplot = _pyplot()
    parts = ("text", "axes.label", "xtick", "ytick")
    ink = {"axes.edgecolor": INK, **{f"{part}color" if "." in part else f"{part}.color": INK for part in parts}}
    with pyplot.rc_context({**ink, "svg.fonttype": "none", "svg.hashsalt": "report", "legend.framealpha": 0}):
        figure, grid = pyplot.subplots(rows, columns, figsize=(10, 9), gridspec_kw=MARGINS)
        text = io.StringIO()
        yield grid, text
        for axes in grid.flat:
            axes.grid(alpha=0.3)
            axes.patch.set_alpha(0)
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)


def _of_any_colour(text):
    svg = text.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _losses(axes, log_history):
    for key, (style, label) in LOSSES.items():
        _curve(axes, log_history, key, style, label)
    _loss_axis(axes, "loss per supervised token (nats)")
    axes.grid(alpha=0.3)


def _loss_axis(axes, label):
    from matplotlib import ticker

    axes.set(xlabel="optimizer step", ylabel=label, yscale="log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    if axes.lines:
        axes.legend()


def _curve(axes, log_history, key, style, label):
    points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
    if points:
        axes.plot(*zip(*points, strict=True), style, label=label)
