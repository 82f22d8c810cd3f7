"""Say how to use what was trained: the last lines of a run, and the model card beside the weights (README.md)."""

import json
import os
import shlex
from typing import Any

from recipe.model.quantised import plain_name
from recipe.training.checkpoints import BEST

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values of vLLM's --max-lora-rank, whose default is 16


def adapter_facts(trainer: Any) -> dict[str, Any] | None:
    """Return what a server must know of an adapter as it is saved; None if the whole model is trained.

    Returns:
        type and rank (the largest one, None if the type has none), and under "merge_first" what servers cannot load.
    """
    from recipe.model import rope

    model = trainer.accelerator.unwrap_model(trainer.model)
    if not hasattr(model, "peft_config"):
        return None
    config = next(iter(model.peft_config.values()))
    rank = max([getattr(config, "r", 0) or 0, *(getattr(config, "rank_pattern", None) or {}).values()])
    rank *= 2 if hasattr(model, "first_factors") else 1  # as it is converted when it is saved
    reasons = {
        "DoRA": getattr(config, "use_dora", False),
        "trained biases": getattr(config, "bias", "none") != "none",
        "modules_to_save": bool(getattr(config, "modules_to_save", None)),
        "trained tokens": getattr(config, "trainable_token_indices", None) is not None,
        "adapters of experts": bool(getattr(config, "target_parameters", None)),
        f"a rank above {VLLM_RANKS[-1]}": rank > VLLM_RANKS[-1],
        "an extended window": rope.is_extended(model.config.get_text_config()),
        f"the type {config.peft_type.value}": config.peft_type != "LORA",
    }
    return {
        "type": "LoRA" if config.peft_type == "LORA" else config.peft_type.value,
        "rank": rank or None,
        "merge_first": [reason for reason, found in reasons.items() if found],
    }


def usage(facts: dict[str, Any], folder: str) -> dict[str, str]:
    """Return {what to do: command} for the weights in a folder, from the facts of `RunRecord`."""
    adapter, quoted = facts["adapter"], shlex.quote(folder)
    kind = (
        f"a {adapter['type']} adapter" + f" of rank {adapter['rank']}" * bool(adapter["rank"]) if adapter else "a model"
    )
    loss = next((e["eval_loss"] for e in facts["evaluations"] if e["step"] == facts["best_step"]), None)
    lines = {"saved": f"{folder}, {kind}, trained from {facts['base']['name_or_path']}"}
    if facts["best_step"] is not None and os.path.isdir(os.path.join(folder, BEST)):
        lines["best"] = f"{os.path.join(folder, BEST)}, step {facts['best_step']}, held-out loss {loss:.4g}"
    lines["prompts"] = _prompts(facts)
    trusted = " --trust_remote_code True" * facts["arguments"]["trust_remote_code"]
    lines["chat"] = f"python chat.py --model_name_or_path {quoted}{trusted}"
    lines["chat"] += " --q_lora True" * facts["arguments"].get("q_lora", False)
    if not adapter:
        return lines | {"serve": _vllm(facts, quoted)}
    merged = shlex.quote(f"{folder}-merged")
    if adapter["type"] == "LoRA":
        # The adapter of a quantised model is merged into the one that this was made from.
        plain = plain_name(facts["base"]["name_or_path"])
        other = f" --base {shlex.quote(plain)}" if plain else ""
        lines["merge"] = f"python merge.py --adapter {quoted} --output {merged}{other}{trusted}"
    if not adapter["merge_first"]:
        return lines | {"serve": _vllm_adapter(facts, folder)}
    reasons = ", ".join(adapter["merge_first"])
    if adapter["type"] != "LoRA":
        return lines | {"serve": f"servers cannot load {reasons}"}
    return lines | {"serve": f"merge first, as servers cannot load {reasons}; then {_vllm(facts, merged)}"}


def _prompts(facts):
    """What a client of a server has to send, besides the messages."""
    prompt, variables = facts["prompt"], facts["template_variables"]
    text = f"--thinking {prompt['thinking']}, "
    text += f"template variables {json.dumps(variables)}" if variables else "no template variables"
    if prompt["system"]:
        text += f", system message {json.dumps(prompt['system'], ensure_ascii=False)}"
    return text


