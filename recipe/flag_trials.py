"""Try early what a flag needs late: its package, its arguments, a folder that can be written.

Each of these would otherwise fail when the data is tokenised and the weights are loaded. A library's own error becomes
one sentence that names the flag.
"""

import contextlib
import copy
import math
import os
import re
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers.utils import is_bitsandbytes_available, is_liger_kernel_available

from recipe import console
from recipe.console import UserError
from recipe.model import attention
from recipe.model.loading import one_line

KNOWN_KERNELS = ("auto", "packed", "eager", "sdpa")
STEPS = 1000  # of a learning-rate schedule that is tried
WITHOUT_ARGUMENTS = ("constant", "constant_with_warmup")  # schedules for which transformers ignores lr_scheduler_kwargs
INITIAL_ADAPTERS = r"true|false|gaussian|pissa|pissa_niter_\d+|olora|orthogonal"


def try_flags(model_args: Any, data_args: Any, training_args: Any, lora_args: Any) -> None:
    """Try what the flags of finetune.py's four argument instances need.

    Raises:
        UserError: a package is missing, a value is wrong, a folder cannot be written.
    """
    _packages(training_args, lora_args)
    _reporters(training_args)
    _schedule(training_args, _optimizer(training_args))
    _data_loader(training_args)
    _attention(model_args)
    _compiler(training_args)
    _adapter(lora_args)
    if console.rank() == 0:
        _hub(training_args)
        _written("output_dir", training_args.output_dir)
        if data_args.dump_tokens:
            _written("dump_tokens", os.path.dirname(os.path.abspath(data_args.dump_tokens)), data_args.dump_tokens)


