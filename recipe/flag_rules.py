"""Check the flags against each other, before anything is loaded, and complete what follows from them.

The argument classes of finetune.py check one field each; the rules here need several of them.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from transformers.utils import ADAPTER_CONFIG_NAME

from recipe import command_line
from recipe.command_line import Bounds
from recipe.console import UserError, say
from recipe.dataset.conversations import named_sources
from recipe.dataset.sources import parse_sources
from recipe.distributed import engines
from recipe.model.loading import Pretrained, adapter_config, refuse_changed_base
from recipe.training import checkpoints
from recipe.training.answers import load_metric

INHERITED_BOUNDS = {  # of flags that transformers declares; those of our own stand in their fields
    "per_device_train_batch_size": Bounds(1),
    "per_device_eval_batch_size": Bounds(1),
    "gradient_accumulation_steps": Bounds(1),
    "num_train_epochs": Bounds(0),
    "learning_rate": Bounds(0),
    "weight_decay": Bounds(0),
    "max_grad_norm": Bounds(0),
    "adam_beta1": Bounds(0, 1),
    "adam_beta2": Bounds(0, 1),
}
WITHOUT_EFFECT = {  # inherited flags that other scripts or other kinds of evaluation read
    "do_predict", "include_for_metrics", "batch_eval_metrics", "eval_do_concat_batches", "label_names", "use_cache",
    "length_column_name", "prediction_loss_only", "remove_unused_columns",
}  # fmt: skip


def arguments_of(named: dict[str, Any], classes: Sequence[type]) -> tuple[Any, ...]:
    """Return one instance of each argument class of finetune.py, checked and completed.

    Args:
        named: the flags that were named, with their values.
        classes: the four argument classes.
    Raises:
        UserError: a flag has a wrong value, or contradicts another one.
    """
    values = {**command_line.defaults(classes), **named}
    implied = {}
    if (values["eval_data_path"] or values["eval_ratio"]) and values["eval_strategy"] == "no":
        implied["eval_strategy"] = "epoch"  # evaluation data is used
    arguments = command_line.build({**implied, **named}, classes)
    check_and_complete(*arguments, named)
    return arguments


def check_and_complete(
    model_args: Any, data_args: Any, training_args: Any, lora_args: Any, named: dict[str, Any]
) -> None:
    """Check the four argument instances of finetune.py against each other and fill in what follows from them.

    Args:
        named: the flags that were named, with their values.
    Raises:
        UserError: what was found, what was expected.
    """
    for name, value in (("model_name_or_path", model_args.model_name_or_path), ("data_path", data_args.data_path)):
        if not value:
            raise UserError(f"--{name} is required; see --help.")
    for arguments in (model_args, data_args, training_args, lora_args):
        _check_bounds(arguments)
    for name in sorted(WITHOUT_EFFECT & set(named)):
        say(f"--{name} has no effect in this script.")
    _lora(training_args, lora_args, named)
    engines.refuse_unsupported(training_args, lora_args)
    if getattr(training_args, "enable_jit_checkpoint", False):
        raise UserError("--enable_jit_checkpoint: leave it out; --save_on_signal saves on every signal and rank.")
    if training_args.auto_find_batch_size:
        raise UserError(
            "--auto_find_batch_size: lowers --per_device_train_batch_size and with it the rows of an optimizer step; leave "
            "it out, and if memory runs out, halve --per_device_train_batch_size and double --gradient_accumulation_steps."
        )
    looking = bool(data_args.preview or data_args.validate_only or data_args.dump_tokens)  # a run may be under way
    _folders(model_args, training_args, looking)
    _sampling(data_args, training_args)
    _packing(data_args, training_args, named)
    _long_rows(training_args, named)
    _shared_rows(model_args, training_args)
    _evaluation(data_args, training_args, named)


def _check_bounds(arguments: Any) -> None:
    for field in dataclasses.fields(arguments):
        value, bounds = getattr(arguments, field.name), field.metadata.get("choices")
        bounds = INHERITED_BOUNDS.get(field.name, bounds)
        if isinstance(bounds, Bounds) and value is not None and value not in bounds:
            raise UserError(f"--{field.name} {value}: expected a number of {bounds}.")


def _lora(training_args: Any, lora_args: Any, named: dict[str, Any]) -> None:
    """Any flag of an adapter switches --use_lora on, as in FastChat; 0 is a value, False and an empty text are none."""
    given = [name for name in vars(lora_args) if named.get(name) not in (None, "") and named[name] is not False]
    if not training_args.use_lora and (given or lora_args.q_lora or lora_args.lora_weight_path):
        if "use_lora" in named:
            raise UserError("--use_lora False contradicts the LoRA flags; remove one of them.")
        training_args.use_lora = True
        say("LoRA flags are given: training a LoRA adapter (--use_lora).")
    folder = lora_args.lora_weight_path
    if folder and set(given) - {"lora_weight_path", "q_lora"}:
        say("--lora_weight_path: the adapter's own rank, alpha, dropout and modules are used.")
    if folder and os.path.isdir(folder) and not os.path.exists(os.path.join(folder, ADAPTER_CONFIG_NAME)):
        raise UserError(f"--lora_weight_path {folder}: holds no {ADAPTER_CONFIG_NAME}, so no adapter.")
    if folder and os.path.isdir(folder):
        refuse_changed_base(adapter_config(Pretrained(folder, named_by="--lora_weight_path")), folder)
    if lora_args.lora_experts and not folder:
        _experts(lora_args)


def _experts(lora_args: Any) -> None:
    """Refuse adapters of experts that peft does not have."""
    start = lora_args.init_lora_weights
    refused = {
        "--use_dora": lora_args.use_dora,
        f"--lora_bias {lora_args.lora_bias}": lora_args.lora_bias != "none",
        f"--init_lora_weights {start}": start.lower() not in ("true", "false", "gaussian"),
    }
    for flag, given in refused.items():
        if given:
            raise UserError(
                f"--lora_experts and {flag} exclude each other, as peft has no such adapters of experts; leave out one "
                "of them."
            )
    if lora_args.lora_dropout:
        say("--lora_experts: no adapter has dropout, as peft cannot load an adapter of experts that has it.")
        lora_args.lora_dropout = 0.0


def _folders(model_args: Any, training_args: Any, looking: bool) -> None:
    folder = training_args.output_dir
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise UserError(f"--output_dir {folder}: is a file; expected a folder, or a new name.")
    if os.path.realpath(folder) == os.path.realpath(model_args.model_name_or_path):
        raise UserError(f"--output_dir {folder}: is the model to start from; name another folder.")
    training_args.resume_from_checkpoint = checkpoints.find_checkpoint(
        training_args.resume_from_checkpoint, folder, recover=not looking
    )


def _sampling(data_args: Any, training_args: Any) -> None:
    if training_args.train_sampling_strategy == "batch_rebalance":
        raise UserError("--train_sampling_strategy batch_rebalance: expected random, sequential or group_by_length.")
    if training_args.train_sampling_strategy == "group_by_length" and data_args.lazy_preprocess:
        raise UserError("--train_sampling_strategy group_by_length needs all lengths; leave out --lazy_preprocess.")
    weighted = any(source.weight for source in parse_sources(data_args.data_path, data_args.columns))
    if weighted and training_args.train_sampling_strategy != "random":
        raise UserError(
            f"--train_sampling_strategy {training_args.train_sampling_strategy}: --data_path has weights, by which rows "
            "are drawn at random; leave out one of them."
        )
    if any(source.weight for source in parse_sources(data_args.eval_data_path or [])):
        raise UserError("--eval_data_path: has weights; every row is evaluated once, so leave them out.")
    if data_args.validate_only or data_args.dump_tokens:
        data_args.lazy_preprocess = False  # all rows are looked at


def _long_rows(training_args: Any, named: dict[str, Any]) -> None:
    decided = {"gradient_checkpointing", "activation_checkpointing"} & set(named)
    if not decided:
        engines.set_checkpointing(training_args, None)  # plan.py chooses when the model is loaded
    for name in ("activation_offloading", "tiled_mlp"):
        if getattr(training_args, name) and training_args.torch_compile:
            raise UserError(f"--{name} and --torch_compile exclude each other; leave out one of them.")
    if not training_args.activation_offloading:
        return
    if decided and not training_args.gradient_checkpointing:
        raise UserError(
            "--activation_offloading keeps what gradient checkpointing needs; leave out it or "
            "--gradient_checkpointing False."
        )
    if not (training_args.fsdp and training_args.fsdp_config.get("activation_checkpointing")):
        engines.set_checkpointing(training_args, True)


def _shared_rows(model_args: Any, training_args: Any) -> None:
    count, processes = training_args.sequence_parallel, training_args.world_size
    if count == 1:
        return
    flag = f"--sequence_parallel {count}"
    if processes % count:
        raise UserError(
            f"{flag}: {processes} processes cannot form groups of {count}; start a multiple of {count}, or leave it out."
        )
    others = {
        "padding_free False": not training_args.padding_free,
        "average_tokens_across_devices False": not training_args.average_tokens_across_devices,
        f"attn_implementation {model_args.attn_implementation}": model_args.attn_implementation != "auto",
        "neftune_noise_alpha": training_args.neftune_noise_alpha,
        "torch_compile": training_args.torch_compile,
    }
    for other in (name for name, given in others.items() if given):
        raise UserError(f"{flag} and --{other} exclude each other; leave out one of them.")


def _packing(data_args: Any, training_args: Any, named: dict[str, Any]) -> None:
    if not data_args.pack_tokens:
        return
    if data_args.lazy_preprocess:
        raise UserError("--pack_tokens needs all lengths; leave out --lazy_preprocess.")
    if training_args.train_sampling_strategy == "group_by_length":
        raise UserError("--pack_tokens fills rows of one length; leave out --train_sampling_strategy group_by_length.")
    if not training_args.padding_free:
        raise UserError("--pack_tokens and --padding_free False exclude each other; leave out one of them.")
    if "per_device_train_batch_size" not in named:
        training_args.per_device_train_batch_size = 1
    if "model_max_length" in named and training_args.model_max_length > data_args.pack_tokens:
        raise UserError(
            f"--pack_tokens {data_args.pack_tokens}: expected at least --model_max_length, "
            f"{training_args.model_max_length}, as no conversation is cut; raise it or lower that one."
        )


def _evaluation(data_args: Any, training_args: Any, named: dict[str, Any]) -> None:
    from transformers import IntervalStrategy

    something = bool(data_args.eval_data_path or data_args.eval_ratio)
    if data_args.eval_ratio and data_args.eval_data_path:
        raise UserError("--eval_ratio and --eval_data_path exclude each other; give one of them.")
    if data_args.metric and not data_args.eval_generate:
        raise UserError("--metric measures the answers of --eval_generate; give that, too.")
    if data_args.metric:
        load_metric(data_args.metric)
    remedy = "add --eval_data_path or --eval_ratio."
    best = {
        "early_stopping_patience": bool(training_args.early_stopping_patience),
        "save_strategy best": training_args.save_strategy == "best",
        "load_best_model_at_end": training_args.load_best_model_at_end,
    }
    if any(best.values()):
        if not something or training_args.eval_strategy == "no":
            flag = next(flag for flag, given in best.items() if given)
            raise UserError(f"--{flag} needs evaluations in the course of training; {remedy}")
        if training_args.metric_for_best_model is None:
            training_args.metric_for_best_model, training_args.greater_is_better = "eval_loss", False
    if training_args.metric_for_best_model and something:
        _refuse_unknown_figure(training_args.metric_for_best_model, data_args)
    if training_args.eval_on_start and not something:
        raise UserError(f"--eval_on_start is set but there is nothing to evaluate; {remedy}")
    if data_args.eval_generate and not something:
        raise UserError(f"--eval_generate needs held-out conversations; {remedy}")
    if not something and training_args.eval_strategy != "no":
        if "eval_strategy" in named and "evaluation_strategy" not in named:  # ancestors' commands asked for it anyway
            raise UserError(f"--eval_strategy is set but there is nothing to evaluate; {remedy}")
        say("there is nothing to evaluate: training without evaluation; see --eval_data_path and --eval_ratio.")
        training_args.eval_strategy, training_args.do_eval = IntervalStrategy.NO, False


def _refuse_unknown_figure(name: str, data_args: Any) -> None:
    """Check that evaluations have the figure by which they are compared."""
    files = list(named_sources(parse_sources(data_args.eval_data_path or [])))
    known = ["loss", *(f"{file}_loss" for file in files if len(files) > 1)]
    if data_args.eval_generate:
        known += ["exact_match", "valid_json"]
        known += [load_metric(data_args.metric).__name__] if data_args.metric else []
    if name.removeprefix("eval_") not in known:
        expected = ", ".join(f"eval_{figure}" for figure in known)
        raise UserError(f"--metric_for_best_model {name}: expected {expected}.")
