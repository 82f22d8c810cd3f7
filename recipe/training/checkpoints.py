"""Checkpoints: which one is complete, what it was made by, and what may have changed since."""

import glob
import hashlib
import json
import os

from recipe.console import UserError, say
from recipe.distributed import engines

COMPLETE = "run.json"  # written last into a checkpoint, when every rank has written its part


def record(model_args, data_args, training_args, lora_args, dataset):
    """What a checkpoint must remember of its run, to be compared when the run is resumed."""
    adapter = {name: value for name, value in vars(lora_args).items() if name not in ("q_lora", "lora_weight_path")}
    args = training_args
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {
        "base model": _model(model_args.model_name_or_path),
        "mode": engines.training_mode(args, lora_args),
        "adapter": adapter if args.use_lora else None,
        "engine": engines.engine_of(args).label,
        "processes": args.world_size,
        "rows a step": f"{rows} of {data_args.pack_tokens} tokens" if data_args.pack_tokens else rows,
        "seed": args.seed,
        "data": _data(dataset),
        "schedule": [args.learning_rate, str(args.lr_scheduler_type), args.num_train_epochs, args.max_steps],
    }


def _model(path):
    """Name of a hub model; for a folder, a hash of its configuration and of both ends of its weights files."""
    if not os.path.isdir(path):
        return path
    digest = hashlib.sha256()
    for name in sorted(os.listdir(path)):
        if name == "config.json" or name.endswith((".safetensors", ".bin")):
            with open(os.path.join(path, name), "rb") as file:
                digest.update(file.read(1 << 16))
                file.seek(max(0, os.path.getsize(file.name) - (1 << 16)))
                digest.update(file.read())
    return digest.hexdigest()


