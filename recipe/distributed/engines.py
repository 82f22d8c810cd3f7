"""The engines that share a training out over processes: what each does, what it can train, and how it is set up.

An engine is one process alone, DDP, DeepSpeed ZeRO-2 or ZeRO-3, or FSDP2. Other modules ask the fields of an `Engine`;
a new engine is one more entry of ENGINES, and a line in `engine_of` if another flag chooses it.
"""

import contextlib
import copy
import dataclasses
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from enum import StrEnum
from typing import Any, TypeAlias

import torch

from recipe import console
from recipe.console import UserError, say

TrainingArguments: TypeAlias = Any  # the class of finetune.py, which lies above this room
Settings = dict[str, Any]  # a configuration of accelerate, DeepSpeed or FSDP, as in its JSON file


class Mode(StrEnum):
    """What is trained: all weights, an adapter, or an adapter of a base model in 4 bits."""

    FULL = "full"
    LORA = "LoRA"
    QLORA = "QLoRA"


class Verdict(StrEnum):
    """What tests/distributed/test_engines.py does with an engine on two CPU ranks, compared with one process."""

    RESUMES = "trained, saved, resumed"
    TRAINS = "trained"
    GPU = "needs a GPU, untested"


@dataclasses.dataclass(frozen=True)
class Engine:
    """The facts of one engine that the rest of the recipe depends on.

    Attributes:
        label: Name in messages, in checkpoints and in the README.
        verdict: What was tested.
        refuses: The modes that the engine cannot train, each with the reason and the remedy.
        deepspeed_stage: ZeRO stage, or 0 for an engine that is not DeepSpeed's.
        offloads: Whether gradients and optimizer, and what else the engine shards, are in main memory.
        shards_weights: Whether no process holds all weights while it trains.
        shards_optimizer: Whether each process holds a part of the gradients and of the optimizer's state.
        copies_gradients: Whether gradients are reduced in buckets that hold all of them once more.
        masters_apart: Whether weights are trained in the computing precision and the optimizer keeps them in float32.
        keeps_gradients: Whether `parameter.grad` is there until the optimizer's step.
        wrapped_class: Name of the class of the model that the Trainer trains, or of one that it inherits from;
            empty if that is the model itself.
        checkpoint_format: Engines of one format can resume each other's checkpoints.
        checkpoint_copies: How often a checkpoint holds the trained weights besides the files to load the model from
            and the optimizer's state.
        resumes_with_other_world_size: Whether a checkpoint can be resumed with another number of processes.
    """

    label: str
    verdict: Verdict
    refuses: Mapping[Mode, str] = dataclasses.field(default_factory=dict)
    deepspeed_stage: int = 0
    offloads: bool = False
    shards_weights: bool = False
    shards_optimizer: bool = False
    copies_gradients: bool = False
    masters_apart: bool = False
    keeps_gradients: bool = True
    wrapped_class: str = ""
    checkpoint_format: str = "whole"
    checkpoint_copies: int = 0
    resumes_with_other_world_size: bool = True

    def extra_checkpoint_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of `checkpoint_copies` for each trained parameter, `dtype` being the computing precision."""
        return self.checkpoint_copies * (dtype.itemsize if self.masters_apart else 4)


ONE_PROCESS = Engine("one process", Verdict.RESUMES)
DDP = Engine("DDP", Verdict.RESUMES, copies_gradients=True, wrapped_class="DistributedDataParallel")
ZERO2 = Engine(
    "ZeRO-2",
    Verdict.RESUMES,
    deepspeed_stage=2,
    shards_optimizer=True,
    masters_apart=True,
    keeps_gradients=False,
    wrapped_class="DeepSpeedEngine",
    checkpoint_format="ZeRO-2",
    checkpoint_copies=2,
    resumes_with_other_world_size=False,
)
ZERO3 = dataclasses.replace(
    ZERO2, label="ZeRO-3", deepspeed_stage=3, shards_weights=True, checkpoint_format="ZeRO-3", checkpoint_copies=1
)
FSDP2 = Engine(
    "FSDP2",
    Verdict.RESUMES,
    shards_weights=True,
    shards_optimizer=True,
    wrapped_class="FSDPModule",
    checkpoint_format="FSDP2",
    checkpoint_copies=1,
)
ZERO2_OFFLOAD = dataclasses.replace(ZERO2, label="ZeRO-2 offload", verdict=Verdict.TRAINS, offloads=True)
ZERO3_OFFLOAD = dataclasses.replace(ZERO3, label="ZeRO-3 offload", verdict=Verdict.TRAINS, offloads=True)
FSDP2_OFFLOAD = dataclasses.replace(
    FSDP2,
    label="FSDP2 offload",
    verdict=Verdict.GPU,
    offloads=True,
    refuses={Mode.QLORA: "4-bit weights stay on the GPU: leave cpu_offload out"},
)
ENGINES = {
    engine.label: engine
    for engine in (ONE_PROCESS, DDP, ZERO2, ZERO2_OFFLOAD, ZERO3, ZERO3_OFFLOAD, FSDP2, FSDP2_OFFLOAD)
}
OFFLOADED = ("offload_optimizer", "offload_param")  # entries of DeepSpeed's zero_optimization
FLAG_OF_ENTRY = {  # entry of a DeepSpeed configuration: flag it follows; a configuration that lacks one gets "auto"
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "bf16.enabled": "bf16",
    "fp16.enabled": "fp16",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "weight_decay",
}


def engine_of(args: TrainingArguments) -> Engine:
    """Return the engine that these arguments choose, after `set_up`.

    Raises:
        UserError: The DeepSpeed stage is none of those in ENGINES.
    """
    if args.deepspeed:
        zero = args.deepspeed["zero_optimization"]
        offloads = any(zero.get(part, {}).get("device", "none") != "none" for part in OFFLOADED)
        stages = {(engine.deepspeed_stage, engine.offloads): engine for engine in ENGINES.values()}
        stage = zero.get("stage", 0)
        if not stage or (stage, offloads) not in stages:
            raise UserError(f"--deepspeed: stage {stage} is not supported; use stage 2 or 3.")
        return stages[stage, offloads]
    if args.fsdp:
        return FSDP2_OFFLOAD if args.fsdp_config.get("cpu_offload") else FSDP2
    several = args.world_size > 1 or console.launched()  # accelerate wraps a launcher's only process, too
    return DDP if several else ONE_PROCESS


def training_mode(args: TrainingArguments, lora_args: Any) -> Mode:
    """Return what finetune.py's TrainingArguments and LoraArguments train."""
    return Mode.QLORA if lora_args.q_lora else Mode.LORA if args.use_lora else Mode.FULL


