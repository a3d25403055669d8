"""A CUDA device that is not there: tensors that claim to be on it, with their numbers in this machine's memory.

Every operation on them is refused where a GPU would refuse it, computed on the CPU otherwise, and its result claims the
device again. So what a GPU's tensors go through is run with real numbers where there is none. What is not seen is what
kernels do: their roundoff, their speed, their faults.

    with pretended_cuda() as seen:
        x = torch.ones(3, device="cuda")       # x.is_cuda; x.device is cuda:0
        x @ torch.ones(3)                      # DeviceMix
        x.numpy(), x.data_ptr()                # TypeError, RuntimeError
        float(x.sum())                         # the CPU waits for the device: counted in `seen.waits`

Stricter than a GPU: a tensor of indices must be on the device (it would be copied there each time). Laxer: a CPU's
operation with a generator of the device is not seen. A CPU build of torch does not know which CUDA device is the
current one and has no guard for it: `cuda` is `cuda:0` here (but `torch.tensor` fails with it), what torch's binding to
Python does under a guard is done without, and there are no gradients.
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
"""Free, and all."""


@contextmanager
def pretended_cuda() -> Iterator[Seen]:
    """Inside, `device="cuda"` makes such tensors, in every thread. Only crosscal is told that there is a device: other
    libraries would go on to ask for its properties."""
    SEEN.clear()
    library = torch.library.Library("aten", "IMPL")
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "(?s).*Overriding a previously registered kernel"
            )  # CUDA builds have them
            for operation in _factories():
                library.impl(operation, functools.partial(_computed_alone, operation), "CUDA")
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "is_available", lambda: _is_asked_by_crosscal())
        patch.setattr(torch.cuda, "device_count", lambda: int(_is_asked_by_crosscal()))
        patch.setattr(torch.cuda, "mem_get_info", _mem_get_info)
        patch.setattr(torch, "Generator", PretendedGenerator)
        patch.setattr(Tensor, "to", _with_number(Tensor.to))
        # A module's parameters stay the same objects when it moves, as they do on a GPU.
        patch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
        yield SEEN
    library._destroy()


def on_device(value: Any) -> Any:
    """The value with its tensors, those inside dataclasses, lists, tuples and dicts as well, copied to the device."""
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
    """Those inside dataclasses, lists, tuples and dicts as well."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        yield from (tensor for part in value for tensor in tensors_of(part))
    elif isinstance(value, dict):
        yield from tensors_of(list(value.values()))
    elif dataclasses.is_dataclass(value):
        yield from tensors_of([getattr(value, each.name) for each in dataclasses.fields(value)])


def devices_of(value: Any) -> set[str]:
    """Where the tensors of a value are: `cpu`, `cuda:0`."""
    return {str(tensor.device) for tensor in tensors_of(value)}


def assert_same(found: Any, expected: Any, device: str = str(CUDA), tolerance: float = 0.0) -> None:
    """The tensors of `found` are on the device and have the numbers of those of `expected`."""
    pairs = list(zip(tensors_of(found), tensors_of(expected), strict=True))
    assert pairs
    assert devices_of(found) == {device}
    for mine, theirs in pairs:
        torch.testing.assert_close(mine.cpu(), theirs, rtol=tolerance, atol=tolerance)


class PretendedGenerator(GENERATOR):
    """Random numbers of any device; here they are all a CPU's."""

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
    """The operations that make a tensor from none on a device that they are told, and the copy to it."""
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
    """`Tensor.to` for whom `cuda` is the first device."""

    def numbered(value: Any) -> Any:
        return CUDA if value in ("cuda", torch.device("cuda")) else value

    @functools.wraps(to)
    def moved(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return to(tensor, *map(numbered, args), **{name: numbered(value) for name, value in kwargs.items()})

    return moved