def _data(dataset, sample=64):
    """Hash of how many conversations there are and of some dozens of them, wherever their files lie."""
    conversations = dataset.conversations
    chosen = range(0, len(conversations), max(1, len(conversations) // sample))
    text = json.dumps([conversations[number] for number in chosen], default=vars, sort_keys=True)
    return f"{len(conversations)} {len(dataset)} {hashlib.sha256(text.encode()).hexdigest()}"


def find(asked, output_dir):
    """The checkpoint that --resume_from_checkpoint means, or None.

    Args:
        asked: a folder, "auto" (the newest complete checkpoint of output_dir; from the beginning if there is no
            checkpoint at all), "True" (the same, and an error then, too), or None.
    Raises:
        UserError: no such checkpoint.
    """
    word = str(asked).lower()
    if asked is None or word == "false":
        return None
    if word not in ("true", "auto"):
        if not os.path.exists(os.path.join(asked, "trainer_state.json")):
            raise UserError(
                f"--resume_from_checkpoint {asked}: no folder of a checkpoint (it lacks trainer_state.json)."
            )
        return asked
    names = os.listdir(output_dir) if os.path.isdir(output_dir) else []
    steps = sorted(int(name[11:]) for name in names if name.startswith("checkpoint-") and name[11:].isdigit())
    for step in reversed(steps):
        folder = os.path.join(output_dir, f"checkpoint-{step}")
        problem = incomplete(folder)
        if not problem:
            return folder
        say(f"{folder}: left out: {problem}")
    if word == "auto" and not steps:
        say(f"{output_dir} holds no checkpoint: training from the beginning.")
        return None
    raise UserError(f"--resume_from_checkpoint {asked}: {output_dir} holds no complete checkpoint to resume from.")


def incomplete(folder):
    """Why a checkpoint is no whole one, or None."""
    if not os.path.exists(os.path.join(folder, COMPLETE)):
        return "it was not written to its end."
    try:
        verify_saved(folder, values=False)  # they were read when they were written, and every rank is here
    except UserError as error:
        return str(error)


def compare(checkpoint, now, ignore_data_skip):
    """Refuse to resume where the checkpoint does not fit what is asked for now, before any weights are loaded.

    Raises:
        UserError: what changed and the way out.
    """
    path = os.path.join(checkpoint, COMPLETE)
    if not os.path.exists(path):
        say(f"{checkpoint} has no {COMPLETE}: what made it is not known and not compared.")
        return
    with open(path, encoding="utf-8") as file:
        then = json.load(file)
    changed = [name for name in now if json.loads(json.dumps(now[name])) != then.get(name)]
    engine, saved_by = engines.ENGINES[now["engine"]], engines.ENGINES.get(then["engine"])
    fatal = [name for name in ("base model", "mode", "adapter") if name in changed]
    fatal += ["engine"] * (saved_by is None or saved_by.checkpoint_format != engine.checkpoint_format)
    fatal += ["processes"] * ("processes" in changed and not engine.resumes_with_other_world_size)
    if not ignore_data_skip:
        fatal += [name for name in ("rows a step", "seed", "data") if name in changed]
    if fatal:
        name = fatal[0]
        short = {key: f"{then.get(key)} then, {now[key]} now" for key in ("mode", "engine", "processes", "rows a step")}
        if name == "adapter":
            parts = [key for key in now[name] if json.loads(json.dumps(now[name][key])) != then[name].get(key)]
            short[name] = ", ".join(f"{key} {then[name].get(key)} then, {now[name][key]} now" for key in parts)
        flag = "--model_name_or_path" if then["mode"] == "full" else "--lora_weight_path"
        way = f"start a new run from its weights with {flag} {checkpoint}"
        if name in ("rows a step", "seed", "data"):
            way = f"go on in the new order of rows with --ignore_data_skip True, or {way}"
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: the {name} changed since it was saved"
            f"{f' ({short[name]})' if name in short else ''}; set it back, or {way}."
        )
    if "schedule" in changed:
        say(f"the schedule changed from {then['schedule']} to {now['schedule']}: the optimizer keeps its own rate.")


def verify_saved(folder, weights=None, moved=False, values=True, names=None):
    """Open what was written: every tensor is there, has elements, is finite; an adapter has learnt something.

    Args:
        weights: {name: tensor} that should be there (None: known from the files alone).
        moved: whether lora_B, which starts at zero, must have moved.
        values: whether to read the numbers, too; without, files that end early or are missing are still found.
        names: the names that the files should have, see `base_files.Names`.
    Raises:
        UserError: what is wrong with which file.
    """
    from safetensors import SafetensorError, safe_open

    adapter = os.path.exists(os.path.join(folder, "adapter_config.json"))
    files = sorted(glob.glob(os.path.join(folder, "adapter_model.safetensors" if adapter else "model*.safetensors")))
    if not files:
        raise UserError(f"{folder}: no weights were written.")
    if adapter != any(".lora_" in name for name in weights or [".lora_" * adapter]):
        raise UserError(f"{folder}: holds an adapter_config.json and no adapter, or an adapter without it.")
    elements, zero_b, b, found = 0, 0, 0, set()
    for path in files:
        try:
            with safe_open(path, "pt") as saved:
                found.update(saved.keys())
                for name in saved.keys():
                    if not values:
                        continue
                    tensor = saved.get_tensor(name)
                    if not tensor.numel():
                        raise UserError(f"{path}: {name} is empty; its parts were not gathered.")
                    if tensor.is_floating_point() and not tensor.isfinite().all():
                        raise UserError(f"{path}: {name} is not finite.")
                    elements += tensor.numel()
                    b += ".lora_B" in name
                    zero_b += ".lora_B" in name and not tensor.any()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cannot be read again: {error}.") from None
    if names is not None and (odd := sorted((found ^ names.all) - names.shared)):
        raise UserError(
            f"{folder}: {len(odd)} names of weights are not those of the base model, the first is {odd[0]}."
        )
    index = os.path.join(folder, "model.safetensors.index.json")
    if not adapter and os.path.exists(index):
        with open(index, encoding="utf-8") as file:
            missing = set(json.load(file)["weight_map"].values()) - {os.path.basename(path) for path in files}
        if missing:
            raise UserError(f"{folder}: lacks {', '.join(sorted(missing))}.")
    if weights is not None:
        expected = sum(tensor.numel() for tensor in {id(tensor): tensor for tensor in weights.values()}.values())
        every_name = sum(tensor.numel() for tensor in weights.values())  # peft writes shared weights under each name
        if elements != expected and not (adapter and elements == every_name):
            raise UserError(f"{folder}: holds {elements:,} numbers, expected the {expected:,} that were trained.")
    if moved and b and zero_b == b:
        raise UserError(f"{folder}: every lora_B is still zero: the adapter has learnt nothing; see --learning_rate.")
