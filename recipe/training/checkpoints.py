"""Checkpoints: what made one, what may change before it is resumed, which one is complete, what a folder must hold."""

import dataclasses
import glob
import hashlib
import inspect
import json
import os
import re
import shutil
from enum import Enum
from typing import Any

import torch
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)

from recipe.console import UserError, rank, say
from recipe.distributed import engines
from recipe.model.base_files import Names
from recipe.training import staging

COMPLETE = "checkpoint.json"  # the record of its run, written last, when every rank has written its part
BEST = "best"  # folder in the output folder with the weights of the lowest evaluation loss

# ----------------------------------------------------------------------------------------------------------------------
# What made a checkpoint, and what may change before it is resumed

# Flags that change neither the rows, nor the weights, nor how they are trained, and those whose meaning is one of the
# facts of `describe_run`. Every other flag is compared, also one that is added later.
NOT_COMPARED = frozenset(
    """
    model_name_or_path trust_remote_code chat_template cache_dir data_path eval_data_path metric eval_generate
    preview validate_only dump_tokens
    output_dir resume_from_checkpoint ignore_data_skip restore_callback_states_from_checkpoint
    per_device_train_batch_size gradient_accumulation_steps bf16 fp16 use_lora q_lora lora_weight_path
    deepspeed fsdp fsdp_config accelerator_config parallelism_config use_cpu local_rank ddp_backend ddp_timeout
    ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_find_unused_parameters
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context dataloader_in_order remove_unused_columns label_names length_column_name
    gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing activation_checkpointing_kwargs
    activation_offloading tiled_mlp
    torch_empty_cache_steps use_cache skip_memory_metrics do_train do_eval do_predict debug
    logging_strategy logging_steps logging_first_step logging_nan_inf_filter log_level log_level_replica
    log_on_each_node disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
    trackio_static_space_id include_num_input_tokens_seen include_for_metrics
    eval_strategy eval_steps eval_delay eval_on_start eval_do_concat_batches eval_use_gather_object
    eval_accumulation_steps per_device_eval_batch_size prediction_loss_only batch_eval_metrics bf16_full_eval
    fp16_full_eval load_best_model_at_end metric_for_best_model greater_is_better
    save_strategy save_steps save_total_limit save_only_model save_on_signal stall_minutes save_on_each_node enable_jit_checkpoint
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    """.split()
)


class Change(Enum):
    """What follows from a fact or a flag that is not what it was when the checkpoint was saved."""

    WEIGHTS = "the weights or the optimizer's state mean something else: the run cannot go on"
    ROWS = "other rows come next: the run goes on if the user says so"
    COURSE = "training goes on in another way, which is printed"
    NOTHING = "the run goes on as it would have"


FACTS = {
    "base model": Change.WEIGHTS,
    "mode": Change.WEIGHTS,
    "continued adapter": Change.WEIGHTS,
    "state_dict_type": Change.WEIGHTS,  # of FSDP2: whether the files hold parts or wholes
    "engine": Change.NOTHING,  # these three depend on the engine, see `_consequences`
    "processes": Change.NOTHING,
    "precision": Change.COURSE,
    "rows a step": Change.ROWS,
    "rows sorted by length together": Change.ROWS,
    "data": Change.ROWS,
    "tokenizer": Change.ROWS,
    "chat template": Change.ROWS,
}
HASHED = {"base model", "continued adapter", "data", "tokenizer", "chat template"}
# A flag of finetune.py's ModelArguments and LoraArguments is one of weights, of DataArguments one of rows, of
# TrainingArguments one of the course of training, but for these.
FLAGS = {
    **dict.fromkeys(("attn_implementation", "lora_dropout"), Change.COURSE),
    **dict.fromkeys(("optim", "optim_args", "optim_target_modules"), Change.WEIGHTS),
    **dict.fromkeys(("seed", "data_seed", "model_max_length"), Change.ROWS),
    **dict.fromkeys(("train_sampling_strategy", "dataloader_drop_last"), Change.ROWS),
}
# The optimizer has these in its state, and goes on with what it was saved with.
KEPT_BY_OPTIMIZER = {"learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"}


