"""Forward passes of one block over all hidden states: several batches in parallel on a CPU, one after another on a GPU.
Meanwhile the inputs of the block's sites are added to moment accumulators. With a dense stream of hidden states beside
the compressed one, each batch of both streams runs through the block, and a site's inputs are added in pairs.

Shapes: S windows of a slice, B of a batch, L tokens of a window, D hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from crosscal.errors import ModelError, UnsupportedModel
from crosscal.lanes import OrderedTurns, side_by_side
from crosscal.models.blocks import MODEL_ERRORS, BlockCalls, StopForward, check_causal, unsupported
from crosscal.models.calls import CarriedState
from crosscal.models.capture import capture
from crosscal.models.fast_linears import fast_linears
from crosscal.models.finding import find_matrices, without_tied
from crosscal.models.producers import with_producers
from crosscal.models.sites import Matrices, Site
from crosscal.models.source import ModelSource
from crosscal.statistics.blas import BLAS
from crosscal.statistics.finite import all_finite
from crosscal.statistics.moments import InputMoments, MomentsAccumulator
from crosscal.statistics.statistic import OF_TWO_STREAMS, Statistic

MOST_BATCHES = 16
"""Batches in parallel, each with one core and its own activations. More would wait on the ordered accumulation: in a
Llama block the widest sum takes a fifth of the arithmetic, and from 4096 inputs on a batch adds it in four strips."""


@dataclass(frozen=True)
class ComputeConfig:
    """Device, dtype and batch size of a walk's forward passes."""

    device: torch.device
    dtype: torch.dtype
    batch_tokens: int

    @property
    def sums_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


@dataclass(frozen=True, eq=False)
class Stream:
    """The outputs of the latest block, which are the inputs of the next one; overwritten in place."""

    hidden: Mapping[str, Tensor]
    """Slice -> hidden_SLD."""
    between: dict[tuple[str, int], CarriedState] = field(default_factory=dict)
    """(slice, first window) of a batch -> what blocks hand on besides hidden states."""

    def between_of(self, name: str, batch: slice) -> CarriedState:
        return self.between.get((name, batch.start), CarriedState())


