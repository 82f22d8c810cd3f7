"""Load a model, its tokenizer and its adapter, by the same rules for training, evaluation, merging and chat.

A checkpoint with a vision tower (Qwen3.5, Qwen3-VL, Gemma 3) is loaded as the class that it was saved from, and trained
on text: `get_decoder()` names its text part; all weights outside it and the output head stay as they are. The names of
its weights, and those of an adapter, are then the checkpoint's own, which servers look for.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import CONFIG_NAME
from transformers.utils.peft_utils import find_adapter_config_file

from recipe.console import UserError
from recipe.model import attention, generation, linear_attention
from recipe.model.precision import best_dtype

if TYPE_CHECKING:  # its import takes seconds, and --help needs none of it
    from peft import PeftModel

# What the libraries raise for files that are missing, cut off, of another format or of another model.
LOADING_ERRORS = (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError)


@dataclass(frozen=True)
class Pretrained:
    """A model folder or a model of the hub, and how its files are read.

    Attributes:
        name_or_path: folder or hub name.
        trust_remote_code: whether to run code that comes with the model.
        cache_dir: folder for downloaded files; None means the hub's own.
        chat_template: Jinja file that replaces the model's chat template.
        named_by: what names the model in error messages: a flag, or a file.
    """

    name_or_path: str
    trust_remote_code: bool = False
    cache_dir: str | None = None
    chat_template: str | None = None
    named_by: str = "--model_name_or_path"

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
        """Load the model with its weights; those outside its text part and its output head are frozen.

        Args:
            config: the configuration, changed or not.
            dtype: what the weights are held in.
            attn_implementation: an attention kernel by its name in transformers, or "auto" for transformers' choice.
            options: further arguments of `from_pretrained`.

        Raises:
            UserError: the model cannot be loaded, or its files lack some of its weights.
        """
        if attn_implementation == attention.PACKED:
            attention.register()
        if attn_implementation != "auto":
            options["attn_implementation"] = attn_implementation
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
        generation.drop_sampling_settings(model.generation_config)
        for parameter in outside_decoder(model).values():
            parameter.requires_grad_(False)
        return model

    def _from_pretrained(self, kind, **options):
        try:
            return kind.from_pretrained(
                self.name_or_path, trust_remote_code=self.trust_remote_code, cache_dir=self.cache_dir, **options
            )
        except LOADING_ERRORS as error:
            if "trust_remote_code" in str(error) and not self.trust_remote_code:
                raise UserError(
                    f"{self.named_by} {self.name_or_path}: comes with its own Python code; read it, and set "
                    "--trust_remote_code True if you trust it."
                ) from None
            raise UserError(
                f"{self.named_by} {self.name_or_path}: cannot be loaded: {one_line(error)} Name a folder with a model "
                "or a model of the hub."
            ) from None


def one_line(error: Exception) -> str:
    """Return what a library raised as one line of at most 300 characters."""
    kind = "" if isinstance(error, (OSError, ValueError, ImportError)) else f"{type(error).__name__}: "
    return kind + f"{' '.join(str(error).split()):.300}"


def auto_class(config: PreTrainedConfig) -> type:
    """Return the Auto class that loads the architecture which a checkpoint was saved from.

    `AutoModelForCausalLM` would load the text part of some vision checkpoints under other names, and refuse others.
    """
    architecture = (config.architectures or [None])[0]
    if architecture in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values():
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


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


# ----------------------------------------------------------------------------------------------------------------------
# Adapters


def load_adapter(
    model: PreTrainedModel, folder: str, is_trainable: bool = False, cache_dir: str | None = None
) -> "PeftModel":
    """Put the adapter of a folder, or of the hub, on its base model.

    An adapter of a vision checkpoint that was trained as the text class of its family, whose layers have shorter names,
    is put in its place, too.

    Raises:
        UserError: the adapter cannot be loaded, or some of its weights find no place in the model.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    mapping = None
    try:
        config = PeftConfig.from_pretrained(folder, cache_dir=cache_dir)
        saved = set(load_peft_weights(folder, device="cpu", cache_dir=cache_dir))
        prefix = decoder_name(model) + "."
        if not any(f".{prefix}" in name for name in saved):
            mapping = {r"^model\.": prefix}
            saved = {name.replace("base_model.model.model.", f"base_model.model.{prefix}", 1) for name in saved}
            if isinstance(config.target_modules, set):
                config.target_modules = {re.sub(r"^model\.", prefix, name) for name in config.target_modules}
        adapted = PeftModel.from_pretrained(
            model, folder, is_trainable=is_trainable, config=config, key_mapping=mapping, cache_dir=cache_dir
        )
    except (*LOADING_ERRORS, TypeError) as error:
        raise UserError(f"{folder}: cannot be loaded as an adapter: {one_line(error)}") from None
    if odd := sorted(saved ^ set(get_peft_model_state_dict(adapted))):
        raise UserError(f"{folder}: {len(odd)} adapter weights do not match the base model, the first is {odd[0]}.")
    return adapted


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
    tokenizer, adapter = source.tokenizer(), _adapter_config(source)
    if adapter is not None:
        source = replace(
            source, name_or_path=base or adapter.base_model_name_or_path, named_by=f"the base model of {folder},"
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


def _adapter_config(source: Pretrained):
    """The configuration of the adapter in a folder or on the hub, or None if it is no adapter."""
    from peft import PeftConfig

    try:
        if find_adapter_config_file(source.name_or_path, cache_dir=source.cache_dir) is None:
            return None
        return PeftConfig.from_pretrained(source.name_or_path, cache_dir=source.cache_dir)
    except LOADING_ERRORS as error:
        raise UserError(f"{source.named_by} {source.name_or_path}: cannot be loaded: {one_line(error)}") from None
