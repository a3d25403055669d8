"""Passes of one block over all hidden states: several batches side by side on a CPU, one after another on a GPU; while
they run, the inputs of the block's sites are fed to moment accumulators. Where a dense stream of hidden states stands
beside the compressed one, a batch of either goes through the block, and a site's inputs are fed in pairs.

Shapes: S windows of a slice, B of a batch, L tokens of a window, D hidden size.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from crosscal.errors import ModelError, UnsupportedModel
from crosscal.lanes import Turns, side_by_side
from crosscal.models import experts
from crosscal.models.blocks import BlockCalls, StopForward, check_causal
from crosscal.models.fast_linears import fast_linears
from crosscal.models.producers import with_producers
from crosscal.models.sites import Matrices, Site, find_matrices, input_of, pre_hooks
from crosscal.models.source import ModelSource
from crosscal.statistics.blas import BLAS
from crosscal.statistics.finite import all_finite
from crosscal.statistics.moments import InputMoments, MomentsAccumulator
from crosscal.statistics.statistic import OF_TWO_STREAMS, Statistic

MOST_BATCHES = 16
"""At once, each with one core and its own activations: more would wait for one another's sums. Of a Llama's block the
widest sum takes a fifth of the arithmetic, and from 4096 inputs on a batch adds to it in four strips."""


@dataclass(frozen=True)
class Numbers:
    device: torch.device
    dtype: torch.dtype
    batch_tokens: int

    @property
    def sums_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


@dataclass(frozen=True, eq=False)
class Passes:
    """What stays the same from block to block, and the hidden states, which do not."""

    source: ModelSource
    blocks: nn.ModuleList
    calls: BlockCalls
    hidden: Mapping[str, Tensor]
    """Slice -> hidden_SLD, overwritten in place."""
    numbers: Numbers
    dense: Mapping[str, Tensor] | None = None
    """The same of the dense model, where inputs are wanted in pairs."""

    def find_matrices(self, index: int) -> Matrices:
        """Raises `UnsupportedModel` for a matrix that cannot be calibrated and for a block that is not causal."""
        first_1LD = next(iter(self.hidden.values()))[:1]
        check_causal(lambda hidden_1LD: self._run_batch(index, hidden_1LD), first_1LD, self.source.block_name(index))
        block, run = self.blocks[index], lambda: self._run_batch(index, first_1LD)
        found = find_matrices(block, run)
        tied = self.source.tied_in_block(index)
        return dataclasses.replace(found, sites=with_producers(block, found.sites, run, tied))

    def pass_on(self, index: int, stream: Mapping[str, Tensor] | None = None) -> None:
        """Run a block over all slices of `hidden`, or of another stream; its outputs replace its inputs. Raises
        `ModelError` when one is not finite."""
        hidden = self.hidden if stream is None else stream
        self._over_batches(index, lambda name, number, batch: [self._pass_batch(index, hidden[name], batch)])

    def accumulate(
        self,
        index: int,
        sites: tuple[Site, ...],
        statistics: Collection[Statistic],
        *,
        keep_outputs: bool,
        keep_dense: bool = False,
    ) -> dict[str, dict[str, InputMoments]]:
        """Slice -> site -> moments of one block; its outputs replace its inputs, or are not even computed. So do those
        of the dense stream with `keep_dense`.

        Raises `ModelError` for inputs or outputs that are not finite, `UnsupportedModel` where a site's inputs in the
        two streams are not of the same tokens.
        """
        accumulators = {name: self._accumulators(sites, statistics) for name in self.hidden}
        sums = {name: Sums(of_slice) for name, of_slice in accumulators.items()}
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
                        note = partial(self._note, dense, index, tokens=self.dense[name][batch].shape[:2].numel())
                        with taking(note, stop_after_last=not keep_dense):
                            finite = self._pass_or_stop(index, self.dense[name], batch, keep=keep_dense)
                    with taking(add, stop_after_last=not keep_outputs):
                        return finite + self._pass_or_stop(index, self.hidden[name], batch, keep=keep_outputs)

            self._over_batches(index, run)
        moments = {
            name: {site: of_slice.pop(site).finish() for site in list(of_slice)}
            for name, of_slice in accumulators.items()
        }
        self._check_inputs(index, moments)
        return moments

    def _note(self, dense: dict[str, Tensor], index: int, site: str, input_TI: Tensor, *, tokens: int) -> None:
        """Keep a site's dense input until the compressed one meets it: a copy, since what runs behind a site may change
        its input in place."""
        if input_TI.shape[:-1].numel() != tokens:
            raise not_paired(f"{self.source.block_name(index)}.{site}")
        dense[site] = input_TI.clone()

    def _accumulators(self, sites: Sequence[Site], statistics: Collection[Statistic]) -> dict[str, MomentsAccumulator]:
        dtype, device = self.numbers.sums_dtype, self.numbers.device
        return {
            site.name: MomentsAccumulator(site.inputs, dtype=dtype, device=device, wanted=statistics) for site in sites
        }

    def _over_batches(self, index: int, run: Callable[[str, int, slice], list[Tensor]]) -> None:
        """Run the batches of all slices; `run` says of a batch whether its outputs are finite. Raises `ModelError`."""
        names_and_runs = [
            (name, partial(run, name, number, batch))
            for name, hidden_SLD in self.hidden.items()
            for number, batch in enumerate(batches(hidden_SLD, self.numbers.batch_tokens))
        ]
        # BLAS has threads of its own, which would wait for work at full speed on the other lanes' cores.
        with fast_linears(self.blocks[index], tokens=self.numbers.batch_tokens), BLAS.one_thread():
            runs = [each for _, each in names_and_runs]
            answers = side_by_side(runs, self.numbers.device, most=MOST_BATCHES, threads_each=1)
        self._check_outputs(index, [(name, finite) for (name, _), finite in zip(names_and_runs, answers, strict=True)])

    def _pass_or_stop(self, index: int, hidden_SLD: Tensor, batch: slice, *, keep: bool) -> list[Tensor]:
        """Whether the outputs are finite, where they are kept."""
        if keep:
            return [self._pass_batch(index, hidden_SLD, batch)]
        with suppress(StopForward):
            self._run_batch(index, hidden_SLD[batch])
        return []

    def _pass_batch(self, index: int, hidden_SLD: Tensor, batch: slice) -> Tensor:
        """Whether the outputs are finite: a tensor, so that a GPU is not waited for."""
        output_BLD = self._run_batch(index, hidden_SLD[batch])
        hidden_SLD[batch] = output_BLD.to(hidden_SLD.device)
        return _is_finite(output_BLD)

    def _run_batch(self, index: int, hidden_BLD: Tensor) -> Tensor:
        # A copy: a block may add to its input in place.
        call = self.calls.of(hidden_BLD.shape[:2], index)
        return call.run(self.blocks[index], hidden_BLD.to(self.numbers.device, copy=True))

    def _check_outputs(self, index: int, finite: list[tuple[str, list[Tensor]]]) -> None:
        for name in self.hidden:
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
    """Experts above all: which tokens come by depends on the stream."""
    return UnsupportedModel(
        "tokens are routed to this matrix, other ones behind compressed blocks than in the dense model, so that its "
        "inputs have no pairs",
        where=where,
        do="Leave out methods that need `cross` for this model (`crosscal methods` says which do).",
    )


def _is_finite(output_BLD: Tensor) -> Tensor:
    if output_BLD.is_cuda:
        return output_BLD.isfinite().all()
    # On a CPU a sum, which keeps NaN and infinity, is thirty times as fast; one that overflows by itself decides
    # nothing.
    finite = output_BLD.sum().isfinite()
    return finite if finite else output_BLD.isfinite().all()


def batches(tokens_SL: Tensor, batch_tokens: int) -> Iterator[slice]:
    """Ranges of windows with about `batch_tokens` tokens, and at least one window."""
    windows = max(1, batch_tokens // tokens_SL.shape[1])
    return (slice(start, min(start + windows, len(tokens_SL))) for start in range(0, len(tokens_SL), windows))


class Sums:
    """The sums of one slice's sites, to which batches add in their order, whichever lane runs them."""

    def __init__(self, accumulators: Mapping[str, MomentsAccumulator]) -> None:
        self._accumulators, self._turns = accumulators, Turns()

    def add(self, number: int, site: str, input_TI: Tensor, dense_TI: Tensor | None = None) -> None:
        """`dense_TI`: the input of the same tokens in the dense model, where sums are over pairs."""
        accumulator = self._accumulators[site]
        for strip in accumulator.strips:
            with self._turns.turn((site, strip.start), number):
                accumulator.add_strip(input_TI, strip, dense_TI)

    def batch(self, number: int) -> AbstractContextManager[None]:
        """A batch adds inside; those that come later do not wait for it any more afterwards."""
        return self._turns.job(number)


