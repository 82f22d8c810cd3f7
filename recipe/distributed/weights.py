"""Whole weights from their parts: counted, gathered from every engine, checked for numbers that are not finite."""

from recipe.console import UserError


def numel(parameter):
    """Elements of a whole parameter, wherever its parts are; 4-bit weights count as what they hold."""
    if hasattr(parameter, "ds_numel"):
        return parameter.ds_numel
    if type(parameter).__name__ == "Params4bit":
        return parameter.numel() * parameter.element_size() * 2
    return parameter.numel()


def whole(tensor):
    """A parameter or gradient from all its parts. Every rank must call this: parts are gathered collectively."""
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def agree(problem):
    """Raise on every rank what one of them found (a text, or None): one that ends alone would leave others waiting."""
    from accelerate.utils import gather_object

    problems = [problem for problem in gather_object([problem]) if problem]
    if problems:
        raise UserError(problems[0])


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
