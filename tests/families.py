"""Tiny random checkpoints of the model families, as folders that `--model_name_or_path` takes."""

import json
import pathlib
import shutil

import torch
import transformers

from helpers import CONTROL_TOKENS, ROOT, template

SIZE = dict(
    vocab_size=1024, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
    num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=False,
    bos_token_id=None, eos_token_id=997, pad_token_id=997,
)  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 32}
DELTA = dict(
    layer_types=["linear_attention", "full_attention"], linear_key_head_dim=16, linear_value_head_dim=16,
    linear_num_key_heads=2, linear_num_value_heads=4,
)  # fmt: skip
SPARSE = {
    **SIZE, **DELTA, **SHARED, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16,
    "indexer_budget": 16, "indexer_compress_ratio": 4, "ple_layer_ids": [1], "heads_per_ngram": 2,
    "ngram_vocab_size_base": 300, "make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 4, "hc_count": 2,
    "hc_lowrank": 8,
}  # fmt: skip
WINDOW = dict(sliding_window=16, layer_types=["sliding_attention", "full_attention"])
TOWER = dict(hidden_size=32, intermediate_size=64, depth=2, num_heads=2, out_hidden_size=64, patch_size=4)
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
GEMMA4 = {**SIZE, **WINDOW, "global_head_dim": 16, "hidden_size_per_layer_input": 0}
GEMMA4_TOWER = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
    patch_size=4, position_embedding_size=64,
)  # fmt: skip
TEXT = {
    "llama": SIZE,
    "mistral": {**SIZE, "sliding_window": 16},
    "qwen2": SIZE,
    "qwen3": SIZE,
    "qwen2_moe": {**SIZE, **SHARED},
    "qwen3_moe": {**SIZE, **EXPERTS},
    "qwen3_next": {**SIZE, **DELTA, **SHARED},
    "qwen3_5_text": {**SIZE, **DELTA},
    "qwen3_5_moe_text": {**SIZE, **DELTA, **SHARED},
    "gpt_oss": {**SIZE, **WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma3_text": {**SIZE, **WINDOW},
    "kimi_linear": {
        **SIZE, **EXPERTS, "layer_types": DELTA["layer_types"], "linear_head_dim": 16, "linear_num_heads": 4,
        "num_key_value_heads": 4, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    },
    "qwen4_exp_text": SPARSE,
}  # fmt: skip
VISION = {  # family, and its variant if it has several: (text configuration, vision configuration, further fields)
    "qwen2_5_vl": ({**SIZE, "rope_parameters": MROPE}, {**TOWER, "fullatt_block_indexes": [1]}),
    "qwen3_vl": ({**SIZE, "rope_parameters": MROPE}, {**TOWER, "deepstack_visual_indexes": [0]}),
    "qwen3_vl_moe": ({**SIZE, **EXPERTS, "moe_intermediate_size": 24, "rope_parameters": MROPE}, {**TOWER, "deepstack_visual_indexes": [0]}),
    "qwen3_5": ({**SIZE, **DELTA}, TOWER),
    "qwen3_5_moe": ({**SIZE, **DELTA, **SHARED}, TOWER),
    "qwen4_exp": (SPARSE, TOWER),
    "gemma3": (
        {**SIZE, **WINDOW},
        dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        ),
    ),
    "gemma4": (GEMMA4, GEMMA4_TOWER),
    "gemma4 A4B": (
        {**GEMMA4, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
        GEMMA4_TOWER,
    ),
    "gemma4 E4B": (
        {**GEMMA4, "num_hidden_layers": 4, "layer_types": WINDOW["layer_types"] * 2, "num_kv_shared_layers": 2,
         "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 1024},
        GEMMA4_TOWER,
    ),
}  # fmt: skip
MTP = (
    "qwen3_5",
    "qwen3_5_moe",
)  # their checkpoints hold layers that predict further tokens, which transformers ignores


def small_tokenizer(folder: pathlib.Path) -> pathlib.Path:
    """Write a tokenizer of 1,000 entries with Qwen2.5's template, which loads in no time, into `folder`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=997, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((ROOT / "data" / "train.jsonl").read_text().splitlines(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in CONTROL_TOKENS])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>", model_max_length=32768
    )
    fast.chat_template = template("qwen2_5")
    fast.save_pretrained(folder)
    return folder


def family(
    name: str,
    folder: pathlib.Path,
    tokenizer: pathlib.Path,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    max_shard_size: str = "1GB",
    **changes: object,
) -> pathlib.Path:
    """Write a random checkpoint of a family into `folder`, with the tokenizer of another folder.

    Args:
        name: a key of TEXT or VISION.
        folder: folder to write to.
        tokenizer: folder with a tokenizer.
        dtype: of the weights.
        tied: whether the output head is the embeddings.
        max_shard_size: a larger model is written in several files.
        changes: further fields of the text configuration.
    """
    torch.manual_seed(1)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    changes = {**changes, "tie_word_embeddings": tied}
    if name in TEXT:
        config = transformers.CONFIG_MAPPING[name](**{**TEXT[name], **changes})
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return folder
    text, vision = VISION[name]
    ids = dict(image_token_id=900, video_token_id=901, vision_start_token_id=902, vision_end_token_id=903)
    if name == "gemma3":
        ids = dict(image_token_index=900, boi_token_index=902, eoi_token_index=903, mm_tokens_per_image=4)
    config = transformers.CONFIG_MAPPING[name.partition(" ")[0]](
        text_config={**text, **changes}, vision_config=dict(vision), tie_word_embeddings=tied, **ids
    )
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "preprocessor_config.json").write_text(json.dumps({"patch_size": 4, "image_mean": [0.5, 0.5, 0.5]}))
    if name in MTP:
        from safetensors.torch import load_file, save_file

        last = sorted(folder.glob("model*.safetensors"))[-1]
        new = {
            "mtp.layers.0.mlp.up_proj.weight": torch.randn(128, 64).to(dtype),
            "mtp.norm.weight": torch.randn(64).to(dtype),
        }
        save_file({**load_file(last), **new}, last, metadata={"format": "pt"})
        if (path := folder / "model.safetensors.index.json").exists():
            index = json.loads(path.read_text())
            index["weight_map"] |= dict.fromkeys(new, last.name)
            path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return folder
