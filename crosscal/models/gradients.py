"""A forward and backward walk: gradients of the loss with respect to the blocks' weights, squared per window.

Shapes: S windows of a slice, L tokens of a window, D hidden size, R predictions, V vocabulary.

Forward: all windows go through block k before block k + 1, and each block's inputs are kept. At the head, the loss of
each window and its gradient with respect to the last block's outputs are computed. Backward, block by block: the block
is recomputed from the kept inputs, one window at a time, so that autograd's gradients are those of one window. They are
squared and summed, and the gradient with respect to the block's inputs is passed to the previous block. Memory holds
the weights of one block and of the next one (prefetched), the sums of one block, and the inputs of all blocks unless
they are in files.

The loss of a window is its mean next-token cross-entropy, as transformers defines it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from crosscal.errors import ModelError, UnsupportedModel
from crosscal.lanes import OrderedTurns, side_by_side
from crosscal.models.attaching import attached
from crosscal.models.blocks import find_blocks, stubbed
from crosscal.models.building import place_buffers
from crosscal.models.calls import CarriedState
from crosscal.models.passes import BlockRunner, ComputeConfig
from crosscal.models.source import ModelSource
from crosscal.models.walk import CACHED_TOKENS, Allocate, WalkReport, allocator, check_windows, enter
from crosscal.statistics.finite import all_finite

MOST_WINDOWS = 16
"""Windows in parallel on a CPU: each holds the activations of a block and the gradients of its weights."""


@dataclass(frozen=True, eq=False)
class BlockGradients:
    """Sums of squared loss gradients of one block's parameters."""

    block: int
    squares: Mapping[str, Mapping[str, Tensor]]
    """Slice -> parameter -> Σ g² over the windows of the slice, on the CPU, in the parameter's own shape."""


