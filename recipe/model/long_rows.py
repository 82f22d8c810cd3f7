"""Hold less of a long row on the device: the inputs of layers wait elsewhere, and feed-forward layers work in pieces.

With gradient checkpointing a device holds the input of every layer, which grows with layers times tokens, and all that
one layer computes from it, most of which are the wide results of its feed-forward layer. `Inputs` puts the former in main
memory until the backward pass comes to the layer, and `in_pieces` lets one piece of a row after the other have the
latter. Neither changes what is computed.
"""

import functools
import tempfile
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

PIECE = 2048  # tokens of a row that a feed-forward layer takes at once
SMALL = 1 << 16  # bytes of a tensor that is not worth a copy


# ----------------------------------------------------------------------------------------------------------------------
# Feed-forward layers


def feed_forward(layer: nn.Module) -> nn.Module | None:
    """Return the part of a decoder layer that computes each token by itself, experts included; None if it has none."""
    return getattr(layer, "mlp", None) or getattr(layer, "feed_forward", None)


def in_pieces(layers: Sequence[nn.Module], pieces: int | None = None) -> None:
    """Let the feed-forward part of each layer take a row in pieces, each of which is computed again in its backward pass.

    Args:
        layers: Decoder layers.
        pieces: Their number, for engines whose ranks must all compute equally often; None: as PIECE asks for.
    """
    for part in filter(None, map(feed_forward, layers)):
        part.forward = functools.partial(_in_pieces, part.forward, pieces)


def _in_pieces(forward, pieces, hidden_states, *rest, **options):
    """Compute a feed-forward part; `hidden_states` and its result are [B, T, H], a router's scores [T, experts]."""
    pieces = pieces or -(-hidden_states.shape[1] // PIECE)
    if pieces == 1:
        return forward(hidden_states, *rest, **options)
    compute = functools.partial(checkpoint, forward, use_reentrant=False) if torch.is_grad_enabled() else forward
    parts = [compute(part, *rest, **options) for part in hidden_states.tensor_split(pieces, dim=1)]
    if torch.is_tensor(parts[0]):
        return torch.cat(parts, dim=1)
    return tuple(torch.cat(column, dim=column[0].dim() - 2) for column in zip(*parts, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# Inputs of layers


class Inputs(transformers.TrainerCallback):
    """Keeps the inputs of checkpointed layers off the device, from the forward pass of a layer to its backward pass.

    Those of a GPU go to pinned main memory on a stream of their own, and each is on its way back while the layer after it
    is computed again. Those of a CPU go to files without a name.

    Args:
        device: Where the model computes.
        folder: For the files.
    """

    def __init__(self, device: torch.device, folder: str):
        self.device, self.folder = device, folder
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.newest: Callable[[], _InMainMemory | None] = lambda: None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Begin with the layers of a model, whose checkpointing the Trainer has switched on."""
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                module._gradient_checkpointing_func = self._around(module._gradient_checkpointing_func)

    def _around(self, checkpointing):
        def compute(*args, **kwargs):
            with saved_tensors_hooks(self.put, lambda held: held if isinstance(held, Tensor) else held.take()):
                return checkpointing(*args, **kwargs)

        return compute

    def put(self, tensor: Tensor) -> Any:
        """Put a tensor away that autograd wants to keep, and return what has it; a small one is kept as it is."""
        if tensor.device.type != self.device.type or tensor.nbytes < SMALL or isinstance(tensor, nn.Parameter):
            return tensor
        if self.stream is None:
            return _InFile(tensor, self.folder)
        held = _InMainMemory(tensor, self.stream, self.newest)
        self.newest = weakref.ref(held)
        return held


class _InFile:
    """A tensor of the CPU in a file that vanishes with this object."""

    def __init__(self, tensor, folder):
        self.shape, self.dtype, self.file = tensor.shape, tensor.dtype, tempfile.TemporaryFile(dir=folder)
        self.file.write(_bytes(tensor.detach().contiguous()))

    def take(self):
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self.file.seek(0)
        if self.file.readinto(_bytes(tensor)) != tensor.nbytes:
            raise OSError(f"{self.file.name}: ends before the {tensor.nbytes:,} bytes of a layer's input")
        return tensor


def _bytes(tensor):
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


class _InMainMemory:
    """A tensor of a GPU in pinned main memory. Both copies are in the order of one stream, beside the computation."""

    def __init__(self, tensor, stream, before):
        self.device, self.stream, self.before, self.back = tensor.device, stream, before, None
        stream.wait_stream(torch.cuda.current_stream(self.device))  # which computes it
        with torch.cuda.stream(stream):
            self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)

    def fetch(self):
        """Start the way back."""
        if self.back is None:
            with torch.cuda.stream(self.stream):
                self.back = self.host.to(self.device, non_blocking=True)
                self.arrived = self.stream.record_event()

    def take(self):
        self.fetch()
        if (before := self.before()) is not None:
            before.fetch()
        now = torch.cuda.current_stream(self.device)
        now.wait_event(self.arrived)
        tensor, self.back = self.back, None
        tensor.record_stream(now)
        return tensor