def refuse_unsupported(args: TrainingArguments, lora_args: Any) -> None:
    """Refuse what the engine cannot train.

    Raises:
        UserError: What is not supported, with the remedy.
    """
    engine, mode = engine_of(args), training_mode(args, lora_args)
    if mode in engine.refuses:
        raise UserError(f"{mode} training with {engine.label}: {engine.refuses[mode]}.")


def assert_engine_runs(trainer: Any) -> None:
    """Compare the engine that was chosen with the class of the prepared model: libraries may fall back on DDP silently.

    Raises:
        UserError: Another engine would run.
    """
    engine, model = engine_of(trainer.args), trainer.model_wrapped
    classes = {parent.__name__ for parent in type(model).__mro__}
    wrappers = {known.wrapped_class for known in ENGINES.values() if known.wrapped_class} & classes
    expected = {engine.wrapped_class} if engine.wrapped_class else set()
    if wrappers != expected or not expected and model is not trainer.model:
        raise UserError(
            f"{engine.label} was asked for and {type(model).__name__} would run; see accelerate's and deepspeed's "
            "versions."
        )


# ----------------------------------------------------------------------------------------------------------------------
# Before the process group starts


def set_up(args: TrainingArguments) -> None:
    """Read the engine's configuration, and start the process group where accelerate would start another engine's.

    `deepspeed` and `fsdp_config` of `args` become dicts of their own. A second instance, or a copy of one, can be set
    up in the same process.

    Args:
        args: Arguments at the start of their __post_init__.

    Raises:
        UserError: A configuration cannot be read, is not supported, or would override the command line.
    """
    if args.deepspeed and args.fsdp:
        raise UserError("--deepspeed and --fsdp exclude each other; give one of them.")
    processes = console.world_size()
    library = "DeepSpeed" if args.deepspeed else "FSDP" if args.fsdp else ""
    if library and args.use_cpu and processes == 1:
        say(f"{library} is left out: one process on a CPU has nothing to share out.")
        args.deepspeed = args.fsdp = None
        return
    if args.deepspeed:
        args.deepspeed = deepspeed_config(args)
    elif args.fsdp:
        args.fsdp_config = fsdp_config(args)
        # Without this entry accelerate keeps whole gradients on every process between the micro-batches of a step.
        _configure_accelerator(args, gradient_accumulation_kwargs={"sync_each_batch": True})
    if args.deepspeed or args.fsdp:
        _set_environment(args)
    if args.use_cpu and library:
        _start_engine_on_cpu(args, library)
    elif args.use_cpu and processes > 1:
        _start_ddp_on_cpu(args)


