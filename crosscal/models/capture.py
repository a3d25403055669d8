"""Feeds the inputs of a block's sites to moment accumulators while the block runs, in several lanes at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn

from crosscal.lanes import Turns
from crosscal.models import experts
from crosscal.models.blocks import StopForward
from crosscal.models.sites import Site, input_of, pre_hooks
from crosscal.statistics.moments import MomentsAccumulator


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
