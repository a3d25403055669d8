"""A model that has read some windows, with the weights of one block in memory at a time.

All windows go through block k before block k + 1 is read. Then what lies outside the blocks is there, with the hidden
states that the last block gave, and the model itself is called: its blocks are stubs that hand it these.

Shapes: S windows, B of a batch, L tokens of a window, D hidden size.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from crosscal.errors import ModelError
from crosscal.lanes import side_by_side
from crosscal.models.adapter import attached_to_block
from crosscal.models.attaching import attached
from crosscal.models.blocks import find_blocks, stubbed
from crosscal.models.building import place_buffers
from crosscal.models.passes import Numbers, Passes
from crosscal.models.source import ModelSource
from crosscal.models.walk import CACHED_TOKENS, check_windows, enter


@contextmanager
def read_by_blocks(
    source: ModelSource,
    windows: Mapping[str, Tensor],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    batch_tokens: int,
    spill_to: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[PreTrainedModel]:
    """Inside, the model: called with windows among these (name -> tokens_SL), or with how one begins, it gives what it
    would with all its weights, up to roundoff. Called with other tokens it raises `ModelError`.

    `source`: see `variant_source`; an adapter beside its weights is added. `batch_tokens`: of passes through blocks, as
    of a walk; a caller may read other batches. `spill_to`: where hidden states lie, if not in memory. `progress` is
    told the blocks read. Several threads may call the model.

    Raises `UnsupportedModel` for a model that cannot be walked, `ModelError` for unreadable weights and hidden states
    that are not finite.
    """
    if torch.device(device).type == "cpu":
        batch_tokens = min(batch_tokens, CACHED_TOKENS)
    check_windows(source, windows)
    with ExitStack() as stack:
        with torch.no_grad():
            numbers = Numbers(torch.device(device), dtype, batch_tokens)
            start = partial(enter, source, windows, stack, numbers, spill_to)
            [run] = side_by_side([start], device, threads_each=1)
            for index in range(source.blocks):
                _pass_on(run, index)
                if progress:
                    progress(index + 1, source.blocks)
        yield stack.enter_context(_behind_blocks(run, windows))


def _pass_on(run: Passes, index: int) -> None:
    """Nothing is read ahead: a model that does not fit in memory may have blocks that take a good part of it."""
    source, numbers, block = run.source, run.numbers, run.blocks[index]
    with (
        attached(block, source.load_block(index, dtype=numbers.dtype, device=numbers.device)),
        attached_to_block(block, source.path, source.block_name(index)),
    ):
        run.pass_on(index)


@contextmanager
def _behind_blocks(run: Passes, windows: Mapping[str, Tensor]) -> Iterator[PreTrainedModel]:
    numbers, given = run.numbers, _Given(run, windows)
    model = run.source.skeleton(numbers.dtype)
    place_buffers(model, numbers.device)
    model.register_forward_pre_hook(given.note, with_kwargs=True)
    weights = run.source.load_outside(dtype=numbers.dtype, device=numbers.device, with_head=True)
    with attached(model, weights), stubbed(find_blocks(model)[1], given.output):
        yield model


class _Given:
    """What the last block gave, by the tokens that the model is called with; of each thread its own."""

    def __init__(self, run: Passes, windows: Mapping[str, Tensor]) -> None:
        self._run, self._windows, self._present = run, windows, threading.local()
        self._places = {
            _key(tokens_L): (name, number)
            for name, tokens_SL in windows.items()
            for number, tokens_L in enumerate(tokens_SL)
        }

    def note(self, _: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The tokens of a call, which blocks are not told."""
        self._present.tokens_BL = kwargs["input_ids"] if "input_ids" in kwargs else args[0]

    def output(self, block: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Of any block that of the last one: in between the model does nothing, or it could not be walked."""
        if block == 0:
            hidden_BLD = torch.cat([self._hidden(tokens_L) for tokens_L in self._present.tokens_BL.cpu()])
            self._present.output = self._run.calls.as_output(hidden_BLD)
        return self._present.output

    def _hidden(self, tokens_L: Tensor) -> Tensor:
        """hidden_1LD of a window, or of how one begins: a causal model gives it whatever follows."""
        name, number = self._places.get(_key(tokens_L)) or self._beginning(tokens_L)
        hidden_1LD, length = self._run.stream.hidden[name][number : number + 1], self._run.tokens[name]
        if len(tokens_L) < length:
            dim = next(dim for dim, size in enumerate(hidden_1LD.shape[:-1]) if dim and size == length)
            hidden_1LD = hidden_1LD.narrow(dim, 0, len(tokens_L))
        return hidden_1LD.to(self._run.numbers.device)

    def _beginning(self, tokens_L: Tensor) -> tuple[str, int]:
        length = len(tokens_L)
        for name, tokens_SL in self._windows.items():
            if length < tokens_SL.shape[1] and (is_same_S := (tokens_SL[:, :length] == tokens_L).all(dim=1)).any():
                return name, int(is_same_S.int().argmax())
        raise ModelError("these tokens have not been read, and the blocks are not in memory", got=f"{length} tokens")


def _key(tokens_L: Tensor) -> bytes:
    return tokens_L.cpu().long().numpy().tobytes()