def walk_back(
    source: ModelSource,
    slices: Mapping[str, Tensor],
    *,
    on_block: Callable[[BlockGradients], None],
    parameters: Callable[[int], Collection[str]],
    wanted: Callable[[int], Collection[str]],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    batch_tokens: int = 4096,
    spill_to: Path | None = None,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> WalkReport:
    """Sum squared gradients of the dense model's loss over `slices` (name -> tokens_SL).

    `on_block` is called from the last block to the first, for each block k whose `wanted(k)` names a slice, with the
    sums of those slices for the parameters `parameters(k)` (names inside the block).
    `dtype` as in `walk`, of activations and their gradients; squares are summed in float32, or float64 in a float64
    walk. On a CPU the sums are bitwise independent of torch's number of threads.
    Raises what `walk` raises, `ModelError` for non-finite gradients and windows of one token, and `UnsupportedModel` if
    blocks read more than hidden states.
    """
    started, device = time.monotonic(), torch.device(device)
    dtype = dtype or (torch.float32 if device.type == "cpu" else source.dtype)
    check_windows(source, slices)
    if any(tokens_SL.shape[1] < 2 for tokens_SL in slices.values()):
        raise ModelError("a window of one token has no next one to predict", do="Calibrate on longer windows.")
    first = next((block for block in range(source.blocks) if wanted(block)), None)
    if first is None:
        return WalkReport(0, 0, 0.0)
    batch_tokens = min(batch_tokens, CACHED_TOKENS) if device.type == "cpu" else batch_tokens
    steps = iter(range(1, 2 * source.blocks - first + 2))

    def told(what: str) -> None:
        if progress:
            progress(what, next(steps), 2 * source.blocks - first + 1)

    with torch.no_grad(), ExitStack() as stack:
        start = partial(enter, source, slices, stack, ComputeConfig(device, dtype, batch_tokens), spill_to)
        [run] = side_by_side([start], device, threads_each=1)
        if run.calls.hand_on or run.calls.depend_on_tokens:
            raise UnsupportedModel(
                "blocks of this model read more than hidden states; no gradients are taken through that",
                where=source.block_name(0),
                do="Leave out methods that need gradients (`crosscal methods` says which do).",
            )
        kept = _forward(run, first, stack.enter_context(allocator(device, spill_to)), told)
        _head(run, slices)
        told("loss")
        for index, weights in _weights(run, reversed(range(first, source.blocks))):
            with attached(run.blocks[index], weights):
                found = _one_block_back(run, index, kept.pop(), parameters(index), wanted(index))
            if found.squares:
                on_block(found)
            told(source.block_name(index))
    return WalkReport(
        sum(tokens_SL.numel() for tokens_SL in slices.values()), source.blocks, time.monotonic() - started
    )


def _weights(run: BlockRunner, order: Iterable[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yield (block, its weights) in the given order, prefetching the next block's."""
    numbers, asked = run.numbers, list(order)
    with ThreadPoolExecutor(max_workers=1) as reader:
        read = partial(reader.submit, run.source.load_block, dtype=numbers.dtype, device=numbers.device)
        ahead = read(asked[0])
        for index, following in zip(asked, [*asked[1:], None], strict=True):
            weights = ahead.result()
            if following is not None:
                ahead = read(following)
            yield index, weights


def _forward(run: BlockRunner, first: int, allocate: Allocate, told: Callable[[str], None]) -> list[dict[str, Tensor]]:
    """Return the inputs of each block from `first` on, slice -> hidden_SLD. Afterwards the run's hidden states are the
    last block's outputs."""
    kept: list[dict[str, Tensor]] = []
    for index, weights in _weights(run, range(run.source.blocks)):
        if index >= first:
            kept.append(
                {name: allocate(each.shape, each.dtype).copy_(each) for name, each in run.stream.hidden.items()}
            )
        with attached(run.blocks[index], weights):
            run.pass_on(index)
        told(run.source.block_name(index))
    return kept


def _head(run: BlockRunner, slices: Mapping[str, Tensor]) -> None:
    """Replace the last block's outputs by the gradients of each window's loss with respect to them.

    The model itself is called with its blocks stubbed, so that all computations after the blocks are included.
    """
    source, numbers = run.source, run.numbers
    model = source.skeleton(numbers.dtype)
    place_buffers(model, numbers.device)
    present = threading.local()

    def of_window(name: str, window: int) -> None:
        tokens_1L = slices[name][window : window + 1].to(numbers.device)
        hidden_1LD = run.stream.hidden[name][window : window + 1].to(numbers.device, copy=True).requires_grad_()
        with torch.enable_grad():
            present.output = run.calls.as_output(hidden_1LD)
            logits_RV = model(input_ids=tokens_1L, use_cache=False).logits[0, :-1]
            loss = functional.cross_entropy(logits_RV.to(numbers.sums_dtype), tokens_1L[0, 1:])
            (gradient_1LD,) = torch.autograd.grad(loss, hidden_1LD)
        run.stream.hidden[name][window : window + 1] = gradient_1LD.to(run.stream.hidden[name])

    weights = source.load_outside(dtype=numbers.dtype, device=numbers.device, with_head=True)
    with attached(model, weights), stubbed(find_blocks(model)[1], lambda *_: present.output):
        jobs = [partial(of_window, name, w) for name, tokens_SL in slices.items() for w in range(len(tokens_SL))]
        side_by_side(jobs, numbers.device, most=MOST_WINDOWS, threads_each=1)


def _one_block_back(
    run: BlockRunner, index: int, inputs: Mapping[str, Tensor], parameters: Collection[str], wanted: Collection[str]
) -> BlockGradients:
    """Return the sums of one block, and replace the run's hidden states (gradients with respect to the block's outputs)
    by those with respect to its inputs."""
    numbers, block = run.numbers, run.blocks[index]
    leaves = {name: block.get_parameter(name).requires_grad_() for name in parameters if wanted}
    sums = {name: _zeros(leaves, numbers.sums_dtype) for name in inputs if name in wanted}
    turns = {name: OrderedTurns() for name in sums}

    def of_window(name: str, window: int) -> None:
        here = slice(window, window + 1)
        asked = list(leaves.values()) if name in sums else []
        hidden_1LD = inputs[name][here].to(numbers.device, copy=True).requires_grad_()
        with torch.enable_grad():
            # A copy: a block may add to its input in place.
            output_1LD = run.calls.run((name, None), index, hidden_1LD.clone(), CarriedState())[0]
            output_gradient_1LD = run.stream.hidden[name][here].to(numbers.device)
            # A parameter that no token of the window reached (an expert) has no gradient.
            found = torch.autograd.grad(output_1LD, [hidden_1LD, *asked], output_gradient_1LD, allow_unused=True)
        run.stream.hidden[name][here] = found[0].to(run.stream.hidden[name])
        if asked:
            with turns[name].job(window), turns[name].turn("sum", window):
                for total, gradient in zip(sums[name].values(), found[1:], strict=True):
                    if gradient is not None:
                        gradient = gradient.to(total.dtype)
                        total.addcmul_(gradient, gradient)

    jobs = [partial(of_window, name, window) for name, each in inputs.items() for window in range(len(each))]
    side_by_side(jobs, numbers.device, most=MOST_WINDOWS, threads_each=1)
    for name, each in sums.items():
        if not all(map(all_finite, each.values())):
            where = f"{run.source.block_name(index)}, slice {name!r}"
            raise ModelError("the gradients are not finite", where=where, do="Compute in float32 or bfloat16.")
    return BlockGradients(index, {name: {key: t.cpu() for key, t in each.items()} for name, each in sums.items()})


def _zeros(parameters: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p, dtype=dtype, requires_grad=False) for name, p in parameters.items()}