Take = Callable[[str, Tensor], None]
"""Called with a site and its input."""


class Taking(Protocol):
    def __call__(self, take: Take, *, stop_after_last: bool = False) -> AbstractContextManager[None]: ...


class _Pass(threading.local):
    """What takes the inputs of the present thread's pass, and which sites it has reached."""

    take: Take
    stops: bool
    reached: set[str]


@contextmanager
def capture(block: nn.Module, sites: Sequence[Site]) -> Iterator[Taking]:
    """Inside, a forward pass of the block within `with taking(take)` has `take` called with the input of each site.

    A stacked expert gets the rows of the tokens routed to it; its inner activations are computed once more for that.
    `stop_after_last`: the pass ends with `StopForward` once every site has had its input, before the last of them
    computes anything. A pass in which one has none (a starved expert) runs to its end. `find_sites` has seen that no
    site is reached twice.
    """
    linear_sites = {site.name: site for site in sites if site.matrices[0].expert is None}
    stacks = {site.matrices[0].parameter.rpartition(".")[0] for site in sites if site.matrices[0].expert is not None}
    watched = {*linear_sites, *stacks}
    present = _Pass()

    @contextmanager
    def taking(take: Take, *, stop_after_last: bool = False) -> Iterator[None]:
        present.take, present.stops, present.reached = take, stop_after_last, set()
        yield

    def note_reached(name: str) -> None:
        present.reached.add(name)
        if present.stops and present.reached == watched:
            raise StopForward

    def note_linear(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        present.take(name, input_of(args, kwargs))
        note_reached(name)

    def note_experts(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for expert, input_TH, input_TF in experts.routed_inputs(module, args, kwargs):
            present.take(f"{name}.{expert}.{experts.up_name(module)}", input_TH)
            present.take(f"{name}.{expert}.down_proj", input_TF)
        note_reached(name)

    with (
        pre_hooks({name: block.get_submodule(name) for name in linear_sites}, note_linear),
        pre_hooks({name: block.get_submodule(name) for name in stacks}, note_experts),
    ):
        yield taking
