"""The walk: a calibration pass over a model, block by block, that sums the input moments of every site for several
slices of data at once.

Shapes: S windows of a slice, B of a batch, L tokens of a window, D hidden size.

All batches of all slices go through block k before block k + 1. Memory holds the weights of one block and of the next
one (prefetched), the Hessians of one block, and the hidden states of all tokens, overwritten in place. A sequential
walk that pairs the inputs of compressed blocks with those of the dense model holds the hidden states twice.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from crosscal.errors import ModelError, UsageError
from crosscal.lanes import side_by_side
from crosscal.models.attaching import attached
from crosscal.models.blocks import BlockCalls, find_blocks, further_outputs
from crosscal.models.building import place_buffers
from crosscal.models.likelihood import last_outputs, window_nll
from crosscal.models.passes import BlockRunner, ComputeConfig, Stream, batches
from crosscal.models.sites import LeftDense, Matrices, Site
from crosscal.models.source import ModelSource
from crosscal.statistics.moments import InputMoments
from crosscal.statistics.statistic import EVERY, Statistic, streams_of

Upstream = Literal["dense", "sequential"]
CACHED_TOKENS = 512
"""Tokens of a batch on a CPU: activations between the layers of a block stay in its caches, and products are large
enough for full speed. Batches of 4096 tokens take 10 % more time (hidden size 512)."""

SURVEY_TOKENS = 256
SEQUENTIAL = "Set `upstream: sequential`: inputs of the dense model are its own counterparts."


@dataclass(frozen=True, eq=False)
class BlockMoments:
    """The input moments of one block's sites, as passed to `on_block`."""

    block: int
    name: str
    """E.g. `model.layers.3`."""
    sites: tuple[Site, ...]
    left_dense: tuple[LeftDense, ...]
    """Parameters that no method changes, and why. Like `sites`, empty for a block that was not wanted."""
    moments: Mapping[str, Mapping[str, InputMoments]]
    """Slice -> site -> moments. An expert to which no token of a slice was routed has moments of 0 tokens. Empty for a
    block that was not wanted."""
    parameters: Mapping[str, Tensor]
    """Name inside the block -> dense parameter, on the walk's device, in its dtype. Do not change or keep them."""


@dataclass(frozen=True)
class WalkReport:
    tokens: int
    """Of all slices. Each goes through every block once (`dense`), twice (`sequential`) or three times (pairs)."""
    blocks: int
    seconds: float
    nll: Mapping[str, list[float]] = field(default_factory=dict)
    """Slice -> mean negative log-likelihood per token of each of its first windows; only with `with_nll`."""


OnBlock = Callable[[BlockMoments], Mapping[str, Tensor] | None]


