"""The tensors of `pretend_device`: checks of each operation, its computation on the CPU, the device of its result."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import crosscal
from tests.helpers.cuda_kernels import has_cuda_kernel

CUDA = torch.device("cuda", 0)
PACKAGE = Path(crosscal.__file__).parent
GENERATOR: Any = torch.Generator
aten = torch.ops.aten
TRANSFERS = {aten.copy_.default, aten._to_copy.default}
"""Operations that read one device and write another."""
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten._unique2.default}
"""Operations for which the CPU waits until the device has computed a value."""
FILLS = {
    aten.index_put_.default,
    aten.index_put.default,
    aten.masked_fill_.Tensor,
    aten.masked_fill.Tensor,
    aten.fill_.Tensor,
}
"""Operations not tagged as pointwise by torch that accept a zero-dimensional CPU tensor all the same."""


class DeviceMix(RuntimeError):
    """Raised for tensors of two devices in one operation."""


@dataclass
class Seen:
    """Recorded use of the device."""

    waits: Counter[str] = field(default_factory=Counter)
    """`file.py:line` of crosscal -> how often the CPU waited there for the device."""
    operations: set[Any] = field(default_factory=set)

    def clear(self) -> None:
        self.waits.clear()
        self.operations.clear()


SEEN = Seen()
DEVICE_GENERATORS: set[int] = set()
"""Addresses of generators; torch may wrap one generator in several Python objects."""


class PretendedTensor(Tensor):
    """A tensor that claims to be on the device; `held` is the CPU tensor with its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> PretendedTensor:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = Tensor._make_wrapper_subclass(cls, held.shape, **layout, device=CUDA)  # type: ignore[attr-defined]
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:
        return f"{self.held!r} on {CUDA}"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.numpy, Tensor.__array__):
            raise TypeError(f"can't convert {CUDA} device type tensor to numpy. Use Tensor.cpu() first.")
        if func in (Tensor.data_ptr, Tensor.untyped_storage):
            raise RuntimeError(f"memory on {CUDA} is nothing that a CPU can read")
        with torch._C.DisableTorchFunctionSubclass():
            return WITHOUT_GUARD.get(func, func)(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_composite(func):  # inference mode does not decompose them
            return func.decompose(*args, **(kwargs or {}))
        return computed(func, args, kwargs or {})


def held(value: Any, given: list[Tensor] | None = None) -> Any:
    """Replace all pretended tensors in nested lists, tuples and dicts by their CPU tensors; append every tensor to
    `given`. Not done by `tree_map`, which would take most of the time of a small operation."""
    if isinstance(value, Tensor):
        if given is not None:
            given.append(value)
        return value.held if isinstance(value, PretendedTensor) else value
    if isinstance(value, tuple | list):
        return type(value)([held(part, given) for part in value])
    if isinstance(value, dict):
        return {name: held(part, given) for name, part in value.items()}
    return value


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given: list[Tensor] = []
    own_args, own_kwargs = held(tuple(args), given), held(kwargs, given)
    _refuse(func, args, kwargs, given)
    device = kwargs.get("device")
    goes_to_cpu = device is not None and device.type == "cpu"
    _note(func, args, goes_to_cpu)
    if device is not None:
        own_kwargs["device"] = torch.device("cpu")
    answer = STAND_INS.get(func, func)(*own_args, **own_kwargs)
    if any(tensor.shape != held(tensor).shape for tensor in given):
        raise NotImplementedError(f"{func} changes a tensor's shape in place")
    if goes_to_cpu or not isinstance(answer, Tensor | tuple | list):
        return answer
    known = {id(held(tensor)): tensor for tensor in given}  # in-place operations return their argument

    def claim(tensor: Tensor) -> Tensor:
        return known[id(tensor)] if id(tensor) in known else PretendedTensor(tensor)

    return claim(answer) if isinstance(answer, Tensor) else tree_map_only(Tensor, claim, answer)


def _refuse(func: Any, args: Any, kwargs: dict[str, Any], given: list[Tensor]) -> None:
    strangers = [tensor for tensor in given if not isinstance(tensor, PretendedTensor)]
    if strangers and _takes_single_numbers(func):
        changed = args[0] if func._schema.is_mutable else None
        strangers = [tensor for tensor in strangers if tensor.ndim or tensor is changed]
    if strangers and func not in TRANSFERS:
        devices = ", ".join(str(tensor.device) for tensor in given)
        raise DeviceMix(f"Expected all tensors to be on the same device, but {func} was given {devices}")
    for generator in (part for part in (*args, *kwargs.values()) if isinstance(part, GENERATOR)):
        if generator._cdata not in DEVICE_GENERATORS:
            raise DeviceMix("Expected a 'cuda' device type for generator but found 'cpu'")
    if not _has_kernel(func):
        raise NotImplementedError(f"{func} has no CUDA kernel")


@functools.cache
def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


@functools.cache
def _takes_single_numbers(func: Any) -> bool:
    """Return whether an operation on the GPU accepts zero-dimensional CPU tensors."""
    return torch.Tag.pointwise in func.tags or func in FILLS


_has_kernel = functools.cache(has_cuda_kernel)


def _note(func: Any, args: Any, goes_to_cpu: bool) -> None:
    SEEN.operations.add(func)
    is_read = func is aten.copy_.default and not isinstance(args[0], PretendedTensor)
    if func in WAITS or goes_to_cpu or is_read:
        _wait()


def _wait() -> None:
    """Count a wait at the current line of crosscal."""
    frame = sys._getframe(1)
    while frame.f_back and not frame.f_code.co_filename.startswith(str(PACKAGE)):
        frame = frame.f_back
    SEEN.waits[f"{frame.f_code.co_filename.removeprefix(f'{PACKAGE}/')}:{frame.f_lineno}"] += 1


def _mm_into(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Half-precision product, accumulated and returned in float32; exists only on CUDA."""
    if left.dtype not in (torch.float16, torch.bfloat16) or right.dtype != left.dtype or out_dtype != torch.float32:
        raise RuntimeError("out_dtype must be the same as the input's, or float32 for float16 and bfloat16")
    return left.to(out_dtype) @ right.to(out_dtype)


STAND_INS = {aten.mm.dtype: _mm_into}
"""Replacements of operations that have no CPU kernel."""


def _item(tensor: Tensor) -> Any:
    return aten._local_scalar_dense.default(tensor.reshape(()))


def _held_index(index: Any, *, waits: bool) -> Any:
    """Return the index for the CPU tensor. With `waits`, a mask counts as a wait: the CPU needs the number selected."""
    if isinstance(index, tuple):
        return tuple(_held_index(part, waits=waits) for part in index)
    if isinstance(index, Tensor) and not isinstance(index, PretendedTensor):
        raise DeviceMix(f"a tensor on {CUDA} is indexed by one on {index.device}")
    if isinstance(index, PretendedTensor) and index.dtype == torch.bool and waits:
        _wait()
    return held(index)


def _at(tensor: Tensor, index: Any) -> Tensor:
    if not isinstance(tensor, PretendedTensor):
        return tensor[index]
    return PretendedTensor(tensor.held[_held_index(index, waits=True)])


def _assign(target: Tensor, index: Any, value: Any) -> None:
    if not isinstance(target, PretendedTensor):
        target[index] = value
        return
    is_copy = not any(isinstance(part, Tensor | list) for part in (index if isinstance(index, tuple) else (index,)))
    is_elsewhere = isinstance(value, Tensor) and not isinstance(value, PretendedTensor)
    if is_elsewhere and value.ndim and not is_copy:
        raise DeviceMix(f"values on {value.device} are put at indices of a tensor on {CUDA}")
    target.held[_held_index(index, waits=isinstance(value, Tensor))] = held(value)


WITHOUT_GUARD: dict[Any, Any] = {
    Tensor.item: _item,
    Tensor.__bool__: lambda tensor: bool(_item(tensor)),
    Tensor.__int__: lambda tensor: int(_item(tensor)),
    Tensor.__index__: lambda tensor: int(_item(tensor)),
    Tensor.__float__: lambda tensor: float(_item(tensor)),
    Tensor.tolist: lambda tensor: tensor.cpu().tolist(),
    Tensor.copy_: aten.copy_.default,
    Tensor.contiguous: aten.contiguous.default,
    Tensor.__invert__: aten.bitwise_not.default,
    Tensor.nonzero: aten.nonzero.default,
    Tensor.__getitem__: _at,
    Tensor.__setitem__: _assign,
}
