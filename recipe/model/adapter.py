"""Which layers of a model an adapter changes, and what may be wrong with the choice."""

import contextlib
from collections.abc import Iterable, Iterator

from torch import nn
from transformers import PreTrainedModel

from recipe.console import UserError
from recipe.model import experts
from recipe.model.loading import in_indexer, one_line

# Layers that give one number for each head or expert: routers, and how fast the state of a gated delta net decays. An
# adapter of the usual rank would have more weights than such a layer itself.
GATES = {"in_proj_a", "in_proj_b", "in_proj_ba", "a_proj", "b_proj", "shared_expert_gate", "router", "gate"}


def targets(model: PreTrainedModel, names: list[str] | None) -> str | list[str]:
    """Return the layers that an adapter changes, as `target_modules` of peft's LoraConfig takes them.

    Layers outside the text part of a model, as in a vision tower, are left out, and so are those of indexers in sparse
    attention: the loss of a text does not reach them.

    Args:
        model: the model without an adapter.
        names: ends of the names of layers, such as "q_proj"; None means the default.

    Raises:
        ValueError: the loss reaches no layer of such a name.
    """
    if not names:
        return default_targets(model)
    named = [name for name, _ in model.named_modules() if any(f".{name}".endswith(f".{end}") for end in names)]
    parts = {*_text_part(model), id(model.get_output_embeddings())}
    chosen = [name for name in named if id(model.get_submodule(name)) in parts]
    if named and not chosen:
        raise ValueError(f"target modules {names} are outside the text part of the model, or in indexers.")
    return names if chosen == named else chosen


def default_targets(model: PreTrainedModel) -> str | list[str]:
    """Return every linear layer of the text part, except gates, the output head and what peft takes for routed experts.

    Returns:
        "all-linear" if that names the same layers, else their names.
    """
    head = model.get_output_embeddings()
    linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and part is not head]
    left_out = [*gates(model).values(), *taken_for_experts(model).values()]
    inside = _text_part(model) - {id(part) for part in left_out}
    chosen = [name for name in linear if id(model.get_submodule(name)) in inside]
    return "all-linear" if chosen == linear and not experts.reserved_names(model.config) else chosen


def gates(model: nn.Module) -> dict[str, nn.Linear]:
    """Return {name: module} of the linear layers that are gates or routers, or parts of one."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and GATES & set(name.split("."))
    }


def _text_part(model):
    return {id(module) for name, module in model.get_decoder().named_modules() if not in_indexer(name)}


def have_shared_weight(model: PreTrainedModel, names: Iterable[str]) -> bool:
    """Return True if the model's input embeddings and output head share a weight, and `names` has one of them."""
    from peft.utils.constants import EMBEDDING_LAYER_NAMES

    shared = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    return shared and any(name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for name in names)


@contextlib.contextmanager
def errors(model: PreTrainedModel) -> Iterator[None]:
    """Turn what peft raises into a UserError that names the model's linear layers."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        linear = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, nn.Linear)}
        raise UserError(f"no adapter: {one_line(error)} Linear layers are {sorted(linear)}.") from None


def taken_for_experts(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return {name: module} of the linear layers, as in a shared expert, that peft cannot tell from routed experts."""
    reserved = experts.reserved_names(model.config)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in reserved
    }