def walk(
    source: ModelSource,
    slices: Mapping[str, Tensor],
    *,
    on_block: OnBlock,
    upstream: Upstream = "dense",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    batch_tokens: int = 4096,
    wanted: Callable[[int], bool] | None = None,
    statistics: Collection[Statistic] = EVERY,
    with_nll: bool = False,
    spill_to: Path | None = None,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> WalkReport:
    """Sum input moments over `slices` (name -> tokens_SL, windows without padding) and call `on_block` for each block.

    `upstream="dense"`: each block's input is the dense model's. One forward pass per block; `on_block` returns None.
    `upstream="sequential"`: `on_block` returns the block's changed parameters (name inside the block -> tensor of the
    stored shape, any float dtype; None: unchanged). The block is run again with them, rounded to the checkpoint's
    dtype, so that the next block's input is that of the compressed model.
    On a CPU the moments of a dense walk are bitwise independent of torch's number of threads: one thread computes a
    batch, and batches are added in order. Those of a sequential walk are too if the results of `on_block` are.
    `wanted(k)` false: block k only runs forward. A sequential walk still calls `on_block`, with no moments, to get the
    parameters that were solved earlier. Nothing is computed after the last wanted block.
    `statistics`: Σ x xᵀ is summed only if `gram` is included; the vectors always are. Statistics of two streams require
    a sequential walk, and add a second stream of hidden states that goes through the dense weights only.
    `with_nll`: a dense walk that reaches the last block also computes `WalkReport.nll`.
    `dtype`: of weights and activations; by default float32 on a CPU and the checkpoint's dtype elsewhere.
    `batch_tokens`: at most this many tokens per batch, but at least one window; on a CPU at most `CACHED_TOKENS`.
    `spill_to`: folder for memory-mapped temporary files that hold the hidden states; None: on `device`.

    Raises `UnsupportedModel` for a model that cannot be walked or whose inputs cannot be paired, `UsageError` for
    pairs with a dense upstream, `ModelError` for unreadable weights, unusable windows and non-finite inputs or hidden
    states.
    """
    started = time.monotonic()
    dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else source.dtype)
    if torch.device(device).type == "cpu":
        batch_tokens = min(batch_tokens, CACHED_TOKENS)
    check_windows(source, slices)
    in_pairs = streams_of(statistics) == 2
    if in_pairs and upstream == "dense":
        raise UsageError("with a dense upstream there are no two streams to pair", got="cross", do=SEQUENTIAL)
    chosen = [block for block in range(source.blocks) if wanted is None or wanted(block)]
    blocks = max(chosen, default=-1) + 1
    if not blocks:
        return WalkReport(0, 0, 0.0)
    with torch.no_grad(), ExitStack() as stack:
        numbers = ComputeConfig(torch.device(device), dtype, batch_tokens)
        start = partial(enter, source, slices, stack, numbers, spill_to, in_pairs=in_pairs)
        [run] = side_by_side([start], device, threads_each=1)
        reader = stack.enter_context(ThreadPoolExecutor(max_workers=1))
        read = partial(reader.submit, source.load_block, dtype=dtype, device=device)
        ahead, nll = read(0), dict
        for index in range(blocks):
            weights = ahead.result()
            if index + 1 < blocks:
                ahead = read(index + 1)
            with attached(run.blocks[index], weights):
                last = index + 1 == blocks
                _one_block(run, index, upstream, on_block, statistics, is_wanted=index in chosen, is_last=last)
                if with_nll and upstream == "dense" and index + 1 == source.blocks:
                    nll = partial(window_nll, run, last_outputs(run, index), slices)
            del weights
            if progress:
                progress(source.block_name(index), index + 1, blocks)
        scores = nll()
    tokens = sum(tokens_SL.numel() for tokens_SL in slices.values())
    return WalkReport(tokens, blocks, time.monotonic() - started, scores)


