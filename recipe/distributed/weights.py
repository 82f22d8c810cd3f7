"""Whole weights from the parts that an engine holds: counted, gathered for saving, checked for finite values."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from recipe.console import UserError
from recipe.model.adapter import as_plain


def numel(parameter: torch.nn.Parameter) -> int:
    """Return the element count of the unsharded parameter; packed 4-bit tensors count their original elements."""
    if hasattr(parameter, "ds_numel"):
        return parameter.ds_numel
    if type(parameter).__name__ == "Params4bit":
        return parameter.numel() * parameter.element_size() * 2
    return parameter.numel()


def gather_full(tensor: Any) -> torch.Tensor:
    """Return a parameter or gradient put together from all its parts. Every rank must call this: it is a collective."""
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def raise_on_all_ranks(problem: str | None, collectives: Iterable[Any] = ()) -> None:
    """Raise on all ranks what one of them found: if one rank alone ended, the others would wait for it forever.

    Args:
        problem: A sentence, or None.
        collectives: What all ranks have to go through first; one that has a problem has left it.

    Raises:
        UserError: A rank has a problem; that of the lowest such rank.
    """
    from accelerate.utils import gather_object

    try:
        for _ in collectives:
            pass
    except UserError as error:
        problem = problem or str(error)
    problems = [problem for problem in gather_object([problem]) if problem]
    if problems:
        raise UserError(problems[0])


def gather_state_dict(model: Any, keep: bool, rows: int | None = None) -> dict[str, torch.Tensor]:
    """Gather the weights to save: those of the adapter, or all of them. Every rank must call this.

    An adapter whose start changed the base is converted, see `adapter.as_plain`.

    The parts of one tensor at a time are put together: a GPU holds one whole tensor, main memory one model. See
    `gather` for a model that is too large for that.

    Args:
        model: The unwrapped model; of one with an adapter only what belongs to the adapter is gathered.
        keep: Whether this rank writes them; the others only take part.
        rows: How many rows of every tensor of a whole model to keep (None: all).

    Returns:
        {name: tensor}, in main memory where the engine held parts; tied weights are one tensor. Without `keep` empty.

    Raises:
        UserError: A trained tensor does not belong to the adapter and would be lost; on all ranks.
    """
    adapter = hasattr(model, "peft_config")
    state: dict[str, torch.Tensor] = {}
    seen: dict[int, torch.Tensor] = {}
    tensors = model.state_dict(keep_vars=True)
    if adapter:
        tensors = _of_adapter(model, tensors)
    for name, tensor in tensors.items():
        if id(tensor) not in seen:
            full = gather_full(tensor)
            if full.data_ptr() != tensor.data_ptr():  # it was in parts
                full = full.cpu() if keep else torch.empty(0)
            if keep and rows and not adapter:
                full = full[:rows].clone()
            seen[id(tensor)] = full
        if keep:
            state[name.replace("_checkpoint_wrapped_module.", "")] = seen[id(tensor)]
    return as_plain(model, state)


def gather(model: Any, keep: bool, rows: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
    """Gather the weights to save: an adapter at once, a whole model layer by layer. Every rank must take all of them.

    Args:
        model, keep, rows: As in `gather_state_dict`; a whole model with `rows` comes at once, too.

    Yields:
        {name: tensor} of the adapter, or, in main memory, of one layer or of one tensor outside the layers. Of a weight
        with several names only the first is there. Without `keep` empty.

    Raises:
        Exception: what a collective raised, with the attribute `in_collective`: the process has to end, as the other
            ranks are in the middle of it.
    """
    if hasattr(model, "peft_config") or rows:
        yield gather_state_dict(model, keep, rows)
        return
    parts: dict[str, dict[str, Any]] = {}
    seen = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            name = name.replace("_checkpoint_wrapped_module.", "")
            layer = re.match(r".*?\.\d+\.", name)
            parts.setdefault(layer[0] if layer else name, {})[name] = tensor
    for part in parts.values():
        try:
            whole = {}
            for name, tensor in part.items():
                full = gather_full(tensor)
                if keep:
                    whole[name] = full.cpu()
                del full
        except Exception as error:
            error.in_collective = True  # type: ignore[attr-defined]
            raise
        yield whole


def adapter_state_dict(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what peft writes of these tensors of a model, under the names that it writes."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, tensors, save_embedding_layers=False)


def _of_adapter(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors that are trained, and what peft saves beside them, such as the projections of VeRA."""
    trained = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    saved = {id(tensor) for tensor in adapter_state_dict(model, tensors).values()}
    unsaved = [name for name, tensor in trained.items() if id(tensor) not in saved]
    if unsaved and saved <= {id(tensor) for tensor in tensors.values()}:  # else peft saves what it makes of them
        raise UserError(
            f"{len(unsaved)} tensors are trained that peft does not save with this adapter, the first is {unsaved[0]}; "
            "freeze them, or name their modules in --modules_to_save."
        )
    return {name: tensor for name, tensor in tensors.items() if name in trained or id(tensor) in saved}


def refuse_infinite(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return weights to save, if they are finite.

    Raises:
        UserError: The first such tensor.
    """
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{name} is no longer finite; nothing was written. Lower --learning_rate.")
    return weights
