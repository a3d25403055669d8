"""Passes of one block over all hidden states: several batches side by side on a CPU, one after another on a GPU; while
they run, the inputs of the block's sites are fed to moment accumulators.

Shapes: S windows of a slice, B of a batch, L tokens of a window, D hidden size.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from crosscal.errors import ModelError
from crosscal.lanes import Turns, side_by_side
from crosscal.models import experts
from crosscal.models.blocks import BlockCalls, StopForward, check_causal
from crosscal.models.fast_linears import fast_linears
from crosscal.models.producers import with_producers
from crosscal.models.sites import Matrices, Site, find_matrices, input_of, pre_hooks
from crosscal.models.source import ModelSource
from crosscal.statistics.blas import BLAS
from crosscal.statistics.moments import InputMoments, MomentsAccumulator

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

    def find_matrices(self, index: int) -> Matrices:
        """Raises `UnsupportedModel` for a matrix that cannot be calibrated and for a block that is not causal."""
        first_1LD = next(iter(self.hidden.values()))[:1]
        check_causal(lambda hidden_1LD: self._run_batch(index, hidden_1LD), first_1LD, self.source.block_name(index))
        block, run = self.blocks[index], lambda: self._run_batch(index, first_1LD)
        found = find_matrices(block, run)
        tied = self.source.tied_in_block(index)
        return dataclasses.replace(found, sites=with_producers(block, found.sites, run, tied))

    def pass_on(self, index: int) -> None:
        """Run a block over all slices; its outputs replace its inputs. Raises `ModelError` when one is not finite."""
        self._check_outputs(
            index, self._over_batches(index, lambda name, number, batch: self._pass_batch(index, name, batch))
        )

    def accumulate(
        self, index: int, sites: tuple[Site, ...], *, keep_outputs: bool
    ) -> dict[str, dict[str, InputMoments]]:
        """Slice -> site -> moments of one block; its outputs replace its inputs, or are not even computed.

        Raises `ModelError` for inputs or outputs that are not finite.
        """
        numbers = self.numbers
        accumulators = {
            name: {
                site.name: MomentsAccumulator(site.inputs, dtype=numbers.sums_dtype, device=numbers.device)
                for site in sites
            }
            for name in self.hidden
        }
        sums = {name: Sums(of_slice) for name, of_slice in accumulators.items()}
        with capture(self.blocks[index], sites, stop_after_last=not keep_outputs) as adding:

            def run(name: str, number: int, batch: slice) -> Tensor | None:
                with adding(sums[name], number):
                    if keep_outputs:
                        return self._pass_batch(index, name, batch)
                    with suppress(StopForward):
                        self._run_batch(index, self.hidden[name][batch])
                return None

            self._check_outputs(index, self._over_batches(index, run))
        moments = {
            name: {site: of_slice.pop(site).finish() for site in list(of_slice)}
            for name, of_slice in accumulators.items()
        }
        self._check_inputs(index, moments)
        return moments

    def _over_batches(
        self, index: int, run: Callable[[str, int, slice], Tensor | None]
    ) -> list[tuple[str, Tensor | None]]:
        """(slice, what `run` says of a batch), for the batches of all slices."""
        names_and_runs = [
            (name, partial(run, name, number, batch))
            for name, hidden_SLD in self.hidden.items()
            for number, batch in enumerate(batches(hidden_SLD, self.numbers.batch_tokens))
        ]
        # BLAS has threads of its own, which would wait for work at full speed on the other lanes' cores.
        with fast_linears(self.blocks[index], tokens=self.numbers.batch_tokens), BLAS.one_thread():
            runs = [each for _, each in names_and_runs]
            answers = side_by_side(runs, self.numbers.device, most=MOST_BATCHES, threads_each=1)
        return [(name, answer) for (name, _), answer in zip(names_and_runs, answers, strict=True)]

    def _pass_batch(self, index: int, name: str, batch: slice) -> Tensor:
        """Whether the outputs are finite: a tensor, so that a GPU is not waited for."""
        hidden_SLD = self.hidden[name]
        output_BLD = self._run_batch(index, hidden_SLD[batch])
        hidden_SLD[batch] = output_BLD.to(hidden_SLD.device)
        return _is_finite(output_BLD)

    def _run_batch(self, index: int, hidden_BLD: Tensor) -> Tensor:
        # A copy: a block may add to its input in place.
        call = self.calls.of(hidden_BLD.shape[:2], index)
        return call.run(self.blocks[index], hidden_BLD.to(self.numbers.device, copy=True))

    def _check_outputs(self, index: int, finite: list[tuple[str, Tensor | None]]) -> None:
        for name in self.hidden:
            parts = [part for owner, part in finite if owner == name and part is not None]
            if parts and not torch.stack(parts).all():
                raise self._not_finite(f"the hidden states of slice {name!r} are not finite after block {index}")

    def _check_inputs(self, index: int, moments: Mapping[str, Mapping[str, InputMoments]]) -> None:
        for name, of_slice in moments.items():
            for site, found in of_slice.items():
                if not found.abs_sum_I.isfinite().all():
                    raise self._not_finite(f"the inputs of {site} in slice {name!r} are not finite in block {index}")

    def _not_finite(self, what: str) -> ModelError:
        return ModelError(
            what,
            got=str(self.numbers.dtype),
            do="Compute in float32 or bfloat16; if they still are not, the checkpoint is damaged.",
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

    def add(self, number: int, site: str, input_TI: Tensor) -> None:
        accumulator = self._accumulators[site]
        for strip in accumulator.strips:
            with self._turns.turn((site, strip.start), number):
                accumulator.add_strip(input_TI, strip)

    def batch(self, number: int) -> AbstractContextManager[None]:
        """A batch adds inside; those that come later do not wait for it any more afterwards."""
        return self._turns.job(number)


Batch = Callable[[Sums, int], AbstractContextManager[None]]
"""`with batch(sums, number)`: this thread's forward pass adds to `sums` as the batch of that number, from 0 on."""


class _Pass(threading.local):
    """What the pass of the present thread adds to, and which sites it has reached."""

    sums: Sums
    number: int
    reached: set[str]


@contextmanager
def capture(block: nn.Module, sites: Sequence[Site], *, stop_after_last: bool = False) -> Iterator[Batch]:
    """Inside, a forward pass of the block within `with batch(sums, number)` adds the inputs of each site to `sums`.

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
    def batch(sums: Sums, number: int) -> Iterator[None]:
        present.sums, present.number, present.reached = sums, number, set()
        with sums.batch(number):
            yield

    def note_reached(name: str) -> None:
        present.reached.add(name)
        if stop_after_last and present.reached == watched:
            raise StopForward

    def note_linear(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        present.sums.add(present.number, name, input_of(args, kwargs))
        note_reached(name)

    def note_experts(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for expert, input_TH, input_TF in experts.routed_inputs(module, args, kwargs):
            present.sums.add(present.number, f"{name}.{expert}.{experts.up_name(module)}", input_TH)
            present.sums.add(present.number, f"{name}.{expert}.down_proj", input_TF)
        note_reached(name)

    with (
        pre_hooks({name: block.get_submodule(name) for name in linear_sites}, note_linear),
        pre_hooks({name: block.get_submodule(name) for name in stacks}, note_experts),
    ):
        yield batch
