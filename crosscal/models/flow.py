"""Track which of a block's parameters each tensor was computed from while the block runs, to identify routers.

Each tensor that depends on a parameter carries two sets. `by_value`: parameters whose values entered it through
floating-point tensors only. `at_all`: also those that influenced it through a choice, made with integers or booleans
(the indices of a top-k, a mask). A parameter in `at_all` of a matrix's input but not in `by_value` only decides what
the matrix reads: it is a router. A router that also weights the inputs of experts (Llama 4) is identified by `picked`:
matrices from whose own outputs indices were computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_MARK = "_crosscal_origin"  # an attribute of the tensor, so that it lives as long as the tensor
_SHAPE_ONLY = ("zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty", "new_full")


@dataclass(frozen=True)
class Origin:
    """The parameters that a tensor depends on, as sets of names."""

    by_value: frozenset[str] = frozenset()
    at_all: frozenset[str] = frozenset()
    nearest: frozenset[str] = frozenset()
    """Matrices multiplied by last on the way to the tensor."""
    picked: frozenset[str] = frozenset()
    """Matrices that were `nearest` where indices were computed."""

    def __or__(self, other: Origin) -> Origin:
        return Origin(*(mine | its for mine, its in zip(self._sets, other._sets, strict=True)))

    @property
    def as_choice(self) -> Origin:
        return Origin(frozenset(), self.at_all, frozenset(), self.picked)

    @property
    def as_indices(self) -> Origin:
        return Origin(frozenset(), self.at_all, frozenset(), self.picked | self.nearest)

    @property
    def _sets(self) -> tuple[frozenset[str], ...]:
        return (self.by_value, self.at_all, self.nearest, self.picked)


NOTHING = Origin()


class DataFlow(TorchFunctionMode):
    """Context: `origin(tensor)` returns the parameters that a tensor depends on. For the current thread only."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._parameters = {
            id(parameter): Origin(own := frozenset((name,)), own, own if parameter.ndim > 1 else frozenset())
            for name, parameter in block.named_parameters()
        }
        self._outputs = {name: len(parameter) for name, parameter in block.named_parameters() if parameter.ndim}
        self._experts: dict[str, int] = {}
        self._watched: dict[int, str] = {}
        self._on_routers: Callable[[frozenset[str]], object] = len

    def origin(self, value: Any) -> Origin:
        """Return the origin of a tensor, or the union over all tensors in nested tuples, lists and dicts."""
        found = NOTHING
        for tensor in _tensors(value):
            mine = self._parameters.get(id(tensor)) or getattr(tensor, _MARK, NOTHING)
            found |= mine if tensor.is_floating_point() else mine.as_choice
        return found

    def choosing(self, given: Any, read: Any) -> frozenset[str]:
        """Return the parameters that influence the arguments `given` but not the values of the input `read`."""
        return self.origin(given).at_all - self.origin(read).by_value

    @contextmanager
    def watching(
        self, parameters: Mapping[str, Tensor], on_routers: Callable[[frozenset[str]], object]
    ) -> Iterator[None]:
        """Context: pass the parameters that decide which rows are multiplied by `parameters` to `on_routers`."""
        self._watched = {tensor.untyped_storage().data_ptr(): name for name, tensor in parameters.items()}
        self._experts = {name: tensor.shape[0] for name, tensor in parameters.items() if tensor.ndim > 2}
        self._on_routers = on_routers
        yield
        self._watched = {}

    def _own(self, tensor: Tensor) -> frozenset[str]:
        own = self._parameters.get(id(tensor))
        return own.nearest if own else frozenset()

    def _look(self, given: Any) -> None:
        places = {tensor: self._watched.get(tensor.untyped_storage().data_ptr()) for tensor in _tensors(given)}
        held = {name for name in places.values() if name is not None}
        read = [tensor for tensor, name in places.items() if name is None and tensor.is_floating_point()]
        if not held or not read:  # not a product: e.g. indexing a stack
            return
        weighing = {
            name
            for name in self.origin(read).picked
            if any(self._outputs[name] == self._experts.get(stack) for stack in held)
        }
        self._on_routers((self.choosing(given, read) - held) | weighing)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self._watched:
            self._look((args, kwargs))
        origin = NOTHING if name in _SHAPE_ONLY else self.origin((args, kwargs))
        result = func(*args, **kwargs)
        if origin == NOTHING:
            return result
        if own := {name for tensor in _tensors((args, kwargs)) for name in self._own(tensor)}:
            origin = dataclasses.replace(origin, nearest=frozenset(own))
        # `x += y`, `x[i] = y`, `out=x`: the result is also, or only, written to an argument
        is_in_place = (
            name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
        )
        changed = args[:1] if is_in_place else ()
        for tensor in _tensors((result, changed, kwargs.get("out"))):
            if id(tensor) not in self._parameters:
                setattr(tensor, _MARK, getattr(tensor, _MARK, NOTHING) | _seen_through(tensor, origin))
        return result


def _seen_through(tensor: Tensor, origin: Origin) -> Origin:
    if tensor.is_floating_point() or tensor.is_complex():
        return origin
    return origin.as_choice if tensor.dtype == torch.bool else origin.as_indices


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
