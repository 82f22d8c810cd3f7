"""Which tensors of a base model's files an adapter changes, and to what: by peft's own layers, on a model without weights."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedConfig

from recipe.console import UserError
from recipe.model.base_files import keep_layout
from recipe.model.loading import Pretrained, adapter_mapping, auto_class, load_adapter
from recipe.model.weight_files import FLOATS, WeightFiles

if TYPE_CHECKING:  # its import takes seconds
    from peft import LoraConfig

ADAPTER = "default"  # peft's name of an adapter that was not given one
WRAPPERS = {"base_layer", "original_module", "token_adapter"}  # what peft inserts into the names of parameters


@dataclass(frozen=True)
class Source:
    """An adapter and the base model that it is merged into.

    Attributes:
        adapter: the adapter's folder.
        settings: its peft.LoraConfig.
        name: the base, as it was named.
        base: where its files lie, and how they are read.
        config: its configuration, with the adapter's rope settings where the adapter has its own.
        stretched: whether it has.
        files: its weights.
    """

    adapter: str
    settings: "LoraConfig"
    name: str
    base: Pretrained
    config: PreTrainedConfig
    stretched: bool
    files: WeightFiles


@dataclass
class Change:
    """What the adapter does to one parameter of the model.

    Attributes:
        apply: function from the base's tensor, as stored, and the dtype to write, to the merged tensor, in float32 or
            in that dtype.
        delta: function to the tensor that is added, in float32, for a change that only adds one.
    """

    apply: Callable[[torch.Tensor, torch.dtype], torch.Tensor]
    delta: Callable[[], torch.Tensor] | None = None


@dataclass
class Plan:
    """What becomes of the tensors in the base's files.

    Attributes:
        places: {parameter of the model: names of its tensors in the files}.
        changed: {name in the files: function from the dtype to write to the merged tensor}.
        dtypes: {name in the files: dtype to write, a key of FLOATS}, where it is not the base's.
        added: {name in the files: (file, shape)} of a tensor that the base does not have.
        layers: {adapted layer, by its name in peft: parameter of the model that it changes}.
        settings: the adapter's peft.LoraConfig, with the layers named as in a model of the base's class.
        mapping: how peft must rename the adapter's weights, see `loading.adapter_mapping`.
        untied: whether the output head, tied to the embeddings in the base, has its own weights now.
    """

    places: dict[str, list[str]]
    changed: dict[str, Callable[[torch.dtype], torch.Tensor]]
    dtypes: dict[str, str]
    added: dict[str, tuple[str, tuple[int, ...]]]
    layers: dict[str, str]
    settings: "LoraConfig"
    mapping: dict[str, str] | None
    untied: bool

    def dtype(self, files: WeightFiles, parameter: str) -> torch.dtype:
        """Precision in which a parameter of the model is written."""
        name = self.places[parameter][0]
        return FLOATS[self.dtypes.get(name) or files.tensors[name].dtype]


def plan(source: Source, dtype: torch.dtype | None) -> Plan:
    """Find out which tensors change and how, without reading any of them.

    Args:
        source: the adapter and its base.
        dtype: precision of the merged model, None: the base's.

    Raises:
        UserError: the adapter does not fit the base, or its change cannot be put into the base's files.
    """
    from peft.utils import load_peft_weights

    model = _skeleton(source)
    mapping = adapter_mapping(model, load_peft_weights(source.adapter, device="cpu"))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    places, converted = _places(model, source.files)
    tied = _tied(model)
    adapted = load_adapter(_skeleton(source), source.adapter, low_cpu_mem_usage=True, torch_device="cpu")
    settings = adapted.peft_config[ADAPTER]
    layers, changes = _changes(source, adapted)
    made = Plan(places, {}, _dtypes(source.files, dtype), {}, layers, settings, mapping, False)
    if tied:
        made.untied = _head_differs(adapted, settings, changes, *tied)
        _settle_head(made, source.files, model, changes, *tied)
    for name, change in changes.items():
        _refuse_stored(source, name, places.get(name, []))
        if name not in converted:
            (stored,) = places[name]
            made.changed[stored] = partial(_single, change, source.files, stored)
            continue
        split = set(_in_files(model, name, torch.empty(shapes[name], device="meta")))
        if not change.delta or split != set(places[name]):
            raise UserError(
                f"{source.adapter}: trains {name}, which the files of {source.name} hold in another layout; it cannot be "
                "merged tensor by tensor."
            )
        parts = _Parts(model, name, change.delta)
        made.changed |= {part: partial(parts.merged, source.files, part) for part in places[name]}
    return made


def _refuse_stored(source, name, stored):
    if not stored:
        raise UserError(f"{source.adapter}: trains {name}, which the files of {source.name} do not hold.")
    for part in stored:
        if (kind := source.files.tensors[part].dtype) not in FLOATS:
            raise UserError(f"{source.name}: {part} is stored as {kind}, expected one of {', '.join(FLOATS)}.")


def _dtypes(files, dtype):
    """{tensor: dtype to write} for the tensors in the base's main precision; some models keep a few in a finer one."""
    if dtype is None:
        return {}
    sizes = Counter()
    for stored in files.tensors.values():
        sizes[stored.dtype] += (stored.end - stored.start) * (stored.dtype in FLOATS)
    ((main, _),) = sizes.most_common(1)
    (wanted,) = (name for name, known in FLOATS.items() if known == dtype)
    return {name: wanted for name, stored in files.tensors.items() if stored.dtype == main != wanted}


