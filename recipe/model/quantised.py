"""Models whose files hold quantised weights, as their config.json says: which of them can be trained, and how."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from recipe.console import UserError, say
from recipe.model import experts
from recipe.model.precision import compute_dtype, dtype_name

# Ends of the names under which quantised copies of a model are published.
NAME_ENDS = re.compile(
    r"([-_.](unsloth|bnb|mlx|gptq|awq|fp8|mxfp[48]|nvfp4|quantized|dynamic|int[248]|[248]-?bits?|w\d+a\d+))+$", re.I
)
DEQUANTISED = "gguf"  # which transformers leaves in the config of weights that it has dequantised


class Quantised(NamedTuple):
    """How the weights of a model are quantised.

    Attributes:
        name: folder or hub name of the model.
        method: "bitsandbytes", "fp8", "gptq" ..., or "quantization_config" if the config does not say.
        in_4_bits: whether bitsandbytes holds them in 4 bits, as QLoRA does.
    """

    name: str
    method: str
    in_4_bits: bool

    def __str__(self) -> str:
        return f"{self.name}: its weights are quantised ({self.method} in its config.json)"

    def remedy(self, flag: str) -> str:
        """Say which model to name instead.

        Args:
            flag: the flag that names the model.
        """
        plain = plain_name(self.name)
        known = f", such as {flag} {plain}" if plain else f" with {flag}"
        return f"name the model in 16 bits that it was made from{known}"


def plain_name(name: str) -> str | None:
    """Return the name of the model that a quantised copy was made from, None if `name` is not that of a copy."""
    plain = NAME_ENDS.sub("", name.rstrip("/"))
    return plain if plain != name.rstrip("/") else None


def quantisation(name: str, config: Mapping[str, Any]) -> Quantised | None:
    """Return how the weights of a model are quantised, None if they are not.

    Args:
        name: folder or hub name of the model.
        config: entries of its config.json.
    """
    for part in (config, config.get("text_config") or {}):
        settings = part.get("quantization_config") or part.get("compression_config") or {}
        if not isinstance(settings, Mapping):  # a damaged file
            return Quantised(name, "quantization_config", False)
        method = settings.get("quant_method") or ("bitsandbytes" if settings.get("load_in_4bit") else "")
        if settings and method != DEQUANTISED:
            in_4_bits = "bitsandbytes" in str(method) and bool(settings.get("load_in_4bit"))
            return Quantised(name, str(method) or "quantization_config", in_4_bits)
    return None


def prepare(config: PreTrainedConfig, args: Any, q_lora: bool, sharded: bool) -> bool:
    """Let a model with quantised weights be trained; any other model is left as it is.

    Weights that bitsandbytes holds in 4 bits stay as they are, as with --q_lora; those in MXFP4 (gpt-oss, which is not
    published in 16 bits) become 16-bit ones as they are read.

    Args:
        config: configuration of the model; changed.
        args: TrainingArguments of finetune.py.
        q_lora: whether the weights are to be held in 4 bits.
        sharded: whether each rank holds a part of each weight.

    Returns:
        Whether the weights have 4 bits in training.

    Raises:
        UserError: such weights cannot be trained.
    """
    found = quantisation(config.name_or_path, config.to_dict())
    if found is None:
        return q_lora
    remedy = f"{found.remedy('--model_name_or_path')}."
    known = found.in_4_bits or found.method == "mxfp4"
    if not known or not getattr(config, "quantization_config", None):  # transformers looks nowhere else
        raise UserError(f"{found}, and cannot be trained; {remedy}")
    if not args.use_lora:
        raise UserError(f"{found}, and full training cannot change them; add --use_lora, or {remedy}")
    if not found.in_4_bits and q_lora:
        raise UserError(f"{found}, and transformers cannot make 4-bit weights of them; leave --q_lora out, or {remedy}")
    if not found.in_4_bits:
        config.quantization_config["dequantize"] = True
        say(f"{found}; they are trained as 16-bit weights, made as they are read.")
        return False
    if sharded:
        raise UserError(f"{found}, in bytes that this engine cannot shard; add --q_lora, and {remedy}")
    if experts.experts_per_token(config):
        raise UserError(
            f"{found}, and transformers cannot load routed experts of this kind; add --q_lora, and {remedy}"
        )
    config.quantization_config["bnb_4bit_compute_dtype"] = dtype_name(compute_dtype(args))
    say(f"{found}: training as with --q_lora.")
    return True
