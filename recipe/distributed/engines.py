"""Which engine shares a training out over processes, what each can train, and what each needs to be told.

The engines are one process, DDP, DeepSpeed ZeRO-2 and ZeRO-3, and FSDP2. `python engines.py` prints TABLE as the README
shows it.
"""

import json
import os
from datetime import timedelta

import torch

from recipe.console import UserError, say

TESTED = "trained, saved, resumed"  # and compared with one process, on two CPU ranks in tests/test_engines.py
RUNS = "trained"  # and compared with one process in the same way
GPU = "needs a GPU, untested"
TABLE = {  # engine: what is known of full, LoRA and QLoRA training with it; anything else is why not, and the remedy
    "one process": (TESTED, TESTED, TESTED),
    "DDP": (TESTED, TESTED, TESTED),
    "ZeRO-2": (TESTED, TESTED, TESTED),
    "ZeRO-2 offload": (RUNS, RUNS, RUNS),
    "ZeRO-3": (TESTED, TESTED, TESTED),
    "ZeRO-3 offload": (RUNS, RUNS, RUNS),
    "FSDP2": (TESTED, TESTED, TESTED),
    "FSDP2 offload": (GPU, GPU, "4-bit weights stay on the GPU: leave cpu_offload out"),
}
MODES = ("full", "LoRA", "QLoRA")
AUTO = {  # entry of a DeepSpeed configuration: the flag that it follows; a configuration that lacks one gets "auto"
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "bf16.enabled": "bf16",
    "fp16.enabled": "fp16",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "weight_decay",
}


def name(args):
    """The engine of these TrainingArguments, a key of TABLE."""
    if args.deepspeed:
        zero = args.deepspeed["zero_optimization"]
        offload = any(zero.get(part, {}).get("device", "none") != "none" for part in OFFLOADS)
        return f"ZeRO-{zero.get('stage', 0)}{' offload' * offload}"
    if args.fsdp:
        return f"FSDP2{' offload' * bool(args.fsdp_config.get('cpu_offload'))}"
    return "DDP" if args.world_size > 1 else "one process"


OFFLOADS = ("offload_optimizer", "offload_param")


def mode(args, lora_args):
    """What is trained, one of MODES."""
    return "QLoRA" if lora_args.q_lora else "LoRA" if args.use_lora else "full"


def zero3(args):
    return bool(args.deepspeed) and args.deepspeed["zero_optimization"].get("stage") == 3


def shards(args):
    """Whether no process holds all weights while it trains."""
    return bool(args.fsdp) or zero3(args)


def check(args, lora_args):
    """Refuse what an engine cannot train, with the remedy.

    Raises:
        UserError: the combination is not for this engine.
    """
    engine = name(args)
    if engine not in TABLE:
        raise UserError(f"--deepspeed: stage {engine.removeprefix('ZeRO-')} is not supported; use stage 2 or 3.")
    trained = mode(args, lora_args)
    verdict = TABLE[engine][MODES.index(trained)]
    if verdict not in (TESTED, RUNS, GPU):
        raise UserError(f"{trained} training with {engine}: {verdict}.")


# ----------------------------------------------------------------------------------------------------------------------
# Before the process groups start


def prepare(args):
    """Read the engine's configuration; start the process group where accelerate would choose another one.

    Args:
        args: TrainingArguments at the start of their __post_init__; `deepspeed` becomes a dict, `fsdp_config`, too.
    Raises:
        UserError: a configuration cannot be read, or would override the command line.
    """
    if args.deepspeed and args.fsdp:
        raise UserError("--deepspeed and --fsdp exclude each other; give one of them.")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if not args.deepspeed and not args.fsdp:
        if args.use_cpu and processes > 1:
            _start_ddp_on_cpu(args)
        return
    if args.use_cpu and processes == 1:
        say(f"one process on a CPU has nothing to share out: {'DeepSpeed' if args.deepspeed else 'FSDP'} is left out.")
        args.deepspeed = args.fsdp = None
        return
    if args.deepspeed:
        args.deepspeed = deepspeed_config(args)
    else:
        args.fsdp_config = fsdp_config(args)
        # Else accelerate leaves whole gradients on every process between the micro-batches of a step.
        options = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
        args.accelerator_config = options | _read("accelerator_config", args.accelerator_config or {})
    if args.use_cpu:
        _start_on_cpu(args)
    elif "RANK" not in os.environ:  # plain python on one GPU
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({**alone, "MASTER_PORT": str(_free_port())})


