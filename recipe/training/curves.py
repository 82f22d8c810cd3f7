"""Draw the loss curves of a run: loss.png beside the model, from the Trainer's own log."""

import os
from typing import Any

PICTURE = "loss.png"


def plot_loss(log_history: list[dict[str, Any]], output_dir: str) -> str | None:
    """Write `loss.png` with the training and evaluation loss over optimizer steps.

    Args:
        log_history: Entries of the Trainer's log.
        output_dir: Folder for the picture.

    Returns:
        The picture's path, or None if no loss was logged.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for key, style in (("loss", "-"), ("eval_loss", "o--")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label={"loss": "training", "eval_loss": "held out"}[key])
    if not axes.lines:
        return None
    axes.set(xlabel="optimizer step", ylabel="loss per supervised token (nats)", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    path = os.path.join(output_dir, PICTURE)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return path
