"""Prove that a merged folder acts as the adapter on its base does: by logits, or by samples of weights.

The logits need the model in float32 in main memory, 4 bytes a parameter: adapter and merged folder, one after the other.
Samples of weights are compared with W + s B A, computed in float64 from the adapter's file by itself.
"""

import glob
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import transformers

from recipe.console import UserError, say
from recipe.distributed import engines
from recipe.model.loading import load_adapter
from recipe.model.precision import dtype_name
from recipe.model.weight_files import WeightFiles
from recipe.training import checkpoints
from recipe.training.memory import GB
from recipe.training.merge_plan import Plan, Source
from recipe.training.resources import free_memory

TOLERANCE = 1e-4  # norm of the difference / norm of the logits, in float32; a good merge has some 1e-6
ROUNDING = 1e-2  # the same after rounding to bfloat16 or float16, as a rule below this
PROMPTS = ["Hello", "What is the capital of France?", "Write a haiku.", "1 + 1 =", '{"key": "value"}']
SAMPLES, ROWS = 32, 64  # layers, spread over the model, and rows of each


@dataclass
class Expected:
    """Logits, one tensor for each of `prompts`: of the adapter, and of its merge rounded as the files will be."""

    prompts: list[torch.Tensor]
    adapter: list[torch.Tensor]
    rounded: list[torch.Tensor]


def expected(source: Source, plan: Plan) -> Expected | None:
    """Compute the logits that the merged folder must have; None where the model does not fit into main memory.

    Raises:
        UserError: peft's merge of the whole model does not act as the adapter does.
    """
    need = 4 * sum(torch.Size(stored.shape).numel() for stored in source.files.tensors.values())
    need += max(os.path.getsize(path) for path in glob.glob(os.path.join(source.adapter, "adapter_model.*")))
    free = free_memory(torch.device("cpu"))
    if 1.1 * need > free:
        say(
            f"logits are not compared: the model needs {need / GB:.1f} GB in float32, and {free / GB:.1f} GB of main "
            "memory are free; samples of its weights are compared instead."
        )
        return None
    prompts = _prompts(source)
    model = load_adapter(source.base.model(source.config, torch.float32), source.adapter).eval()
    before = _logits(model, prompts)
    if plan.untied or getattr(plan.settings, "ensure_weight_tying", False):
        _untie(model)  # else peft would merge both into the one tensor
    with warnings.catch_warnings(action="ignore"):  # of tied heads, see _untie
        model = model.merge_and_unload()
    apart = _distance(before, _logits(model, prompts))
    if not apart <= TOLERANCE:
        raise UserError(
            f"{source.adapter}: the merged model's logits differ from the adapter's by {apart:.1e}, expected at most "
            f"{TOLERANCE:.0e}; nothing was written. Report the adapter's configuration to its library, peft."
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(parameter.to(plan.dtype(source.files, name)))
    return Expected(prompts, before, _logits(model, prompts))


def difference(
    source: Source,
    plan: Plan,
    expected: Expected | None,
    folder: str,
    quantize: Callable[[torch.dtype], transformers.BitsAndBytesConfig] | None,
) -> float:
    """Compare the merged folder with what is expected, and say what its precision and a 4-bit base change.

    Args:
        source: what was merged.
        plan: how.
        expected: what `expected` returned.
        folder: the merged folder.
        quantize: function from the computing precision to how the base was held in 4 bits, for adapters trained so.

    Returns:
        The largest norm of a difference over the norm of what is expected, of logits or of samples of weights.

    Raises:
        UserError: the folder is not what was merged.
    """
    if expected:
        found = _logits(_merged(source, folder), expected.prompts)
        apart, largest = _distance(expected.rounded, found), _distance(expected.adapter, found)
    else:
        apart, largest = _compare_weights(source, plan, folder)
    if not apart <= TOLERANCE:
        raise UserError(
            f"{source.adapter}: what was written differs from what was merged by {apart:.1e}, expected at most "
            f"{TOLERANCE:.0e}; nothing is kept. Report the model {source.name} to this project."
        )
    if expected and largest > ROUNDING:
        dtype = plan.dtype(source.files, next(iter(plan.layers.values())))
        say(f"rounding to {dtype_name(dtype)} changes the logits by {largest:.1e}; --dtype float32 keeps them.")
    if expected and quantize and _trained_in_4_bits(source.adapter):
        model = source.base.model(source.config, torch.float32, quantization_config=quantize(torch.float32))
        there = _logits(load_adapter(model, source.adapter).eval(), expected.prompts)
        say(
            "the adapter was trained on the base in 4 bits; there its logits differ from the merged model's by "
            f"{_distance(there, found):.1e}, which is what the 4 bits change."
        )
    return largest


# ----------------------------------------------------------------------------------------------------------------------
# Logits


def _merged(source, folder):
    merged = replace(source.base, name_or_path=folder, named_by="the merged model in")
    return merged.model(merged.config(), torch.float32).eval()


def _distance(expected, found):
    return torch.stack([(a - b).norm() / a.norm() for a, b in zip(expected, found, strict=True)]).max().item()


@torch.no_grad()
def _logits(model, prompts):
    return [model(input_ids=ids.to(model.device), use_cache=False).logits.float() for ids in prompts]


def _prompts(source):
    """Token ids, each [1, tokens]: PROMPTS, and the tokens whose embeddings were trained."""
    trained = os.path.exists(os.path.join(source.adapter, "tokenizer_config.json"))
    tokenizer = (replace(source.base, name_or_path=source.adapter) if trained else source.base).tokenizer()
    prompts = [tokenizer(text, return_tensors="pt").input_ids for text in PROMPTS]
    tokens = source.settings.trainable_token_indices or []
    rows = sorted(set().union(*tokens.values())) if isinstance(tokens, dict) else tokens
    return [*prompts, torch.tensor([rows])] if rows else prompts


def _untie(model):
    """Give the output head its own copy of the embeddings, so that a merge into one leaves the other."""
    embedding = model.get_input_embeddings()
    embedding = getattr(embedding, "original_module", getattr(embedding, "base_layer", embedding))
    for module in model.modules():
        if module is not embedding and getattr(module, "_parameters", {}).get("weight") is embedding.weight:
            module.weight = torch.nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)


