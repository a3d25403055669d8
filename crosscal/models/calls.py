"""The arguments of a block besides its hidden states, and what blocks hand on to later ones.

Shapes: B windows of a batch, L tokens of a window, D hidden size.

Arguments are nested tuples, lists and dicts of leaves: tensors, numbers, strings. Two kinds of leaves change from block
to block and are filled in for each run: a further output of the previous block (`FromPreviousBlock`), and a dict that
is empty before the first block, in which blocks store tensors for others (`Shared`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from crosscal.errors import UnsupportedModel

HIDDEN = "hidden_states"
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


@dataclass(frozen=True)
class FromPreviousBlock:
    """Placeholder for the previous block's output number `place` after its hidden states."""

    place: int


@dataclass(frozen=True, eq=False)
class Shared:
    """Placeholder for the dict of this number that all blocks receive."""

    number: int
    empty: MutableMapping[Any, Any]


@dataclass(frozen=True, eq=False)
class CarriedState:
    """What the blocks so far have handed on, for one batch, besides hidden states."""

    outputs: tuple[Any, ...] = ()
    shared: dict[int, MutableMapping[Any, Any]] = field(default_factory=dict)

    def first(self) -> CarriedState:
        """Return the part of the batch's first window."""

        def cut(leaf: Any) -> Any:
            return leaf[:1] if isinstance(leaf, Tensor) and leaf.ndim else leaf

        shared = {}
        for number, held in self.shared.items():
            shared[number] = copy.copy(held)
            shared[number].update({key: mapped(value, cut) for key, value in held.items()})
        return CarriedState(mapped(self.outputs, cut), shared)


@dataclass(frozen=True, eq=False)
class BlockCall:
    """The arguments of one block besides its hidden states, for one batch."""

    positional: tuple[Any, ...]
    named: dict[str, Any]
    returns_tuple: bool

    def run(self, block: nn.Module, hidden_BLD: Tensor, between: CarriedState) -> tuple[Tensor, CarriedState]:
        """Return the block's output hidden states and what it hands on besides. `between` is not changed."""
        shared = {number: copy.copy(held) for number, held in between.shared.items()}

        def given(leaf: Any) -> Any:
            if isinstance(leaf, FromPreviousBlock):
                return between.outputs[leaf.place]
            if isinstance(leaf, Shared):
                return shared.setdefault(leaf.number, copy.copy(leaf.empty))
            return leaf

        output = block(hidden_BLD, *mapped(self.positional, given), **mapped(self.named, given))
        if not self.returns_tuple:
            return output, CarriedState((), shared)
        return output[0], CarriedState(tuple(leaves(output[1:])), shared)

    @property
    def wanted(self) -> frozenset[int]:
        """Places of the previous block's further outputs that it reads."""
        return frozenset(leaf.place for leaf in self.leaves if isinstance(leaf, FromPreviousBlock))

    @property
    def leaves(self) -> list[Any]:
        return [*leaves(self.positional), *leaves(self.named)]

    def sharing(self, other: BlockCall) -> BlockCall:
        """Return this call with the other's tensors in place of equal ones, to hold them in memory once."""
        mine, its = self.leaves, other.leaves
        if len(mine) != len(its):
            return self
        pairs = iter(zip(mine, its, strict=True))

        def one(_: Any) -> Any:
            leaf, known = next(pairs)
            both = isinstance(leaf, Tensor) and isinstance(known, Tensor)
            return known if both and (leaf is known or _equal(leaf, known)) else leaf

        return BlockCall(mapped(self.positional, one), mapped(self.named, one), self.returns_tuple)

    def has_tensors_of(self, other: BlockCall) -> bool:
        """Whether every tensor is the same object as the other's."""
        pairs = zip(self.leaves, other.leaves, strict=False)
        return all(mine is its for mine, its in pairs if isinstance(mine, Tensor))


def split_arguments(args: tuple[Any, ...], kwargs: dict[str, Any], tuple_returned: bool) -> tuple[Tensor, BlockCall]:
    """Split the arguments of a call into the hidden states and the others."""
    if args:
        return args[0], BlockCall(args[1:], dict(kwargs), tuple_returned)
    named = dict(kwargs)
    return named.pop(HIDDEN), BlockCall((), named, tuple_returned)


def with_placeholders(call: BlockCall, outputs_before: tuple[Any, ...], shared: list[Any], name: str) -> BlockCall:
    """Return the call with placeholders for the leaves that change from block to block.

    `outputs_before`: poison from the previous block's stub; `shared`: dicts seen in this pass; new ones are added.
    Raises `UnsupportedModel` for an argument that depends on a block in any other way, or may do so.
    """
    before = {id(leaf): place for place, leaf in enumerate(leaves(outputs_before)) if isinstance(leaf, Tensor)}

    def mark(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            if id(leaf) in before:
                return FromPreviousBlock(before[id(leaf)])
            if is_poisoned(leaf):
                raise UnsupportedModel("an argument of the block depends on the output of another block", where=name)
        elif isinstance(leaf, MutableMapping) and not leaf:
            if not any(leaf is known for known in shared):
                shared.append(leaf)
            return Shared(next(number for number, known in enumerate(shared) if known is leaf), copy.copy(leaf))
        elif not isinstance(leaf, _PLAIN):
            raise UnsupportedModel(
                "an argument of the block may change between blocks", where=name, got=type(leaf).__name__
            )
        return leaf

    return BlockCall(mapped(call.positional, mark), mapped(call.named, mark), call.returns_tuple)


def poison(tensor: Tensor) -> Tensor:
    """Return a tensor of the same shape whose use can be detected: all NaN, or all the smallest integer."""
    if tensor.is_floating_point() or tensor.is_complex():
        return torch.full_like(tensor, torch.nan)
    return torch.full_like(tensor, False if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).min)


def is_poisoned(tensor: Tensor) -> bool:
    if tensor.is_floating_point() or tensor.is_complex():
        return bool(tensor.isnan().any())
    return tensor.dtype != torch.bool and bool((tensor == torch.iinfo(tensor.dtype).min).any())


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Apply `change` to every leaf, in the order of `leaves`, and keep the nesting."""
    if isinstance(value, tuple | list):
        return type(value)(mapped(part, change) for part in value)
    if isinstance(value, dict) and value:
        return {key: mapped(part, change) for key, part in value.items()}
    return change(value)


def leaves(value: Any) -> Iterator[Any]:
    """Yield the leaves of nested tuples, lists and dicts; an empty dict is a leaf."""
    if isinstance(value, tuple | list):
        for part in value:
            yield from leaves(part)
    elif isinstance(value, dict) and value:
        for part in value.values():
            yield from leaves(part)
    else:
        yield value


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
