"""Load a model, its tokenizer and its adapter, by the same rules for training, evaluation, merging and chat.

A checkpoint with a vision tower (Qwen3.5, Qwen3-VL, Gemma 3) is loaded as the class that it was saved from, and trained
on text: `get_decoder()` names its text part; all weights outside it and the output head stay as they are. The names of
its weights, and those of an adapter, are then the checkpoint's own, which servers look for.
"""

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import WeightConverter
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_NAME,
    cached_file,
    extract_commit_hash,
    logging,
)
from transformers.utils.peft_utils import find_adapter_config_file

from recipe.console import UserError
from recipe.model import attention, experts, generation, linear_attention, quantised, rope
from recipe.model.precision import best_dtype
from recipe.model.weight_files import WeightFiles

if TYPE_CHECKING:  # its import takes seconds, and --help needs none of it
    from peft import PeftConfig, PeftModel

CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # starts of an adapter that peft takes off the base


@dataclass(frozen=True)
class Pretrained:
    """A model folder or a model of the hub, and how its files are read.

    Attributes:
        name_or_path: folder or hub name.
        trust_remote_code: whether to run code that comes with the model.
        cache_dir: folder for downloaded files; None means the hub's own.
        chat_template: Jinja file that replaces the model's chat template.
        named_by: what names the model in error messages: a flag, or a file.
        revision: commit, branch or tag of a model of the hub; None means its main branch.
    """

    name_or_path: str
    trust_remote_code: bool = False
    cache_dir: str | None = None
    chat_template: str | None = None
    named_by: str = "--model_name_or_path"
    revision: str | None = None

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer, with `chat_template` if there is one.

        Raises:
            UserError: the tokenizer cannot be loaded, or the chat template cannot be read.
        """
        tokenizer = self._from_pretrained(transformers.AutoTokenizer)
        if self.chat_template:
            try:
                with open(self.chat_template, encoding="utf-8") as file:
                    tokenizer.chat_template = file.read()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"--chat_template {self.chat_template}: cannot be read: {error}.") from None
        return tokenizer

    def config(self) -> PreTrainedConfig:
        """Load the configuration.

        Raises:
            UserError: it cannot be loaded.
        """
        return self._from_pretrained(transformers.AutoConfig)

    def model(
        self, config: PreTrainedConfig, dtype: torch.dtype, attn_implementation: str = "auto", **options
    ) -> PreTrainedModel:
        """Load the model with its weights; those that training on text cannot change are frozen.

        Args:
            config: the configuration, changed or not.
            dtype: what the weights are held in.
            attn_implementation: an attention kernel by its name in transformers, or "auto" for transformers' choice.
            options: further arguments of `from_pretrained`.

        Raises:
            UserError: the model cannot be loaded, or its files lack some of its weights.
        """
        attention.register()
        if attn_implementation != "auto":
            options["attn_implementation"] = attn_implementation
        if "quantization_config" in options:
            experts.quantise_experts_as_well()
        _show_whole_shapes()
        model, report = self._from_pretrained(
            auto_class(config), config=config, dtype=dtype, output_loading_info=True, **options
        )
        if report["missing_keys"]:
            raise UserError(
                f"{self.named_by} {self.name_or_path}: its files lack {len(report['missing_keys'])} weights, the first "
                f"is {sorted(report['missing_keys'])[0]}; download it again."
            )
        _work_around_libraries(model)
        linear_attention.keep_documents_apart(model)
        rope.keep_documents_apart(model)
        experts.use_low_rank_forward(model)
        generation.drop_sampling_settings(model.generation_config)
        for parameter in never_trained(model).values():
            parameter.requires_grad_(False)
        return model

    def skeleton(self, config: PreTrainedConfig) -> PreTrainedModel:
        """Make the model without the numbers of its weights, on torch's "meta" device.

        Names and shapes in the safetensors files of a folder are checked; other files, and those of a model of the hub,
        which may have to be downloaded first, are checked when they are loaded.

        Raises:
            UserError: the folder's files are damaged, or lack some of the weights.
        """
        files = os.listdir(self.name_or_path) if os.path.isdir(self.name_or_path) else [WEIGHTS_NAME]
        older = any(name.startswith(os.path.splitext(WEIGHTS_NAME)[0]) for name in files)  # pickled weights
        with _quiet():
            if not older and not quantised.quantisation(self.name_or_path, config.to_dict()):
                if {SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME} & set(files):
                    WeightFiles(self.name_or_path)
                return self.model(config, config.dtype or torch.float32, device_map={"": "meta"})
            options = {"trust_remote_code": True} if self.trust_remote_code else {}
            with reading(f"{self.named_by} {self.name_or_path}", self._remedy), torch.device("meta"):
                return auto_class(config).from_config(config, **options)

    def _from_pretrained(self, kind, **options):
        if self.revision:
            options["revision"] = self.revision
        with reading(f"{self.named_by} {self.name_or_path}", self._remedy):
            return kind.from_pretrained(
                self.name_or_path, trust_remote_code=self.trust_remote_code, cache_dir=self.cache_dir, **options
            )

    def _remedy(self, error):
        if "trust_remote_code" in str(error) and not self.trust_remote_code:
            return "It comes with its own Python code; read it, and set --trust_remote_code True if you trust it."
        return "Name a folder with a model or a model of the hub."


@contextlib.contextmanager
def reading(what: str, remedy: Callable[[Exception], str] = lambda error: "") -> Iterator[None]:
    """Within the context, whatever a library raises becomes a UserError: damaged files have no exception of their own.

    Args:
        what: what is loaded.
        remedy: function from the library's exception to what to do.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: cannot be loaded: {one_line(error)} {remedy(error)}".rstrip()) from None


