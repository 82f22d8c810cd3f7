"""What is saved is what was trained: gathered from every engine, written by rank 0, then opened again and checked."""

import glob
import json
import os

from conversations import UserError
from engines import whole

COMPLETE = "run.json"  # written last into a checkpoint, when every rank has written its part


def gathered(model, keep, rows=None):
    """The weights to save: those of the adapter, or all of them. Every rank must call it.

    Parts of one tensor at a time are brought together, so a GPU holds one whole tensor and main memory one model.
    Args:
        model: the unwrapped model; one with an adapter gives the trained tensors alone.
        keep: whether this rank writes; the others only take part.
        rows: keep so many rows of every tensor of a whole model (None: all).
    Returns:
        {name: tensor}, in main memory where the engine had it in parts; tied weights are one tensor. {} without `keep`.
    """
    adapter = hasattr(model, "peft_config")
    state, seen = {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if adapter and not tensor.requires_grad:
            continue
        if id(tensor) not in seen:
            full = whole(tensor)
            if full.data_ptr() != tensor.data_ptr():  # it was in parts
                full = full.cpu() if keep else None
            if keep and rows and not adapter:
                full = full[:rows].clone()
            seen[id(tensor)] = full
        if keep:
            state[name.replace("_checkpoint_wrapped_module.", "")] = seen[id(tensor)]
    return state


def refuse_infinite(weights):
    """Raise a UserError for weights, {name: tensor}, that hold something not finite."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{name} is no longer finite; nothing was written. Lower --learning_rate.")


def verify_saved(folder, weights=None, moved=False, values=True):
    """Open what was written: every tensor is there, has elements, is finite; an adapter has learnt something.

    Args:
        weights: {name: tensor} that should be there (None: known from the files alone).
        moved: whether lora_B, which starts at zero, must have moved.
        values: whether to read the numbers, too; without, files that end early or are missing are still found.
    Raises:
        UserError: what is wrong with which file.
    """
    from safetensors import SafetensorError, safe_open

    adapter = os.path.exists(os.path.join(folder, "adapter_config.json"))
    files = sorted(glob.glob(os.path.join(folder, "adapter_model.safetensors" if adapter else "model*.safetensors")))
    if not files:
        raise UserError(f"{folder}: no weights were written.")
    if adapter != any(".lora_" in name for name in weights or [".lora_" * adapter]):
        raise UserError(f"{folder}: holds an adapter_config.json and no adapter, or an adapter without it.")
    elements, zero_b, b = 0, 0, 0
    for path in files:
        try:
            with safe_open(path, "pt") as saved:
                for name in saved.keys():
                    if not values:
                        continue
                    tensor = saved.get_tensor(name)
                    if not tensor.numel():
                        raise UserError(f"{path}: {name} is empty; its parts were not gathered.")
                    if tensor.is_floating_point() and not tensor.isfinite().all():
                        raise UserError(f"{path}: {name} is not finite.")
                    elements += tensor.numel()
                    b += ".lora_B" in name
                    zero_b += ".lora_B" in name and not tensor.any()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cannot be read again: {error}.") from None
    index = os.path.join(folder, "model.safetensors.index.json")
    if not adapter and os.path.exists(index):
        with open(index, encoding="utf-8") as file:
            missing = set(json.load(file)["weight_map"].values()) - {os.path.basename(path) for path in files}
        if missing:
            raise UserError(f"{folder}: lacks {', '.join(sorted(missing))}.")
    if weights is not None:
        expected = sum(tensor.numel() for tensor in {id(tensor): tensor for tensor in weights.values()}.values())
        if elements != expected:
            raise UserError(f"{folder}: holds {elements:,} numbers, expected the {expected:,} that were trained.")
    if moved and b and zero_b == b:
        raise UserError(f"{folder}: every lora_B is still zero: the adapter has learnt nothing; see --learning_rate.")