def _start_ddp_on_cpu(args):
    """What transformers would do, but with --ddp_timeout, which it takes on GPUs alone."""
    from accelerate import PartialState

    PartialState(cpu=True, backend=args.ddp_backend, timeout=timedelta(seconds=args.ddp_timeout))


def _start_on_cpu(args):
    """Start a gloo group that accelerate takes for the engine's: told of a CPU, it would run DDP without a word."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    if args.bf16 or args.fp16:
        say(f"{'DeepSpeed' if args.deepspeed else 'FSDP'} on a CPU computes in float32.")
        args.bf16 = args.fp16 = False
    timeout = timedelta(seconds=args.ddp_timeout)
    if args.deepspeed:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo", timeout=timeout)
    else:
        if args.fsdp_config.pop("cpu_offload", False):
            say("--fsdp_config: cpu_offload has no meaning on a CPU and is left out.")
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        # accelerate turns MULTI_GPU into FSDP
        PartialState(cpu=True, timeout=timeout).distributed_type = DistributedType.MULTI_GPU
    configured = {"use_configured_state": True}
    args.accelerator_config = _read("accelerator_config", args.accelerator_config or {}) | configured
    args.use_cpu, args.dataloader_pin_memory = False, False


def _free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _read(flag, path):
    """A configuration file; one that is named but missing is looked for beside this file under its last name."""
    if isinstance(path, dict):
        return path
    here = os.path.dirname(os.path.abspath(__file__))
    root = os.path.dirname(os.path.dirname(here))
    places = (os.path.join(folder, os.path.basename(path)) for folder in (root, here))
    shipped = next(filter(os.path.exists, places), "")
    if not os.path.exists(path) and shipped:
        say(f"--{flag} {path}: not found; using {shipped}.")
        path = shipped
    try:
        with open(path, encoding="utf-8-sig") as file:
            config = json.load(file)
    except OSError as error:
        raise UserError(f"--{flag} {path}: cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise UserError(f"--{flag} {path}: not valid JSON: {error}.") from None
    if not isinstance(config, dict):
        raise UserError(f"--{flag} {path}: expected a JSON object.")
    return config


def deepspeed_config(args):
    """The DeepSpeed configuration with "auto" for what it leaves open.

    Raises:
        UserError: it would override the command line.
    """
    config = _read("deepspeed", args.deepspeed)
    source = args.deepspeed if isinstance(args.deepspeed, str) else "(JSON)"
    config.setdefault("zero_optimization", {})
    if "scheduler" in config:
        raise UserError(
            f"--deepspeed {source}: its scheduler {config['scheduler'].get('type')} would replace --lr_scheduler_type "
            f"{getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)}; remove the block."
        )
    optimizer = config.get("optimizer", {}).get("type", "AdamW")
    if optimizer.lower() != "adamw":
        raise UserError(
            f"--deepspeed {source}: its optimizer {optimizer} would replace --optim "
            f"{getattr(args.optim, 'value', args.optim)}; remove the block."
        )
    for entry, flag in AUTO.items():
        *path, last = entry.split(".")
        if path[:1] == ["optimizer"] and "optimizer" not in config:
            continue
        node = config
        for part in path:
            node = node.setdefault(part, {})
        value = node.setdefault(last, "auto")
        if value != "auto" and value != getattr(args, flag):
            raise UserError(
                f"--deepspeed {source}: its {entry} {value} would override --{flag} {getattr(args, flag)}; write "
                '"auto" there.'
            )
    config.setdefault("train_batch_size", "auto")
    if config["zero_optimization"].get("stage") == 3:
        config["zero_optimization"].setdefault("stage3_gather_16bit_weights_on_model_save", True)
    return config


def fsdp_config(args):
    """The FSDP2 configuration; the layers that are sharded together are those that the model names.

    Raises:
        UserError: it asks for FSDP1.
    """
    config = _read("fsdp_config", args.fsdp_config) if args.fsdp_config else {}
    config = {entry.removeprefix("fsdp_"): value for entry, value in config.items()}
    if "offload" in str(args.fsdp).split():  # as it was written for FSDP1
        config.setdefault("cpu_offload", True)
    args.fsdp = True
    if int(config.setdefault("version", 2)) != 2:
        raise UserError(f"--fsdp_config: version {config['version']} is not supported; use 2.")
    config.setdefault("cpu_ram_efficient_loading", True)
    # Collectives on tensors in main memory, too: for whole state dicts and for offloaded weights.
    os.environ.setdefault("ACCELERATE_USE_FSDP", "true")
    os.environ.setdefault("FSDP_STATE_DICT_TYPE", config.setdefault("state_dict_type", "FULL_STATE_DICT"))
    return config


# ----------------------------------------------------------------------------------------------------------------------
# The model under an engine


def use_reentrant(zero3, frozen, quantized, deepspeed):
    """Which kind of gradient checkpointing an engine needs.

    The reentrant kind breaks DDP with frozen weights ("mark a variable ready only once"); the other one breaks ZeRO-3
    with frozen weights up to DeepSpeed 0.19.2, which frees them before they are computed again, and with 4-bit weights
    it keeps all of them gathered until the backward pass ends.
    Args:
        zero3: whether that is the engine; frozen: whether some weights are; quantized: whether these have 4 bits;
        deepspeed: its version, as text.
    """
    from packaging.version import Version

    return zero3 and frozen and (quantized or Version(deepspeed) <= Version("0.19.2"))


def set_checkpointing(args, value):
    """Gradient checkpointing on, off or (None) not yet chosen; transformers 5.23 has a second name for it."""
    args.gradient_checkpointing = args.activation_checkpointing = value


def settle_checkpointing(model, args, quantized):
    """Prepare the model for --gradient_checkpointing, of the kind that the engine needs unless the user chose one."""
    if not args.gradient_checkpointing:
        return
    model.enable_input_require_grads()  # frozen embeddings would cut the graph before the first checkpoint
    newest = "activation_checkpointing_kwargs"  # as transformers 5.23 calls it
    name = newest if hasattr(args, newest) else "gradient_checkpointing_kwargs"
    chosen = dict(getattr(args, name) or {})
    if zero3(args):
        import deepspeed

        chosen.setdefault("use_reentrant", use_reentrant(True, args.use_lora, quantized, deepspeed.__version__))
    setattr(args, name, {"use_reentrant": False, **chosen})


def mark_experts(model, args):
    """Under ZeRO-3 gather a mixture-of-experts layer at once: ranks use different experts and would wait for ever."""
    experts = {
        type(module) for module in model.modules() if isinstance(getattr(module, "experts", None), torch.nn.Module)
    }
    if experts and zero3(args):
        from deepspeed.utils import set_z3_leaf_modules

        set_z3_leaf_modules(model, list(experts))


def really_runs(trainer):
    """Refuse to go on with another engine than the one asked for: libraries fall back on DDP without a word.

    Raises:
        UserError: the prepared model is not what the engine makes of it.
    """
    asked, wrapped = name(trainer.args), type(trainer.model_wrapped).__name__
    runs = {"Z": wrapped == "DeepSpeedEngine", "F": wrapped.startswith("FSDP"), "D": "DataParallel" in wrapped}
    if not runs.get(asked[0], True):
        raise UserError(f"{asked} was asked for and {wrapped} would run; see accelerate's and deepspeed's versions.")


def table():
    """TABLE in Markdown."""
    known = (TESTED, RUNS, GPU)
    lines = [f"| engine | {' | '.join(MODES)} |", "|---|---|---|---|"]
    for engine, verdicts in TABLE.items():
        lines.append(f"| {engine} | {' | '.join(text if text in known else f'refused: {text}' for text in verdicts)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
