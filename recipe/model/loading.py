"""Load a model and its tokenizer, by the same rules for training, evaluation, merging and chat."""

import json
import os

import torch

from recipe.console import UserError
from recipe.model import attention, linear_attention
from recipe.model.precision import best_dtype


def load(folder, dtype=None, device=None):
    """Model and tokenizer from a model folder, a hub name or an adapter folder (its base model is looked up).

    Returns:
        (model in evaluation mode, tokenizer); `device` None means the GPU if there is one, `dtype` None what is fast.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    adapter = os.path.exists(os.path.join(folder, "adapter_config.json"))
    base = folder
    if adapter:
        with open(os.path.join(folder, "adapter_config.json"), encoding="utf-8") as file:
            base = json.load(file)["base_model_name_or_path"]
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    attention.register()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        # An adapter trained with --rope_scaling has a configuration of its own beside it.
        own = os.path.exists(os.path.join(folder, "config.json"))
        config = AutoConfig.from_pretrained(folder if own else base)
        kernel = {"attn_implementation": attention.PACKED} if attention.can_pack(config.get_text_config()) else {}
        dtype = dtype or best_dtype(device == "cpu")
        model = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=dtype, **kernel)
        linear_attention.keep_documents_apart(model)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: cannot be loaded as a model: {str(error).splitlines()[0]}") from None
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder)
    return model.eval().to(device), tokenizer