def _trained_in_4_bits(adapter):
    """Whether the run that wrote the adapter says so: in its flags, or in the record of a checkpoint."""
    run = os.path.abspath(adapter)
    folders = [run, os.path.dirname(run)] if re.match("best$|checkpoint-", os.path.basename(run)) else [run]
    for folder in folders:
        if os.path.exists(path := os.path.join(folder, "run.yaml")):
            with open(path, encoding="utf-8") as file:
                return bool(re.search(r"^q_lora: true$", file.read(), re.M | re.I))
        if record := checkpoints.record_of(folder):
            return record.get("mode") == engines.Mode.QLORA
    return False


# ----------------------------------------------------------------------------------------------------------------------
# Samples of weights


def _compare_weights(source, plan, folder):
    """How far rows of the written weights are from W + s B A, beyond rounding and with it: the largest relative norms."""
    from peft.utils import load_peft_weights

    weights = load_peft_weights(source.adapter, device="cpu", key_mapping=plan.mapping)
    written = WeightFiles(folder)
    known = [layer for layer in plan.layers if f"base_model.model.{layer}.lora_A.weight" in weights]
    chosen = known[:: max(1, len(known) // SAMPLES)]
    apart, largest = [0.0], []
    for layer in chosen:
        places = plan.places[plan.layers[layer]]
        stored = places[len(places) // 2]
        new, number = written.read(stored), re.search(r"\.experts\.(\d+)\.", stored)
        expert = int(number[1]) if number else new.shape[0] // 2
        rows, merged = _merged_rows(source, plan, weights, layer, stored, expert)
        new = (new[expert] if new.ndim == 3 else new)[rows]
        error, rounding = (new.double() - merged).abs(), torch.finfo(new.dtype).eps / 2 * merged.abs()
        apart.append(((error - rounding).clamp(min=0).norm() / merged.norm()).item())
        largest.append((error.norm() / merged.norm()).item())
    say(f"{len(chosen)} of {len(plan.changed)} changed tensors were compared, {ROWS} rows of each.")
    return max(apart), max(largest, default=float("nan"))


def _merged_rows(source, plan, weights, layer, stored, expert):
    """Rows of one tensor of the files, as (their numbers, W + s B A in float64), from the adapter's file alone.

    The scale s is alpha / r, or alpha / sqrt(r) with rank stabilisation (arXiv 2312.03732). DoRA (arXiv 2402.09353) then
    gives each row the norm that it has learnt. Experts lie one after the other in A, and in turn in B.
    """
    settings, name = plan.settings, plan.layers[layer].removesuffix(".weight")
    prefix, base = f"base_model.model.{layer}", source.files.read(stored)
    left, right = (weights[f"{prefix}.lora_{part}.weight"].double() for part in "BA")
    if name == plan.layers[layer]:  # a parameter of its own, not a layer's weight: experts
        names = plan.places[name]
        experts = (
            base.shape[0] if base.ndim == 3 else len({re.search(r"\.experts\.(\d+)\.", part)[1] for part in names})
        )
        left, right = (
            left.reshape(len(left), -1, experts)[:, :, expert],
            right.reshape(experts, -1, right.shape[1])[expert],
        )
        if ".gate_proj." in stored or ".up_proj." in stored:  # the model holds them as one, gate first
            left = left.chunk(2)[".up_proj." in stored]
        base = base[expert] if base.ndim == 3 else base
    rank = right.shape[0]
    if (len(left), right.shape[1]) != base.shape:
        left, right = right.T, left.T
    alphas = (alpha for key, alpha in settings.alpha_pattern.items() if re.fullmatch(rf"(.*\.)?({key})", name))
    scale = next(alphas, settings.lora_alpha) / (rank**0.5 if settings.use_rslora else rank)
    rows = torch.linspace(0, len(base) - 1, ROWS).long().unique()
    merged = base[rows].double() + scale * left[rows] @ right
    if (norms := weights.get(f"{prefix}.lora_magnitude_vector")) is not None:
        merged *= (norms[rows] / merged.norm(dim=1)).unsqueeze(1)
    return rows, merged
