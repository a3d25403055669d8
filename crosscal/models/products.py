"""Find matrices that a block multiplies by without calling a linear: stacks of experts, weights used directly.

Shapes: T tokens, O outputs, I inputs of a matrix, E matrices that one parameter holds.

There is no table of model families: the matrix products are intercepted as torch dispatches them. An operand that is a
slice of a parameter of the block is a matrix; the other operand is its input. The slice's offset in the parameter gives
its position in the stack, and its strides give the storage order ([O, I] or [I, O]).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_FACTORS = {"mm": (0, 1), "bmm": (0, 1), "mv": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2), "addmv": (1, 2)}
"""Operation -> positions of the product's two operands among its arguments."""


@dataclass(frozen=True)
class Layout:
    """How a parameter holds its matrices."""

    rows: int
    columns: int
    """Rows and columns of each matrix as stored."""
    transposed: bool
    """Each matrix is stored as [I, O]."""

    def count(self, parameter: Tensor) -> int:
        return parameter.numel() // (self.rows * self.columns)


@dataclass(frozen=True, eq=False)
class Product:
    """One product with one matrix."""

    parameter: str
    place: int
    """Index among the matrices of the parameter."""
    layout: Layout
    input_TI: Tensor


class Products(TorchDispatchMode):
    """Context: in this thread, call `note` for every product with a matrix that is a slice of these parameters."""

    def __init__(self, parameters: Mapping[str, Tensor], note: Callable[[Product], None]) -> None:
        super().__init__()
        self._held = {tensor.untyped_storage().data_ptr(): (name, tensor) for name, tensor in parameters.items()}
        self._note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if places := _FACTORS.get(func.overloadpacket.__name__):
            left, right = (args[place] for place in places)
            # x_TI @ weight_IO, or weight_OI @ x_IT
            for product in self._with(right, left, is_left=False):
                self._note(product)
            for product in self._with(left, right if right.ndim == 1 else right.mT, is_left=True):
                self._note(product)
        return func(*args, **(kwargs or {}))

    def _with(self, matrix: Tensor, input_TI: Tensor, *, is_left: bool) -> Iterator[Product]:
        found = self._held.get(matrix.untyped_storage().data_ptr())
        if found is None or matrix.ndim < 2:
            return
        name, parameter = found
        layout = _layout(matrix, is_left=is_left)
        if layout is None or not parameter.is_contiguous():
            return
        size = layout.rows * layout.columns
        start, step = matrix.storage_offset() - parameter.storage_offset(), matrix.stride(0)
        for number, each in enumerate(input_TI if matrix.ndim == 3 else [input_TI]):
            offset = start + number * step
            if offset % size == 0:
                yield Product(name, offset // size, layout, each.reshape(-1, each.shape[-1]))


def _layout(matrix: Tensor, *, is_left: bool) -> Layout | None:
    """Layout of an operand: [I, O] on the right, [O, I] on the left. None if it is not a dense slice."""
    *_, rows, columns = matrix.shape
    if matrix.stride()[-2:] == (columns, 1):
        return Layout(rows, columns, transposed=not is_left)
    if matrix.stride()[-2:] == (1, rows):
        return Layout(columns, rows, transposed=is_left)
    return None


NEVER = "this matrix never receives an input, so it cannot be calibrated"
TWICE = "this matrix is used more than once in a block"
SLICES = "this parameter is multiplied in slices that do not tile it"


def layouts(
    parameters: Mapping[str, Tensor], products: Iterable[tuple[str, int, Layout]]
) -> tuple[dict[str, Layout], dict[str, str]]:
    """Return each parameter's layout, from the products of one forward pass, and for the others why there is none.

    `products`: (parameter, place, layout) of each."""
    seen: dict[str, list[tuple[int, Layout]]] = {}
    for parameter, place, layout in products:
        seen.setdefault(parameter, []).append((place, layout))
    found: dict[str, Layout] = {}
    why_not: dict[str, str] = {}
    for name, tensor in parameters.items():
        mine = seen.get(name, [])
        layout = mine[0][1] if mine else None
        if layout is None:
            why_not[name] = NEVER
        elif len({place for place, _ in mine}) < len(mine):
            why_not[name] = TWICE
        elif any(other != layout for _, other in mine) or not _makes_up(layout, tensor):
            why_not[name] = SLICES
        else:
            found[name] = layout
    return found, why_not


def _makes_up(layout: Layout, parameter: Tensor) -> bool:
    """Whether the parameter is a stack of such matrices, along its first dimension or along its rows."""
    if parameter.ndim not in (2, 3) or parameter.shape[-1] != layout.columns:
        return False
    return layout.rows == parameter.shape[1] if parameter.ndim == 3 else parameter.shape[0] % layout.rows == 0
