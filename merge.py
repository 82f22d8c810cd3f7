"""Merge an adapter into its base model and prove that nothing was lost.

    python merge.py --adapter output/demo --output output/demo-merged

The base is loaded in float32 in main memory (4 bytes a parameter), also for an adapter trained with --q_lora: merging
into 4-bit weights would round the adapter away. Logits of the adapter and of the merged weights are compared on a few
prompts; a difference is an error and nothing is written. What rounding to the saved precision then changes is told.
"""

import argparse
import os

import torch

from recipe import console
from recipe.console import UserError
from recipe.model import generation, loading
from recipe.model.precision import dtype_name

TOLERANCE = 1e-4  # norm of the difference / norm of the logits, in float32; a good merge has some 1e-6
ROUNDING = 1e-2  # the same after rounding to bfloat16 or float16, as a rule below this
PROMPTS = ["Hello", "What is the capital of France?", "Write a haiku.", "1 + 1 =", '{"key": "value"}']


def merge(adapter, output, dtype=torch.bfloat16):
    """Write the merged model, tokenizer, chat template and generation config to `output`.

    Returns:
        how far the merged model's logits are from the adapter's: the largest, over the prompts, of the norm of the
        difference over the norm of the logits.
    Raises:
        UserError: `adapter` is no adapter, some of its weights find no place in the base, or the merged model differs.
    """
    if not os.path.exists(os.path.join(adapter, "adapter_config.json")):
        raise UserError(f"{adapter}: holds no adapter_config.json; expected the folder of an adapter.")
    model, tokenizer = loading.load(adapter, torch.float32, device="cpu")
    _all_weights_placed(model, adapter)
    before = _logits(model, tokenizer)
    model = model.merge_and_unload()
    difference = _distance(before, _logits(model, tokenizer))
    if not difference <= TOLERANCE:
        raise UserError(
            f"{adapter}: the merged model's logits differ from the adapter's by {difference:.1e}, expected at most "
            f"{TOLERANCE:.0e}; nothing was written. Report the adapter's configuration to its library, peft."
        )
    if dtype != torch.float32:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(dtype))
        difference = _distance(before, _logits(model, tokenizer))
        if difference != difference:
            raise UserError(f"{adapter}: its weights do not fit into {dtype_name(dtype)}; use --dtype bfloat16.")
        if difference > ROUNDING:
            print(
                f"rounding to {dtype_name(dtype)} changes the logits by {difference:.1e}; --dtype float32 keeps them."
            )
    model.config.use_cache = True
    generation.drop_sampling_settings(model.generation_config)
    model.to(dtype).save_pretrained(output)
    tokenizer.save_pretrained(output)
    if os.path.exists(os.path.join(adapter, "generation_config.json")):
        from transformers import GenerationConfig

        GenerationConfig.from_pretrained(adapter).save_pretrained(output)
    return difference


def _all_weights_placed(model, adapter):
    from peft import get_peft_model_state_dict
    from peft.utils import load_peft_weights

    saved, placed = set(load_peft_weights(adapter, device="cpu")), set(get_peft_model_state_dict(model))
    if saved != placed:
        odd = sorted(saved ^ placed)
        raise UserError(f"{adapter}: {len(odd)} adapter weights do not match the base model, the first is {odd[0]}.")


def _distance(expected, found):
    return torch.stack([(a - b).norm() / a.norm() for a, b in zip(expected, found, strict=True)]).max().item()


@torch.no_grad()
def _logits(model, tokenizer):
    ids = [tokenizer(text, return_tensors="pt").input_ids.to(model.device) for text in PROMPTS]
    return [model(input_ids=i, use_cache=False).logits.float() for i in ids]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapter", required=True, help="Folder of the adapter.")
    parser.add_argument("--output", required=True, help="Folder for the merged model.")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"], help="Precision.")
    args = parser.parse_args()
    console.quiet()
    try:
        difference = merge(args.adapter, args.output, getattr(torch, args.dtype))
    except UserError as error:
        console.fail(error)
    print(f"{args.output}: merged; logits differ from the adapter's by {difference:.1e}")


if __name__ == "__main__":
    main()
