"""The decoder blocks of a model, and what the model hands to each of them.

Shapes: B windows of a batch, L tokens of a window, D hidden size.

No table of model families: the model is run with its blocks replaced by stubs, which note the arguments they are
called with (masks, position tables). Between stubs travels a tensor of NaN. A model that changes it on the way, or lets
it into another argument, does something between its blocks that running them one by one would lose; it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from crosscal.errors import UnsupportedModel

HIDDEN = "hidden_states"


@dataclass(frozen=True, eq=False)
class BlockCall:
    """The arguments of one block besides its hidden states, for batches of one shape."""

    positional: tuple[Any, ...]
    named: dict[str, Any]
    returns_tuple: bool

    def run(self, block: nn.Module, hidden_BLD: Tensor) -> Tensor:
        """The block's output hidden states."""
        output = block(hidden_BLD, *self.positional, **self.named)
        return output[0] if self.returns_tuple else output


class StopForward(Exception):
    """Ends a forward pass at a stub: what was wanted is known."""


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The outermost list of `num_hidden_layers` modules of the decoder, with its name in the model."""
    decoder, blocks = model.get_decoder(), model.config.get_text_config().num_hidden_layers
    prefix = next((f"{name}." if name else "" for name, module in model.named_modules() if module is decoder), "")
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in decoder.named_modules():
        inside_another = any(name.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, nn.ModuleList) and len(module) == blocks and not inside_another:
            found.append((name, module))
    if len(found) != 1:
        names = ", ".join(prefix + name for name, _ in found) or "none"
        raise UnsupportedModel(f"{type(model).__name__}: one list of {blocks} decoder blocks was expected", got=names)
    return prefix + found[0][0], found[0][1]


class BlockCalls:
    """Learns, from the model itself, how its blocks are called; keeps one set of arguments per shape of batch."""

    def __init__(self, model: PreTrainedModel, further: tuple[Tensor | None, ...] | None) -> None:
        """`further`: what `further_outputs` found of this model."""
        self._model, self._blocks, self._further = model, find_blocks(model)[1], further
        self._calls: dict[torch.Size, tuple[BlockCall, ...]] = {}

    def enter(self, tokens_BL: Tensor) -> Tensor:
        """Run the model up to its first block: the hidden states that enter it. Notes every block's arguments."""
        calls: list[BlockCall] = []
        hidden_BLD: Tensor | None = None
        poison_BLD: Tensor | None = None

        def on_call(block: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal hidden_BLD, poison_BLD
            name = f"block {block} of {type(self._model).__name__}"
            entering_BLD, call = _split_arguments(args, kwargs, self._further is not None)
            if block != len(calls):
                raise UnsupportedModel("the blocks do not run once each, in order", where=name)
            if hidden_BLD is None or poison_BLD is None:
                hidden_BLD, poison_BLD = entering_BLD, torch.full_like(entering_BLD, torch.nan)
            elif entering_BLD is not poison_BLD:
                raise UnsupportedModel("the model changes the hidden states between its blocks", where=name)
            _check_arguments(call, name)
            calls.append(call)
            if len(calls) == len(self._blocks):
                raise StopForward
            return self.as_output(poison_BLD)

        with stubbed(self._blocks, on_call):
            forward(self._model, tokens_BL)
        if hidden_BLD is None or len(calls) != len(self._blocks):
            raise UnsupportedModel("the model did not run all its blocks", where=type(self._model).__name__)
        self._keep(tokens_BL.shape, tuple(calls))
        return hidden_BLD

    def of(self, shape_BL: torch.Size, block: int) -> BlockCall:
        return self._calls[shape_BL][block]

    def as_output(self, hidden_BLD: Tensor) -> Any:
        """Hidden states in the form in which a block returns them."""
        return hidden_BLD if self._further is None else (hidden_BLD, *self._further)

    def _keep(self, shape_BL: torch.Size, calls: tuple[BlockCall, ...]) -> None:
        known = self._calls.setdefault(shape_BL, calls)
        for block, (first, second) in enumerate(zip(known, calls, strict=True)):
            if first is not second and not _equal(first, second):
                raise UnsupportedModel(
                    "a block's arguments depend on the tokens", where=f"block {block} of {type(self._model).__name__}"
                )


def further_outputs(
    model: PreTrainedModel, first_block: nn.Module, tokens_BL: Tensor
) -> tuple[Tensor | None, ...] | None:
    """What blocks return after the hidden states, made NaN; None if they return hidden states alone.

    `first_block` has its weights and is run once. Attention weights, say, are returned by some and used by no one; as
    NaN they would show in another block's arguments if they were.
    """
    output: Any = None

    def on_call(_: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal output
        output = first_block(*args, **kwargs)
        raise StopForward

    with stubbed(find_blocks(model)[1], on_call):
        forward(model, tokens_BL)
    if isinstance(output, Tensor):
        return None
    if not all(extra is None or (isinstance(extra, Tensor) and extra.is_floating_point()) for extra in output[1:]):
        kinds = ", ".join(type(extra).__name__ for extra in output[1:])
        raise UnsupportedModel(
            "a block returns more than its hidden states", where=type(first_block).__name__, got=kinds
        )
    return tuple(None if extra is None else torch.full_like(extra, torch.nan) for extra in output[1:])


def check_causal(run: Callable[[Tensor], Tensor], hidden_1LD: Tensor, name: str) -> None:
    """Raises `UnsupportedModel` if what a block gives for the first half of a window depends on the second half.

    `run` gives the block's output. More than roundoff, sqrt(eps) of the dtype relative to the output, at more than half
    of the positions: a router may decide a tie otherwise at one of them.
    """
    early = hidden_1LD.shape[1] // 2
    other_1LD = hidden_1LD.clone()
    other_1LD[:, early:] = -hidden_1LD[:, early:].flip(1)
    first_1LD, second_1LD = (run(each)[:, :early].float() for each in (hidden_1LD, other_1LD))
    change_L = (first_1LD - second_1LD).norm(dim=-1)[0]
    tolerance_L = torch.finfo(hidden_1LD.dtype).eps ** 0.5 * first_1LD.norm(dim=-1)[0]
    if (change_L > tolerance_L).float().sum() > early / 2:
        raise UnsupportedModel(
            "not a causal model: what this block gives for a token depends on later tokens",
            where=name,
            do="Give a decoder. A BERT is one only with `is_decoder: true` in its config.",
        )


def forward(model: PreTrainedModel, tokens_BL: Tensor) -> None:
    """Run the model without its output head, until a stub stops it."""
    base = getattr(model, model.base_model_prefix, model)
    try:
        base(input_ids=tokens_BL, use_cache=False)
    except StopForward:
        return


@contextmanager
def stubbed(blocks: nn.ModuleList, on_call: Callable[[int, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
    """Inside, calling block k calls `on_call(k, args, kwargs)`; every other attribute is the real block's."""
    real = list(blocks)
    for index, block in enumerate(real):
        blocks[index] = _Stub(block, index, on_call)
    try:
        yield
    finally:
        for index, block in enumerate(real):
            blocks[index] = block


class _Stub(nn.Module):
    def __init__(
        self, block: nn.Module, index: int, on_call: Callable[[int, tuple[Any, ...], dict[str, Any]], Any]
    ) -> None:
        super().__init__()
        self._call = lambda args, kwargs: on_call(index, args, kwargs)
        self.__dict__["_block"] = (
            block  # not a submodule: hooks and moves must not reach the real block through its stub
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(args, kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"], name)


def _split_arguments(args: tuple[Any, ...], kwargs: dict[str, Any], tuple_returned: bool) -> tuple[Tensor, BlockCall]:
    if args:
        return args[0], BlockCall(args[1:], dict(kwargs), tuple_returned)
    named = dict(kwargs)
    return named.pop(HIDDEN), BlockCall((), named, tuple_returned)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def _call_leaves(call: BlockCall) -> list[Any]:
    return [leaf for value in (*call.positional, *call.named.values()) for leaf in _leaves(value)]


def _check_arguments(call: BlockCall, name: str) -> None:
    for leaf in _call_leaves(call):
        if isinstance(leaf, Tensor):
            if leaf.is_floating_point() and leaf.isnan().any():
                raise UnsupportedModel("an argument of the block depends on the output of another block", where=name)
        elif not isinstance(leaf, (type(None), bool, int, float, str)):
            raise UnsupportedModel(
                "an argument of the block may change between blocks", where=name, got=type(leaf).__name__
            )


def _equal(a: BlockCall, b: BlockCall) -> bool:
    leaves_a, leaves_b = _call_leaves(a), _call_leaves(b)
    if len(leaves_a) != len(leaves_b) or a.named.keys() != b.named.keys():
        return False
    return all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x is y or x == y
        for x, y in zip(leaves_a, leaves_b, strict=True)
    )
