"""Which layers of a model an adapter changes unless they are named."""

from torch import nn
from transformers import PreTrainedModel

# Layers that give one number for each head or expert: routers, and how fast the state of a gated delta net decays. An
# adapter of the usual rank would have more weights than such a layer itself.
GATES = {"in_proj_a", "in_proj_b", "in_proj_ba", "a_proj", "b_proj", "shared_expert_gate", "router", "gate"}


def default_targets(model: PreTrainedModel) -> str | list[str]:
    """Return every linear layer except gates and the output head, as `target_modules` of peft's LoraConfig takes them."""
    if not gates(model):
        return "all-linear"
    left_out = {id(model.get_output_embeddings())} | {id(module) for module in gates(model).values()}
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return [name for name, module in linear.items() if id(module) not in left_out]


def gates(model: nn.Module) -> dict[str, nn.Linear]:
    """Return {name: module} of the linear layers that are gates or routers, or parts of one."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and GATES & set(name.split("."))
    }
