"""Which of a block's parameters a tensor was computed from, seen while the block runs: what a router is follows.

Two sets stand at each tensor that a parameter had a part in. `by_value`: parameters whose values entered it through
floating-point tensors only. `at_all`: also those whose part was a choice, made through integers or truth values (the
indices of a top-k, a mask). What is in `at_all` of a matrix's input and not in `by_value` only decides what the matrix
reads: it is a router.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_MARK = "_crosscal_origin"  # on the tensor itself: it is gone with the tensor
_SHAPE_ONLY = ("zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty", "new_full")


@dataclass(frozen=True)
class Origin:
    """Names of parameters."""

    by_value: frozenset[str] = frozenset()
    at_all: frozenset[str] = frozenset()

    def __or__(self, other: Origin) -> Origin:
        return Origin(self.by_value | other.by_value, self.at_all | other.at_all)

    @property
    def as_choice(self) -> Origin:
        return Origin(frozenset(), self.at_all)


NOTHING = Origin()


class DataFlow(TorchFunctionMode):
    """Inside, `origin(tensor)` tells where a tensor comes from. In this thread alone."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._parameters = {
            id(parameter): Origin(frozenset((name,)), frozenset((name,)))
            for name, parameter in block.named_parameters()
        }

    def origin(self, value: Any) -> Origin:
        """Of a tensor, or of all tensors in nested tuples, lists and dicts."""
        found = NOTHING
        for tensor in _tensors(value):
            mine = self._parameters.get(id(tensor)) or getattr(tensor, _MARK, NOTHING)
            found |= mine if tensor.is_floating_point() else mine.as_choice
        return found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        origin = NOTHING if name in _SHAPE_ONLY else self.origin((args, kwargs))
        result = func(*args, **kwargs)
        if origin == NOTHING:
            return result
        # `x += y`, `x[i] = y`, `out=x`: the result is also, or only, in an argument
        is_in_place = (
            name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
        )
        changed = args[:1] if is_in_place else ()
        for tensor in _tensors((result, changed, kwargs.get("out"))):
            if id(tensor) not in self._parameters:
                setattr(tensor, _MARK, getattr(tensor, _MARK, NOTHING) | _seen_through(tensor, origin))
        return result


def _seen_through(tensor: Tensor, origin: Origin) -> Origin:
    return origin if tensor.is_floating_point() else origin.as_choice


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
