"""Linear-attention layers (gated delta nets, short convolutions) over a packed row, each document by itself.

Such a layer convolves each channel over the last few tokens and carries a state from token to token, so the start of a
document would depend on the document before it. transformers passes the ends of the documents (`cu_seq_lens_q`) to both
functions of a layer, but only the delta rule of flash-linear-attention observes them: the torch rule raises an error
(transformers 5.23) or ignores them (5.17), and every convolution ignores them.

`keep_documents_apart` replaces these functions in the modelling file, where the layers look them up at each call. It
leaves the layers' `forward` alone: a forward that ran once for each document would gather the weights of ZeRO-3 a
different number of times on ranks with different numbers of documents, and the ranks would hang.

Where documents share the tokens that they begin with (see `dataset.prefixes`), each takes its state through all of its
tokens by itself, from inputs that were computed once.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from recipe.model.attention import Fetch

CHUNK = 64  # tokens that the torch rules compute at once
# Names of functions in modelling files, and the functions of flash-linear-attention that compute the same.
CONVOLUTION = "causal_conv1d_fn"
RULES = {"torch_chunk_gated_delta_rule", "chunk_kimi_delta_attention"}
KERNELS = {
    CONVOLUTION: ("fla.modules.causal_conv1d", "causal_conv1d"),
    "torch_chunk_gated_delta_rule": ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
    "chunk_kimi_delta_attention": ("fla.ops.kda", "chunk_kda"),
}


def keep_documents_apart(model: nn.Module) -> None:
    """Let the linear-attention layers of a model compute each document of a packed row by itself.

    Calls without `cu_seq_lens_q`, as in generation, run as before. Further calls change nothing. Layers with other
    functions (Mamba, for one) stay as they are, and `checks.packing_fault` finds that they mix documents.
    """
    for functions in _modelling_files(model):
        for name in KERNELS.keys() & functions.keys():
            if not hasattr(functions[name], "keeps_documents_apart"):
                by_document = _convolution_by_document if name == CONVOLUTION else _rule_by_document
                functions[name] = by_document(functions[name], _kernel(name))


def describe(model: nn.Module, device: torch.device) -> str | None:
    """Name what computes the linear-attention layers on a device; None for a model without any that are known here."""
    names = {name for functions in _modelling_files(model) for name in KERNELS.keys() & functions.keys()}
    if not names:
        return None
    if device.type == "cpu":
        return "torch functions, each document by itself"
    if all(map(_kernel, names)):
        return "kernels of flash-linear-attention"
    return (
        "torch functions, each document by itself; `pip install flash-linear-attention` brings kernels that compute a "
        "whole row at once and are many times faster"
    )


def _modelling_files(model: nn.Module) -> Iterator[dict]:
    """Yield the globals of each modelling file of the model whose linear-attention functions are known here."""
    for name in sorted({type(module).__module__ for module in model.modules()}):
        functions = vars(sys.modules.get(name, nn))
        # Without a rule the convolution may be the whole layer, as in LFM2, or lead to a scan that mixes documents.
        alone = any(type(m).__module__ == name and type(m).__name__.endswith("ShortConv") for m in model.modules())
        if CONVOLUTION in functions and (alone or RULES & functions.keys()):
            yield functions


def _kernel(name: str) -> Callable | None:
    """Import the kernel for a function of a modelling file; None without the library, or where Triton does not load."""
    path, function = KERNELS[name]
    try:
        return getattr(importlib.import_module(path), function)
    except Exception:  # transformers, too, takes its torch function whatever the import raises
        return None


def _convolution_by_document(original: Callable, kernel: Callable | None) -> Callable:
    def causal_conv1d_fn(states, *weights, cu_seq_lens_q=None, cu_seq_lens_k=None, key_places=None, **options):
        if cu_seq_lens_q is None:
            return original(states, *weights, **options)
        if key_places is None:
            return _convolve(original, kernel, cu_seq_lens_q, states, *weights, **options)
        whole = Fetch.apply(states[0].T, key_places).T[None]
        output = _convolve(original, kernel, cu_seq_lens_k, whole, *weights, **options)
        return output[:, :, _own(cu_seq_lens_q, cu_seq_lens_k, states.shape[2])]

    causal_conv1d_fn.keeps_documents_apart = True
    return causal_conv1d_fn


def _rule_by_document(original: Callable, kernel: Callable | None) -> Callable:
    def rule(*states, cu_seqlens=None, cu_seq_lens_q=None, cu_seq_lens_k=None, key_places=None, **options):
        ends = cu_seq_lens_q if cu_seqlens is None else cu_seqlens
        if ends is None:
            return original(*states, **options)
        if key_places is None:
            return _apply_rule(original, kernel, ends, *states, **options)

        def whole(state):
            return Fetch.apply(state[0], key_places)[None]

        more = {name: whole(value) if name in ("query", "key", "value", "g", "beta") else value
                for name, value in options.items()}  # fmt: skip
        output, none = _apply_rule(original, kernel, cu_seq_lens_k, *map(whole, states), **more)
        return output[:, _own(ends, cu_seq_lens_k, len(states[0][0]))], none

    rule.keeps_documents_apart = True
    return rule


def _own(ends: Tensor, all_ends: Tensor, tokens: int) -> Tensor:
    """Return where, in all tokens of all documents, those are that each has for itself: int64 [tokens of the row].

    Args:
        ends, all_ends: int32 [documents + 1], `cu_seq_lens_q` and `cu_seq_lens_k` of `collator.Batch`.
    """
    shift = (all_ends - ends)[1:].repeat_interleave(ends.diff(), output_size=tokens)
    return torch.arange(tokens, device=ends.device) + shift


@torch.compiler.disable  # rows differ in their documents, and each would be compiled anew
def _convolve(
    original: Callable,
    kernel: Callable | None,
    ends: Tensor,
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **options,
) -> Tensor:
    """Convolve each channel over the tokens of each document.

    Args:
        original: the function of the modelling file.
        kernel: `causal_conv1d` of flash-linear-attention, where it is installed.
        ends: int32 [documents + 1], 0 and where each document ends.
        states: [1, C, T]; weight: [C, width]; bias: [C].
    Returns:
        [1, C, T].
    """
    row = states.transpose(1, 2)
    if kernel and states.device.type != "cpu" and activation in (None, "silu", "swish"):  # it ignores others
        return kernel(row, weight, bias, activation=activation, cu_seqlens=ends)[0].transpose(1, 2)

    def convolve(rows):
        return inspect.unwrap(original)(rows.transpose(1, 2), weight, bias, activation=activation).transpose(1, 2)

    return _by_document(convolve, ends, row).transpose(1, 2)


@torch.compiler.disable
def _apply_rule(
    original: Callable,
    kernel: Callable | None,
    ends: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **options,
) -> tuple[Tensor, None]:
    """Apply the delta rule to each document, whose state starts at zero.

    Args:
        original: the function of the modelling file.
        kernel: the same rule of flash-linear-attention, where it is installed.
        ends: int32 [documents + 1], 0 and where each document ends.
        query, key: [1, T, H, D]; value: [1, T, HV, V]; beta: [1, T, HV].
        g: the logarithm of the decay, [1, T, HV] (gated delta rule) or [1, T, HV, D] (Kimi).
    Returns:
        [1, T, HV, V] and no state, as a packed row is not continued.
    """
    settings = {"use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel}
    if kernel and query.device.type != "cpu":
        return kernel(query, key, value, g=g, beta=beta, cu_seqlens=ends, **settings)[0], None

    def rule(query, key, value, g, beta):
        return inspect.unwrap(original)(query, key, value, g=g, beta=beta, **settings)[0]

    return _by_document(rule, ends, query, key, value, g, beta), None


def _by_document(function: Callable, ends: Tensor, *states: Tensor) -> Tensor:
    """Call a causal function of states [rows, tokens, ...] on the documents of one row, and join what it returns.

    Documents of as many chunks go through one call, padded to the longest of them: the rule pads each to whole chunks
    in any case, and a token does not depend on later ones.
    """
    lengths = ends.diff().tolist()
    parts = [state[0].split(lengths) for state in states]
    groups: dict[int, list[int]] = {}
    for document, length in enumerate(lengths):
        groups.setdefault(-(-length // CHUNK), []).append(document)
    outputs: dict[int, Tensor] = {}
    for documents in groups.values():
        rows = [pad_sequence([part[document] for document in documents], batch_first=True) for part in parts]
        for document, output in zip(documents, function(*rows), strict=True):
            outputs[document] = output[: lengths[document]]
    return torch.cat([outputs[document] for document in range(len(lengths))])[None]
