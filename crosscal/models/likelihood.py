"""Negative log-likelihood of calibration windows, from the hidden states after the last block of a walk.

Shapes: B windows of a batch, L tokens of a window, D hidden size, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from functools import partial

from torch import Tensor
from torch.nn import functional

from crosscal.lanes import side_by_side
from crosscal.models.attaching import attached
from crosscal.models.blocks import MODEL_ERRORS, USUAL_DIMS, find_blocks, stubbed
from crosscal.models.building import place_buffers
from crosscal.models.passes import MOST_BATCHES, BlockRunner, batches

SCORED_TOKENS = 2048
"""At most this many tokens per slice, but at least one batch."""
SCORED_LENGTH = 256
"""Tokens of a window, from its beginning. The logits of more would be the largest tensor in memory."""


def last_outputs(run: BlockRunner, index: int) -> dict[str, Tensor]:
    """Run the last block on the first batches of each slice: slice -> hidden_BLD. Call this while the block has its
    weights and the run's hidden states are its inputs."""
    return {
        name: run.outputs(index, name, scored)
        for name, hidden_SLD in run.stream.hidden.items()
        if (scored := list(_scored_batches(run, name, len(hidden_SLD))))
    }


def window_nll(run: BlockRunner, outputs: Mapping[str, Tensor], slices: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Return slice -> mean negative log-likelihood per predicted token, in nats, over the first `SCORED_LENGTH` tokens
    of each window in `outputs`. Empty if the model fails when only its head is run.

    The model itself is called with its blocks stubbed, so that all computations after the blocks are included.
    """
    numbers, present = run.numbers, threading.local()
    model = run.source.skeleton(numbers.dtype)
    place_buffers(model, numbers.device)
    found = {name: [0.0] * len(hidden_BLD) for name, hidden_BLD in outputs.items()}

    def of_window(name: str, window: int) -> None:
        tokens_1L = slices[name][window : window + 1, :SCORED_LENGTH].to(numbers.device)
        hidden_1LD = outputs[name][window : window + 1].to(numbers.device)
        if hidden_1LD.ndim == USUAL_DIMS:
            hidden_1LD = hidden_1LD[:, :SCORED_LENGTH]
        present.output = run.calls.as_output(hidden_1LD)
        logits_LV = model(input_ids=tokens_1L, use_cache=False).logits[0, : tokens_1L.shape[1] - 1]
        found[name][window] = float(functional.cross_entropy(logits_LV.to(numbers.sums_dtype), tokens_1L[0, 1:]))

    weights = run.source.load_outside(dtype=numbers.dtype, device=numbers.device, with_head=True)
    with attached(model, weights), stubbed(find_blocks(model)[1], lambda *_: present.output):
        jobs = [partial(of_window, name, window) for name, each in found.items() for window in range(len(each))]
        try:
            side_by_side(jobs, numbers.device, most=MOST_BATCHES, threads_each=1)
        except MODEL_ERRORS:
            return {}
    return found


def _scored_batches(run: BlockRunner, name: str, windows: int) -> Iterator[slice]:
    length = run.tokens[name]
    for batch in batches(windows, length, run.numbers.batch_tokens):
        if batch.start and batch.stop * min(length, SCORED_LENGTH) > SCORED_TOKENS:
            return
        yield batch
