"""The hidden states between two blocks, for all windows of a slice: the one thing a walk keeps for every token.

Shapes: S windows of a slice, B of a batch, L tokens of a window, D hidden size.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from crosscal.models.blocks import BlockCalls


@contextmanager
def hidden_states(
    slices: Mapping[str, Tensor],
    calls: BlockCalls,
    *,
    batch_tokens: int,
    device: torch.device | str,
    spill_to: Path | None,
) -> Iterator[dict[str, Tensor]]:
    """What enters the first block, one [S, L, D] tensor per slice; a walk overwrites it in place, block after block.

    On `device`, or in a temporary file under `spill_to` that is mapped into memory and gone afterwards.
    """
    if spill_to is None:
        yield {name: _enter(tokens_SL, calls, batch_tokens, device, None) for name, tokens_SL in slices.items()}
        return
    spill_to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="hidden-", dir=spill_to) as folder:
        files = {name: Path(folder, str(index)) for index, name in enumerate(slices)}
        yield {name: _enter(tokens_SL, calls, batch_tokens, device, files[name]) for name, tokens_SL in slices.items()}


def batches(tokens_SL: Tensor, batch_tokens: int) -> Iterator[slice]:
    """Ranges of windows with about `batch_tokens` tokens, and at least one window."""
    windows = max(1, batch_tokens // tokens_SL.shape[1])
    return (slice(start, min(start + windows, len(tokens_SL))) for start in range(0, len(tokens_SL), windows))


def _enter(
    tokens_SL: Tensor, calls: BlockCalls, batch_tokens: int, device: torch.device | str, file: Path | None
) -> Tensor:
    first_1LD = calls.enter(tokens_SL[:1].to(device))
    hidden_SLD = _allocate((*tokens_SL.shape, first_1LD.shape[-1]), first_1LD.dtype, device, file)
    for batch in batches(tokens_SL, batch_tokens):
        hidden_SLD[batch] = calls.enter(tokens_SL[batch].to(device))
    return hidden_SLD


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str, file: Path | None) -> Tensor:
    if file is None:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.from_file(str(file), shared=True, size=torch.Size(shape).numel(), dtype=dtype).view(shape)
