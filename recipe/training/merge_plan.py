"""Which tensors of a base model's files an adapter changes, and to what: by peft's own layers, on a model without weights."""

import copy
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from safetensors import safe_open

from recipe.console import UserError
from recipe.model.weight_files import FLOATS, WeightFiles

ADAPTER = "default"  # peft's name of an adapter that was not given one
WRAPPERS = {"base_layer", "original_module", "token_adapter"}  # what peft inserts into the names of parameters


@dataclass
class Source:
    """An adapter and the base model that it is merged into.

    Attributes:
        adapter: the adapter's folder.
        settings: its peft.LoraConfig.
        base: name of the base, as it was given.
        folder: where the base's files lie.
        config: the base's configuration, with the adapter's rope settings where it has its own.
        stretched: whether it has.
        files: the base's weights.
        trust_remote_code: whether code that comes with the base may run.
        renamed: {regular expression: replacement} for the names of the adapter's weights, see `_rename`.
    """

    adapter: str
    settings: Any
    base: str
    folder: str
    config: Any
    stretched: bool
    files: WeightFiles
    trust_remote_code: bool
    renamed: dict[str, str] | None = None

    @property
    def model_class(self) -> Any:
        """The class that the checkpoint names, which has a place for all its tensors, or AutoModelForCausalLM."""
        import transformers

        name = (self.config.architectures or [""])[0]
        named = name.endswith(("ForCausalLM", "ForConditionalGeneration")) and getattr(transformers, name, None)
        return named or transformers.AutoModelForCausalLM

    def weights(self) -> dict[str, torch.Tensor]:
        """Read the adapter's weights, under the names that they have in a model of the base's class."""
        from peft.utils import load_peft_weights

        return load_peft_weights(self.adapter, device="cpu", key_mapping=self.renamed)

    def weight_names(self) -> set[str]:
        """Read the names alone, which leaves the weights on the disk."""
        path = os.path.join(self.adapter, "adapter_model.safetensors")
        if not os.path.exists(path):
            return set(self.weights())
        with safe_open(path, "pt") as file:
            names = set(file.keys())
        for pattern, replacement in (self.renamed or {}).items():
            names = {
                re.sub(pattern.replace("^", r"^(base_model\.model\.)"), rf"\1{replacement}", name) for name in names
            }
        return names

    def adapted(self, model: torch.nn.Module, **options: Any) -> torch.nn.Module:
        """Put the adapter on a model of the base's class, in evaluation mode.

        Raises:
            UserError: it does not fit, or some of its weights find no place.
        """
        from peft import PeftModel, get_peft_model_state_dict

        options |= {"config": copy.deepcopy(self.settings), "key_mapping": self.renamed, "torch_device": "cpu"}
        try:
            with warnings.catch_warnings(action="ignore"):  # of tied heads, which are looked after here
                model = PeftModel.from_pretrained(model, self.adapter, **options)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.adapter}: does not fit the base model {self.base}: {one_line(error)}") from None
        placed = set(get_peft_model_state_dict(model, save_embedding_layers=False))
        odd = sorted((placed ^ self.weight_names()) - set(model.state_dict()))  # some hold embeddings of the base, too
        if odd:
            raise UserError(
                f"{self.adapter}: {len(odd)} adapter weights do not match the base model {self.base}, the first is "
                f"{odd[0]}."
            )
        return model.eval()


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
        untied: whether the output head, tied to the embeddings in the base, has its own weights now.
    """

    places: dict[str, list[str]]
    changed: dict[str, Callable[[torch.dtype], torch.Tensor]]
    dtypes: dict[str, str]
    added: dict[str, tuple[str, tuple[int, ...]]]
    layers: dict[str, str]
    untied: bool

    def dtype(self, files: WeightFiles, parameter: str) -> torch.dtype:
        """Precision in which a parameter of the model is written."""
        name = self.places[parameter][0]
        return FLOATS[self.dtypes.get(name) or files.tensors[name].dtype]


def one_line(error: Exception, length: int = 300) -> str:
    """Return the text of a library's error as one line that ends with a full stop."""
    return " ".join(str(error).split())[:length].rstrip(".") + "."


def plan(source: Source, dtype: torch.dtype | None) -> Plan:
    """Find out which tensors change and how, without reading any of them.

    Args:
        source: the adapter and its base; `renamed` and `settings` change where the adapter has names of another class.
        dtype: precision of the merged model, None: the base's.

    Raises:
        UserError: the adapter does not fit the base, or its change cannot be put into the base's files.
    """
    model, placeholder = _skeleton(source)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    places, converted = _places(model, source.files)
    tied = _tied(model)
    _rename(source, model)
    layers, changes = _changes(source, source.adapted(model, low_cpu_mem_usage=True), placeholder)
    made = Plan(places, {}, _dtypes(source.files, dtype), {}, layers, False)
    if tied:
        made.untied = _head_differs(model, source.settings, changes, *tied)
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
                f"{source.adapter}: trains {name}, which the files of {source.base} hold in another layout; it cannot be "
                "merged tensor by tensor."
            )
        parts = _Parts(model, name, change.delta)
        made.changed |= {part: partial(parts.merged, source.files, part) for part in places[name]}
    return made