def _set_environment(args: TrainingArguments) -> None:
    """Set the environment variables that the engine's libraries read; nothing else here changes the environment.

    ACCELERATE_USE_FSDP and FSDP_STATE_DICT_TYPE let accelerate start a process group that also reduces tensors in main
    memory, which gathering whole weights and offloading need. RANK to MASTER_PORT are what a launcher would set: both
    libraries want a process group, also for one process on one GPU.
    """
    if args.fsdp:
        os.environ.setdefault("ACCELERATE_USE_FSDP", "true")
        os.environ.setdefault("FSDP_STATE_DICT_TYPE", args.fsdp_config["state_dict_type"])
    if not args.use_cpu and not console.launched():
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({**alone, "MASTER_PORT": str(_free_port())})


def _start_ddp_on_cpu(args: TrainingArguments) -> None:
    """Start the process group as transformers does, but with --ddp_timeout, which it passes on for GPUs only."""
    from accelerate import PartialState

    PartialState(cpu=True, backend=args.ddp_backend, timeout=timedelta(seconds=args.ddp_timeout))


def _start_engine_on_cpu(args: TrainingArguments, library: str) -> None:
    """Start a gloo process group that accelerate takes for one of DeepSpeed or FSDP.

    With `use_cpu` accelerate would run DDP and not say so.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType, patch_environment

    if args.bf16 or args.fp16:
        say(f"{library} on a CPU computes in float32.")
        args.bf16 = args.fp16 = False
    timeout = timedelta(seconds=args.ddp_timeout)
    if args.deepspeed:
        with patch_environment(ACCELERATE_USE_DEEPSPEED="true"):
            PartialState(backend="gloo", timeout=timeout)
    else:
        if args.fsdp_config.pop("cpu_offload", False):
            say("--fsdp_config: cpu_offload is left out: on a CPU everything is in main memory.")
        # accelerate takes MULTI_GPU for FSDP when it has an FSDP plugin.
        PartialState(cpu=True, timeout=timeout).distributed_type = DistributedType.MULTI_GPU
    _configure_accelerator(args, use_configured_state=True)
    args.use_cpu, args.dataloader_pin_memory = False, False


def _configure_accelerator(args: TrainingArguments, **entries: Any) -> None:
    given = args.accelerator_config or {}
    if hasattr(given, "to_dict"):  # of a copy of arguments that were set up before
        given = given.to_dict()
    args.accelerator_config = _read("accelerator_config", given) | entries


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _read(flag: str, path: str | Settings) -> Settings:
    """Read a JSON file; if `path` is missing, the file of the same base name that comes with this recipe."""
    if isinstance(path, dict):
        return copy.deepcopy(path)
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


def deepspeed_config(args: TrainingArguments) -> Settings:
    """Return the DeepSpeed configuration, with "auto" for the entries that it leaves open.

    Raises:
        UserError: It would override the command line.
    """
    config = _read("deepspeed", args.deepspeed)
    source = args.deepspeed if isinstance(args.deepspeed, str) else "(JSON)"
    zero = config.setdefault("zero_optimization", {})
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
    for entry, flag in FLAG_OF_ENTRY.items():
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
    if zero.get("stage") == 3:
        zero.setdefault("stage3_gather_16bit_weights_on_model_save", True)
    return config


def fsdp_config(args: TrainingArguments) -> Settings:
    """Return the FSDP2 configuration and make `fsdp` True, whatever older spelling it had.

    Raises:
        UserError: It asks for FSDP1.
    """
    config = _read("fsdp_config", args.fsdp_config or {})
    config = {entry.removeprefix("fsdp_"): value for entry, value in config.items()}
    if "offload" in str(args.fsdp).split():  # the spelling of FSDP1: "full_shard auto_wrap offload"
        config.setdefault("cpu_offload", True)
    args.fsdp = True
    if int(config.setdefault("version", 2)) != 2:
        raise UserError(f"--fsdp_config: version {config['version']} is not supported; use 2.")
    config.setdefault("cpu_ram_efficient_loading", True)
    # In a checkpoint of full training each rank writes its part; an adapter is small, and whole.
    kind = config.setdefault("state_dict_type", "FULL_STATE_DICT" if args.use_lora else "SHARDED_STATE_DICT")
    config["state_dict_type"] = str(kind).upper()
    return config


# ----------------------------------------------------------------------------------------------------------------------
# The model under an engine


def use_reentrant(zero3: bool, frozen: bool, quantized: bool, deepspeed: str) -> bool:
    """Return whether gradient checkpointing must be of the reentrant kind.

    The reentrant kind breaks DDP with frozen weights ("mark a variable ready only once"). The other kind breaks ZeRO-3
    with frozen weights up to DeepSpeed 0.19.2, which frees them before they are computed again; with 4-bit weights it
    keeps all of them gathered until the backward pass ends.

    Args:
        zero3: Whether ZeRO-3 is the engine.
        frozen: Whether some weights are frozen.
        quantized: Whether the frozen weights have 4 bits.
        deepspeed: Version of DeepSpeed.
    """
    from packaging.version import Version

    return zero3 and frozen and (quantized or Version(deepspeed) <= Version("0.19.2"))


def set_checkpointing(args: TrainingArguments, value: bool | None) -> None:
    """Switch gradient checkpointing on, off or to "not chosen" (None), under both names that transformers 5.23 has."""
    args.gradient_checkpointing = args.activation_checkpointing = value


def settle_checkpointing(model: Any, args: TrainingArguments, quantized: bool) -> None:
    """Prepare the model for gradient checkpointing of the kind that the engine needs, unless the user chose one."""
    if not args.gradient_checkpointing:
        return
    model.enable_input_require_grads()  # frozen embeddings would cut the graph before the first checkpoint
    newest = "activation_checkpointing_kwargs"  # its name since transformers 5.23
    name = newest if hasattr(args, newest) else "gradient_checkpointing_kwargs"
    chosen = dict(getattr(args, name) or {})
    if engine_of(args).deepspeed_stage == 3:
        import deepspeed

        chosen.setdefault("use_reentrant", use_reentrant(True, args.use_lora, quantized, deepspeed.__version__))
    setattr(args, name, {"use_reentrant": False, **chosen})


@contextlib.contextmanager
def whole_models(args: TrainingArguments) -> Iterator[None]:
    """Within the context, models are made and loaded as without an engine; ZeRO-3 would hold them in parts."""
    from transformers.integrations import deepspeed

    if not args.deepspeed:
        yield
        return
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed.set_hf_deepspeed_config(args.hf_deepspeed_config)


def settle_loading(args: TrainingArguments, model: Any, buffers: Sequence[str]) -> None:
    """Choose how the ranks of FSDP2 load a model, before they do.

    Args:
        args: TrainingArguments of finetune.py; rank 0 alone reads the files by default and passes parameters on.
        model: The model, or its skeleton.
        buffers: Names of the buffers in its files. accelerate does not pass these on and raises an error, so every rank
            reads the files of a model that has some.

    Raises:
        UserError: FSDP2 cannot train the model.
    """
    if engine_of(args).wrapped_class != FSDP2.wrapped_class:
        return
    config = model.config
    if config.model_type == "gemma4" and config.get_text_config().hidden_size_per_layer_input:
        raise UserError(
            f"{config.model_type} with {engine_of(args).label}: a model with embeddings of its own in each layer reads "
            "a weight that is held in parts; use DDP or ZeRO-3 (--deepspeed ds_config_zero3.json)."
        )
    if args.fsdp_plugin_args["cpu_ram_efficient_loading"] and buffers:
        say(f"every process reads the weights itself: FSDP2 cannot pass on buffers such as {buffers[0]}.")
        args.fsdp_plugin_args["cpu_ram_efficient_loading"] = False
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def adapt_model(model: Any, args: TrainingArguments) -> None:
    """Tell the engine which modules of a loaded model belong together.

    ZeRO-3 gathers a mixture-of-experts layer at once, and an indexer of sparse attention: ranks use different experts,
    or call layers of the indexer once for each token, and would wait for each other forever. Experts that lie in a
    decoder layer itself, as in Gemma 4, are gathered without the rest of it.

    FSDP2 shards the classes in `_no_split_modules` one by one, and refuses a model that has no module of one of them,
    such as the text part of a model whose list names the blocks of its vision tower as well.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer  # the base class of transformers' layers

    classes = {type(module) for module in model.modules()}
    if model._no_split_modules is not None:
        model._no_split_modules = set(model._no_split_modules) & {kind.__name__ for kind in classes}
    whole = {
        type(module.experts if isinstance(module, GradientCheckpointingLayer) else module)
        for module in model.modules()
        if isinstance(getattr(module, "experts", None), torch.nn.Module)
    }
    whole |= {type(module) for name, module in model.named_modules() if name.rpartition(".")[2] == "indexer"}
    if whole and engine_of(args).deepspeed_stage == 3:
        from deepspeed.utils import set_z3_leaf_modules

        set_z3_leaf_modules(model, list(whole))
