"""Routed experts of a mixture: their forward pass, their low-rank adapters and their weights in 4 bits.

transformers keeps the routed experts of a layer in two stacks, one 3-D parameter each, and chooses their forward pass
by name from a registry. The one here (`forward`) sends every row through the weight of its expert and, beside it,
through the factors A and B of its adapter. peft alone would form W + scaling * B A for all experts at every call: two
tensors as large as the layer, and a dense gradient. Factors, names and files stay peft's: its wrappers hand the
factors over (`hand_over_factors`) instead of forming the sum. The same function dequantises stacks that are held in
4 bits, which peft cannot add to.
"""

import contextlib
import math
import types
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.integrations import moe
from transformers.quantizers import auto
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from recipe.console import UserError
from recipe.model.precision import computing_dtype

IMPLEMENTATION = "low_rank"  # name of `forward` in transformers' registry
ROW_BYTES = 16  # the kernel for grouped products takes rows of a multiple of it
LARGEST_4BIT = 2**31 - 1  # bitsandbytes counts the elements of a tensor in 32 bits


def routed_experts(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Find the modules that transformers' registry of expert functions runs, by their names in the model."""
    return {name: module for name, module in model.named_modules() if _is_routed(module)}


def _is_routed(module: torch.nn.Module) -> bool:
    return all(hasattr(module, fact) for fact in ("num_experts", "has_gate", "is_transposed")) and bool(_stacks(module))


def _stacks(experts: torch.nn.Module) -> tuple[str, ...]:
    """Name the two 3-D parameters in the order of the computation."""
    names = ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")
    return names if all(hasattr(experts, name) for name in names) else ()


def is_routed_weight(name: str) -> bool:
    """Tell whether a parameter of that name is a weight of routed experts (and not of an adapter)."""
    return ".experts." in name and ".lora_" not in name


def experts_per_token(config: PretrainedConfig) -> int:
    """Read from a model's config how many routed experts compute a token; 0 for a model without such experts."""
    config = config.get_text_config()
    of_layer = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    of_token = ("num_experts_per_tok", "top_k_experts", "moe_topk")
    if not any(getattr(config, name, None) for name in of_layer):
        return 0
    return next((getattr(config, name) for name in of_token if isinstance(getattr(config, name, None), int)), 0)


def balancing_weight(config: PretrainedConfig) -> float:
    """Read the weight of the load-balancing loss (arXiv 2101.03961) from a model's config; 0 where it is not asked for."""
    config = config.get_text_config()
    wanted = getattr(config, "output_router_logits", False)
    return float(getattr(config, "router_aux_loss_coef", None) or 0) if wanted else 0.0


def balancing_of(model: torch.nn.Module) -> float:
    """Return that weight for a training: an adapter leaves the routers as they are, and their balance with them."""
    return 0.0 if hasattr(model, "peft_config") else balancing_weight(model.config)


# ----------------------------------------------------------------------------------------------------------------------
# Forward pass


def use_low_rank_forward(model: PreTrainedModel) -> None:
    """Let `forward` run the routed experts of a model; a model without such experts is left as it is."""
    if routed_experts(model):
        moe.ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, forward)
        model.set_experts_implementation(IMPLEMENTATION)


