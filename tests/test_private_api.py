"""The private parts of libraries that this project touches; docs/architecture.md says where and why."""

import argparse
import atexit
import threading

import bitsandbytes
import datasets
import peft
import pytest
import torch
import transformers
from peft.utils import transformers_weight_conversion
from transformers import core_model_loading
from transformers.integrations import moe
from transformers.models.kimi_linear import modeling_kimi_linear
from transformers.models.lfm2 import modeling_lfm2
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.quantizers import auto


def checkpointed_layer():
    """A decoder layer whose checkpointing is switched on."""
    small = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**small))
    model.gradient_checkpointing_enable()
    return model.model.layers[0]


PRIVATE = [
    (argparse.ArgumentParser(), "_negative_number_matcher"),
    (argparse.HelpFormatter, "_format_action_invocation"),
    (argparse.HelpFormatter, "_format_args"),
    (argparse.ArgumentDefaultsHelpFormatter, "_get_help_string"),
    (transformers.HfArgumentParser, "_parse_dataclass_field"),
    (transformers.TrainingArguments("output", use_cpu=True), "_n_gpu"),
    (moe, "_grouped_mm"),
    (auto, "AUTO_QUANTIZER_MAPPING"),
    (peft.tuners.lora.layer.ParamWrapper, "_activate_lora"),
    (transformers_weight_conversion, "_MODEL_TO_CONVERSION_PATTERN"),
    (transformers_weight_conversion, "_MOE_TARGET_MODULE_MAPPING"),
    (modeling_qwen3_5, "causal_conv1d_fn"),
    (modeling_qwen3_5, "torch_chunk_gated_delta_rule"),
    (modeling_kimi_linear, "chunk_kimi_delta_attention"),
    (modeling_lfm2, "Lfm2ShortConv"),
    *(
        (transformers.Trainer, name)
        for name in (
            *("_get_dataloader", "_get_train_sampler", "_evaluate", "_save", "_save_checkpoint"),
            *(
                "_get_grad_norm",
                "_load_from_checkpoint",
                "_load_best_model",
                "_load_rng_state",
                "_maybe_log_save_evaluate",
            ),
        )
    ),
    (checkpointed_layer(), "_gradient_checkpointing_func"),
    (checkpointed_layer(), "gradient_checkpointing"),
    (transformers.trainer, "PreTrainedConfig"),
    (transformers.Trainer, "set_initial_training_values"),
    (transformers.PreTrainedConfig(), "_attn_implementation"),
    (transformers.PreTrainedConfig(), "_name_or_path"),
    (transformers.PreTrainedModel, "_no_split_modules"),
    (transformers.PreTrainedModel, "_keys_to_ignore_on_save"),
    (core_model_loading, "revert_weight_conversion"),
    (core_model_loading.WeightConverter, "convert"),
    (peft.utils.constants, "EMBEDDING_LAYER_NAMES"),
    (torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"),
    (torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward"),
    (torch.cpu, "_is_avx512_bf16_supported"),
    (torch.cpu, "_is_amx_tile_supported"),
    (bitsandbytes.nn, "Params4bit"),
    (bitsandbytes.nn.Params4bit(torch.zeros(2, 2)), "quant_state"),
    (bitsandbytes.nn.Linear4bit(2, 2), "support_avx512bf16_for_cpu"),
    (datasets.Dataset.from_dict({}), "_fingerprint"),
    (threading, "_shutdown"),
    (atexit, "_run_exitfuncs"),
]


@pytest.mark.parametrize("owner, name", PRIVATE, ids=[name for _, name in PRIVATE])
def test_a_private_part_still_exists(owner, name):
    assert hasattr(owner, name)