def survey(source: ModelSource) -> list[Matrices]:
    """Find the matrices of every block before calibration, on one window of random tokens.

    Of blocks with the same structure only one is loaded and run, unless blocks hand on more than hidden states. Raises
    the errors that `walk` would raise for the matrices."""
    length = min(SURVEY_TOKENS, max(2, (source.max_positions or 2 * SURVEY_TOKENS) // 2))
    chance = torch.Generator().manual_seed(0)
    tokens_1L = torch.randint(source.config.get_text_config().vocab_size, (1, length), generator=chance)
    numbers, of_kind, found = ComputeConfig(torch.device("cpu"), torch.float32, length), {}, []
    with torch.no_grad(), ExitStack() as stack:
        run = enter(source, {"made up": tokens_1L}, stack, numbers, None)
        for index, block in enumerate(run.blocks):
            shapes = tuple((name, tuple(tensor.shape)) for name, tensor in block.state_dict().items())
            kind = (shapes, frozenset(source.tied_in_block(index)))
            if kind in of_kind and not run.calls.hand_on:
                found.append(of_kind[kind])
                continue
            with attached(block, source.load_block(index, dtype=numbers.dtype)):
                found.append(of_kind[kind] if kind in of_kind else run.find_matrices(index))
                if run.calls.hand_on:  # a later block needs this one's further outputs
                    run.pass_on(index)
            if not any(left.must_be_asked for left in found[-1].left_dense):  # another may use what this one does not
                of_kind[kind] = found[-1]
    return found


def _one_block(
    run: BlockRunner,
    index: int,
    upstream: Upstream,
    on_block: OnBlock,
    statistics: Collection[Statistic],
    *,
    is_wanted: bool,
    is_last: bool,
) -> None:
    dense, block = upstream == "dense", run.blocks[index]
    found, moments = Matrices((), ()), {}
    if is_wanted:
        found = run.find_matrices(index)
        keep = {"keep_outputs": dense and not is_last, "keep_dense": not is_last}
        moments = run.accumulate(index, found.sites, statistics, **keep)
    elif dense or run.dense:
        run.pass_on(index, run.dense)
    changed: Mapping[str, Tensor] | None = None
    if is_wanted or not dense:
        name = run.source.block_name(index)
        parameters = dict(block.named_parameters())
        changed = on_block(BlockMoments(index, name, found.sites, found.left_dense, moments, parameters))
        assert not (dense and changed), "a dense walk hands on the dense model's outputs"
    if not dense and not is_last:
        # Rounded as the checkpoint will store it, so that the next block's input is that of the compressed model.
        stored = {key: value.to(run.source.dtype) for key, value in (changed or {}).items()}
        with attached(block, {key: value.to(run.numbers.device, run.numbers.dtype) for key, value in stored.items()}):
            run.pass_on(index)


def enter(
    source: ModelSource,
    slices: Mapping[str, Tensor],
    stack: ExitStack,
    numbers: ComputeConfig,
    spill_to: Path | None,
    *,
    in_pairs: bool = False,
) -> BlockRunner:
    """Run what precedes the blocks, and record how the model calls each block. The result holds the hidden states of
    every token that enter the first block; with `in_pairs` twice, in a second, dense stream."""
    model = source.skeleton(numbers.dtype)
    place_buffers(model, numbers.device)
    blocks = find_blocks(model)[1]
    probe_BL = next(iter(slices.values()))[:1].to(numbers.device)
    with attached(model, source.load_outside(dtype=numbers.dtype, device=numbers.device)):
        with attached(blocks[0], source.load_block(0, dtype=numbers.dtype, device=numbers.device)):
            calls = BlockCalls(model, further_outputs(model, blocks[0], probe_BL))
        allocate = stack.enter_context(allocator(numbers.device, spill_to))
        hidden = {name: _hidden_of(name, each, calls, numbers, allocate) for name, each in slices.items()}
    tokens = {name: tokens_SL.shape[1] for name, tokens_SL in slices.items()}
    dense = {name: allocate(each.shape, each.dtype).copy_(each) for name, each in hidden.items()} if in_pairs else None
    return BlockRunner(source, blocks, calls, Stream(hidden), numbers, tokens, Stream(dense) if dense else None)


Allocate = Callable[[torch.Size, torch.dtype], Tensor]
"""Allocates an uninitialised tensor of a shape and dtype for hidden states."""


@contextmanager
def allocator(device: torch.device, spill_to: Path | None) -> Iterator[Allocate]:
    """Allocate on `device`, or in memory-mapped temporary files under `spill_to`, which are deleted afterwards."""
    if spill_to is None:
        yield lambda shape, dtype: torch.empty(shape, dtype=dtype, device=device)
        return
    spill_to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="hidden-", dir=spill_to) as folder:
        files = (str(Path(folder, str(number))) for number in itertools.count())
        mapped = partial(torch.from_file, shared=True)
        yield lambda shape, dtype: mapped(next(files), size=shape.numel(), dtype=dtype).view(shape)


def _hidden_of(name: str, tokens_SL: Tensor, calls: BlockCalls, numbers: ComputeConfig, allocate: Allocate) -> Tensor:
    """Return the hidden states that enter the first block, [S, L, D]; a walk overwrites them in place."""
    first_1LD = calls.enter(tokens_SL[:1].to(numbers.device), (name, None))
    hidden_SLD = allocate(torch.Size((len(tokens_SL), *first_1LD.shape[1:])), first_1LD.dtype)
    for batch in batches(len(tokens_SL), tokens_SL.shape[1], numbers.batch_tokens):
        hidden_SLD[batch] = calls.enter(tokens_SL[batch].to(numbers.device), (name, batch.start))
    return hidden_SLD


def check_windows(source: ModelSource, slices: Mapping[str, Tensor]) -> None:
    """Raise `ModelError` for windows that this model cannot process."""
    vocabulary, longest = source.config.get_text_config().vocab_size, source.max_positions
    if not slices:
        raise ModelError("there is nothing to calibrate on", got="no slices")
    for name, tokens_SL in slices.items():
        if tokens_SL.ndim != 2 or tokens_SL.numel() == 0:
            raise ModelError(
                "a slice needs at least one window of tokens", where=name, got=f"shape {tuple(tokens_SL.shape)}"
            )
        if longest is not None and tokens_SL.shape[1] > longest:
            raise ModelError(
                "windows are longer than the model's positions", where=name, got=f"{tokens_SL.shape[1]} > {longest}"
            )
        if int(tokens_SL.min()) < 0 or int(tokens_SL.max()) >= vocabulary:
            raise ModelError(
                "a token is outside the model's vocabulary",
                where=name,
                got=f"{int(tokens_SL.min())} to {int(tokens_SL.max())}",
                do="Draw the windows with this model's tokenizer.",
            )
