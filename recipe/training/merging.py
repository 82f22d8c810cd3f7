"""Merge an adapter into its base model, tensor by tensor, and prove that the result acts as the adapter does.

The base is never loaded to be merged: peft's own layers lie on a model whose weights take no memory, and get one tensor
of the base's files at a time. What has no adapter is copied to the byte. Main memory: the adapter, and one tensor in
float32 with the change to it (experts that the model holds in one tensor count as one). The proof is in merge_proof.py.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace

import torch
import transformers
from transformers.utils import CONFIG_NAME

from recipe.console import UserError, say
from recipe.model.loading import Pretrained, refuse_changed_base
from recipe.model.precision import dtype_name
from recipe.model.quantised import quantisation
from recipe.model.weight_files import FLOATS, WeightFiles, read_json
from recipe.training import merge_plan, merge_proof, model_card, run_record
from recipe.training.merge_plan import Source

RECORD = "merge.json"  # in the merged folder: what it was made from, and the names of its files
UNFINISHED = "merge.incomplete"  # folder within the output folder, until all is written and proved
# Files of the adapter's folder that replace the base's: the tokenizer with its chat template, where to stop, how to ask.
TRAINED_FILES = re.compile(
    r"(tokenizer.*|special_tokens_map|added_tokens|chat_template|vocab|merges|generation_config|prompt_mode)\.\w+"
)
# The base's files that transformers would prefer to what a newer tokenizer_config.json and chat_template.jinja say.
SUPERSEDED = ("special_tokens_map.json", "added_tokens.json", "chat_template.json", "chat_template.jinja")
# Files of the base's folder that do not belong to the merged model: weights in other formats, the base's card, and what
# a training leaves behind.
LEFT_OUT = re.compile(
    r"\..*|README\.md|merge\.json|run\.(json|yaml)|prompt_mode\.json|trainer_state\.json|(all|train|eval)_results\.json|report\.html"
    r"|loss\.png|.*\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack|onnx|onnx_data)(\.index\.json)?",
    re.I,
)


def merge(
    adapter: str,
    output: str,
    dtype: torch.dtype | None = None,
    base: str | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
    quantize: Callable[[torch.dtype], transformers.BitsAndBytesConfig] | None = None,
) -> float:
    """Write the merged model to `output`: weights, configuration, tokenizer, and what else comes with the base.

    Args:
        adapter: folder of a LoRA adapter of any kind that peft can merge.
        output: folder to write: a new one, an empty one, or that of an earlier merge, which is replaced.
        dtype: precision to write the model in. None keeps the base's.
        base: folder or hub name of the base model. None: the one that adapter_config.json names.
        cache_dir: folder for downloaded models. None: the hub's own.
        trust_remote_code: whether to run code that comes with the base model.
        quantize: function from the computing precision to how the base was held in 4 bits, to measure what that
            changed for an adapter trained with --q_lora. None: it is not measured.

    Returns:
        How far the merged model's logits are from the adapter's: the largest, over the prompts, of the norm of the
        difference over the norm of the logits. Where the model does not fit into memory: the same of samples of
        weights, compared with what they should be.

    Raises:
        UserError: the merge is not possible or not exact; `output` is then as it was before.
    """
    source = _source(adapter, base, cache_dir, trust_remote_code)
    _refuse_output(output, source)
    plan = merge_plan.plan(source, dtype)
    expected = merge_proof.expected(source, plan)
    work, new = os.path.join(output, UNFINISHED), not os.path.exists(output)
    try:
        shutil.rmtree(work, ignore_errors=True)
        os.makedirs(work)
        for shard in source.files.shards:
            source.files.write(shard, work, plan.dtypes, plan.changed, plan.added)
        _write_rest(source, plan, dtype, work)
        try:
            _write_card(source.adapter, output, work)
        except Exception as error:  # the record may be of another version; the weights matter more
            say(f"no model card is written: {type(error).__name__}: {error}.")
        difference = merge_proof.difference(source, plan, expected, work, quantize)
        _publish(work, output, {"adapter": adapter, "base": source.name, "difference": difference})
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror or error}).") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if new and os.path.isdir(output) and not os.listdir(output):
            os.rmdir(output)
    return difference


# ----------------------------------------------------------------------------------------------------------------------
# What is merged


def _source(adapter, base, cache_dir, trust_remote_code):
    settings = _settings(adapter)
    entry = os.path.join(adapter, "adapter_config.json")
    recorded = settings.base_model_name_or_path
    name = base or recorded
    if not name:
        raise UserError(f"{entry}: base_model_name_or_path is empty; name the base model with --base.")
    revision = settings.revision if name == recorded else None
    folder = _folder(name, revision, cache_dir, "--base" if base else f"{entry}: base_model_name_or_path")
    if base and base != recorded:
        say(f"--base {base} is used in place of {recorded}, which {entry} names.")
    if os.path.isdir(name):
        _refuse_revision(settings.revision, folder, entry)
    if not os.path.exists(os.path.join(folder, CONFIG_NAME)):
        raise UserError(f"{name}: holds no config.json; expected the folder or hub name of the base model.")
    if found := quantisation(name, read_json(os.path.join(folder, CONFIG_NAME))):
        raise UserError(f"{found}, and merging would round the adapter away; {found.remedy('--base')}.")
    pretrained = Pretrained(folder, trust_remote_code, cache_dir, named_by="the base model")
    config = pretrained.config()
    stretched = _take_rope(config, replace(pretrained, name_or_path=adapter, named_by="the adapter"))
    return Source(adapter, settings, name, pretrained, config, stretched, WeightFiles(folder))


def _settings(adapter):
    from peft import PeftConfig

    entry = os.path.join(adapter, "adapter_config.json")
    if not os.path.exists(entry):
        raise UserError(f"{adapter}: holds no adapter_config.json; expected the folder of an adapter.")
    if not any(os.path.exists(os.path.join(adapter, f"adapter_model.{end}")) for end in ("safetensors", "bin")):
        raise UserError(f"{adapter}: holds no adapter_model.safetensors; expected the folder of an adapter.")
    kind = read_json(entry).get("peft_type")
    if kind != "LORA":
        raise UserError(f"{entry}: peft_type is {kind}; expected LORA, the only kind that can be merged here.")
    settings = PeftConfig.from_pretrained(adapter)
    refuse_changed_base(settings, adapter)
    return settings


def _folder(name, revision, cache_dir, where):
    """Folder of a model's files: `name` itself, or the snapshot of a hub model, downloaded if it is not in the cache."""
    if os.path.isdir(name):
        return name
    from huggingface_hub import snapshot_download

    other = [f"*.{end}" for end in ("bin", "pt", "pth", "gguf", "h5", "msgpack", "onnx", "onnx_data")]
    try:
        return snapshot_download(name, revision=revision, cache_dir=cache_dir, ignore_patterns=[*other, "*/*"])
    except (OSError, ValueError) as error:
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"{where} is {name!r}, which is no folder here and no model of the hub that can be had{at} "
            f"({type(error).__name__}); name the base model's folder with --base."
        ) from None