def _vllm(facts, model):
    variables = facts["template_variables"]
    trusted = " --trust-remote-code" * facts["arguments"]["trust_remote_code"]
    words = f"vllm serve {model}{trusted}"
    return words + _option("default-chat-template-kwargs", json.dumps(variables)) * bool(variables)


def _vllm_adapter(facts, folder):
    """vLLM takes the tokenizer, the chat template and the stop tokens of the base, unless it is told otherwise."""
    base, name = facts["base"], os.path.basename(os.path.normpath(folder))
    rank = min(rank for rank in VLLM_RANKS if rank >= facts["adapter"]["rank"])
    words = _vllm(facts, shlex.quote(base["name_or_path"]))
    words += _option("revision", base["revision"]) * bool(base["revision"])
    words += f" --enable-lora --max-lora-rank {rank}" + _option("lora-modules", f"{name}={folder}")
    return words + _option("chat-template", f"{folder}/chat_template.jinja") + _option("generation-config", folder)


def _option(name, value):
    return f" --{name} {shlex.quote(str(value))}"


def write(facts: dict[str, Any], folder: str, place: str, run_yaml: str) -> None:
    """Write the card of the weights in a folder.

    Args:
        facts: those of `RunRecord`.
        folder: of the weights.
        place: where the folder will lie.
        run_yaml: the flags of the run.
    """
    from huggingface_hub import ModelCard, ModelCardData

    on_hub = not os.path.isabs(facts["base"]["name_or_path"])
    data = ModelCardData(
        base_model=facts["base"]["name_or_path"] if on_hub else None,  # the hub refuses a card with a path
        library_name="peft" if facts["adapter"] else "transformers",
        pipeline_tag="text-generation",
        tags=["lora", "sft"] if facts["adapter"] else ["sft"],
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(facts, place, run_yaml)}").save(os.path.join(folder, "README.md"))


def _text(facts, folder, run_yaml):
    base = facts["base"]
    commit = f", commit {base['revision']}" if base["revision"] else ""
    kind = "An adapter of" if facts["adapter"] else "A model trained from"
    lines = [f"# {os.path.basename(os.path.normpath(folder))}", "", f"{kind} {base['name_or_path']}{commit}.", ""]
    lines += ["## Use", ""]
    for what, text in usage(facts, folder).items():
        is_command = text.startswith(("python ", "vllm "))
        lines += [f"{what}:", "", "```bash", text, "```", ""] if is_command else [f"{what}: {text}", ""]
    kind = "peft import AutoPeftModelForCausalLM" if facts["adapter"] else "transformers import AutoModelForCausalLM"
    lines += ["in Python:", "", "```python", f"from {kind} as Model", "from transformers import AutoTokenizer", ""]
    lines += [f"model, tokenizer = (kind.from_pretrained({folder!r}) for kind in (Model, AutoTokenizer))", "```", ""]
    lines += ["## Data", "", "| used for | file | rows | tokens |", "|---|---|---:|---:|"]
    for name, files in facts["data"].items():
        for file in files:
            tokens = "not counted" if file["tokens"] is None else f"{file['tokens']:,}"
            lines.append(f"| {name} | {file['path']} | {file['rows']:,} | {tokens} |")
    lines += ["", "## Training", "", *_training(facts), "", "```yaml", run_yaml.rstrip(), "```", ""]
    lines.append(", ".join(f"{name} {version}" for name, version in facts["versions"].items()) + ".")
    return "\n".join(lines) + "\n"


def _training(facts):
    lines = [f"* {facts['steps']:,} optimizer steps, {facts['epochs']:g} epochs, on {facts['hardware']['device']}"]
    if facts["first_loss"] is not None:
        lines.append(f"* loss from {facts['first_loss']:.4g} to {facts['last_loss']:.4g}")
    for entry in facts["evaluations"]:
        known = ((name, value) for name, value in entry.items() if name != "step" and value is not None)
        figures = (f"{name} {value:.4g}" for name, value in known if "_per_" not in name)
        lines.append(f"* held out, step {entry['step']}: {', '.join(f for f in figures if 'runtime' not in f)}")
    return lines
