"""The text part of a model, and which of its layers an adapter changes."""

from torch import nn
from transformers import PreTrainedModel

from recipe.model import experts

# Layers that give one number for each head or expert: routers, and how fast the state of a gated delta net decays. An
# adapter of the usual rank would have more weights than such a layer itself.
GATES = {"in_proj_a", "in_proj_b", "in_proj_ba", "a_proj", "b_proj", "shared_expert_gate", "router", "gate"}


def decoder_name(model: PreTrainedModel) -> str:
    """Return the name of the module that computes the text, such as "model" or "model.language_model"."""
    decoder = model.get_decoder()
    return next(name for name, module in model.named_modules() if module is decoder)


def outside_decoder(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Return {name: parameter} of what training on text never computes: the vision tower and its projector."""
    parts = (model.get_decoder(), model.get_output_embeddings())
    trained = {id(parameter) for part in parts for parameter in part.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in trained}


def lora_targets(model: PreTrainedModel, names: list[str] | None) -> str | list[str]:
    """Return the layers that an adapter changes, as `target_modules` of peft's LoraConfig takes them.

    Args:
        model: the model without an adapter.
        names: ends of the names of layers, such as "q_proj"; None means every linear layer of the text part, except
            gates, the output head and what peft takes for routed experts.

    Raises:
        ValueError: no layer of the text part has such a name.
    """
    left_out, reserved = {**gates(model), **taken_for_experts(model)}, experts.reserved_names(model.config)
    if not outside_decoder(model) and (names or not left_out and not reserved):
        return names or "all-linear"
    inside, head = decoder_name(model) + ".", model.get_output_embeddings()
    modules = {name: module for name, module in model.named_modules() if name.startswith(inside) or module is head}
    if names is None:
        linear = [name for name, module in modules.items() if isinstance(module, nn.Linear) and module is not head]
        return [name for name in linear if name not in left_out]
    chosen = [name for name in modules if any(f".{name}".endswith(f".{end}") for end in names)]
    if not chosen:
        raise ValueError(f"Target modules {names} not found in the text part of the model.")
    return chosen


def gates(model: nn.Module) -> dict[str, nn.Linear]:
    """Return {name: module} of the linear layers that are gates or routers, or parts of one."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and GATES & set(name.split("."))
    }


def taken_for_experts(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return {name: module} of the linear layers, as in a shared expert, that peft cannot tell from routed experts."""
    reserved = experts.reserved_names(model.config)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in reserved
    }