def buffers_in_files(model: PreTrainedModel) -> list[str]:
    """Name the buffers that the files of a model hold beside its parameters."""
    return sorted(model.state_dict().keys() - dict(model.named_parameters(remove_duplicate=False)).keys())


@contextlib.contextmanager
def _quiet():
    """Within the context, transformers shows no progress bar and no report: both come again with the weights."""
    verbosity, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def found_from_anywhere(name_or_path: str, cache_dir: str | None = None) -> tuple[str, str | None]:
    """Return a name by which a loaded model is found again: an absolute path; or its hub name, and its commit if known.

    Args:
        name_or_path: folder or hub name.
        cache_dir: folder for downloaded files; None means the hub's own.
    """
    if os.path.isdir(name_or_path):
        return os.path.abspath(name_or_path), None
    path = cached_file(name_or_path, CONFIG_NAME, cache_dir=cache_dir, local_files_only=True)
    return name_or_path, extract_commit_hash(path, None)


def one_line(error: Exception) -> str:
    """Return what a library raised as one line of at most 300 characters."""
    kind = "" if isinstance(error, (OSError, ValueError, ImportError)) else f"{type(error).__name__}: "
    return kind + f"{' '.join(str(error).split()):.300}"


def auto_class(config: PreTrainedConfig) -> type:
    """Return the Auto class that loads the architecture which a checkpoint was saved from.

    `AutoModelForCausalLM` would load the text part of some vision checkpoints under other names, and refuse others.
    """
    architectures = config.architectures if isinstance(config.architectures, list) else []
    if architectures and architectures[0] in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values():
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


class _WholeShapes:
    """A model held in parts by ZeRO-3, to whatever looks up the shapes of its parameters."""

    def __init__(self, model):
        self._model = model

    def __getattr__(self, name):
        return getattr(self._model, name)

    def get_parameter(self, name):
        parameter = self._model.get_parameter(name)
        return torch.empty(getattr(parameter, "ds_shape", parameter.shape), device="meta")


def _show_whole_shapes() -> None:
    """Let transformers convert weights between files and models that ZeRO-3 holds in parts; further calls change nothing.

    Some conversions compare a tensor with the shape of its parameter, which is then empty: those of the experts of
    Qwen3-VL-MoE would be transposed in any case.
    """
    convert = WeightConverter.convert
    if hasattr(convert, "shows_whole_shapes"):
        return

    @functools.wraps(convert)
    def convert_by_whole_shapes(self, layer_name, model=None, *args, **options):
        in_parts = model is not None and hasattr(next(model.parameters()), "ds_shape")
        return convert(self, layer_name, _WholeShapes(model) if in_parts else model, *args, **options)

    convert_by_whole_shapes.shows_whole_shapes = True
    WeightConverter.convert = convert_by_whole_shapes