def describe_run(model_args: Any, data_args: Any, training_args: Any, lora_args: Any, dataset: Any) -> dict[str, Any]:
    """Return what a checkpoint must remember of its run.

    Args:
        model_args, data_args, training_args, lora_args: The instances of finetune.py's argument classes.
        dataset: The SupervisedDataset to train on.

    Returns:
        {name: value} in types of JSON: those of FACTS, and {flag: value} of the compared flags under "flags".
    """
    args, tokenizer = training_args, dataset.tokeniser.encoder.tokenizer
    each = args.per_device_train_batch_size * args.gradient_accumulation_steps
    classes = [model_args, data_args, args, *([lora_args] if args.use_lora else [])]
    flags = {field.name: getattr(part, field.name) for part in classes for field in dataclasses.fields(part)}
    record = {
        "base model": _model(model_args.model_name_or_path),
        "mode": engines.training_mode(args, lora_args),
        "continued adapter": _adapter(lora_args.lora_weight_path),
        "engine": engines.engine_of(args).label,
        "state_dict_type": args.fsdp_config["state_dict_type"] if args.fsdp else None,
        "processes": args.world_size,
        "precision": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
        "rows a step": each * args.world_size // args.sequence_parallel,
        "rows sorted by length together": each if args.train_sampling_strategy == "group_by_length" else None,
        "data": _data(dataset),
        "tokenizer": _digest(json.dumps([tokenizer.get_vocab(), tokenizer.special_tokens_map], sort_keys=True)),
        "chat template": _digest(json.dumps(tokenizer.chat_template)),
        "flags": {name: value for name, value in flags.items() if name not in NOT_COMPARED},
    }
    return _plain(record)


def _plain(value: Any) -> Any:
    """Return a value as it is after it was written to JSON and read again."""
    return json.loads(json.dumps(value, default=lambda other: getattr(other, "value", str(other))))


