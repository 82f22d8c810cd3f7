"""Read and write the safetensors files of a checkpoint one tensor at a time, without loading the model.

The format (https://github.com/huggingface/safetensors#format): 8 bytes with the length of the header, the header as
JSON, {name: {dtype, shape, data_offsets}}, and the numbers of all tensors one after the other.
"""

import glob
import json
import os
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch

from recipe.console import UserError

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
COPIED = 1 << 24  # bytes that are copied at a time


class Stored(NamedTuple):
    """Where a tensor lies: file name, dtype in the words of safetensors, shape, and its bytes in the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class WeightFiles:
    """The tensors of a checkpoint folder with one file model.safetensors, or with several and an index.

    Attributes:
        folder: the checkpoint's folder.
        shards: names of its weight files.
        index: name of the file that says which tensor lies where, None for a single weight file.
        tensors: {name: Stored}, in the order in which they lie in the files.

    Raises:
        UserError: the folder has no such files, or one is missing, cut off or of another format.
    """

    def __init__(self, folder: str):
        from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

        self.folder, self.shards, self.tensors, self.index = folder, [SAFE_WEIGHTS_NAME], {}, None
        index = os.path.join(folder, SAFE_WEIGHTS_INDEX_NAME)
        if not os.path.exists(os.path.join(folder, SAFE_WEIGHTS_NAME)):
            if not os.path.exists(index):
                raise UserError(
                    f"{folder}: holds no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}; expected weights in "
                    "safetensors files. Load a model with other weight files in transformers and save it with "
                    "save_pretrained."
                )
            self.index, places = SAFE_WEIGHTS_INDEX_NAME, read_json(index).get("weight_map")
            if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
                raise UserError(f"{index}: weight_map names no files; download the model again.")
            self.shards = sorted(set(places.values()))
        for name in self.shards:
            self.tensors.update(_tensors(folder, name))

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor in the dtype it is stored in, one of FLOATS, into memory of its own."""
        stored = self.tensors[name]
        numbers = bytearray(stored.end - stored.start)
        with open(os.path.join(self.folder, stored.file), "rb") as file:
            file.seek(stored.start)
            file.readinto(numbers)
        if not numbers:
            return torch.empty(stored.shape, dtype=FLOATS[stored.dtype])
        return torch.frombuffer(numbers, dtype=FLOATS[stored.dtype]).reshape(stored.shape)

    def write(
        self,
        file: str,
        folder: str,
        dtypes: Mapping[str, str],
        changed: Mapping[str, Callable[[torch.dtype], torch.Tensor]],
        added: Mapping[str, tuple[str, tuple[int, ...]]],
    ) -> None:
        """Write a copy of one weight file into `folder`, some of its tensors changed, in memory of one tensor.

        Tensors that do not change are copied, and so is the header of a file whose tensors keep their dtypes.

        Args:
            file: name of the weight file.
            folder: folder to write to.
            dtypes: {name: dtype to write, a key of FLOATS}, for tensors that are new or get another dtype.
            changed: {name: function from the dtype to write to the new tensor}.
            added: {name: (file, shape)} of new tensors, which `changed` computes.

        Raises:
            UserError: a tensor is not finite in the dtype to write.
        """
        here = {name: stored for name, stored in self.tensors.items() if stored.file == file}
        new = {name: shape for name, (holder, shape) in added.items() if holder == file}
        shapes = {name: stored.shape for name, stored in here.items()} | new
        kinds = {name: dtypes.get(name) or here[name].dtype for name in shapes}
        with open(os.path.join(self.folder, file), "rb") as source, open(os.path.join(folder, file), "wb") as target:
            length = int.from_bytes(source.read(8), "little")
            header = source.read(length)
            if new or any(kinds[name] != stored.dtype for name, stored in here.items()):
                header = _header(json.loads(header), kinds, shapes, here)
            target.write(len(header).to_bytes(8, "little") + header)
            for name, kind in kinds.items():
                if name not in changed and kind == here[name].dtype:
                    _copy(source, target, here[name])
                    continue
                tensor = changed[name](FLOATS[kind]) if name in changed else self.read(name)
                _append(target, name, tensor, FLOATS[kind])


