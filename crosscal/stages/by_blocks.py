"""Evaluate a model that does not fit in memory: on texts only, with the weights of one block at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel

from crosscal.evaluation.logits import row_bytes, rows_at_once
from crosscal.models.by_blocks import read_by_blocks
from crosscal.models.variant_source import open_variant
from crosscal.progress import Report
from crosscal.stages.heldout_text import HeldOutText
from crosscal.stages.preflight import BlockShape, EvaluationSizes
from crosscal.stages.spill import SHARE, spill_folder

_log = logging.getLogger(__name__)


@contextmanager
def texts_read(
    folder: Path,
    texts: Sequence[HeldOutText],
    *,
    device: str,
    dtype: torch.dtype,
    batch_tokens: int,
    name: str,
    report: Report,
) -> Iterator[PreTrainedModel]:
    """Yield a model that has run these texts' windows and can be called with no others (see `read_by_blocks`). Their
    hidden states are in memory, or on disk if they would take more than half of the free memory."""
    source = open_variant(folder)
    windows = {f"{number}: {text.corpus} ({text.split})": text.tokens_SL for number, text in enumerate(texts, 1)}
    _log.info("%s does not fit in memory: measured with the weights of one block at a time", name)
    spill_to = spill_folder(source, windows.values(), dtype=dtype, device=device)
    sizes = {"device": device, "dtype": dtype, "batch_tokens": batch_tokens, "spill_to": spill_to}
    with read_by_blocks(
        source, windows, **sizes, progress=lambda done, blocks: report(f"{name}: blocks read", done, blocks)
    ) as model:
        yield model


def evaluating_by_blocks_bytes(
    shapes: Sequence[BlockShape], sizes: EvaluationSizes, *, all_tokens: int, free_bytes: int
) -> int:
    """Return the bytes of memory of such an evaluation: the hidden states of `all_tokens`, unless they are on disk, and
    the largest of three phases.

    First the parameters outside the blocks and one block; then one block twice, as oneDNN copies its weights into its
    own layout, and a batch's activations; last the parameters outside the blocks and the logits.
    """
    block, widest = max(s.parameters for s in shapes), max(inputs for s in shapes for _, inputs in s.sites)
    outside = sizes.parameters - sum(shape.parameters for shape in shapes)
    tokens, itemsize = sizes.tokens, sizes.itemsize
    states = all_tokens * sizes.hidden * itemsize
    rows = min(tokens, rows_at_once(sizes.vocabulary, itemsize))
    head = outside * itemsize + rows * row_bytes(sizes.vocabulary, itemsize)
    passing = (2 * block + tokens * (2 * sizes.hidden + 3 * widest)) * itemsize
    return (states if states <= SHARE * free_bytes else 0) + max((outside + block) * itemsize, passing, head)