@torch.compiler.disable  # inductor gives the factors a layout that the kernel refuses
def forward(
    experts: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Compute the routed experts of a layer, as `transformers.integrations.moe.grouped_mm_experts_forward` does.

    Products run in the precision of autocast, or of `hidden_states`.
    Args:
        experts: module with the stacks and, while an adapter's wrappers call it, `lora_factors`.
        hidden_states: [T, H]; top_k_index: int64 [T, k], the experts of a token; top_k_weights: [T, k].
    Returns:
        [T, H], in the dtype of `hidden_states`.
    """
    device, top_k = hidden_states.device.type, top_k_index.shape[-1]
    dtype = computing_dtype(hidden_states)
    expert_of_row, order = top_k_index.flatten().sort()
    numbers = torch.arange(experts.num_experts, device=hidden_states.device)
    ends = torch.searchsorted(expert_of_row, numbers, right=True).int()
    into, out_of = _stacks(experts)
    with torch.autocast(device, enabled=False):
        rows = hidden_states.to(dtype)[:, None].expand(-1, top_k, -1).flatten(0, 1).index_select(0, order)
        rows = _project(experts, into, rows, expert_of_row, ends)
        rows = experts._apply_gate(rows) if experts.has_gate else experts.act_fn(rows)
        rows = _project(experts, out_of, rows, expert_of_row, ends)
        if getattr(experts, "has_post_expert_norm", False):
            rows = experts.post_expert_norm(rows)
        rows = rows.index_select(0, order.argsort()).unflatten(0, (-1, top_k))
        return torch.bmm(top_k_weights[:, None].to(dtype), rows)[:, 0].to(hidden_states.dtype)


def _project(experts, name, rows, expert_of_row, ends):
    """Multiply rows [S, in], sorted by expert, with a stack and add its adapters: [S, out]."""
    stack = getattr(experts, name)
    if stack.requires_grad:  # trained whole, or summed up by peft
        result = moe._grouped_mm(rows, _inwards(stack.to(rows.dtype), experts.is_transposed), ends)
    else:
        state = getattr(experts, "quant_states", {}).get(name)
        result = _FrozenProduct.apply(rows, stack, state, experts.is_transposed, ends)
    for a, b, scaling in getattr(experts, "lora_factors", {}).get(name, ()):
        padding = -a.shape[1] % (ROW_BYTES // rows.element_size())
        a = torch.nn.functional.pad(a.to(rows.dtype), (0, 0, 0, padding))
        b = torch.nn.functional.pad((scaling * b).to(rows.dtype), (0, padding)).contiguous()
        inner = moe._grouped_mm(rows, a.transpose(1, 2), ends)
        result += moe._grouped_mm(inner, b.transpose(1, 2), ends)
    if experts.has_bias:
        result += getattr(experts, f"{name}_bias")[expert_of_row].to(rows.dtype)
    return result


def _inwards(stack, transposed):
    """View a stack as [E, in, out]."""
    return stack if transposed else stack.transpose(1, 2)


class _FrozenProduct(torch.autograd.Function):
    """Product of rows with a stack that is not trained, which is kept for the backward pass as it is stored.

    Neither a copy in another precision nor dequantised weights outlive the product; and engines that take a parameter
    apart after each pass can do so, as autograd refers to the parameter itself.
    Args:
        rows: [S, in], sorted by expert; stack: [E, out, in], or [E, in, out] if `transposed`, or packed in 4 bits.
        state: the `QuantState` of a packed stack, or None; ends: int32 [E], where the rows of each expert end.
    Returns:
        [S, out], in the dtype of `rows`.
    """

    @staticmethod
    def forward(ctx, rows, stack, state, transposed, ends):
        ctx.save_for_backward(stack, ends)
        ctx.state, ctx.transposed = state, transposed
        return moe._grouped_mm(rows, _inwards(_unpacked(stack, state, rows.dtype), transposed), ends)

    @staticmethod
    def backward(ctx, grad):
        stack, ends = ctx.saved_tensors
        outwards = _inwards(_unpacked(stack, ctx.state, grad.dtype), ctx.transposed).transpose(1, 2)
        return moe._grouped_mm(grad.contiguous(), outwards, ends), None, None, None, None


def _unpacked(stack, state, dtype):
    if state is None:
        return stack.to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    if state.absmax.device != stack.device:  # engines move the parameters of a module and nothing else
        state.to(stack.device)
    return dequantize_4bit(stack.data, state).to(dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Adapters


def check(config: PretrainedConfig, adapt_experts: bool, target_modules: list[str] | None) -> None:
    """Refuse adapters that a model of this configuration cannot have, before its weights are loaded.

    Args:
        adapt_experts: whether the routed experts are to be adapted; target_modules: linear layers that the user names.
    Raises:
        UserError: the model has no routed experts, or peft would adapt them in place of the named layers.
    """
    if adapt_experts and not experts_per_token(config):
        raise UserError(
            f"--lora_experts: {config.model_type} has no routed experts, or its config does not say how many compute "
            "a token; leave the flag out."
        )
    reserved = sorted(reserved_names(config) & {name.rpartition(".")[2] for name in target_modules or ()})
    if reserved:
        raise UserError(
            f"--lora_target_modules {' '.join(reserved)}: in a {config.model_type}, peft takes these names for the "
            "routed experts; leave them out, --lora_experts adapts the experts."
        )


def reserved_names(config: PretrainedConfig) -> set[str]:
    """Return names of linear layers that peft takes for those of routed experts, or the router, in such a model.

    In files of transformers 4 the experts of some families are linear layers gate_proj, up_proj, down_proj. For such a
    family peft replaces these target modules by stacked parameters whenever it creates or loads an adapter, see
    `peft.utils.transformers_weight_conversion`. Other linear layers of these names (in a shared expert, or in layers
    without routed experts) therefore cannot be adapted.
    """
    from peft.utils import transformers_weight_conversion as conversion

    family = conversion._MODEL_TO_CONVERSION_PATTERN.get(config.model_type)
    return set(conversion._MOE_TARGET_MODULE_MAPPING.get(family, {}))


def expert_rank(config: PretrainedConfig, r: int) -> int:
    """Share a rank out among the experts of a token, so that a token passes as much of an adapter as elsewhere."""
    return max(1, r // max(1, experts_per_token(config)))


def adapter_size(model: PreTrainedModel, rank: int) -> int:
    """Count the parameters of adapters of that rank on all routed experts."""
    shapes = (_shape(experts, name) for experts in routed_experts(model).values() for name in _stacks(experts))
    return sum(rank * count * (rows + columns) for count, rows, columns in shapes)


def _shape(experts, name):
    """Shape [E, out, in] or [E, in, out] of a stack, also of one in parts or in 4 bits."""
    stack, state = getattr(experts, name), getattr(experts, "quant_states", {}).get(name)
    return state.shape if state is not None else getattr(stack, "ds_shape", stack.shape)


def lora_options(model: PreTrainedModel, r: int, alpha: float, use_rslora: bool) -> dict[str, Any]:
    """Describe adapters on both stacks of all routed experts for `peft.LoraConfig`, with the scale of the others.

    Returns:
        `target_parameters`, `rank_pattern` and `alpha_pattern`.
    Raises:
        UserError: the experts are not stacked in the way that transformers' registry runs.
    """
    names = set()
    for path, experts in routed_experts(model).items():
        parts = path.split(".")
        layer = max((index for index, part in enumerate(parts) if part.isdecimal()), default=-1)
        names |= {".".join([*parts[layer + 1 :], stack]) for stack in _stacks(experts)}
    if not names:
        raise UserError(
            f"--lora_experts: no adapter can reach the routed experts of {model.config.model_type}, which transformers "
            "does not compute through its registry of expert functions; leave the flag out."
        )
    rank = expert_rank(model.config, r)
    scaled = alpha * (math.sqrt(rank / r) if use_rslora else rank / r)
    return {
        "target_parameters": sorted(names),
        "rank_pattern": dict.fromkeys(sorted(names), rank),
        "alpha_pattern": dict.fromkeys(sorted(names), scaled),
    }


def hand_over_factors(model: torch.nn.Module) -> None:
    """Make the wrappers of an adapter hand its factors to `forward`, in place of summing up weights."""
    from peft.tuners.lora.layer import ParamWrapper

    for module in model.modules():
        if isinstance(module, ParamWrapper) and _is_routed(module.get_base_layer()):
            module._activate_lora = types.MethodType(_with_factors, module)


@contextlib.contextmanager
def _with_factors(wrapper, active_adapters: Iterable[str]) -> Iterator[None]:
    """Take the place of `ParamWrapper._activate_lora`, which surrounds the call of the wrapped experts."""
    experts, handed = wrapper.get_base_layer(), []
    for name in active_adapters:
        if name in wrapper.lora_A:
            a, b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
            a = a.view(wrapper.num_experts, -1, a.shape[-1])  # [E, r, in]
            b = b.view(b.shape[0], -1, wrapper.num_experts).permute(2, 0, 1)  # [E, out, r]
            handed.append((a, b, wrapper.scaling[name]))
    factors = experts.__dict__.setdefault("lora_factors", {})
    factors[wrapper.parameter_name] = handed
    try:
        yield
    finally:
        del factors[wrapper.parameter_name]


@contextlib.contextmanager
def whole_shapes(model: torch.nn.Module) -> Iterator[None]:
    """Show packed stacks in their whole shapes while peft creates or loads an adapter; they take no memory."""
    packed = []
    for experts in routed_experts(model).values():
        for name, state in getattr(experts, "quant_states", {}).items():
            stack = getattr(experts, name)
            packed.append((experts, name, stack))
            shape_only = torch.zeros(1, dtype=state.dtype, device=stack.device).expand(state.shape)
            setattr(experts, name, torch.nn.Parameter(shape_only, requires_grad=False))
    try:
        with warnings.catch_warnings():  # peft looks for these names among modules and not among parameters
            warnings.filterwarnings("ignore", message=".*pattern keys did not match any targeted module")
            yield
    finally:
        for experts, name, stack in packed:
            setattr(experts, name, stack)


# ----------------------------------------------------------------------------------------------------------------------
# 4 bits


def quantise_experts_as_well() -> None:
    """Let transformers hold stacks of routed experts in 4 bits, too, wherever it loads a model in 4 bits."""
    auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = ExpertsQuantizer


class ExpertsQuantizer(Bnb4BitHfQuantizer):
    """bitsandbytes' quantizer, which knows linear layers alone, with the stacks of routed experts added.

    A stack is quantised as soon as it has been read, so that few of them exist in 16 bits at a time; on a CPU
    bitsandbytes takes five times the stack while it quantises one.
    """

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Tell whether a parameter is to be held in 4 bits.

        Raises:
            UserError: a stack has more elements than bitsandbytes can count.
        """
        path, _, name = param_name.rpartition(".")
        module = model.get_submodule(path)
        if not _is_routed(module) or name not in _stacks(module):
            return super().param_needs_quantization(model, param_name, **kwargs)
        if getattr(module, name).numel() > LARGEST_4BIT:
            raise UserError(
                f"--q_lora: {param_name} holds {getattr(module, name).numel():,} weights, and bitsandbytes can hold at "
                f"most {LARGEST_4BIT:,} of one tensor in 4 bits; leave out --q_lora."
            )
        return True

    def get_quantize_ops(self) -> ConversionOps:
        """Return the operation that quantises one parameter."""
        return _Quantize(self.quantization_config, super().get_quantize_ops())


class _Quantize(ConversionOps):
    """Quantise one parameter while a model is loaded: a stack here, anything else with bitsandbytes' own operation."""

    def __init__(self, config, linear):
        self.config, self.linear = config, linear

    def convert(self, input_dict, model=None, full_layer_name=None, **kwargs):
        from bitsandbytes.nn import Params4bit

        ((param_name, value),) = input_dict.items()
        path, _, name = param_name.rpartition(".")
        module = model.get_submodule(path)
        if not _is_routed(module):
            return self.linear.convert(input_dict, model=model, full_layer_name=full_layer_name, **kwargs)
        value = value[0] if isinstance(value, list) else value
        packed = Params4bit(
            value,
            requires_grad=False,
            compress_statistics=self.config.bnb_4bit_use_double_quant,
            quant_type=self.config.bnb_4bit_quant_type,
            quant_storage=self.config.bnb_4bit_quant_storage,
        ).to(value.device)
        # The parts that an engine makes of the parameter have no state.
        module.__dict__.setdefault("quant_states", {})[name] = packed.quant_state
        module._is_hf_initialized = True
        return {param_name: packed}
