"""The files of the checkpoint that a model was loaded from: what training does not change is saved as it was.

A vision tower is frozen, the layers `mtp.*` that predict further tokens are not even loaded, and the configuration of
an image processor is none of the tokenizer's files; a server needs all of them beside the trained weights.
"""

import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import Transpose, revert_weight_conversion
from transformers.utils import (
    IMAGE_PROCESSOR_NAME,
    PROCESSOR_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    VIDEO_PROCESSOR_NAME,
    cached_file,
)
from transformers.utils.hub import get_checkpoint_shard_files

from recipe.console import UserError
from recipe.model.weight_files import ShardWriter


class Names(NamedTuple):
    """Names of the tensors that a save writes.

    Attributes:
        all: every name, those of tensors that training does not change included.
        shared: the names among them, or beside them, of weights with several names, of which one is written.
    """

    all: set[str]
    shared: set[str]


def keep_layout(model: PreTrainedModel, shapes: Mapping[str, Sequence[int]]) -> None:
    """Let weights of a model be written in the layout of the files that it was loaded from.

    transformers reads the experts of Qwen3-VL-MoE in either of two layouts, which it tells apart by their shapes, and
    would write one of them only.

    Args:
        model: the model, in parts or not; its conversions are settled.
        shapes: {name of a tensor in the files: shape}.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        return
    kept = []
    for conversion in conversions:
        by_shape = [op for op in getattr(conversion, "operations", []) if getattr(op, "check_dims", False)]
        if by_shape:
            end = conversion.source_patterns[0]
            (transposition,), parameters = by_shape, dict(model.named_parameters())
            whole = next(getattr(p, "ds_shape", p.shape) for name, p in parameters.items() if name.endswith(end))
            if tuple(whole) == next((tuple(shape) for name, shape in shapes.items() if name.endswith(end)), None):
                continue
            conversion.operations = [Transpose(transposition.dim0, transposition.dim1)]
        kept.append(conversion)
    model._weight_conversions = kept


class BaseFiles:
    """The files of the checkpoint that a model was loaded from.

    Args:
        model: the model without an adapter, in parts or not. Nothing is gathered.
        cache_dir: folder for downloaded files; None means the hub's own.

    Attributes:
        tensors: {name of a tensor: (path of its file, name there)}; empty if the checkpoint has no safetensors files.
            The files of a model without an output head lack the prefix that its layers have in one with a head.
    """

    def __init__(self, model: PreTrainedModel, cache_dir: str | None = None):
        self.model, self.cache_dir = model, cache_dir
        self.tensors = {}
        shapes: dict[str, list[int]] = {}
        for path in self._weight_files():
            with safe_open(path, "pt") as file:
                self.tensors.update({name: (path, name) for name in file.keys()})
                shapes.update({name: file.get_slice(name).get_shape() for name in file.keys()})
        keep_layout(model, shapes)
        self._shapes = _without_numbers(model)
        # What `save_pretrained` does, so that these are the names in the files.
        self._written = revert_weight_conversion(model, dict(self._shapes))
        if not self.tensors.keys() & self._written.keys():
            self.tensors = {f"{model.base_model_prefix}.{name}": source for name, source in self.tensors.items()}

    def _find(self, name):
        return cached_file(
            self.model.name_or_path,
            name,
            cache_dir=self.cache_dir,
            local_files_only=True,  # loading the model has downloaded them
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )

    def _weight_files(self):
        if path := self._find(SAFE_WEIGHTS_NAME):
            return [path]
        if path := self._find(SAFE_WEIGHTS_INDEX_NAME):
            name = self.model.name_or_path
            return get_checkpoint_shard_files(name, path, cache_dir=self.cache_dir, local_files_only=True)[0]
        return []

    def names(self) -> Names:
        """Return the names of the tensors that a save writes: those of the checkpoint.

        Raises:
            UserError: the save would write names that the checkpoint does not have.
        """
        uses = Counter(id(shape) for shape in self._shapes.values())
        shared = {name for name, shape in self._written.items() if uses[id(shape)] > 1}
        odd = sorted(self._written.keys() - self.tensors.keys() - shared)
        if odd and self.tensors:
            raise UserError(
                f"{len(odd)} weights would be saved under names that {self.model.name_or_path} does not have, the "
                f"first is {odd[0]}; nothing could load them. Report the versions of transformers and of the engine."
            )
        return Names(set(self._written) | set(self.tensors), shared)

    def unchanged(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read {name: tensor} of the frozen weights among these, by their names in the model."""
        file_names = {id(shape): name for name, shape in self._written.items()}
        frozen = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
        sources = {name: file_names.get(id(self._shapes[name])) for name in frozen.intersection(names)}
        return {name: self._read(source) for name, source in sources.items() if source in self.tensors}

    @contextlib.contextmanager
    def written(self, folder: str, layers: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """Write a whole model as `save_pretrained` would, in memory of one file; what was not trained as it went in.

        Args:
            folder: where to write. Weights that are there stay until all new ones are written; these stay in any case.
            layers: {name in the model: tensor} of each layer.

        Yields:
            {name: tensor without numbers} of what was written.
        """
        with ShardWriter(folder) as writer:
            for layer in layers:
                state = layer | self.unchanged(layer)
                for name in self.model._keys_to_ignore_on_save or ():
                    state.pop(name, None)
                writer.add(revert_weight_conversion(self.model, state))
            for name in sorted(self.tensors.keys() - self._written.keys()):
                writer.add({name: self._read(name)})
            writer.flush()
        try:
            self._copy_processor(folder)
            yield writer.written
        finally:
            writer.finish()

    def _read(self, name):
        path, there = self.tensors[name]
        with safe_open(path, "pt") as file:
            return file.get_tensor(there)

    def _copy_processor(self, folder: str) -> None:
        """Copy the configurations of the image and video processors into a folder."""
        os.makedirs(folder, exist_ok=True)
        for name in (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME):
            if path := self._find(name):
                shutil.copyfile(path, os.path.join(folder, name))


def _without_numbers(model):
    """The state dict of a model as tensors without numbers; weights with several names are one tensor."""
    made, state = {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        shape = getattr(tensor, "ds_shape", tensor.shape)  # ZeRO-3's whole shape
        empty = made.setdefault(id(tensor), torch.empty(shape, device="meta"))
        state[name.replace("_checkpoint_wrapped_module.", "")] = empty
    return state
