"""Safetensors files, read one tensor at a time and written atomically; names of files and folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from crosscal.errors import ModelError
from crosscal.files import whole_file

ADAPTER, ADAPTER_CONFIG = "adapter", "adapter_config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DECODED_BYTES = 4
"""Largest decoded size of one stored byte: two numbers of two bytes."""
UNENCODED = "Give a checkpoint in bfloat16, or one whose config names its fp8 format (`weight_scale_inv`)."
AGAIN = "Download or save the model again."
_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class Encoded:
    """A tensor that is stored as several parts and decoded from them when it is read."""

    parts: tuple[str, ...]
    decode: Callable[..., Tensor]


class TensorReader:
    """Reads tensors from several files, opening each file once, and decodes encoded ones. Raises `ModelError`."""

    def __init__(self, files: Mapping[str, Path], encoded: Mapping[str, Encoded], stack: ExitStack) -> None:
        self._files, self._encoded, self._stack, self._open = files, encoded, stack, {}

    def __call__(self, key: str) -> Tensor:
        if (encoded := self._encoded.get(key)) is not None:
            try:
                return encoded.decode(*(self._read(part) for part in encoded.parts))
            except ModelError as error:
                raise ModelError(error.what, where=key, got=error.got, do=error.do) from error
        tensor = self._read(key)
        if tensor.is_floating_point() and tensor.dtype.itemsize == 1:
            what = "an 8-bit tensor has no scales in the checkpoint"
            raise ModelError(what, where=f"{self._files[key]}, {key}", got=str(tensor.dtype), do=UNENCODED)
        return tensor

    def _read(self, key: str) -> Tensor:
        file = self._files[key]
        if file not in self._open:
            self._open[file] = self._stack.enter_context(_opened(file))
        try:
            return self._open[file].get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise _unreadable(file, error) from error


@contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    try:
        # pread, not mmap: pages of a mapped file would count as used memory.
        handle = safe_open(str(file), framework="pt", device="cpu", backend="pread")
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, error) from error
    with handle as opened:
        yield opened


def _unreadable(file: Path, error: Exception) -> ModelError:
    return ModelError("this weight file cannot be read", where=str(file), got=str(error), do=AGAIN)


def files_by_tensor(folder: Path) -> dict[str, Path]:
    """Return checkpoint name -> the file that holds it. Raises `ModelError` if a file is missing or damaged."""
    index = folder / INDEX
    names = sorted(set(_weight_map(index).values())) if index.is_file() else [SINGLE]
    files: dict[str, Path] = {}
    for name in names:
        if not (folder / name).is_file():
            raise ModelError("a weight file is missing", where=str(folder), got=f"no {name}", do=AGAIN)
        files.update(dict.fromkeys(tensor_names(folder / name), folder / name))
    if index.is_file():
        gone = sorted(set(_weight_map(index)) - set(files))
        if gone:
            raise ModelError("tensors that the index lists are in no file", where=str(index), got=some_of(gone))
    return files


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError("the index of the weight files cannot be read", where=str(index), got=str(error)) from error


def tensor_names(file: Path) -> list[str]:
    """Return the names of the tensors in one file."""
    with _opened(file) as opened:
        return list(opened.keys())


def bytes_of(files: Mapping[str, Path], encoded: Mapping[str, Encoded], key: str) -> int:
    """Return the bytes of a tensor as stored or, if it is encoded, an upper bound of its decoded size."""
    is_encoded = key in encoded
    stored = encoded[key].parts[0] if is_encoded else key
    with _opened(files[stored]) as file:
        view = file.get_slice(stored)
        numbers = int(torch.Size(view.get_shape()).numel())
        return numbers * (DECODED_BYTES if is_encoded else _ITEM_BYTES.get(view.get_dtype(), 8))


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write one safetensors file atomically."""
    with whole_file(file) as aside:
        save_file({key: _own(tensor) for key, tensor in tensors.items()}, aside, metadata={"format": "pt"})


def _own(tensor: Tensor) -> Tensor:
    """Return the tensor, cloned if it is not all of its storage, as the file format requires."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def some_of(names: list[str]) -> str:
    """Format the first four names and the number of the others."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
