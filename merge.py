"""Merge an adapter into its base model and prove that nothing was lost.

    python merge.py --adapter output/demo --output output/demo-merged

The base's files are read tensor by tensor, so merging takes little main memory, and what was not trained is copied to
the byte. An adapter trained with --q_lora is merged into the base in 16 bits. The proof compares logits of the adapter
and of the merged folder on a few prompts, in float32 where that fits into main memory; a difference is an error and
nothing is written. The difference that rounding makes is printed.
"""

import argparse

import torch

from recipe import console
from recipe.console import UserError
from recipe.training.merging import merge


def main() -> None:
    """Merge what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapter", required=True, help="Folder of the adapter.")
    parser.add_argument("--output", required=True, help="Folder for the merged model: new, empty or an earlier merge.")
    parser.add_argument("--base", help="Folder or hub name of the base model. Default: as adapter_config.json says.")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], help="Precision. Default: that of the base model."
    )
    parser.add_argument("--cache_dir", help="Folder for downloaded models. Default: the hub's own.")
    parser.add_argument("--trust_remote_code", action="store_true", help="Run code that comes with the base model.")
    args = parser.parse_args()
    console.quiet()
    dtype = getattr(torch, args.dtype) if args.dtype else None
    try:
        difference = merge(args.adapter, args.output, dtype, args.base, args.cache_dir, args.trust_remote_code)
    except UserError as error:
        console.fail(error)
    print(f"{args.output}: merged; logits differ from the adapter's by {difference:.1e}")


if __name__ == "__main__":
    main()