def _refuse_revision(recorded, folder, entry):
    """Compare commits, where both are known: the hub's cache names folders by them, a download elsewhere notes them."""
    note = os.path.join(folder, ".cache", "huggingface", "download", "config.json.metadata")
    found = os.path.basename(os.path.realpath(folder))
    if os.path.exists(note):
        with open(note, encoding="utf-8") as file:
            found = file.readline().strip()
    if found != recorded and all(re.fullmatch(r"[0-9a-f]{40}", commit or "") for commit in (found, recorded)):
        raise UserError(
            f"{folder}: is revision {found}, expected {recorded}, as {entry} says; download that one, or take the entry "
            "`revision` out if the weights are the same."
        )


def _take_rope(config, adapter):
    """Give the base's configuration the rope settings of an adapter trained with --rope_scaling; whether it has any."""
    if not os.path.exists(os.path.join(adapter.name_or_path, CONFIG_NAME)):
        return False
    own, text, changed = adapter.config().get_text_config(), config.get_text_config(), False
    for name in ("rope_parameters", "max_position_embeddings"):
        if getattr(own, name, None) != getattr(text, name, None):
            setattr(text, name, getattr(own, name))
            changed = True
    return changed


def _refuse_output(output, source):
    for folder, what in ((source.adapter, "the adapter"), (source.files.folder, "the base model")):
        if os.path.realpath(output) == os.path.realpath(folder):
            raise UserError(f"--output {output}: is the folder of {what}; name another one.")
    if os.path.exists(output) and not os.path.isdir(output):
        raise UserError(f"--output {output}: is a file; name a folder.")
    there = set(os.listdir(output)) - {UNFINISHED} if os.path.exists(output) else set()
    if RECORD in there:
        there -= {RECORD, *read_json(os.path.join(output, RECORD)).get("files", [])}
    if there:
        raise UserError(
            f"--output {output}: holds {min(there)}, which no earlier merge wrote there; name a new folder, or empty it."
        )


# ----------------------------------------------------------------------------------------------------------------------
# What is written beside the weights