def _refuse_stored(source, name, stored):
    if not stored:
        raise UserError(f"{source.adapter}: trains {name}, which the files of {source.base} do not hold.")
    for part in stored:
        if (kind := source.files.tensors[part].dtype) not in FLOATS:
            raise UserError(f"{source.base}: {part} is stored as {kind}, expected one of {', '.join(FLOATS)}.")


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
    """A model of the base's class whose weights are one zero, seen in their shapes, and that zero.

    On the meta device peft would put the adapter there, too.
    """
    kind = source.model_class
    build = getattr(kind, "from_config", None)  # of an AutoModel
    options = {"trust_remote_code": source.trust_remote_code} if build else {}
    try:
        with torch.device("meta"):
            model = (build or kind._from_config)(source.config, **options)
    except (ValueError, ImportError) as error:
        raise UserError(f"{source.base}: its class is not known: {one_line(error)}") from None
    placeholder = torch.zeros(())
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                seen = placeholder.expand(parameter.shape)
                module._parameters[name] = torch.nn.Parameter(seen, requires_grad=False)
    model.tie_weights()
    return model, placeholder


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


def _rename(source, model):
    """Let an adapter that was trained on the text-only class of a vision checkpoint find its layers in the whole model.

    Its names begin at the decoder (model.layers), which is one of several parts here (model.language_model.layers).
    """
    from peft.utils.other import get_pattern_key

    modules = dict(model.named_modules())
    decoder = next(name for name, module in modules.items() if module is model.get_decoder())
    keys = (key.removeprefix("base_model.model.").split(".lora_") for key in source.weight_names() if ".lora_" in key)
    old = {_own_name(key[0]) for key in keys}
    new = {_moved(name, decoder): name for name in old}
    if old & set(modules) or not set(new) & set(modules):
        return
    source.renamed, settings = {r"^model\.": f"{decoder}."}, source.settings
    for patterns, default in ((settings.rank_pattern, settings.r), (settings.alpha_pattern, settings.lora_alpha)):
        values = {name: patterns.get(get_pattern_key(patterns, was), default) for name, was in new.items()}
        patterns.clear()
        patterns.update(values)
    settings.target_modules = [name for name in new if hasattr(modules[name], "weight")]  # experts are parameters
    settings.exclude_modules = settings.layers_to_transform = settings.layers_pattern = None
    settings.target_parameters = [_moved(name, decoder) for name in settings.target_parameters or []] or None
    settings.modules_to_save = [_moved(name, decoder) for name in settings.modules_to_save or []] or None
    if isinstance(settings.trainable_token_indices, dict):
        tokens = settings.trainable_token_indices.items()
        settings.trainable_token_indices = {_moved(name, decoder): rows for name, rows in tokens}


def _moved(name, decoder):
    return re.sub(r"^model\.", f"{decoder}.", name)


def _own_name(name):
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


# ----------------------------------------------------------------------------------------------------------------------
# What the adapter does to each parameter


def _changes(source, adapted, placeholder):
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
            changes[layers[name]] = Change(partial(_merged, source, name, module, placeholder), delta)
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
        if not of_adapter and parameter.data_ptr() != placeholder.data_ptr():
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


def _merged(source, name, layer, placeholder, weight, dtype):
    """Let peft's layer merge itself into the base's tensor, which takes the placeholder's place meanwhile."""
    base = layer.get_base_layer()
    before, bias = base.weight, getattr(base, "bias", None)
    own = before.data_ptr() != placeholder.data_ptr()  # the adapter comes with the base's embeddings
    base.weight = torch.nn.Parameter((before.detach().clone() if own else weight).float(), requires_grad=False)
    if bias is not None:
        base.bias = torch.nn.Parameter(torch.zeros(bias.shape), requires_grad=False)
    try:
        layer.merge()
        return base.weight.detach()
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise UserError(f"{source.adapter}: {name} cannot be merged: {one_line(error)}") from None
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


def _head_differs(model, settings, changes, embedding, head):
    """Whether the adapter changes the embeddings or the head of a model that ties them, and not both in the same way."""
    tokens = getattr(model.get_output_embeddings(), "token_adapter", None)
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
