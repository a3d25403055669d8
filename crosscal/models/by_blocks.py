"""Evaluate a model on given windows with the weights of only one block in memory at a time.

All windows go through block k before block k + 1 is loaded. Then the tensors outside the blocks are loaded and the
model itself is called: its blocks are stubs that return the last block's precomputed outputs.

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
from crosscal.models.passes import BlockRunner, ComputeConfig
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
    """Context: yield a model that can be called with any of `windows` (name -> tokens_SL) or a prefix of one. Up to
    roundoff it returns what it would with all its weights. For other tokens it raises `ModelError`.

    `source`: see `variant_source`; an adapter beside its weights is applied. `batch_tokens`: of the forward passes
    through blocks, as in `walk`; the model may be called with other batch sizes. `spill_to`: folder for the hidden
    states, if not in memory. `progress(done, blocks)` is called after each block. The model is thread-safe.

    Raises `UnsupportedModel` for a model that cannot be walked, `ModelError` for unreadable weights and hidden states
    that are not finite.
    """
    if torch.device(device).type == "cpu":
        batch_tokens = min(batch_tokens, CACHED_TOKENS)
    check_windows(source, windows)
    with ExitStack() as stack:
        with torch.no_grad():
            numbers = ComputeConfig(torch.device(device), dtype, batch_tokens)
            start = partial(enter, source, windows, stack, numbers, spill_to)
            [run] = side_by_side([start], device, threads_each=1)
            for index in range(source.blocks):
                _pass_on(run, index)
                if progress:
                    progress(index + 1, source.blocks)
        yield stack.enter_context(_behind_blocks(run, windows))


def _pass_on(run: BlockRunner, index: int) -> None:
    """Run one block, without prefetching the next one: each may take a large part of the memory."""
    source, numbers, block = run.source, run.numbers, run.blocks[index]
    with (
        attached(block, source.load_block(index, dtype=numbers.dtype, device=numbers.device)),
        attached_to_block(block, source.path, source.block_name(index)),
    ):
        run.pass_on(index)


@contextmanager
def _behind_blocks(run: BlockRunner, windows: Mapping[str, Tensor]) -> Iterator[PreTrainedModel]:
    numbers, given = run.numbers, _Given(run, windows)
    model = run.source.skeleton(numbers.dtype)
    place_buffers(model, numbers.device)
    model.register_forward_pre_hook(given.note, with_kwargs=True)
    weights = run.source.load_outside(dtype=numbers.dtype, device=numbers.device, with_head=True)
    with attached(model, weights), stubbed(find_blocks(model)[1], given.output):
        yield model


class _Given:
    """Looks up the last block's outputs by the tokens that the model is called with, separately for each thread."""

    def __init__(self, run: BlockRunner, windows: Mapping[str, Tensor]) -> None:
        self._run, self._windows, self._present = run, windows, threading.local()
        self._places = {
            _key(tokens_L): (name, number)
            for name, tokens_SL in windows.items()
            for number, tokens_L in enumerate(tokens_SL)
        }

    def note(self, _: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the tokens of a call, which blocks do not receive."""
        self._present.tokens_BL = kwargs["input_ids"] if "input_ids" in kwargs else args[0]

    def output(self, block: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the last block's output for any block: a model that computes between blocks cannot be walked."""
        if block == 0:
            hidden_BLD = torch.cat([self._hidden(tokens_L) for tokens_L in self._present.tokens_BL.cpu()])
            self._present.output = self._run.calls.as_output(hidden_BLD)
        return self._present.output

    def _hidden(self, tokens_L: Tensor) -> Tensor:
        """Return hidden_1LD of a window or a prefix of one: in a causal model, it does not depend on later tokens."""
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
        raise ModelError(
            "these tokens are not a prefix of any prepared window, and the blocks are not in memory",
            got=f"{length} tokens",
        )


def _key(tokens_L: Tensor) -> bytes:
    return tokens_L.cpu().long().numpy().tobytes()
