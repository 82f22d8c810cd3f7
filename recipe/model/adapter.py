"""Which layers of a model an adapter changes, what may be wrong with the choice, and as what the adapter is saved."""

import contextlib
import copy
import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from recipe.console import UserError
from recipe.model import experts
from recipe.model.loading import changes_base, in_indexer, one_line

# Layers that give one number for each head or expert: routers, and how fast the state of a gated delta net decays. An
# adapter of the usual rank would have more weights than such a layer itself.
GATES = {"in_proj_a", "in_proj_b", "in_proj_ba", "a_proj", "b_proj", "shared_expert_gate", "router", "gate"}


def targets(model: PreTrainedModel, names: list[str] | None) -> str | list[str]:
    """Return the layers that an adapter changes, as `target_modules` of peft's LoraConfig takes them.

    Layers outside the text part of a model, as in a vision tower, are left out, and so are those of indexers in sparse
    attention: the loss of a text does not reach them.

    Args:
        model: the model without an adapter.
        names: ends of the names of layers, such as "q_proj", also with commas between them; or one regular expression
            of whole names; or "all-linear"; None means the default.

    Raises:
        UserError: a name hits no layer.
        ValueError: the loss reaches no layer of such a name.
    """
    if not names or names == ["all-linear"]:
        return default_targets(model)
    every = [name for name, _ in model.named_modules()]
    if len(names) == 1 and not re.fullmatch(r"[\w.,]+", names[0]):
        named = [name for name in every if re.fullmatch(names[0], name)]
        if not named:
            raise UserError(
                f"--lora_target_modules {names[0]}: this regular expression matches no layer, such as {every[-1]}."
            )
        names = named
    else:
        names = hit(model, names, "lora_target_modules")
        named = [name for name in every if any(f".{name}".endswith(f".{end}") for end in names)]
    parts = {*_text_part(model), id(model.get_output_embeddings())}
    chosen = [name for name in named if id(model.get_submodule(name)) in parts]
    if not chosen:
        raise ValueError(f"target modules {names} are outside the text part of the model, or in indexers.")
    return names if chosen == named else chosen


def hit(model: nn.Module, names: Iterable[str], flag: str) -> list[str]:
    """Return the ends of names of layers that a flag lists, also with commas between them.

    Raises:
        UserError: one of them is the end of no layer's name.
    """
    names = [name for listed in names for name in listed.split(",") if name]
    ends = {
        ".".join(parts[i:])
        for name, _ in model.named_modules()
        for parts in [name.split(".")]
        for i in range(len(parts))
    }
    for name in names:
        if name not in ends:
            near = difflib.get_close_matches(name, sorted(ends), n=1, cutoff=0)[0]
            raise UserError(
                f"--{flag} {name}: the model has no layer of this name; did you mean {near}? {_linear_layers(model)}"
            )
    return names


def refuse_unknown_tokens(model: PreTrainedModel, ids: Iterable[int] | None) -> None:
    """Check the ids of tokens whose embeddings are to be trained.

    Raises:
        UserError: the model has no embedding of one of them.
    """
    count = model.config.get_text_config().vocab_size
    for index in ids or ():
        if index >= count:
            raise UserError(f"--trainable_token_indices {index}: expected ids below {count}, the model's embeddings.")


def layers_by_name(model: nn.Module) -> dict[str, int]:
    """Count the layers that an adapter changes, by the last part of their names."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    named = (name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    counts = Counter(name.rpartition(".")[2] for name in named if not name.endswith(".base_layer"))
    return dict(sorted(counts.items()))


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
        raise UserError(f"no adapter: {one_line(error)} {_linear_layers(model)}") from None


def _linear_layers(model):
    linear = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    return f"Linear layers are {sorted(linear)}."


def taken_for_experts(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return {name: module} of the linear layers, as in a shared expert, that peft cannot tell from routed experts."""
    reserved = experts.reserved_names(model.config)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in reserved
    }


# ----------------------------------------------------------------------------------------------------------------------
# As what an adapter is saved

FACTORS = (".lora_A.", ".lora_B.")


def remember_start(model: nn.Module) -> None:
    """Keep copies of an adapter's first factors in main memory if its start has changed the base (PiSSA, OLoRA)."""
    if any(map(changes_base, getattr(model, "peft_config", {}).values())):
        named = model.named_parameters()
        model.first_factors = {
            name: p.detach().to("cpu", torch.float32, copy=True) for name, p in named if any(f in name for f in FACTORS)
        }


def as_plain(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of an adapter as they are saved: for the base model as it was before the adapter was added.

    PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775) take s B0 A0 off the base. With the factors A and B of now,
    W - s B0 A0 + s B A = W + s [B, -B0] [A; A0]: a plain adapter of twice the rank. peft's own conversion
    (`LoraModel.subtract_mutated_init`) puts a second adapter into the model, which sharded weights do not allow, and
    loses trained biases, whole modules and the magnitudes of DoRA.

    Args:
        model: the model with an adapter.
        state: {name: whole tensor}, under the names of the model's state_dict.
    """
    plain = dict(state)
    for name, first in getattr(model, "first_factors", {}).items():
        if name in state:
            now, is_a = state[name], FACTORS[0] in name
            first = first.to(now.device, now.dtype)
            plain[name] = torch.cat([now, first if is_a else -first], dim=0 if is_a else 1)
    return plain


def trained_half(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the factors A and B of now from what `as_plain` made of them, and all other weights as they are."""
    halves = {name: tensor[: len(tensor) // 2] for name, tensor in state.items() if FACTORS[0] in name}
    halves |= {name: tensor[:, : tensor.shape[1] // 2] for name, tensor in state.items() if FACTORS[1] in name}
    return {**state, **halves}


@contextlib.contextmanager
def as_saved(model: nn.Module, base: tuple[str, str | None]) -> Iterator[None]:
    """Within the context, the adapter's configuration is what adapter_config.json has to say.

    An adapter that `as_plain` converts has twice the rank and the same scale.

    Args:
        model: a model with or without an adapter.
        base: name and commit of its base model, see `loading.found_from_anywhere`.
    """
    before = getattr(model, "peft_config", {})
    configs = copy.deepcopy(before)
    for config in configs.values():
        config.base_model_name_or_path, config.revision = base
        if hasattr(model, "first_factors"):
            config.init_lora_weights = True
            # The scale is alpha / r, or alpha / sqrt(r) with rank stabilisation.
            config.r, config.lora_alpha = 2 * config.r, config.lora_alpha * (math.sqrt(2) if config.use_rslora else 2)
    if configs:
        model.peft_config = configs
    try:
        yield
    finally:
        if configs:
            model.peft_config = before