# ----------------------------------------------------------------------------------------------------------------------
# The model without weights, and the names of its parameters in the files


def _skeleton(source):
    """A model of the base's class in which each weight is one zero that is seen in the weight's shape.

    On the meta device, which takes no memory either, peft would put the adapter, too.
    """
    options = {"trust_remote_code": True} if source.base.trust_remote_code else {}
    with torch.device("meta"):
        model = auto_class(source.config).from_config(source.config, **options)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                zeros = torch.nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False)
                zeros.unread = True  # to tell it from what the adapter brings
                module._parameters[name] = zeros
    model.tie_weights()
    return model


def _places(model, files):
    """{parameter: its tensors in the files}, as transformers finds them in loading, and which ones it converts."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    conversions = get_model_conversion_mapping(model)
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in conversions if not isinstance(entry, WeightConverter)]
    state, places, converted = model.state_dict(), {}, set()
    for name in files.tensors:
        found, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if found not in state and name in state:
            found, pattern = name, None
        places.setdefault(found, []).append(name)
        if pattern is not None:
            converted.add(found)
    model._weight_conversions = [entry for entry in conversions if entry.was_used()]  # what _in_files reverts
    keep_layout(model, {name: stored.shape for name, stored in files.tensors.items()})
    return places, converted


def _in_files(model, name, tensor):
    """{name in the files: tensor} for a tensor of the model; `_places` was called before."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, {name: tensor})