def _write_rest(source, plan, dtype, work):
    """Copy the base's other files, and the adapter's tokenizer and generation config; change what has to change."""
    trained = [name for name in os.listdir(source.adapter) if TRAINED_FILES.fullmatch(name)]
    superseded = SUPERSEDED if "tokenizer_config.json" in trained else ()
    for name in os.listdir(source.files.folder):
        path = os.path.join(source.files.folder, name)
        if os.path.isfile(path) and not LEFT_OUT.fullmatch(name) and name not in superseded:
            shutil.copyfile(path, os.path.join(work, name))
    for name in trained:
        shutil.copyfile(os.path.join(source.adapter, name), os.path.join(work, name))
    _rewrite(source.files.folder, work, CONFIG_NAME, lambda config: _edit_config(config, source, plan, dtype))
    if source.files.index:
        _rewrite(source.files.folder, work, source.files.index, lambda index: _edit_index(index, source.files, plan))


def _write_card(adapter, output, work):
    """Write the card of the run that trained the adapter, as that of a whole model; none if its record is not there."""
    for folder in (adapter, os.path.dirname(os.path.abspath(adapter))):  # `best` lies in the folder of its run
        record, flags = (os.path.join(folder, name) for name in (run_record.FILE, "run.yaml"))
        if os.path.exists(record) and os.path.exists(flags):
            facts = read_json(record)
            facts |= {"adapter": None, "arguments": facts["arguments"] | {"q_lora": False}}
            with open(flags, encoding="utf-8") as file:
                model_card.write(facts, work, os.path.abspath(output), file.read())
            return


def _rewrite(folder, work, name, edit):
    """Write an edited JSON file, or a copy to the byte where the edit changes nothing."""
    before, edited = (read_json(os.path.join(folder, name)) for _ in range(2))
    edit(edited)
    if edited == before:
        shutil.copyfile(os.path.join(folder, name), os.path.join(work, name))
        return
    with open(os.path.join(work, name), "w", encoding="utf-8") as file:
        json.dump(edited, file, indent=2, ensure_ascii=False)
        file.write("\n")


def _edit_config(config, source, plan, dtype):
    text = config.get("text_config") or config
    for part in (config, text):
        if part.get("quantization_config"):  # a quantised base is refused: this tells of the file that it came from
            del part["quantization_config"]
    if dtype:
        for part in (config, *(value for value in config.values() if isinstance(value, dict))):
            part.update({name: dtype_name(dtype) for name in ("dtype", "torch_dtype") if name in part})
    if plan.untied:
        config["tie_word_embeddings"] = text["tie_word_embeddings"] = False
        say(
            "the output head differs from the embeddings now: the merged model has lm_head.weight, and is larger by it."
        )
    if source.stretched:
        new = source.config.get_text_config()
        rope, by_layer = dict(new.rope_parameters), any(isinstance(part, dict) for part in new.rope_parameters.values())
        old = "rope_theta" in text and not by_layer  # the spelling of transformers 4, which version 5 reads, too
        text.pop("rope_parameters" if old else "rope_scaling", None)
        text["rope_scaling" if old else "rope_parameters"] = rope
        if old:
            text["rope_theta"] = rope.pop("rope_theta", text["rope_theta"])
        text["max_position_embeddings"] = new.max_position_embeddings
        say("config.json has the adapter's rope settings, with which it was trained.")


def _edit_index(index, files, plan):
    metadata = index.get("metadata") or {}
    for name, kind in plan.dtypes.items():
        before = files.tensors.get(name)
        file, shape = (before.file, before.shape) if before else plan.added[name]
        numbers = torch.Size(shape).numel()
        index["weight_map"][name] = file
        if "total_size" in metadata:
            metadata["total_size"] += numbers * FLOATS[kind].itemsize - (before.end - before.start if before else 0)
        if "total_parameters" in metadata and not before:
            metadata["total_parameters"] += numbers


def _publish(work, output, record):
    """Move what was written into the output folder, config.json last: until then nothing takes it for a model."""
    names = sorted(os.listdir(work), key=lambda name: (name == CONFIG_NAME, name))
    path = os.path.join(output, RECORD)
    if os.path.exists(path):
        for name in sorted(read_json(path)["files"]):  # config.json is among the first
            if os.path.exists(os.path.join(output, name)):
                os.remove(os.path.join(output, name))
    with open(path, "w", encoding="utf-8") as file:
        json.dump({**record, "files": names}, file, indent=2)
    for name in names:
        os.replace(os.path.join(work, name), os.path.join(output, name))
