"""Merge an adapter into its base model and prove that nothing was lost.

    python merge.py --adapter output/demo --output output/demo-merged

The base's files are read tensor by tensor, so merging takes little main memory, and what was not trained is copied to
the byte. An adapter trained with --q_lora is merged into the base in 16 bits. The proof compares logits of the adapter
and of the merged folder on a few prompts, in float32, where that fits into main memory. If they differ, nothing is
written. The difference that rounding makes is printed. --gguf converts the merged model for llama.cpp and Ollama.
"""

import argparse
import os

from recipe import console, signals
from recipe.console import UserError


def parse() -> argparse.Namespace:
    """Parse the command line."""
    from transformers.hf_argparser import string_to_bool

    switch = {"type": string_to_bool, "nargs": "?", "const": True, "default": False}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapter", required=True, help="Folder of the adapter.")
    parser.add_argument("--output", required=True, help="Folder for the merged model: new, empty or an earlier merge.")
    parser.add_argument("--base", help="Base model of the adapter. Default: the one that the adapter names.")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], help="Precision. Default: that of the base model."
    )
    parser.add_argument("--gguf", help="GGUF file to convert the merged model into, with Ollama's Modelfile beside it.")
    parser.add_argument("--llama_cpp", help="Folder with the source of llama.cpp, whose converter --gguf runs.")
    parser.add_argument("--trust_remote_code", **switch, help="Run code that comes with the model. Default False.")
    parser.add_argument("--cache_dir", help="Folder for downloaded models. Default: the hub's own.")
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    """Merge what the command line names, and print how exact it is.

    Raises:
        UserError: the merge is not possible or not exact.
    """
    import torch

    from finetune import nf4
    from recipe.training import gguf
    from recipe.training.merging import merge

    if bool(args.gguf) != bool(args.llama_cpp):
        raise UserError("--gguf and --llama_cpp belong together: a file to write, and llama.cpp's source folder.")
    if args.gguf and os.path.realpath(args.gguf).startswith(os.path.join(os.path.realpath(args.output), "")):
        raise UserError(f"--gguf {args.gguf}: lies in the folder of --output, which a second merge would refuse.")
    program = gguf.converter(args.llama_cpp) if args.gguf else None  # before the merge
    dtype = getattr(torch, args.dtype) if args.dtype else None
    difference = merge(args.adapter, args.output, dtype, args.base, args.cache_dir, args.trust_remote_code, nf4)
    print(f"{args.output}: merged; logits differ from the adapter's by {difference:.1e}")
    if program:
        gguf.convert(args.output, args.gguf, program, args.trust_remote_code)
        print(f"{args.gguf}: converted; for Ollama: ollama create NAME -f {gguf.modelfile_of(args.gguf)}")


def main() -> None:
    """Run the command line; a user's mistake is one sentence."""
    args = parse()
    console.configure_libraries()
    console.run(lambda: run(args))


if __name__ == "__main__":
    signals.watch("ended before the work was done.")
    main()
    console.leave()
