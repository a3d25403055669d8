"""Find the decoder blocks of a model, and record the arguments with which the model calls each of them.

Shapes: B windows of a batch, L tokens of a window, D hidden size.

There is no table of model families: the model runs with its blocks replaced by stubs, which record their arguments
(masks, position tables). Stubs return hidden states of NaN, and poison for the blocks' further outputs. If the model
changes these between blocks, or computes another argument from them, running blocks one by one would lose that
computation: the model is rejected. Outputs that it passes on unchanged are passed on (`calls.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedModel

from crosscal.errors import UnsupportedModel
from crosscal.models.calls import (
    BlockCall,
    CarriedState,
    FromPreviousBlock,
    Shared,
    leaves,
    mapped,
    poison,
    split_arguments,
    with_placeholders,
)

USUAL_DIMS = 3
"""Usual number of dimensions of hidden states. Some models (Gemma 3n, DeepSeek-V4) add one for streams, before or
after that of the windows."""
MODEL_ERRORS = (
    RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ImportError, ArithmeticError,
    StrictDataclassError,
)  # fmt: skip
"""Exceptions that a model's code raises if it cannot be run in this way."""


class StopForward(Exception):
    """Ends a forward pass early, once all required tensors are known."""


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return (name in the model, list) of the decoder's outermost list of `num_hidden_layers` modules, or of its only
    list. Raises `UnsupportedModel` if there is not exactly one."""
    blocks = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    found: list[tuple[str, nn.ModuleList]] = []
    # `get_decoder` of some models returns the head, whose name is `decoder`
    for decoder in (model.get_decoder(), getattr(model, model.base_model_prefix, model)):
        outermost = _outermost_lists(model, decoder)
        found = [each for each in outermost if len(each[1]) == blocks] or (outermost if len(outermost) == 1 else [])
        if found:
            break
    if len(found) != 1 or not len(found[0][1]):
        names = ", ".join(name for name, _ in found) or "none"
        raise UnsupportedModel(f"{type(model).__name__}: one list of {blocks} decoder blocks was expected", got=names)
    return found[0]


def _outermost_lists(model: PreTrainedModel, decoder: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    prefix = next((f"{name}." if name else "" for name, module in model.named_modules() if module is decoder), "")
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in decoder.named_modules():
        inside_another = any(f"{prefix}{name}".startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, nn.ModuleList) and not inside_another:
            found.append((prefix + name, module))
    return found


class BlockCalls:
    """Records from the model itself how its blocks are called for each batch, and calls them the same way."""

    def __init__(self, model: PreTrainedModel, further: tuple[Any, ...] | None) -> None:
        """`further`: the result of `further_outputs` for this model."""
        self._model, self._blocks, self._further = model, find_blocks(model)[1], further
        self._calls: dict[Hashable, tuple[BlockCall, ...]] = {}
        self._of_shape: dict[torch.Size, tuple[BlockCall, ...]] = {}
        self._window_dim = 0
        self.depend_on_tokens = False
        """Whether some argument differed between batches of one shape."""

    def enter(self, tokens_BL: Tensor, batch: Hashable = None) -> Tensor:
        """Run the model up to its first block and return the hidden states that enter it, windows first. Record every
        block's arguments under the key `batch`."""
        hidden, calls = self._pass(tokens_BL)
        is_usual = hidden.ndim == USUAL_DIMS and len(hidden) == len(tokens_BL)
        if not is_usual and not self._of_shape:
            self._window_dim = _differing_dim(hidden, self._pass(tokens_BL.repeat(2, 1))[0])
        known = self._of_shape.setdefault(tokens_BL.shape, calls)
        shared = [(call.sharing(first), first) for call, first in zip(calls, known, strict=True)]
        self._calls[batch] = tuple(call for call, _ in shared)
        self.depend_on_tokens |= any(not call.has_tensors_of(first) for call, first in shared)
        return hidden.movedim(self._window_dim, 0)

    def run(
        self, batch: Hashable, block: int, hidden_BLD: Tensor, between: CarriedState
    ) -> tuple[Tensor, CarriedState]:
        """Run a block; return its output hidden states, windows first, and what it hands on besides."""
        entering = hidden_BLD.movedim(0, self._window_dim)
        output, between = self.of(batch, block).run(self._blocks[block], entering, between)
        return output.movedim(self._window_dim, 0), between

    def _pass(self, tokens_BL: Tensor) -> tuple[Tensor, tuple[BlockCall, ...]]:
        """Return the hidden states that enter the first block, and the call of each block."""
        calls: list[BlockCall] = []
        hidden: list[Tensor] = []
        travelling: tuple[Any, ...] = ()
        shared: list[Any] = []

        def on_call(block: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal travelling
            name = f"block {block} of {type(self._model).__name__}"
            entering_BLD, call = split_arguments(args, kwargs, self._further is not None)
            if block != len(calls):
                raise UnsupportedModel("the blocks do not run once each, in order", where=name)
            if not hidden:
                hidden.append(entering_BLD)
            elif entering_BLD is not travelling[0]:
                raise UnsupportedModel("the model changes the hidden states between its blocks", where=name)
            calls.append(with_placeholders(call, travelling[1:], shared, name))
            if len(calls) == len(self._blocks):
                raise StopForward
            further = mapped(self._further or (), lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)
            travelling = (poison(entering_BLD), *further)
            return travelling[0] if self._further is None else travelling

        with stubbed(self._blocks, on_call):
            forward(self._model, tokens_BL)
        if not hidden or len(calls) != len(self._blocks):
            raise UnsupportedModel("the model did not run all its blocks", where=type(self._model).__name__)
        return hidden[0], tuple(calls)

    @property
    def hand_on(self) -> bool:
        """Whether some block may read more from another one than its hidden states."""
        calls = [call for calls in self._of_shape.values() for call in calls]
        return any(isinstance(leaf, FromPreviousBlock | Shared) for call in calls for leaf in call.leaves)

    def of(self, batch: Hashable, block: int) -> BlockCall:
        return self._calls[batch][block]

    def wanted_of(self, batch: Hashable, block: int) -> frozenset[int]:
        """Places of a block's further outputs that the next one reads."""
        calls = self._calls[batch]
        return calls[block + 1].wanted if block + 1 < len(calls) else frozenset()

    def as_output(self, hidden_BLD: Tensor) -> Any:
        """Convert hidden states, windows first, to the form in which a block returns them."""
        output = hidden_BLD.movedim(0, self._window_dim)
        return output if self._further is None else (output, *self._further)


def further_outputs(model: PreTrainedModel, first_block: nn.Module, tokens_BL: Tensor) -> tuple[Any, ...] | None:
    """Return poison for the outputs of blocks after the hidden states; None if blocks return hidden states only.

    `first_block` must have its weights; it is run once. Some blocks return outputs that are not used, e.g. attention
    weights. Raises `UnsupportedModel` for outputs that are not tensors."""
    output: Any = None

    def on_call(_: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal output
        output = first_block(*args, **kwargs)
        raise StopForward

    with stubbed(find_blocks(model)[1], on_call):
        forward(model, tokens_BL)
    if isinstance(output, Tensor):
        return None
    if not isinstance(output, tuple | list) or not all(isinstance(leaf, Tensor | None) for leaf in leaves(output[1:])):
        further = output[1:] if isinstance(output, tuple | list) else (output,)
        kinds = ", ".join(type(extra).__name__ for extra in further)
        raise UnsupportedModel(
            "a block returns more than its hidden states", where=type(first_block).__name__, got=kinds
        )
    return mapped(tuple(output[1:]), lambda leaf: None if leaf is None else poison(leaf))


def check_causal(run: Callable[[Tensor], Tensor], hidden_1LD: Tensor, name: str, tokens: int) -> None:
    """Raise `UnsupportedModel` if a block's output for the first half of a window depends on the second half.

    `run` returns the block's output. The output depends on it if it changes by more than roundoff, sqrt(eps) of the
    dtype relative to the output, at more than half of the positions: at a few, a router may break a tie differently.
    `tokens`: length of the window.
    """
    dim = next((dim for dim, size in enumerate(hidden_1LD.shape[:-1]) if dim and size == tokens), None)
    if dim is None:
        raise UnsupportedModel("what enters this block is not one hidden state a token", where=name)
    early = hidden_1LD.shape[dim] // 2
    kept, late = hidden_1LD.tensor_split([early], dim)
    other_1LD = torch.cat([kept, -late.flip(dim)], dim)
    first, second = (
        run(each).narrow(dim, 0, early).float().movedim(dim, 0).flatten(1) for each in (hidden_1LD, other_1LD)
    )
    change_L = (first - second).norm(dim=-1)
    tolerance_L = torch.finfo(hidden_1LD.dtype).eps ** 0.5 * first.norm(dim=-1)
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
    except MODEL_ERRORS as error:
        raise unsupported(
            error, "this model cannot be run on tokens alone, block by block", type(model).__name__
        ) from error


def unsupported(error: Exception, what: str, where: str) -> Exception:
    """Convert an error of the model's own code to `UnsupportedModel`; return an out-of-memory error unchanged."""
    if isinstance(error, torch.OutOfMemoryError):
        return error
    return UnsupportedModel(what, where=where, got=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


@contextmanager
def stubbed(blocks: nn.ModuleList, on_call: Callable[[int, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
    """Context: calling block k calls `on_call(k, args, kwargs)`; all other attributes are the real block's."""
    real = list(blocks)
    for index, block in enumerate(real):
        blocks[index] = _Stub(block, index, on_call)
    try:
        yield
    finally:
        for index, block in enumerate(real):
            blocks[index] = block


def _differing_dim(one: Tensor, two: Tensor) -> int:
    return next((dim for dim, (a, b) in enumerate(zip(one.shape, two.shape, strict=True)) if a != b), 0)


class _Stub(nn.Module):
    def __init__(
        self, block: nn.Module, index: int, on_call: Callable[[int, tuple[Any, ...], dict[str, Any]], Any]
    ) -> None:
        super().__init__()
        self._call = lambda args, kwargs: on_call(index, args, kwargs)
        self.__dict__["_block"] = (
            block  # not a submodule, so that hooks and `to` do not reach the real block through its stub
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(args, kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"], name)