@dataclass(frozen=True, eq=False)
class BlockRunner:
    """Runs the blocks of one walk, one at a time, over the hidden states of all slices."""

    source: ModelSource
    blocks: nn.ModuleList
    calls: BlockCalls
    stream: Stream
    numbers: ComputeConfig
    tokens: Mapping[str, int]
    """Slice -> L."""
    dense: Stream | None = None
    """The dense model's hidden states, if inputs are paired."""

    def find_matrices(self, index: int) -> Matrices:
        """Find the matrices of a block by running one window. Raises `UnsupportedModel` if the block is not causal or
        cannot be run on its own."""
        name, hidden_SLD = next(iter(self.stream.hidden.items()))
        first_1LD, between = hidden_SLD[:1], self.stream.between_of(name, slice(0, 1)).first()

        where = self.source.block_name(index)

        def run_on(hidden_1LD: Tensor) -> Tensor:
            try:
                return self._run(index, hidden_1LD, (name, None), between)[0]
            except MODEL_ERRORS as error:
                raise unsupported(error, "this block cannot be run by itself", where) from error

        check_causal(run_on, first_1LD, where, self.tokens[name])
        block, run = self.blocks[index], lambda: run_on(first_1LD)
        found = find_matrices(block, run)
        tied = self.source.tied_in_block(index)
        found = without_tied(found, tied)
        return dataclasses.replace(found, sites=with_producers(block, found.sites, run, tied))

    def pass_on(self, index: int, stream: Stream | None = None) -> None:
        """Run a block over all slices of a stream (default: `self.stream`); its outputs replace its inputs. Raises
        `ModelError` if an output is not finite."""
        passed = stream or self.stream
        self._over_batches(index, lambda name, number, batch: [self._pass_batch(index, passed, name, batch)])

    def outputs(self, index: int, name: str, some: Sequence[slice]) -> Tensor:
        """Return a block's outputs hidden_BLD for some batches of a slice, without changing the slice."""
        with BLAS.one_thread():
            runs = [partial(self._run_batch, index, self.stream, name, batch) for batch in some]
            found = side_by_side(runs, self.numbers.device, most=MOST_BATCHES, threads_each=1)
        return torch.cat([output_BLD for output_BLD, _ in found])

    def accumulate(
        self,
        index: int,
        sites: tuple[Site, ...],
        statistics: Collection[Statistic],
        *,
        keep_outputs: bool,
        keep_dense: bool = False,
    ) -> dict[str, dict[str, InputMoments]]:
        """Return slice -> site -> moments of one block. Its outputs replace its inputs with `keep_outputs` (those of
        the dense stream with `keep_dense`); otherwise each pass stops once all inputs are known.

        Raises `ModelError` for non-finite inputs or outputs, `UnsupportedModel` if a site's inputs in the two streams
        do not belong to the same tokens.
        """
        accumulators = {name: self._accumulators(sites, statistics) for name in self.stream.hidden}
        sums = {name: OrderedSums(of_slice) for name, of_slice in accumulators.items()}
        if self.dense is not None and (routed := [site.name for site in sites if site.matrices[0].expert is not None]):
            raise not_paired(f"{self.source.block_name(index)}.{routed[0]}")
        with capture(self.blocks[index], sites) as taking:

            def run(name: str, number: int, batch: slice) -> list[Tensor]:
                dense: dict[str, Tensor] = {}

                def add(site: str, input_TI: Tensor) -> None:
                    sums[name].add(number, site, input_TI, dense.pop(site, None))

                with sums[name].batch(number):
                    finite = []
                    if self.dense is not None:
                        note = partial(self._note, dense, index, tokens=(batch.stop - batch.start) * self.tokens[name])
                        with taking(note, stop_after_last=not keep_dense):
                            finite = self._pass_or_stop(index, self.dense, name, batch, keep=keep_dense)
                    with taking(add, stop_after_last=not keep_outputs):
                        return finite + self._pass_or_stop(index, self.stream, name, batch, keep=keep_outputs)

            self._over_batches(index, run)
        moments = {
            name: {site: of_slice.pop(site).finish() for site in list(of_slice)}
            for name, of_slice in accumulators.items()
        }
        self._check_inputs(index, moments)
        return moments

    def _note(self, dense: dict[str, Tensor], index: int, site: str, input_TI: Tensor, *, tokens: int) -> None:
        """Keep a copy of a site's dense input until the compressed one is available: later operations may change the
        input in place."""
        if input_TI.shape[:-1].numel() != tokens:
            raise not_paired(f"{self.source.block_name(index)}.{site}")
        dense[site] = input_TI.clone()

    def _accumulators(self, sites: Sequence[Site], statistics: Collection[Statistic]) -> dict[str, MomentsAccumulator]:
        dtype, device = self.numbers.sums_dtype, self.numbers.device
        return {
            site.name: MomentsAccumulator(site.inputs, dtype=dtype, device=device, wanted=statistics) for site in sites
        }

    def _over_batches(self, index: int, run: Callable[[str, int, slice], list[Tensor]]) -> None:
        """Run the batches of all slices; `run(slice, number, batch)` returns whether the batch's outputs are finite.
        Raises `ModelError` if one is not."""
        names_and_runs = [
            (name, partial(run, name, number, batch))
            for name, hidden_SLD in self.stream.hidden.items()
            for number, batch in enumerate(batches(len(hidden_SLD), self.tokens[name], self.numbers.batch_tokens))
        ]
        # BLAS has its own threads, which would busy-wait on the cores of the other worker threads.
        with fast_linears(self.blocks[index], tokens=self.numbers.batch_tokens), BLAS.one_thread():
            runs = [each for _, each in names_and_runs]
            answers = side_by_side(runs, self.numbers.device, most=MOST_BATCHES, threads_each=1)
        self._check_outputs(index, [(name, finite) for (name, _), finite in zip(names_and_runs, answers, strict=True)])

    def _pass_or_stop(self, index: int, stream: Stream, name: str, batch: slice, *, keep: bool) -> list[Tensor]:
        """Run a batch. Return whether the outputs are finite, or nothing if they are not kept."""
        if keep:
            return [self._pass_batch(index, stream, name, batch)]
        with suppress(StopForward):
            self._run_batch(index, stream, name, batch)
        return []

    def _pass_batch(self, index: int, stream: Stream, name: str, batch: slice) -> Tensor:
        """Run a batch and keep its outputs. Return whether they are finite, as a tensor to avoid a GPU sync."""
        output_BLD, between = self._run_batch(index, stream, name, batch)
        hidden_SLD, key = stream.hidden[name], (name, batch.start)
        hidden_SLD[batch] = output_BLD.to(hidden_SLD.device)
        wanted = self.calls.wanted_of(key, index)
        outputs = tuple(leaf if place in wanted else None for place, leaf in enumerate(between.outputs))
        stream.between[key] = CarriedState(outputs, between.shared)
        return _is_finite(output_BLD)

    def _run_batch(self, index: int, stream: Stream, name: str, batch: slice) -> tuple[Tensor, CarriedState]:
        key = (name, batch.start)
        return self._run(index, stream.hidden[name][batch], key, stream.between_of(name, batch))

    def _run(
        self, index: int, hidden_BLD: Tensor, batch: Hashable, between: CarriedState
    ) -> tuple[Tensor, CarriedState]:
        # A copy: a block may add to its input in place.
        hidden_BLD = hidden_BLD.to(self.numbers.device, copy=True)
        return self.calls.run(batch, index, hidden_BLD, between)

    def _check_outputs(self, index: int, finite: list[tuple[str, list[Tensor]]]) -> None:
        for name in self.stream.hidden:
            parts = [part for owner, of_batch in finite if owner == name for part in of_batch]
            if parts and not torch.stack(parts).all():
                raise self._not_finite(f"the hidden states of slice {name!r} are not finite after block {index}")

    def _check_inputs(self, index: int, moments: Mapping[str, Mapping[str, InputMoments]]) -> None:
        for name, of_slice in moments.items():
            for site, found in of_slice.items():
                of_pairs = (found.sums[which] for which in OF_TWO_STREAMS if which in found.sums)
                if not all(all_finite(sum_) for sum_ in (found.abs_sum_I, *of_pairs)):
                    raise self._not_finite(f"the inputs of {site} in slice {name!r} are not finite in block {index}")

    def _not_finite(self, what: str) -> ModelError:
        return ModelError(
            what,
            got=str(self.numbers.dtype),
            do="Compute in float32 or bfloat16; if they still are not, the checkpoint is damaged.",
        )