class ShardWriter:
    """Writes the weights of a model to files of a size, as they come. An error within its context deletes them.

    Args:
        folder: where to write.

    Attributes:
        written: {name: tensor without numbers} of all tensors so far.
    """

    LARGEST = 5 * 10**9  # bytes of a file with several tensors

    def __init__(self, folder: str):
        self.folder, self.written = folder, {}
        self._files: list[list[str]] = []
        self._next: dict[str, torch.Tensor] = {}

    def __enter__(self) -> "ShardWriter":
        os.makedirs(self.folder, exist_ok=True)
        self._delete("unfinished-*.safetensors")  # of a save that was killed
        return self

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write these tensors, {name in the file: tensor}, or keep them until a file is full."""
        for name, tensor in tensors.items():
            if self._next and _bytes(self._next.values()) + tensor.nbytes > self.LARGEST:
                self.flush()
            self._next[name] = tensor.contiguous()
            self.written[name] = torch.empty_like(tensor, device="meta")

    def flush(self) -> None:
        """Write what has been kept."""
        from safetensors.torch import save_file

        if self._next:
            save_file(self._next, self._unfinished(len(self._files)), metadata={"format": "pt"})
            self._files.append(list(self._next))
            self._next.clear()

    def __exit__(self, kind: type | None, *error: object) -> None:
        if kind:
            self._delete("unfinished-*.safetensors")

    def finish(self) -> None:
        """Give the files the names under which a model is loaded, in place of an earlier save's."""
        from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

        self._delete(SAFE_WEIGHTS_NAME, "model-?????-of-?????.safetensors", SAFE_WEIGHTS_INDEX_NAME)
        count, places = len(self._files), {}
        for number, names in enumerate(self._files):
            file = f"model-{number + 1:05}-of-{count:05}.safetensors" if count > 1 else SAFE_WEIGHTS_NAME
            os.replace(self._unfinished(number), os.path.join(self.folder, file))
            places.update(dict.fromkeys(names, file))
        if count > 1:
            index = {"metadata": {"total_size": _bytes(self.written.values())}, "weight_map": places}
            with open(os.path.join(self.folder, SAFE_WEIGHTS_INDEX_NAME), "w", encoding="utf-8") as target:
                json.dump(index, target, indent=2, sort_keys=True)

    def _unfinished(self, number):
        return os.path.join(self.folder, f"unfinished-{number}.safetensors")

    def _delete(self, *patterns):
        for pattern in patterns:
            for path in glob.glob(os.path.join(glob.escape(self.folder), pattern)):
                os.remove(path)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def read_json(path: str) -> dict:
    """Read a JSON file that comes with a model.

    Raises:
        UserError: it is not there, or no JSON object.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object; download the model again.")
    return content


def _tensors(folder, name):
    path = os.path.join(folder, name)
    try:
        with open(path, "rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(start - 8))
        entries.pop("__metadata__", None)
        ordered = sorted(entries.items(), key=lambda entry: entry[1]["data_offsets"])
        found = {
            key: Stored(name, entry["dtype"], tuple(entry["shape"]), *(start + at for at in entry["data_offsets"]))
            for key, entry in ordered
        }
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); download the model again.") from None
    except Exception:  # any that comes of bytes which are no header
        raise UserError(f"{path}: is no safetensors file; download the model again.") from None
    end = max((stored.end for stored in found.values()), default=start)
    if os.path.getsize(path) != end:
        raise UserError(f"{path}: has {os.path.getsize(path):,} bytes, expected {end:,}; download the model again.")
    return found


def _header(old, kinds, shapes, here):
    header, at = {}, 0
    if "__metadata__" in old:
        header["__metadata__"] = old["__metadata__"]
    for name, kind in kinds.items():
        size = here[name].end - here[name].start if name in here and kind == here[name].dtype else None
        size = size if size is not None else FLOATS[kind].itemsize * torch.Size(shapes[name]).numel()
        header[name] = {"dtype": kind, "shape": list(shapes[name]), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


def _append(target, name, tensor, dtype):
    finite, tensor = tensor.isfinite().all(), tensor.to(dtype)
    if not tensor.isfinite().all():
        remedy = f" in {dtype}; use --dtype bfloat16" if finite else ""
        raise UserError(f"{name} is not finite{remedy}; nothing was written.")
    target.write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))


def _copy(source, target, stored):
    source.seek(stored.start)
    for start in range(stored.start, stored.end, COPIED):
        target.write(source.read(min(COPIED, stored.end - start)))