def _tied(model):
    """Names of the embeddings and of the output head if they are one parameter, else None."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        return None
    names = {module: name for name, module in model.named_modules()}
    return f"{names[embedding]}.weight", f"{names[head]}.weight"


def _own_name(name):
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


# ----------------------------------------------------------------------------------------------------------------------
# What the adapter does to each parameter


def _changes(source, adapted):
    """Adapted layers as in `Plan.layers`, and {parameter of the model: Change}."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    layers, changes = {}, {}
    for name, module in adapted.get_base_model().named_modules():
        own = _own_name(name)
        if isinstance(module, ParamWrapper):
            layers[name] = f"{own}.{module.parameter_name}"
            delta = partial(module.get_delta_weight, ADAPTER)
            changes[layers[name]] = Change(partial(_added, delta), delta)
        elif isinstance(module, LoraLayer):
            layers[name] = f"{own}.weight"
            delta = None if module.lora_variant else partial(module.get_delta_weight, ADAPTER)
            changes[layers[name]] = Change(partial(_merged, source, name, module), delta)
            if module.lora_bias.get(ADAPTER):
                bias = module.lora_B[ADAPTER].bias.detach() * module.scaling[ADAPTER]
                changes[f"{own}.bias"] = Change(partial(_added, bias.clone))
        elif isinstance(module, TrainableTokensWrapper):
            tokens = module.token_adapter
            if tokens.tied_adapter is None:
                rows = torch.tensor(tokens.token_indices[ADAPTER])
                values = tokens.trainable_tokens_delta[ADAPTER].detach()
                changes[f"{own}.weight"] = Change(partial(_with_rows, rows, values))
        elif isinstance(module, ModulesToSaveWrapper):
            for part, parameter in module.modules_to_save[ADAPTER].named_parameters():
                changes[f"{own}.{part}"] = Change(partial(_replaced, parameter.detach()))
    for name, parameter in adapted.get_base_model().named_parameters():  # biases, and what else the adapter holds whole
        of_adapter = any(part.startswith(("lora_", "modules_to_save", "trainable_tokens")) for part in name.split("."))
        if not of_adapter and not hasattr(parameter, "unread"):
            changes.setdefault(_own_name(name), Change(partial(_replaced, parameter.detach())))
    return layers, changes


def _added(delta, weight, dtype):
    return delta().float().add_(weight)


def _with_rows(rows, values, weight, dtype):
    merged = weight.to(dtype)
    merged[rows] = values.to(dtype)
    return merged


def _replaced(tensor, weight, dtype):
    return tensor


def _merged(source, name, layer, weight, dtype):
    """Let peft's layer merge itself into the base's tensor, which takes the place of the zeros meanwhile."""
    base = layer.get_base_layer()
    before, bias = base.weight, getattr(base, "bias", None)
    if not hasattr(before, "unread"):  # the adapter comes with the base's embeddings
        weight = before.detach().clone()
    base.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
    if bias is not None:
        base.bias = torch.nn.Parameter(torch.zeros(bias.shape), requires_grad=False)
    try:
        layer.merge()
        return base.weight.detach()
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise UserError(f"{source.adapter}: {name} cannot be merged: {' '.join(str(error).split())}") from None
    finally:
        base.weight = before
        if bias is not None:
            base.bias = bias
        layer.merged_adapters.clear()


def _single(change, files, name, dtype):
    return change.apply(files.read(name), dtype)


class _Parts:
    """The tensors of the files that the model holds as one, such as experts: the change is split as they are."""

    def __init__(self, model, name, delta):
        self.model, self.name, self.delta, self.left = model, name, delta, {}

    def merged(self, files, part, dtype):
        if not self.left:
            self.left = _in_files(self.model, self.name, self.delta().float())
        return self.left.pop(part).add_(files.read(part))


# ----------------------------------------------------------------------------------------------------------------------
# An output head that is the embeddings


def _head_differs(adapted, settings, changes, embedding, head):
    """Whether the adapter changes the embeddings or the head of a model that ties them, and not both in the same way."""
    tokens = getattr(adapted.get_output_embeddings(), "token_adapter", None)
    together = getattr(settings, "ensure_weight_tying", False) or getattr(tokens, "tied_adapter", None) is not None
    return not together and bool({embedding, head} & set(changes))


def _settle_head(made, files, model, changes, embedding, head):
    """Plan the head's tensor: its own where it now differs, else none, or a copy where the files hold one."""
    if not made.untied:
        changes.pop(head, None)
        if head in made.places and embedding in changes:
            changes[head] = changes[embedding]
        made.places.setdefault(head, made.places[embedding])
    elif head not in made.places:
        (stored,) = made.places[embedding]
        (name,) = _in_files(model, head, torch.empty(files.tensors[stored].shape, device="meta"))
        made.places[head] = [name]
        made.added[name] = (files.tensors[stored].file, files.tensors[stored].shape)
        made.dtypes[name] = made.dtypes.get(stored) or files.tensors[stored].dtype
        made.changed[name] = partial(_single, changes.pop(head, Change(_kept)), files, stored)


def _kept(weight, dtype):
    return weight