def not_paired(where: str) -> UnsupportedModel:
    """The error for a site, usually of an expert, that receives different tokens in the two streams."""
    return UnsupportedModel(
        "tokens are routed to this matrix, other ones behind compressed blocks than in the dense model, so that its "
        "inputs have no pairs",
        where=where,
        do="Leave out methods that need `cross` for this model (`crosscal methods` says which do).",
    )


def _is_finite(output_BLD: Tensor) -> Tensor:
    if output_BLD.is_cuda:
        return output_BLD.isfinite().all()
    # On a CPU a sum, which propagates NaN and infinity, is thirty times as fast. If it is not finite, it may also have
    # overflowed, so every value is checked.
    finite = output_BLD.sum().isfinite()
    return finite if finite else output_BLD.isfinite().all()


def batches(count: int, length: int, batch_tokens: int) -> Iterator[slice]:
    """Yield ranges of `count` windows, each with at most `batch_tokens` tokens but at least one window."""
    windows = max(1, batch_tokens // length)
    return (slice(start, min(start + windows, count)) for start in range(0, count, windows))


class OrderedSums:
    """The sums of one slice's sites. Batches add to them in order, regardless of which worker thread runs them."""

    def __init__(self, accumulators: Mapping[str, MomentsAccumulator]) -> None:
        self._accumulators, self._turns = accumulators, OrderedTurns()

    def add(self, number: int, site: str, input_TI: Tensor, dense_TI: Tensor | None = None) -> None:
        """`dense_TI`: the input of the same tokens in the dense model, if sums are over pairs."""
        accumulator = self._accumulators[site]
        for strip in accumulator.strips:
            with self._turns.turn((site, strip.start), number):
                accumulator.add_strip(input_TI, strip, dense_TI)

    def batch(self, number: int) -> AbstractContextManager[None]:
        """Context in which a batch adds its inputs; after it, later batches no longer wait for this one."""
        return self._turns.job(number)