def _digest(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def _model(path: str) -> str:
    """Return the name of a hub model; of a folder, a hash of its configuration and of both ends of its weights."""
    if not os.path.isdir(path):
        return path
    digest = hashlib.sha256()
    for name in sorted(os.listdir(path)):
        if name == CONFIG_NAME or name.endswith((".safetensors", ".bin")):
            with open(os.path.join(path, name), "rb") as file:
                digest.update(file.read(1 << 16))
                file.seek(max(0, os.path.getsize(file.name) - (1 << 16)))
                digest.update(file.read())
    return digest.hexdigest()


def _adapter(path: str) -> str | None:
    """Return a hash of the configuration of the adapter to continue from, or its hub name."""
    config = os.path.join(path, ADAPTER_CONFIG_NAME)
    if not path or not os.path.exists(config):
        return path or None
    with open(config, "rb") as file:
        return _digest(file.read())


def _data(dataset: Any, sample: int = 64) -> str:
    """Return how many conversations and rows there are, and a hash of some of them, wherever their files lie."""
    conversations = dataset.conversations
    chosen = range(0, len(conversations), max(1, len(conversations) // sample))
    text = json.dumps(list(conversations.readable(chosen)), default=vars, sort_keys=True)
    weights = [source.weight for source in conversations.sources]
    text += str(weights) if any(weights) else ""
    return f"{len(conversations)} {len(dataset)} {_digest(text)}"


def refuse_changed_run(
    checkpoint: str, now: dict[str, Any], argument_classes: tuple[type, ...], ignore_data_skip: bool
) -> None:
    """Refuse to resume the checkpoint of another run, before any weights are loaded; print changes that are allowed.

    Args:
        checkpoint: Its folder.
        now: `describe_run` of the run that is to go on.
        argument_classes: finetune.py's ModelArguments, DataArguments, TrainingArguments and LoraArguments.
        ignore_data_skip: Whether the rows may have changed.

    Raises:
        UserError: What changed, and the way out.
    """
    then = record_of(checkpoint)
    if "flags" not in then:
        say(f"{checkpoint} has no {COMPLETE} with the flags of its run: what has changed since is not known.")
    if "state_dict_type" not in then and str(then.get("engine")).startswith(engines.FSDP2.label):
        then["state_dict_type"] = "FULL_STATE_DICT"  # before it was recorded
    changes: dict[Change, list[str]] = {kind: [] for kind in Change}
    consequences = _consequences(then, now, argument_classes)
    for name in FACTS:
        if name in then and then[name] != now[name]:
            shown = "" if name in HASHED else f" ({then[name]} then, {now[name]} now)"
            changes[consequences[name]].append(f"the {name}{shown}")
    added = _defaults(argument_classes) if then.get("mode") == now["mode"] else {}
    flags = added | then.get("flags", now["flags"])
    for name, value in now["flags"].items():
        if name in flags and flags[name] != value:
            kept = "; the optimizer keeps what it has" if name in KEPT_BY_OPTIMIZER else ""
            changes[consequences[name]].append(f"--{name} ({flags[name]} then, {value} now{kept})")

    weights, rows = changes[Change.WEIGHTS], changes[Change.ROWS]
    if weights or rows and not ignore_data_skip:
        source = "--model_name_or_path" if then.get("mode") == engines.Mode.FULL else "--lora_weight_path"
        way = f"start a new run from its weights with {source} {checkpoint}"
        if not weights:
            way = f"go on with the rows as they are now with --ignore_data_skip True, or {way}"
        refused = weights if ignore_data_skip else weights + rows
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: {', '.join(refused)} changed since it was saved; set "
            f"{'them' if refused[1:] else 'it'} back, or {way}."
        )
    if rows + changes[Change.COURSE]:
        say(f"since {checkpoint} was saved there have changed: {', '.join(rows + changes[Change.COURSE])}.")


def _consequences(then: dict, now: dict, argument_classes: tuple[type, ...]) -> dict[str, Change]:
    """Return what follows from a change of each fact and flag under the engine of now."""
    model, data, training, lora = ([field.name for field in dataclasses.fields(part)] for part in argument_classes)
    result = {**FACTS, **dict.fromkeys(model + lora, Change.WEIGHTS), **dict.fromkeys(data, Change.ROWS)}
    result |= {**dict.fromkeys(training, Change.COURSE), **FLAGS}
    engine, saved_by = engines.ENGINES[now["engine"]], engines.ENGINES.get(then.get("engine", now["engine"]))
    if saved_by is None or saved_by.checkpoint_format != engine.checkpoint_format:
        result["engine"] = Change.WEIGHTS
    if not engine.resumes_with_other_world_size:
        result["processes"] = Change.WEIGHTS
    if engine.masters_apart:
        result["precision"] = Change.WEIGHTS  # that of the weights in the checkpoint
    if now["flags"].get("rope_scaling"):
        result["model_max_length"] = Change.WEIGHTS  # to which the positions are stretched
    return result


def _defaults(argument_classes: tuple[type, ...]) -> dict[str, Any]:
    """Return what a flag of this recipe was in a run whose checkpoint does not know it: it was added since."""
    return {
        field.name: _plain(field.default)
        for part in argument_classes
        for field in dataclasses.fields(part)
        if field.name in inspect.get_annotations(part) and field.default is not dataclasses.MISSING
    }


def write_record(checkpoint: str, record: dict[str, Any]) -> None:
    """Mark a checkpoint as complete, which all ranks have written, with the record of its run."""
    with open(os.path.join(checkpoint, COMPLETE), "w", encoding="utf-8") as file:
        json.dump(record, file)


def record_of(checkpoint: str) -> dict[str, Any]:
    """Return what `describe_run` said of the run that wrote a checkpoint; {} where another program wrote it."""
    try:
        with open(os.path.join(checkpoint, COMPLETE), encoding="utf-8") as file:
            record = json.load(file)
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and FACTS.keys() & record.keys() else {}


# ----------------------------------------------------------------------------------------------------------------------
# Which checkpoint to resume


def recorded_precision(asked: str | None, output_dir: str) -> str | None:
    """Return the computing precision of the checkpoint that --resume_from_checkpoint means, or None if none is known.

    Args:
        asked, output_dir: As in `find_checkpoint`, which later says what is wrong with them.
    """
    word = str(asked).lower()
    if asked is None or word == "false":
        return None
    folders = _checkpoints(output_dir) if word in ("true", "auto") else [asked]
    return next((record["precision"] for record in map(record_of, reversed(folders)) if "precision" in record), None)


def find_checkpoint(asked: str | None, output_dir: str, recover: bool = True) -> str | None:
    """Return the checkpoint that --resume_from_checkpoint means, or None. Every rank must call it, and gets the same.

    Args:
        asked: A folder, "auto" (the newest complete checkpoint of output_dir; from the beginning if there is none),
            "True" (the same, but then an error), or None.
        output_dir: Folder of the run.
        recover: Whether to clear up first what a run has left that was killed while it wrote a checkpoint.

    Raises:
        UserError: There is no such checkpoint, or those that there are were damaged later.
    """
    from accelerate.utils import broadcast_object_list

    found: list[str | None] = [None, None]
    if asked is None or str(asked).lower() == "false":
        return None
    if rank() == 0:
        try:
            found[0] = _find(asked, output_dir, recover)
        except UserError as error:
            found[1] = str(error)
    broadcast_object_list(found)
    if found[1]:
        raise UserError(found[1])
    return found[0]


def _find(asked: str, output_dir: str, recover: bool) -> str | None:
    word = asked.lower()
    if word not in ("true", "auto"):
        if not os.path.exists(os.path.join(asked, TRAINER_STATE_NAME)):
            raise UserError(
                f"--resume_from_checkpoint {asked}: no folder of a checkpoint (it lacks {TRAINER_STATE_NAME})."
            )
        if not record_of(asked):  # optimizer states are pickles, and DeepSpeed runs what a pickle says
            raise UserError(
                f"--resume_from_checkpoint {asked}: has no {COMPLETE} of this recipe, so another program wrote it, or it "
                "was not written to its end; start a new run from its weights with --model_name_or_path or "
                "--lora_weight_path."
            )
        if problem := why_incomplete(asked):
            raise UserError(f"--resume_from_checkpoint {asked}: {problem}")
        return asked
    for name in staging.recover(output_dir) if recover else []:
        say(f"{output_dir}: {name} was being written when the run ended; that part of it is deleted.")
    folders = _checkpoints(output_dir)
    for folder in reversed(folders):
        problem = why_incomplete(folder)
        if not problem:
            return folder
        say(f"{folder}: left out: {problem}")
    if word == "auto" and not any(map(record_of, folders)):
        say(f"{output_dir} holds no complete checkpoint: training from the beginning.")
        return None
    raise UserError(f"--resume_from_checkpoint {asked}: {output_dir} holds no complete checkpoint to resume from.")


def _checkpoints(output_dir: str) -> list[str]:
    """Return the folders of checkpoints by their optimizer step, the oldest first."""
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    names = os.listdir(output_dir) if os.path.isdir(output_dir) else []
    steps = sorted((int(match[1]), match[0]) for match in map(pattern.fullmatch, names) if match)
    return [os.path.join(output_dir, name) for _, name in steps]


def newest(output_dir: str) -> str | None:
    """Return the folder of the checkpoint with the most optimizer steps, if there is one."""
    return next(reversed(_checkpoints(output_dir)), None)


def why_incomplete(folder: str) -> str | None:
    """Return the reason why a checkpoint is incomplete, or None."""
    if not record_of(folder):
        return "it was not written to its end by this recipe."
    try:
        verify_saved(folder, read=False)  # the numbers were read when they were written, and every rank is here
    except UserError as error:
        return str(error)
    return None


def rotate(output_dir: str, limit: int | None, newest: str, best: str | None) -> None:
    """Delete complete checkpoints beyond `limit`: those of an earlier run with more steps first, then the oldest.

    Args:
        output_dir: Folder of the run.
        limit: How many to keep (None or 0: all).
        newest: Name of the checkpoint that was just written, which is kept.
        best: Path of another one to keep, or None.
    """
    if not limit or limit < 0:
        return
    names = [os.path.basename(folder) for folder in _checkpoints(output_dir) if record_of(folder)]
    kept = {newest, os.path.basename(best or newest)}
    later = names[names.index(newest) + 1 :]
    others = [name for name in later + names if name not in kept]
    for name in list(dict.fromkeys(others))[: max(0, len(names) - max(limit, len(kept)))]:
        staging.discard(output_dir, name)
    shutil.rmtree(os.path.join(output_dir, staging.SAVING), ignore_errors=True)


# ----------------------------------------------------------------------------------------------------------------------
# What a folder of weights must hold


def verify_saved(
    folder: str,
    state: dict[str, torch.Tensor] | None = None,
    moved: bool = False,
    base_names: Names | None = None,
    read: bool = True,
) -> None:
    """Open what was written: nothing is missing, every number is there and finite, an adapter has learnt something.

    Args:
        folder: Where a model or an adapter was saved.
        state: {name: tensor} that should be there, of an adapter with peft's names (None: known from the files alone).
        moved: Whether training must have changed the weights.
        base_names: Names of the tensors that the files of a whole model must have: those of its base model.
        read: Whether to read the tensors; without, files that end early or are missing are still found.

    Raises:
        UserError: What is wrong with which file.
    """
    adapter = os.path.exists(os.path.join(folder, ADAPTER_CONFIG_NAME))
    files = _weight_files(folder, adapter)
    names = tensor_names(files)
    if read:
        sizes, zero = _read_tensors(files)
        if state is not None:
            _refuse_other_sizes(folder, sizes, state, adapter)
        if moved and adapter:
            _refuse_unmoved(folder, sizes, zero)
    if base_names and (odd := sorted((names ^ base_names.all) - base_names.shared)):
        raise UserError(
            f"{folder}: {len(odd)} names of weights are not those of the base model, the first is {odd[0]}."
        )


def _weight_files(folder: str, adapter: bool) -> list[str]:
    pattern = ADAPTER_SAFE_WEIGHTS_NAME if adapter else SAFE_WEIGHTS_NAME.replace(".", "*.")
    files = sorted(glob.glob(os.path.join(glob.escape(folder), pattern)))
    if not files:
        raise UserError(f"{folder}: no weights were written.")
    index = os.path.join(folder, SAFE_WEIGHTS_INDEX_NAME)
    if not adapter and os.path.exists(index):
        with open(index, encoding="utf-8") as file:
            missing = set(json.load(file)["weight_map"].values()) - {os.path.basename(path) for path in files}
        if missing:
            raise UserError(f"{folder}: lacks {', '.join(sorted(missing))}.")
    return files


def tensor_names(files: list[str]) -> set[str]:
    """Return the names of all tensors in safetensors files, whose headers alone are read.

    Raises:
        UserError: A file ends early, or is none.
    """
    from safetensors import SafetensorError, safe_open

    names: set[str] = set()
    for path in files:
        try:
            with safe_open(path, "pt") as saved:
                names.update(saved.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cannot be read again: {error}.") from None
    return names


def _read_tensors(files: list[str]) -> tuple[dict[str, int], set[str]]:
    """Return {name: elements} of all tensors, and the names of those that hold nothing but zeros."""
    from safetensors import safe_open

    sizes, zero = {}, set()
    for path in files:
        with safe_open(path, "pt") as saved:
            for name in saved.keys():
                tensor = saved.get_tensor(name)
                if not tensor.numel():
                    raise UserError(f"{path}: {name} is empty; its parts were not gathered.")
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    raise UserError(f"{path}: {name} is not finite.")
                sizes[name] = tensor.numel()
                if not tensor.any():
                    zero.add(name)
    return sizes, zero


def _refuse_other_sizes(folder: str, sizes: dict[str, int], state: dict[str, torch.Tensor], adapter: bool) -> None:
    found, expected = sum(sizes.values()), sum(tensor.numel() for tensor in state.values())
    once = sum(tensor.numel() for tensor in {id(tensor): tensor for tensor in state.values()}.values())
    # peft writes each name, transformers writes weights with several names once, and may rename some
    if found != expected and (adapter or found != once) or adapter and sizes.keys() != state.keys():
        raise UserError(
            f"{folder}: holds {found:,} numbers in {len(sizes)} tensors, expected the {expected:,} in {len(state)} "
            "that were trained."
        )


def _refuse_unmoved(folder: str, sizes: dict[str, int], zero: set[str]) -> None:
    """Refuse a LoRA adapter whose every B is still zero, as it was at the start; adapters of other types start else."""
    starts = {name for name in sizes if ".lora_B" in name}
    if starts and starts <= zero:
        raise UserError(f"{folder}: every lora_B is still zero: the adapter has learnt nothing; see --learning_rate.")
