"""Draw the loss curves of a run: loss.png beside the model, from the Trainer's own log."""

import os


def draw(log_history, output_dir):
    """Write `loss.png` with training and evaluation loss over optimizer steps.

    Args:
        log_history: the Trainer's list of dicts.
    Returns:
        the picture's path, or None where nothing was logged.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for key, style in (("loss", "-"), ("eval_loss", "o--")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points), style, label={"loss": "training", "eval_loss": "held out"}[key])
    if not axes.lines:
        return None
    axes.set(xlabel="optimizer step", ylabel="loss per supervised token (nats)", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    path = os.path.join(output_dir, "loss.png")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return path
