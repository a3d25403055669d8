"""A CUDA device that is not there: tensors that claim to be on it, with their numbers in this machine's memory.

Each operation on them raises an error if a GPU would; otherwise it is computed on the CPU, and its result claims the
device again. So a GPU's code path runs with real numbers on a machine without one. Not covered: the roundoff, speed and
faults of kernels.

    with pretended_cuda() as seen:
        x = torch.ones(3, device="cuda")       # x.is_cuda; x.device is cuda:0
        x @ torch.ones(3)                      # DeviceMix
        x.numpy(), x.data_ptr()                # TypeError, RuntimeError
        float(x.sum())                         # the CPU waits for the device: counted in `seen.waits`

Stricter than a GPU: an index tensor must be on the device (a GPU would copy it there each time). Laxer: a CPU operation
with a generator of the device is not detected. A CPU build of torch has neither a current CUDA device nor a device
guard: `cuda` means `cuda:0` here (`torch.tensor` fails with it), methods that torch's Python bindings run under a guard
are replaced (`WITHOUT_GUARD`), and there are no gradients.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.pretended_tensor import CUDA, DEVICE_GENERATORS, GENERATOR, PACKAGE, SEEN, Seen, aten, computed

MEMORY_BYTES = (2**33, 2**34)
"""Free, total."""


@contextmanager
def pretended_cuda() -> Iterator[Seen]:
    """Context in which `device="cuda"` creates such tensors, in every thread. `torch.cuda.is_available` is True only if
    crosscal calls it: other libraries would go on to query properties of the device."""
    SEEN.clear()
    library = torch.library.Library("aten", "IMPL")
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "(?s).*Overriding a previously registered kernel"
            )  # CUDA builds register these
            for operation in _factories():
                library.impl(operation, functools.partial(_computed_alone, operation), "CUDA")
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "is_available", lambda: _is_asked_by_crosscal())
        patch.setattr(torch.cuda, "device_count", lambda: int(_is_asked_by_crosscal()))
        patch.setattr(torch.cuda, "mem_get_info", _mem_get_info)
        patch.setattr(torch, "Generator", PretendedGenerator)
        patch.setattr(Tensor, "to", _with_number(Tensor.to))
        # As on a GPU, parameters stay the same objects when their module moves.
        patch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
        yield SEEN
    library._destroy()


def on_device(value: Any) -> Any:
    """Return the value with its tensors (also inside dataclasses, lists, tuples and dicts) copied to the device."""
    if isinstance(value, Tensor):
        return value.to(CUDA)
    if isinstance(value, list | tuple):
        return type(value)([on_device(part) for part in value])
    if isinstance(value, dict):
        return {name: on_device(part) for name, part in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
        return dataclasses.replace(value, **on_device(parts))
    return value


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a value, also those inside dataclasses, lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        yield from (tensor for part in value for tensor in tensors_of(part))
    elif isinstance(value, dict):
        yield from tensors_of(list(value.values()))
    elif dataclasses.is_dataclass(value):
        yield from tensors_of([getattr(value, each.name) for each in dataclasses.fields(value)])


def devices_of(value: Any) -> set[str]:
    """Return the devices of a value's tensors: `cpu`, `cuda:0`."""
    return {str(tensor.device) for tensor in tensors_of(value)}


def assert_same(found: Any, expected: Any, device: str = str(CUDA), tolerance: float = 0.0) -> None:
    """Assert that the tensors of `found` are on the device and equal those of `expected`."""
    pairs = list(zip(tensors_of(found), tensors_of(expected), strict=True))
    assert pairs
    assert devices_of(found) == {device}
    for mine, theirs in pairs:
        torch.testing.assert_close(mine.cpu(), theirs, rtol=tolerance, atol=tolerance)


class PretendedGenerator(GENERATOR):
    """Generator that claims a device; its random numbers are the CPU's."""

    def __new__(cls, device: torch.device | str = "cpu") -> PretendedGenerator:
        made = super().__new__(cls)
        DEVICE_GENERATORS.discard(made._cdata)
        if torch.device(device).type == "cuda":
            DEVICE_GENERATORS.add(made._cdata)
        return made

    @property
    def device(self) -> torch.device:
        return CUDA if self._cdata in DEVICE_GENERATORS else torch.device("cpu")


@functools.cache
def _factories() -> list[Any]:
    """Return the operations that create a tensor on a given device without tensor arguments, and `copy_`."""
    found: list[Any] = [aten.copy_.default]
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = name.partition("::")
        packet, _, overload = rest.partition(".")
        operation = getattr(getattr(aten, packet, None), overload or "default", None) if namespace == "aten" else None
        if operation is not None:
            kinds = {argument.name: str(argument.type) for argument in operation._schema.arguments}
            if "device" in kinds and not any("Tensor" in kind for kind in kinds.values()):
                found.append(operation)
    return found


def _computed_alone(operation: Any, *args: Any, **kwargs: Any) -> Any:
    return computed(operation, args, kwargs)


def _is_asked_by_crosscal() -> bool:
    return sys._getframe(2).f_code.co_filename.startswith(str(PACKAGE))


def _mem_get_info(device: Any = None) -> tuple[int, int]:
    if device is not None and torch.device(device).type != "cuda":
        raise ValueError(f"Expected a cuda device, but got: {device}")
    return MEMORY_BYTES


def _with_number(to: Any) -> Any:
    """Return `Tensor.to` with `cuda` read as `cuda:0`."""

    def numbered(value: Any) -> Any:
        return CUDA if value in ("cuda", torch.device("cuda")) else value

    @functools.wraps(to)
    def moved(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return to(tensor, *map(numbered, args), **{name: numbered(value) for name, value in kwargs.items()})

    return moved