def _work_around_libraries(model: PreTrainedModel) -> None:
    for module in model.modules():
        # At the first evaluation bitsandbytes would turn 4-bit weights into a layout for inference on CPUs: rounded
        # once more, and without a gradient when training goes on.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    # Under ZeRO-3 transformers keeps the conversions of names that no weight of this checkpoint needed, too, and a save
    # would revert them: "model.language_model.model.language_model.layers...".
    if conversions := getattr(model, "_weight_conversions", None):
        model._weight_conversions = [conversion for conversion in conversions if conversion.was_used()]


# ----------------------------------------------------------------------------------------------------------------------
# The text part of a model


def decoder_name(model: PreTrainedModel) -> str:
    """Return the name of the module that computes the text, such as "model" or "model.language_model"."""
    decoder = model.get_decoder()
    return next(name for name, module in model.named_modules() if module is decoder)


def outside_decoder(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Return {name: parameter} of what training on text never computes: the vision tower and its projector."""
    parts = (model.get_decoder(), model.get_output_embeddings())
    trained = {id(parameter) for part in parts for parameter in part.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in trained}


def in_indexer(name: str) -> bool:
    """Return whether a module or parameter of that name belongs to an indexer of sparse attention.

    An indexer chooses the tokens that a token attends to, as in DeepSeek-V3.2 and Qwen4: it passes on the places of its
    highest scores and not the scores, so the loss has no gradient for its weights.
    """
    return "indexer" in name.split(".")


def never_trained(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Return {name: parameter} of what the loss of a text does not reach: what `outside_decoder` finds, and indexers."""
    chosen = {name: parameter for name, parameter in model.named_parameters() if in_indexer(name)}
    return {**outside_decoder(model), **chosen}


# ----------------------------------------------------------------------------------------------------------------------
# Adapters


def load_adapter(
    model: PreTrainedModel, folder: str, is_trainable: bool = False, cache_dir: str | None = None, **options
) -> "PeftModel":
    """Put the adapter of a folder, or of the hub, on its base model.

    An adapter of a vision checkpoint that was trained as the text class of its family, whose layers have shorter names,
    is put in its place, too.

    Args:
        model: the base model.
        folder: folder or hub name of the adapter.
        is_trainable: whether the adapter will be trained on.
        cache_dir: folder for downloaded files; None means the hub's own.
        options: further arguments of `PeftModel.from_pretrained`.

    Raises:
        UserError: the adapter cannot be loaded, or some of its weights find no place in the model.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    with reading(f"{folder}, an adapter"):
        config = PeftConfig.from_pretrained(folder, cache_dir=cache_dir)
        if is_trainable:
            refuse_changed_base(config, folder)
        saved = set(load_peft_weights(folder, device="cpu", cache_dir=cache_dir))
        if mapping := adapter_mapping(model, saved):
            saved = set(load_peft_weights(folder, device="cpu", cache_dir=cache_dir, key_mapping=mapping))
            _name_whole_model(config, model, saved)
        options |= {"is_trainable": is_trainable, "config": config, "key_mapping": mapping, "cache_dir": cache_dir}
        options.setdefault("low_cpu_mem_usage", model.device.type == "meta")  # else they would be copied, into nothing
        with experts.whole_shapes(model):
            adapted = PeftModel.from_pretrained(model, folder, **options)
    placed = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if odd := sorted((saved ^ placed) - set(adapted.state_dict())):  # an adapter may come with the base's embeddings
        raise UserError(f"{folder}: {len(odd)} adapter weights do not match the base model, the first is {odd[0]}.")
    experts.hand_over_factors(adapted)
    return adapted


def changes_base(config: Any) -> bool:
    """Return True if an adapter of this peft.PeftConfig belongs to a base model that its start has changed."""
    start = str(getattr(config, "init_lora_weights", None)).lower()
    return start.startswith(CHANGES_BASE) or bool(getattr(config, "kasa_config", None))


def refuse_changed_base(config: Any, folder: str) -> None:
    """Refuse an adapter that belongs to a base model which its start has changed.

    Raises:
        UserError: it was not converted to a plain adapter when it was saved.
    """
    if changes_base(config):
        raise UserError(
            f"{os.path.join(folder, 'adapter_config.json')}: the adapter starts as {config.init_lora_weights} and "
            "belongs to a base model that this start changed; expected one that was converted when it was saved "
            "(peft's save_pretrained with path_initial_model_for_weight_conversion)."
        )


def adapter_mapping(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str] | None:
    """Return how peft must rename the weights of an adapter that was trained as the text class of a checkpoint.

    Args:
        model: the base model.
        names: names of the adapter's weights.

    Returns:
        {regular expression: replacement}, or None if the names are those of the base model.
    """
    prefix = f"{decoder_name(model)}."
    return None if any(f".{prefix}" in name for name in names) else {r"^model\.": prefix}


def _name_whole_model(config, model, names):
    """Change the names of layers in an adapter's configuration as `adapter_mapping` changes those of its weights.

    Ranks and scales that are set by patterns are looked up by the names that the layers had in training.
    """
    from peft.utils.other import get_pattern_key

    def moved(name):
        return re.sub(r"^model\.", prefix, name)

    prefix, modules = f"{decoder_name(model)}.", dict(model.named_modules())
    layers = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in names if ".lora_" in name}
    for patterns, default in ((config.rank_pattern, config.r), (config.alpha_pattern, config.lora_alpha)):
        old = {layer: f"model.{layer.removeprefix(prefix)}" for layer in layers if patterns}
        values = {layer: patterns.get(get_pattern_key(patterns, name), default) for layer, name in old.items()}
        patterns.clear()
        patterns.update(values)
    config.target_modules = [name for name in layers if hasattr(modules.get(name), "weight")]  # not those of experts
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.target_parameters = [moved(name) for name in config.target_parameters or []] or None
    config.modules_to_save = [moved(name) for name in config.modules_to_save or []] or None
    if isinstance(config.trainable_token_indices, dict):
        config.trainable_token_indices = {moved(name): ids for name, ids in config.trainable_token_indices.items()}


def load(
    folder: str,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    base: str | None = None,
    quantize: Callable[[torch.dtype], transformers.BitsAndBytesConfig] | None = None,
    **files,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model folder, a hub name or an adapter, whose base model is looked up, for use without training.

    Args:
        folder: folder or hub name of the model or the adapter.
        dtype: what the weights are held in; None means the fastest precision.
        device: "cpu" or "cuda"; None means the GPU if there is one.
        base: base model of the adapter; None means the one that the adapter names.
        quantize: function from the computing precision to how the weights are held in 4 bits; None: they are not.
        files: `trust_remote_code`, `cache_dir` and `chat_template` of `Pretrained`.

    Returns:
        (model in evaluation mode, tokenizer).

    Raises:
        UserError: one of the parts cannot be loaded.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    source = of_config = Pretrained(folder, **files)
    tokenizer, adapter = source.tokenizer(), adapter_config(source)
    if adapter is not None:
        recorded = adapter.base_model_name_or_path
        source = replace(
            source,
            name_or_path=base or recorded,
            named_by=f"the base model of {folder},",
            revision=adapter.revision if base in (None, recorded) else None,
        )
        # An adapter trained with --rope_scaling comes with a configuration of its own.
        of_config = of_config if os.path.exists(os.path.join(folder, CONFIG_NAME)) else source
    config = of_config.config()
    kernel = attention.choose(config.get_text_config())
    dtype = dtype or best_dtype(device == "cpu")
    options = {"quantization_config": quantize(dtype), "device_map": {"": device}} if quantize else {}
    model = source.model(config, dtype, kernel, **options)
    if adapter is not None:
        model = load_adapter(model, folder, cache_dir=source.cache_dir)
    return (model if quantize else model.to(device)).eval(), tokenizer


def adapter_config(source: Pretrained) -> "PeftConfig | None":
    """Return the configuration of the adapter in a folder or on the hub, or None if it is no adapter.

    Raises:
        UserError: it cannot be read.
    """
    from peft import PeftConfig

    with reading(f"{source.named_by} {source.name_or_path}"):
        if find_adapter_config_file(source.name_or_path, cache_dir=source.cache_dir) is None:
            return None
        return PeftConfig.from_pretrained(source.name_or_path, cache_dir=source.cache_dir)


def compile_layers(model: nn.Module, training_args: Any) -> None:
    """Compile each decoder layer, for --torch_compile: the layers share one graph and their weights keep their names.

    Clears `torch_compile_backend` of the TrainingArguments, so that accelerate does not compile the whole model again.
    """
    backend, training_args.torch_compile_backend = training_args.torch_compile_backend, None
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):  # the base class of transformers' layers
            module.compile(backend=backend, mode=training_args.torch_compile_mode)