@contextlib.contextmanager
def _naming(flags: str) -> Iterator[None]:
    """Turn an error of a library into one sentence that names the flags."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{flags}: {one_line(error).rstrip('.')}.") from None


def _packages(args: Any, lora_args: Any) -> None:
    needed = {
        "q_lora": ("bitsandbytes", lora_args.q_lora, is_bitsandbytes_available),
        "use_liger_kernel": ("liger-kernel", args.use_liger_kernel, is_liger_kernel_available),
    }
    for flag, (package, used, available) in needed.items():
        if used and not available():
            raise UserError(f"--{flag} needs the package {package}; pip install {package}.")


def _reporters(args: Any) -> None:
    from transformers.integrations import get_reporting_integration_callbacks

    for name in args.report_to:
        with _naming(f"--report_to {name}"):
            for callback in get_reporting_integration_callbacks([name]):
                callback()


def _optimizer(args: Any) -> torch.optim.Optimizer:
    """Make the optimizer for a small layer, and take a step with it."""
    flags = f"--optim {args.optim.value}" + f" --optim_args {args.optim_args}" * bool(args.optim_args)
    if args.optim_args and not all(re.fullmatch(r"\s*\w+\s*=[^=]+", pair) for pair in args.optim_args.split(",")):
        raise UserError(f"--optim_args {args.optim_args}: expected name=value pairs, separated by commas.")
    with _naming(flags), torch.random.fork_rng(devices=[]):
        layer = torch.nn.Linear(64, 64, device=args.device)
        args = copy.copy(args)
        if args.optim_target_modules is not None:
            args.optim_target_modules = "all-linear"  # the names are those of the model
        cls, options = transformers.Trainer.get_optimizer_cls_and_kwargs(args, torch.nn.Sequential(layer))
        for own in ("params", "model", "optimizer_dict"):  # as the Trainer hands them over
            if own in options:
                return cls(options.pop(own), **options)
        optimizer = cls([{"params": list(layer.parameters()), "weight_decay": args.weight_decay}], **options)
        for parameter in layer.parameters():
            parameter.grad = torch.zeros_like(parameter)
        if hasattr(optimizer, "train"):  # schedule-free ones
            optimizer.train()
        optimizer.step()
        return optimizer


def _schedule(args: Any, optimizer: torch.optim.Optimizer) -> None:
    """Make the learning-rate schedule, and take all of its steps."""
    name, options = args.lr_scheduler_type.value, args.lr_scheduler_kwargs or {}
    flags = f"--lr_scheduler_type {name}" + f" --lr_scheduler_kwargs {options}" * bool(options)
    if options and name in WITHOUT_ARGUMENTS:
        raise UserError(f"{flags}: this schedule has no arguments; leave out --lr_scheduler_kwargs.")
    with _naming(flags):
        warmup = args.get_warmup_steps(STEPS)
        schedule = transformers.get_scheduler(args.lr_scheduler_type, optimizer, warmup, STEPS, options)
        for step in range(STEPS + 1):
            for factor in (function(step) for function in getattr(schedule, "lr_lambdas", [])):
                if not math.isfinite(factor):
                    raise ValueError(f"the learning rate at step {step} of {STEPS} is {factor}")


def _data_loader(args: Any) -> None:
    """Make a loader, without starting its workers."""
    workers, persistent = args.dataloader_num_workers, args.dataloader_persistent_workers
    flags = f"--dataloader_num_workers {workers}" + f" --dataloader_persistent_workers {persistent}" * persistent
    prefetched = args.dataloader_prefetch_factor if workers else None
    flags += f" --dataloader_prefetch_factor {prefetched}" * (prefetched is not None)
    with _naming(flags):
        torch.utils.data.DataLoader(
            [0], num_workers=workers, persistent_workers=persistent, prefetch_factor=prefetched
        )  # fmt: skip


def _attention(model_args: Any) -> None:
    """Make a tiny model with the kernel: transformers checks its name and its package then."""
    kernel = model_args.attn_implementation
    if kernel not in KNOWN_KERNELS:
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
        heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
        attention.register()
        with _naming(f"--attn_implementation {kernel}"), torch.device("meta"):
            config = transformers.Qwen2Config(**sizes, **heads)
            transformers.AutoModelForCausalLM.from_config(config, attn_implementation=kernel)


def _compiler(args: Any) -> None:
    """Compile one addition: the backend and what it needs, such as a C++ compiler, are there."""
    if args.torch_compile:
        flags = f"--torch_compile with backend {args.torch_compile_backend} and mode {args.torch_compile_mode}"
        with _naming(flags):
            add = torch.compile(lambda x: x + 1, backend=args.torch_compile_backend, mode=args.torch_compile_mode)
            add(torch.zeros(2, device=args.device))


def _adapter(lora_args: Any) -> None:
    start = lora_args.init_lora_weights
    if not re.fullmatch(INITIAL_ADAPTERS, start, re.IGNORECASE):
        raise UserError(
            f"--init_lora_weights {start}: expected true, false, gaussian, pissa, pissa_niter_16, olora or orthogonal."
        )
    if start == "orthogonal" and lora_args.lora_r % 2:
        raise UserError(f"--init_lora_weights orthogonal: expected an even --lora_r, not {lora_args.lora_r}.")
    for index in lora_args.trainable_token_indices or ():
        if index < 0:
            raise UserError(f"--trainable_token_indices {index}: expected ids of tokens, from 0.")


def _hub(args: Any) -> None:
    """Ask the hub who the user is: there is a network, and a token that is valid."""
    if args.push_to_hub:
        import huggingface_hub

        with _naming("--push_to_hub"):
            if args.hub_model_id is not None:
                huggingface_hub.utils.validate_repo_id(args.hub_model_id)
            token = args.hub_token or huggingface_hub.get_token()
            if not token:
                raise UserError(
                    "--push_to_hub: there is no token of the hub; run 'hf auth login', or give --hub_token."
                )
            huggingface_hub.HfApi(token=token).whoami()


def _written(flag: str, folder: str, named: str | None = None) -> None:
    """Make the folder and a file in it, and remove what was made."""
    made = []
    try:
        part = os.path.abspath(folder)
        while not os.path.lexists(part):
            made.append(part)
            part = os.path.dirname(part)
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--{flag} {named or folder}: cannot be written ({reason}); name another place.") from None
    finally:
        for part in made:
            with contextlib.suppress(OSError):
                os.rmdir(part)
